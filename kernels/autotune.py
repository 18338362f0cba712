"""Times the candidates that the cost model likes best, once, while a graph is lowered.

A choice is kept beside the generated kernels, in a file named by the hash of everything it depends on; a
later process reads it and times nothing. Launches by themselves (`clsa_compile/dispatch.py`) never come here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
import triton
from torch import SymInt, Tensor
from torch.utils._python_dispatch import _disable_current_modes

from clsa_compile.errors import KernelError
from clsa_compile.ir.variants import Variant
from clsa_compile.kernels.catalog import sources_hash
from clsa_compile.kernels.choice import choosing, ranked
from clsa_compile.kernels.cost import Shape, Sizes
from clsa_compile.kernels.device import Device
from clsa_compile.kernels.render import default_folder, write

log = logging.getLogger("clsa_compile")

# Candidates that are timed, by predicted time.
TIMED = 4
REPEATS = 20
# More than the L2 cache of any chip.
COLD_BYTES = 256 * 2**20

# Gives the microseconds of a call on the device.
Timer: TypeAlias = Callable[[Callable[[], object]], float]


def device_time(call: Callable[[], object]) -> float:
    """Returns the median microseconds of a call, replayed as a CUDA graph with the L2 cache cold."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()  # compiles
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    flush = torch.empty(COLD_BYTES, dtype=torch.int8, device="cuda")
    times = []
    for _ in range(REPEATS):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return statistics.median(times)


def tuned(variants: tuple[Variant, ...], timer: Timer = device_time) -> tuple[Variant, ...]:
    """Returns the variants with launches that choose their shapes by timing them."""
    return tuple(replace(variant, launch=_tuned(variant, timer)) for variant in variants)


def _tuned(variant: Variant, timer: Timer) -> Callable[..., Any]:
    def launch(*args: Any, wrap: Callable[[Any], Any]) -> Any:
        def chooser(name: str, sizes: Sizes, device: Device) -> Shape:
            return best(variant, args, name, sizes, device, timer)

        with choosing(chooser):
            return variant.launch(*args, wrap=wrap)

    return launch


def best(
    variant: Variant, args: Sequence[Any], name: str, sizes: Sizes, device: Device, timer: Timer
) -> Shape:
    """Returns the fastest shape of a launch: as stored, or as timed now and then stored."""
    shapes = [shape for _, shape in ranked(name, sizes, device)[:TIMED]]
    key = identity(variant, args, name, sizes, device)
    path = file_of(key)
    stored = read(path, key, shapes)
    if stored is not None:
        return stored
    with _disable_current_modes():
        times = timed(variant, args, shapes, timer)
    if not times:
        return shapes[0]
    chosen = min(times, key=lambda shape: times[shape])
    text = {
        "key": key,
        "shape": asdict(chosen),
        "microseconds": [{**asdict(shape), "took": took} for shape, took in times.items()],
    }
    try:
        write(path, json.dumps(text, indent=1) + "\n")
    except KernelError as error:
        warnings.warn(f"clsa's autotuning is not kept: {error}", stacklevel=2)
    return chosen


def timed(variant: Variant, args: Sequence[Any], shapes: Sequence[Shape], timer: Timer) -> dict[Shape, float]:
    """Returns microseconds by shape; a shape that cannot run is left out."""
    found: dict[Shape, float] = {}
    try:
        operands = random_operands(variant.op, args)
    except RuntimeError as error:
        warnings.warn(f"clsa cannot autotune {variant.op}, no room for operands: {error}", stacklevel=2)
        return found

    def call() -> object:
        return variant.launch(*operands, wrap=lambda kernel: kernel)

    for shape in shapes:
        try:
            with choosing(lambda *_, shape=shape: shape):
                found[shape] = timer(call)
        except (RuntimeError, triton.TritonError) as error:
            log.debug("clsa: %s as %s does not run: %s", variant.op, shape, error)
            continue
        log.debug("clsa: %s as %s takes %.1f us", variant.op, shape, found[shape])
    return found


def identity(
    variant: Variant, args: Sequence[Any], name: str, sizes: Sizes, device: Device
) -> dict[str, Any]:
    """Returns everything that a choice depends on, as JSON has it."""
    return {
        "sources": sources_hash(),
        "triton": triton.__version__,
        "device": device.name,
        "variant": f"{variant.op} {variant.name}",
        "kernel": name,
        "sizes": asdict(sizes),
        "operands": [_described(arg) for arg in args],
    }


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return [str(value.dtype), *(_hints(sizes) for sizes in (value.shape, value.stride()))]
    if isinstance(value, list | tuple):
        return [_described(v) for v in value]
    return hint(value) if isinstance(value, SymInt) else value


def hint(size: Any) -> int:
    """Returns a size as it was in the call that is being compiled; leaves no guard."""
    return int(size.node.hint) if isinstance(size, SymInt) else int(size)


def _hints(sizes: Sequence[Any]) -> list[int]:
    return [hint(size) for size in sizes]


def file_of(key: dict[str, Any]) -> Path:
    """Returns where the choice for a key is kept."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return default_folder() / f"autotune_{digest}.json"


def read(path: Path, key: dict[str, Any], shapes: Sequence[Shape]) -> Shape | None:
    """Returns the stored choice, or None where there is none; a file that is not one is named and ignored."""
    if not path.is_file():
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        shape, same = Shape(**stored["shape"]), stored["key"] == key
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
    else:
        if same and shape in shapes:
            return shape
        problem = "it was written for another launch"
    warnings.warn(f"the autotuning file {path} is ignored and written again: {problem}", stacklevel=2)
    return None


def random_operands(op: str, args: Sequence[Any]) -> list[Any]:
    """Returns real operands of the same sizes and strides: random numbers, masks that let everything pass."""
    schema = getattr(torch.ops.clsa, op).default._schema
    names = [argument.name for argument in schema.arguments]
    keys = hint(args[names.index("k")].shape[2])
    return [_filled(name, value, keys) for name, value in zip(names, args, strict=False)]


def _filled(name: str, value: Any, keys: int) -> Any:
    if isinstance(value, list | tuple):
        return [_filled(name, v, keys) for v in value]
    if not isinstance(value, Tensor):
        return hint(value) if isinstance(value, SymInt) else value
    sizes, strides = _hints(value.shape), _hints(value.stride())
    # What is expanded has no memory of its own to be written.
    written = [1 if stride == 0 else size for size, stride in zip(sizes, strides, strict=True)]
    base = torch.empty_strided(written, strides, dtype=value.dtype, device=value.device)
    return _fill(name, base, keys).expand(sizes)


def _fill(name: str, base: Tensor, keys: int) -> Tensor:
    if name == "indices":
        return base.random_(0, keys)
    if name == "bounds":
        base[..., 0], base[..., 1] = 0, keys
        return base
    if name == "mask" and base.dtype != torch.bool:
        return base.zero_()
    if base.is_floating_point():
        return base.normal_()
    return base.fill_(True if base.dtype == torch.bool else keys - 1)
