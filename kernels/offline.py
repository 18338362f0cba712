"""Compiles every kernel without a GPU and checks what it needs: `python -m clsa_compile.kernels.offline`.

The launches run over tensors without storage; instead of launching, each kernel is compiled for each
architecture by the Triton that is installed. A kernel that needs more shared memory than a chip
has would compile and fail at its first launch, and one that spills registers would only be slow:
both are violations here.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from clsa_compile.errors import KernelError
from clsa_compile.ir.scores import DOT_PRODUCT, LIGHTNING, MASS, MAX_HEAD
from clsa_compile.kernels.catalog import VARIANTS

# Shared memory that one program may take, in bytes, by compute capability.
SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448}
# Where a spill is a violation; elsewhere it is only shown.
NO_SPILLS = (90,)
# Arguments of a call that may read, or select, some tokens only.
POOLED = {"attention_mass": 13, "index_topk": 14}
TYPES = {
    torch.bool: "*i1",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
}


@dataclass(frozen=True)
class Launch:
    """One recorded launch: the kernel and its arguments by name."""

    kernel: Any
    arguments: dict[str, Any]

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes two launches the same compilation."""
        kinds = tuple(
            (name, _kind(name, value, self.kernel)) for name, value in sorted(self.arguments.items())
        )
        return (self.kernel.__module__, kinds)


@dataclass
class Recorder:
    """Stands in for `wrap`: keeps launches instead of making them."""

    launches: list[Launch] = field(default_factory=list)

    def __call__(self, kernel: Any) -> Any:
        """Returns what is indexed with a grid and then called, as a Triton kernel is."""

        class Grid:
            def __getitem__(_, grid: Any) -> Callable[..., None]:
                return lambda **arguments: self.launches.append(Launch(kernel, arguments))

        return Grid()


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel takes."""

    registers: int
    stack: int
    shared: int
    seconds: float


def _constexprs(kernel: Any) -> set[str]:
    return {p.name for p in kernel.params if p.is_constexpr}


def _kind(name: str, value: Any, kernel: Any) -> Any:
    """Returns what of an argument the compiled code depends on."""
    if isinstance(value, Tensor):
        return TYPES[value.dtype]
    if name in _constexprs(kernel) or name.startswith("num_") or not isinstance(value, int):
        return value
    return value == 1, value % 16 == 0, value > 2**31 - 1


def compile_for(launch: Launch, capability: int) -> Any:
    """Compiles one launch for sm_<capability> as the JIT would, with the same specialisations."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    constexprs = _constexprs(launch.kernel)
    for position, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments[name]
        if isinstance(value, Tensor):
            signature[name] = TYPES[value.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif name in constexprs or value == 1:
            signature[name] = "constexpr"
            constants[name] = value
        else:
            signature[name] = "i64" if value > 2**31 - 1 else "i32"
            if value % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {name: launch.arguments[name] for name in ("num_warps", "num_stages")}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def usage_of(compiled: Any, seconds: float) -> Usage:
    """Reads registers and stack (spills live there) out of the cubin. Raises KernelError if it cannot."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise KernelError(f"cannot read the resource usage in what {tool} printed: {text!r}")
    return Usage(int(found[1]), int(found[2]), compiled.metadata.shared, seconds)


def meta(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Returns a tensor without storage."""
    return torch.empty(sizes, dtype=dtype, device="meta")


def _attention(
    b: int, h: int, hkv: int, s: int, t: int, d: int, dv: int, dtype: torch.dtype, **extra: Any
) -> list[Any]:
    return [
        meta(b, h, s, d, dtype=dtype),
        meta(b, hkv, t, d, dtype=dtype),
        meta(b, hkv, t, dv, dtype=dtype),
        extra.get("mask"),
        extra.get("bounds"),
        extra.get("inputs", []),
        extra.get("sinks"),
        d**-0.5,
        extra.get("softcap", 0.0),
        extra.get("predicate", ""),
    ]


def _latent(arguments: list[Any]) -> list[Any]:
    """Returns arguments whose values are the first 512 columns of the keys."""
    return [*arguments[:2], arguments[1][..., :512], *arguments[3:]]


def _sparse(topk: int, *sizes: Any, heads: int = 1, **extra: Any) -> list[Any]:
    args = _attention(*sizes, **extra)
    b, s = sizes[0], sizes[3]
    return [*args[:3], meta(b, heads, s, topk, dtype=torch.int32), *args[3:]]


def _index(
    b: int, h: int, hkv: int, s: int, t: int, d: int, dtype: torch.dtype, score: str, **extra: Any
) -> list[Any]:
    return [
        meta(b, h, s, d, dtype=dtype),
        meta(b, hkv, t, d, dtype=dtype),
        meta(b, h, s, dtype=torch.float32),
        meta(b, h, s, dtype=torch.float32),
        extra.get("mask"),
        extra.get("bounds"),
        extra.get("inputs", []),
        2048,
        d**-0.5,
        score,
        extra.get("predicate", ""),
        extra.get("per_kv_head", False),
    ]


def _paged(page: int, arguments: list[Any], caches: int = 2) -> list[Any]:
    """Returns arguments whose `caches` tensors after q are an engine's pools [N, P, HKV, D], transposed."""
    b, t = arguments[0].shape[0], arguments[1].shape[2]
    pools = [
        meta(b * t // page, page, x.shape[1], x.shape[3], dtype=x.dtype).transpose(1, 2)
        for x in arguments[1 : 1 + caches]
    ]
    pages = meta(b, t // page, dtype=torch.int32)
    return [arguments[0], *pools, *arguments[1 + caches :], pages]


def configurations() -> Iterator[tuple[str, str, list[Any]]]:
    """Yields (op, description, arguments): the shapes that users' models have, and the corners."""
    bf16, fp16, fp32, i32 = torch.bfloat16, torch.float16, torch.float32, torch.int32
    t = 131072
    bounds = meta(1, 1, 2, dtype=i32)
    masked: dict[str, Any] = {"mask": meta(1, 1, 1, t, dtype=torch.bool), "bounds": bounds}
    causal: dict[str, Any] = {
        "predicate": "kv <= in0(q)",
        "inputs": [meta(1, dtype=torch.int64)],
        "bounds": bounds,
    }
    llama = (24, 8)
    yield "attention", "Llama B=1, mask", _attention(1, *llama, 1, t, 128, 128, bf16, **masked)
    yield "attention", "Llama B=1, predicate", _attention(1, *llama, 1, t, 128, 128, bf16, **causal)
    yield "attention", "Llama B=4", _attention(4, *llama, 1, t, 128, 128, bf16)
    yield "attention", "Llama B=64, direct", _attention(64, *llama, 1, t, 128, 128, bf16)
    every: dict[str, Any] = {
        "mask": meta(1, 1, 4, 4096, dtype=fp16),
        "bounds": meta(1, 4, 2, dtype=i32),
        "sinks": meta(32, dtype=fp16),
        "softcap": 50.0,
    }
    yield "attention", "S=4, bias, sinks, softcap", _attention(1, 32, 4, 4, 4096, 128, 128, fp16, **every)
    yield "attention", "MLA expanded", _attention(1, 16, 16, 1, t, 192, 128, bf16, **masked)
    yield "attention", "MLA absorbed", _attention(1, 16, 1, 1, t, 576, 512, bf16)
    yield "attention", "MLA latent", _latent(_attention(1, 128, 1, 1, t, 576, 512, bf16))
    yield "attention", "MLA latent B=32", _latent(_attention(32, 128, 1, 1, t, 576, 512, bf16))
    for d in (64, 80, 96, 256):
        yield "attention", f"D={d}", _attention(1, 8, 4, 1, t, d, d, bf16)
    anchor: dict[str, Any] = {"bounds": meta(1, 4096, 2, dtype=i32), "predicate": "kv <= q"}
    yield "attention", "Llama rows", _attention(1, *llama, 4096, 4096, 128, 128, bf16, **anchor)
    capped: dict[str, Any] = {
        "softcap": 50.0,
        "sinks": meta(8, dtype=bf16),
        "mask": meta(1, 1, 512, 512, dtype=bf16),
    }
    yield "attention", "D=256, rows", _attention(1, 8, 4, 512, 512, 256, 256, bf16, **capped)
    yield "attention", "D=80, rows", _attention(1, 8, 4, 512, 512, 80, 80, bf16)
    yield "attention", "MLA rows", _attention(1, 16, 16, 512, 512, 192, 128, bf16)
    latent: dict[str, Any] = {"bounds": meta(1, 512, 2, dtype=i32), "predicate": "kv <= q"}
    several: dict[str, Any] = {"mask": meta(1, 1, 512, 512, dtype=torch.bool), "bounds": latent["bounds"]}
    yield "attention", "Llama rows, mask", _attention(1, *llama, 512, 512, 128, 128, bf16, **several)
    yield (
        "attention",
        "MLA latent rows, mask",
        _latent(_attention(1, 128, 1, 512, 512, 576, 512, bf16, **several)),
    )
    yield "attention", "MLA latent rows", _latent(_attention(1, 128, 1, 512, 512, 576, 512, bf16, **latent))
    yield "attention", "MLA absorbed rows", _attention(1, 16, 1, 512, 512, 576, 512, bf16)
    yield "attention", "D=512, rows", _attention(1, 8, 4, 512, 512, 512, 512, bf16, **capped)
    yield "attention", "fp32, MLA latent rows", _latent(_attention(1, 16, 1, 512, 512, 576, 512, fp32))
    yield "attention", "fp32, rows", _attention(1, 9, 3, 512, 512, 128, 128, fp32)
    yield "attention", "fp32 D=64", _attention(1, 9, 3, 1, 2048, 64, 64, fp32)
    yield "attention", "fp32 D=128", _attention(1, *llama, 1, t, 128, 128, fp32)

    yield "attention", "64 heads, one kv head", _attention(1, 64, 1, 1, t, 128, 128, bf16)
    yield "attention", "S=8, G=16", _attention(1, 32, 2, 8, t, 128, 128, bf16)
    yield "attention", "64 heads of 256", _attention(4, 64, 1, 1, t, 256, 256, bf16)

    yield "sparse_attention", "128 heads, one kv head", _sparse(2048, 1, 128, 1, 1, t, 128, 128, bf16)
    yield "sparse_attention", "64 heads of 256", _sparse(2048, 1, 64, 1, 1, t, 256, 256, bf16)
    yield "sparse_attention", "MLA absorbed, 32 heads", _sparse(2048, 1, 32, 1, 1, t, 576, 512, bf16)
    yield "sparse_attention", "MLA latent", _latent(_sparse(2048, 1, 128, 1, 1, t, 576, 512, bf16))
    yield "sparse_attention", "Llama B=1", _sparse(2048, 1, *llama, 1, t, 128, 128, bf16)
    yield "sparse_attention", "Llama B=4", _sparse(2048, 4, *llama, 1, t, 128, 128, bf16)
    yield "sparse_attention", "Llama rows", _sparse(2048, 1, *llama, 4096, t, 128, 128, bf16, **causal)
    yield "sparse_attention", "MLA expanded", _sparse(2048, 1, 16, 16, 1, t, 192, 128, bf16)
    yield "sparse_attention", "MLA absorbed", _sparse(2048, 1, 16, 1, 1, t, 576, 512, bf16)
    yield (
        "sparse_attention",
        "S=4, bias, sinks, softcap",
        _sparse(256, 1, 32, 4, 4, 4096, 128, 128, fp16, heads=4, **every),
    )
    yield "sparse_attention", "D=64", _sparse(256, 1, 9, 3, 1, t, 64, 64, bf16)
    yield "sparse_attention", "fp32 D=64", _sparse(256, 1, 9, 3, 1, 2048, 64, 64, fp32)
    yield "sparse_attention", "fp32 D=128", _sparse(256, 1, *llama, 1, 2048, 128, 128, fp32)
    yield from _sparse_rows_configurations(t)

    lightning = LIGHTNING.text
    yield "index_topk", "DSA, 64 heads", _index(1, 64, 1, 1, t, 128, bf16, lightning, **masked)
    yield "index_topk", "DSA, 32 heads", _index(4, 32, 1, 1, t, 128, bf16, lightning, **causal)
    for h, s, d in ((64, 3, 128), (64, 8, 128), (32, 3, 128), (32, 8, 128), (64, 8, 192), (64, 8, 256)):
        yield "index_topk", f"DSA, {h} heads of {d}, S={s}", _index(1, h, 1, s, t, d, bf16, lightning)
    yield "index_topk", "DSA, S=8, fp32", _index(1, 64, 1, 8, 2048, 128, fp32, lightning)
    yield "index_topk", "CLSA, 1 head", _index(1, 1, 1, 1, t, 128, bf16, DOT_PRODUCT.text)
    yield "index_topk", "mass of an anchor", _index(1, *llama, 1, t, 128, bf16, MASS.text, **masked)
    yield (
        "index_topk",
        "a set per kv head",
        _index(1, *llama, 2, t, 128, bf16, MAX_HEAD.text, per_kv_head=True),
    )
    yield "index_topk", "DSA, fp32", _index(1, 32, 1, 1, 2048, 128, fp32, lightning)
    yield "index_topk", "DSA rows", _index(1, 32, 1, 512, t, 128, bf16, lightning, predicate="kv <= q")
    yield "index_topk", "DSA rows, fp32", _index(1, 32, 1, 64, 2048, 128, fp32, lightning)
    yield "index_topk", "rows, kv heads", _index(1, 9, 3, 64, t, 64, bf16, MASS.text)
    yield from _paged_configurations(t)
    yield from _mass_configurations()


def _sparse_rows_configurations(t: int) -> Iterator[tuple[str, str, list[Any]]]:
    """Yields prompts over selected tokens: few and many heads of a kv head, widths, masks, pages."""
    bf16, fp16, i32 = torch.bfloat16, torch.float16, torch.int32
    causal: dict[str, Any] = {"predicate": "kv <= in0(q)", "inputs": [meta(1, dtype=torch.int64)]}
    masked: dict[str, Any] = {"mask": meta(1, 1, 512, 4096, dtype=torch.bool)}
    every: dict[str, Any] = {"mask": meta(1, 1, 512, 4096), "sinks": meta(8, dtype=bf16), "softcap": 50.0}
    yield "sparse_attention", "MLA expanded rows", _sparse(2048, 1, 16, 16, 4096, t, 192, 128, bf16, **causal)
    yield (
        "sparse_attention",
        "MLA expanded rows, mask",
        _sparse(2048, 1, 16, 16, 512, 4096, 192, 128, bf16, **masked),
    )
    yield (
        "sparse_attention",
        "4096 of 131072, rows",
        _sparse(4096, 1, 16, 8, 512, t, 128, 128, bf16, **causal),
    )
    yield "sparse_attention", "20 tokens, rows", _sparse(20, 1, 16, 8, 512, 512, 128, 128, bf16, **causal)
    yield "sparse_attention", "D=64, rows", _sparse(256, 1, 9, 3, 2048, 2048, 64, 64, bf16, **causal)
    yield "sparse_attention", "D=256, rows", _sparse(512, 1, 8, 4, 512, 4096, 256, 256, bf16, **every)
    yield (
        "sparse_attention",
        "8 sets, rows",
        _sparse(512, 1, 24, 8, 512, 4096, 128, 128, fp16, heads=8, **masked),
    )
    yield "sparse_attention", "fp32, rows", _sparse(256, 1, 9, 3, 512, 2048, 64, 64, torch.float32, **causal)
    yield "sparse_attention", "fp32 D=128, rows", _sparse(256, 1, 24, 8, 512, 2048, 128, 128, torch.float32)
    many: dict[str, Any] = {"predicate": "kv <= in0(b) + q", "inputs": [meta(4, dtype=i32)]}
    yield (
        "sparse_attention",
        "Llama rows, paged",
        _paged(16, _sparse(2048, 4, 24, 8, 512, t, 128, 128, bf16, **many)),
    )


def _paged_configurations(t: int) -> Iterator[tuple[str, str, list[Any]]]:
    """Yields what engines call with their paged caches: lengths as a predicate and as bounds."""
    bf16, i32 = torch.bfloat16, torch.int32
    b, llama = 4, (24, 8)

    def lengths(s: int, predicate: str = "kv < in0(b)") -> dict[str, Any]:
        return {"predicate": predicate, "inputs": [meta(b, dtype=i32)], "bounds": meta(b, s, 2, dtype=i32)}

    one, many = lengths(1), lengths(512, "kv <= in0(b) + q")
    yield "attention", "Llama paged", _paged(16, _attention(b, *llama, 1, t, 128, 128, bf16, **one))
    latent = _attention(b, 128, 1, 1, t, 576, 512, bf16, **one)
    yield "attention", "MLA latent paged", _latent(_paged(64, latent))
    latent = _attention(32, 128, 1, 1, t, 576, 512, bf16)
    yield "attention", "MLA latent paged, B=32", _latent(_paged(64, latent))
    yield "attention", "Llama rows, paged", _paged(16, _attention(b, *llama, 512, t, 128, 128, bf16, **many))
    yield "sparse_attention", "Llama paged", _paged(16, _sparse(2048, b, *llama, 1, t, 128, 128, bf16))
    latent = _sparse(2048, b, 128, 1, 1, t, 576, 512, bf16)
    yield "sparse_attention", "MLA latent paged", _latent(_paged(64, latent))
    dsa = LIGHTNING.text
    yield "index_topk", "DSA paged", _paged(64, _index(b, 64, 1, 1, t, 128, bf16, dsa, **one), 1)
    yield "index_topk", "DSA rows, paged", _paged(64, _index(b, 32, 1, 512, t, 128, bf16, dsa, **many), 1)


def _mass_configurations() -> Iterator[tuple[str, str, list[Any]]]:
    """Yields what anchors of a dense model run: one set for all heads, one a kv head, mixtures."""
    t, i32 = 131072, torch.int32
    bounds = meta(4, 1, 2, dtype=i32)
    for b, sets, power in ((1, 1, 1.0), (4, 1, 0.5), (4, 8, 0.5)):
        q, k, v, *rest = _attention(b, 24, 8, 1, t, 128, 128, torch.bfloat16, bounds=bounds[:b])
        weight = meta(sets, 24, dtype=torch.float32)
        yield "attention_mass", f"Llama B={b}, {sets} sets", [q, k, v, weight, *rest, power]
    q, k, v, *_ = _attention(1, 24, 8, 1, t, 128, 128, torch.bfloat16)
    length, predicate = meta(1, dtype=torch.int64), "kv <= in0(q)"
    for b in (1, 4):
        some = _sparse(2048, b, 24, 8, 1, t, 128, 128, torch.bfloat16, bounds=bounds[:b], inputs=[length])
        yield "sparse_attention", f"Llama B={b}, few tokens whole", [*some[:-1], predicate, None, 4096]
    weight, pool = meta(1, 24, dtype=torch.float32), meta(1, 1, 1, 4096, dtype=i32)
    alone: list[Any] = [None, None, [], None, 0.1, 0.0, "", 1.0]
    yield "attention_mass", "Llama, a pool of 4096", [q, k, v, weight, *alone, pool]
    yield from _mass_rows_configurations()
    dsa = _index(1, 64, 1, 1, t, 128, torch.bfloat16, LIGHTNING.text)
    yield "index_topk", "DSA, a pool of 4096", [*dsa, None, pool]
    yield "select_topk", "Llama", [meta(1, 1, 1, t, dtype=torch.float32), bounds[:1], 2048, 4, 32]


def _mass_rows_configurations() -> Iterator[tuple[str, str, list[Any]]]:
    """Yields what anchors run for prompts that attend sparsely: widths, sets, masks, and tokens offered."""
    i32 = torch.int32
    causal: dict[str, Any] = {"bounds": meta(1, 512, 2, dtype=i32), "predicate": "kv <= q"}
    shapes = (
        ((24, 8), 128, 128, 1, torch.bfloat16, causal),
        ((24, 8), 128, 128, 8, torch.bfloat16, {**causal, "sinks": meta(24, dtype=torch.bfloat16)}),
        ((8, 4), 256, 256, 2, torch.bfloat16, {"softcap": 50.0, "mask": meta(1, 1, 512, 512)}),
        (
            (24, 8),
            128,
            128,
            2,
            torch.bfloat16,
            {**causal, "mask": meta(1, 1, 512, 512, dtype=torch.bfloat16)},
        ),
        ((16, 16), 192, 128, 2, torch.bfloat16, {**causal, "mask": meta(1, 1, 512, 512, dtype=torch.bool)}),
        ((16, 1), 576, 512, 2, torch.bfloat16, causal),
        ((9, 3), 64, 64, 3, torch.float32, causal),
        ((16, 1), 576, 512, 2, torch.float32, causal),
    )
    for heads, d, dv, sets, dtype, extra in shapes:
        q, k, v, *rest = _attention(1, *heads, 512, 512, d, dv, dtype, **extra)
        weight = meta(sets, heads[0], dtype=torch.float32)
        yield "attention_mass", f"rows, D={d}, {sets} sets", [q, k, v, weight, *rest, 0.5]
    pool = meta(1, 1, 512, 64, dtype=i32)
    q, k, v, *rest = _attention(1, 24, 8, 512, 512, 128, 128, torch.bfloat16, **causal)
    yield "attention_mass", "rows, among 64", [q, k, v, meta(1, 24, dtype=torch.float32), *rest, 1.0, pool]
    mass = meta(1, 2, 512, 16384, dtype=torch.float32)
    yield "select_topk", "rows", [mass, meta(1, 512, 2, dtype=i32), 2048, 4, 32]


def recorded() -> Iterator[tuple[str, Launch]]:
    """Yields (description, launch) of every distinct compilation that the configurations need."""
    seen: set[tuple[Any, ...]] = set()
    for op, description, arguments in configurations():
        for variant in VARIANTS:
            # Torch's own kernels are not ours to compile.
            if variant.op != op or variant.name == "sdpa":
                continue
            rows = arguments[0].shape[2]
            few = variant.name in ("decode", "pooled")
            if few != (rows <= 8) and op in ("attention", "index_topk", "attention_mass"):
                continue
            if op == "sparse_attention" and variant.name == "rows" and rows <= 8:
                continue
            if few and (variant.name == "pooled") != (len(arguments) == POOLED.get(op)):
                continue
            recorder = Recorder()
            variant.launch(*arguments, wrap=recorder)
            for launch in recorder.launches:
                if launch.key not in seen:
                    seen.add(launch.key)
                    yield f"{op} {variant.name}: {description}", launch


def problem(usage: Usage, capability: int) -> str:
    """Returns what is wrong with a compiled kernel, or nothing."""
    if usage.shared > SHARED_LIMIT[capability]:
        return f"needs {usage.shared} of {SHARED_LIMIT[capability]} bytes of shared memory"
    if usage.stack and capability in NO_SPILLS:
        return f"spills: a stack of {usage.stack} bytes"
    return ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Compiles, prints one line a kernel and architecture, and returns 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--arch",
        type=int,
        nargs="+",
        choices=sorted(SHARED_LIMIT),
        default=sorted(SHARED_LIMIT),
        help="compute capabilities times ten",
    )
    options = parser.parse_args(arguments)
    columns = "{:<20} {:>5} {:>5} {:>6} {:>8} {:>6} {:>7}  {}"
    print(f"triton {triton.__version__}")
    print(columns.format("kernel", "sm", "regs", "stack", "shared", "warps", "seconds", "for"))
    wrong = 0
    for description, launch in recorded():
        for capability in options.arch:
            began = time.perf_counter()
            try:
                compiled = compile_for(launch, capability)
                usage = usage_of(compiled, time.perf_counter() - began)
            except Exception as error:
                wrong += 1
                print(f"{launch.kernel.__name__} sm_{capability} {description}: {error}")
                continue
            trouble = problem(usage, capability)
            wrong += bool(trouble)
            print(
                columns.format(
                    launch.kernel.__name__,
                    capability,
                    usage.registers,
                    usage.stack,
                    usage.shared,
                    launch.arguments["num_warps"],
                    f"{usage.seconds:.1f}",
                    f"{description}{'  <- ' + trouble if trouble else ''}",
                ),
                flush=True,
            )
    print(f"{wrong} violations" if wrong else "no violations")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
