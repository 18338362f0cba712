"""Packages that several tests look at: each is built once a process."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clsa_compile
from clsa_compile.testing import tiny


@dataclass(frozen=True)
class Built:
    """A package that was written."""

    path: Path
    digest: str


class Product(nn.Module):
    """A module that is no decoder, with what arguments may be: nested, by name, constant."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(8, 4)

    def forward(self, pair: tuple[Tensor, Tensor], *, scale: float, bias: Tensor) -> dict[str, Tensor]:
        return {"out": self.inner(pair[0]) * scale + bias, "sum": pair[1].sum(0)}


def arguments(rows: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns arguments of a `Product` with so many rows."""
    generator = torch.Generator().manual_seed(rows)
    x, y = torch.randn(rows, 8, generator=generator), torch.randn(rows, 3, generator=generator)
    return ((x, y),), {"scale": 0.5, "bias": torch.randn(4, generator=generator)}


@pytest.fixture(scope="session")
def product() -> tuple[nn.Module, Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]]:
    """A small module in eval mode, and what makes arguments for a number of rows."""
    return Product().eval(), arguments


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Built]:
    """Builds a package unless another worker has: native code takes half a minute."""
    root = tmp_path_factory.getbasetemp()
    folder = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def build(name: str, make: Callable[[Path], clsa_compile.Exported]) -> Built:
        path, digest = folder / f"{name}.pt2", folder / f"{name}.digest"
        with (folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not digest.exists():
                digest.write_text(make(path).digest)
        return Built(path, digest.read_text())

    return build


@pytest.fixture(scope="session")
def small(once: Callable[..., Built]) -> Built:
    """A package of `Product` for any number of rows, as an exported program: it takes no compiler."""

    def make(path: Path) -> clsa_compile.Exported:
        rows = torch.export.Dim("rows", min=1, max=64)
        args, kwargs = arguments(5)
        shapes = {"pair": ({0: rows}, {0: rows}), "scale": None, "bias": None}
        module = Product().eval()
        return clsa_compile.export(module, args, kwargs, path=path, dynamic_shapes=shapes, format="program")

    return once("small", make)


@pytest.fixture(scope="session")
def llama() -> nn.Module:
    """A decoder of one layer whose embeddings are its head's weights too."""
    # Inductor writes tensors of up to 8 numbers into the code; frequencies of wider heads are a tensor.
    return tiny("llama", num_hidden_layers=1, tie_word_embeddings=True, head_dim=32)


@pytest.fixture(scope="session")
def decoder(once: Callable[..., Built], llama: nn.Module) -> Built:
    """A package of `llama` with native code, padding, and its weights left out."""

    def make(path: Path) -> clsa_compile.Exported:
        ids = torch.zeros(1, 4, dtype=torch.long)
        given = {"attention_mask": torch.ones_like(ids)}
        return clsa_compile.export(llama, (ids,), given, path=path, weights="outside")

    return once("decoder", make)


@pytest.fixture(scope="session")
def altered() -> Callable[..., Path]:
    """Makes a package whose records were changed by somebody who knows how to seal one."""
    return rewritten


def rewritten(source: Path, target: Path, change: Callable[[str, bytes], bytes]) -> Path:
    """Copies an archive, each text of it as `change(name, data)` makes it, and seals the copy."""
    import zipfile

    from torch.export.pt2_archive import PT2ArchiveWriter

    from clsa_compile.package.digest import seal

    skipped = ("archive_format", "archive_version", "byteorder", ".data/")
    with zipfile.ZipFile(source) as archive, PT2ArchiveWriter(str(target)) as writer:
        for entry in archive.infolist():
            name = entry.filename.partition("/")[2]
            if name.startswith(skipped):
                continue
            data = archive.read(entry)
            inside = name.removeprefix("extra/clsa/")
            writer.write_bytes(name, change(inside, data) if inside != name else data)
    seal(target)
    return target
