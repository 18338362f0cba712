"""Every variant of every contract op, in order of preference. Importing this needs Triton."""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
from collections.abc import Iterator
from importlib.resources.abc import Traversable

from clsa_compile.ir.variants import Variant
from clsa_compile.kernels.dense_attention import decode as attention_decode
from clsa_compile.kernels.dense_attention import mass, mass_rows, sdpa
from clsa_compile.kernels.dense_attention import pooled as attention_pooled
from clsa_compile.kernels.dense_attention import rows as attention_rows
from clsa_compile.kernels.index_topk import choose
from clsa_compile.kernels.index_topk import decode as index_decode
from clsa_compile.kernels.index_topk import pooled as index_pooled
from clsa_compile.kernels.index_topk import rows as index_rows
from clsa_compile.kernels.sparse_attention import gather
from clsa_compile.kernels.sparse_attention import rows as sparse_rows

VARIANTS: tuple[Variant, ...] = (
    attention_decode.DECODE,
    sdpa.SDPA,
    attention_rows.ROWS,
    index_decode.DECODE,
    index_rows.ROWS,
    sparse_rows.ROWS,
    gather.GATHER,
    mass.MASS,
    attention_pooled.POOLED,
    mass_rows.ROWS,
    index_pooled.POOLED,
    choose.CHOOSE,
)


def _sources(folder: Traversable, path: str) -> Iterator[tuple[str, bytes]]:
    for entry in folder.iterdir():
        name = f"{path}/{entry.name}"
        if entry.is_dir():
            yield from _sources(entry, name)
        elif entry.name.endswith((".py", ".jinja")):
            yield name, entry.read_bytes()


@functools.cache
def sources_hash() -> str:
    """Returns a hash of every template and source that kernels are made of, for cache keys."""
    digest = hashlib.sha256()
    root = importlib.resources.files("clsa_compile.kernels")
    for name, text in sorted(_sources(root, "")):
        digest.update(f"{name}\0{len(text)}\0".encode())
        digest.update(text)
    return digest.hexdigest()
