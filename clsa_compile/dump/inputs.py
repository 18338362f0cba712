"""Inputs: how to make tensors like those of a call, without keeping what they hold.

Floats get their mean and deviation, integers their range or their steps. Masks are kept as they are: another
mask is another computation.
"""

from __future__ import annotations

import base64
import zlib
from typing import Any

import torch
from torch import Tensor

__all__ = ["recipe"]

_MOST_KEPT = 1 << 20
_MOST_READ = 1 << 22
# Additive masks hold numbers like this where nothing may be read.
_FORBIDDING = -1e4
_SPREAD = 0.02


def recipe(value: Any, like: Any) -> str:
    """Returns Python that makes an input: `value` is what came, `like` the graph's own value for it."""
    if isinstance(value, torch.SymInt):
        return repr(int(value.node.hint or 1))
    if not isinstance(value, Tensor):
        return repr(value)
    shape, stride = tuple(map(_hint, like.shape)), tuple(map(_hint, like.stride()))
    length = _length(shape, stride)
    known = type(value) in (Tensor, torch.nn.Parameter) and value.device.type != "meta"
    numbers = _numbers(_storage(value, length)) if known and length else _guess(value.dtype, length)
    layout = "" if stride == _contiguous(shape) else f", stride={stride}"
    free = tuple(i for i, size in enumerate(like.shape) if isinstance(size, torch.SymInt))
    dynamic = f", dynamic={free}" if free else ""
    device = "" if value.device.type == "cpu" else f", device={str(value.device)!r}"
    return f"tensor({numbers}, {shape}, {value.dtype}{layout}{device}{dynamic})"


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint or 1)


def _length(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Returns how many elements lie from the first to the last; with strides of 0 fewer than there seem."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    steps = [1]
    for size in reversed(shape[1:]):
        steps.append(steps[-1] * max(size, 1))
    return tuple(reversed(steps)) if shape else ()


def _storage(value: Tensor, length: int) -> Tensor:
    return value.detach().as_strided((length,), (1,), value.storage_offset())


def _guess(dtype: torch.dtype, length: int) -> str:
    return f"normal({length}, 0.0, {_SPREAD})" if dtype.is_floating_point else f"full({length}, 0)"


def _numbers(flat: Tensor) -> str:
    if flat.dtype == torch.bool:
        return _bits(flat)
    try:
        return _floats(flat) if flat.is_floating_point() else _integers(flat)
    except RuntimeError:  # complex numbers, packed ones: torch cannot order them
        return _guess(flat.dtype, len(flat))


def _bits(flat: Tensor) -> str:
    if flat.all() or not flat.any():
        return f"full({len(flat)}, {bool(flat[0])})"
    return _packed(flat) if len(flat) <= _MOST_KEPT else f"integers({len(flat)}, 0, 1)"


def _integers(flat: Tensor) -> str:
    low, high = (int(x) for x in flat.aminmax())
    if low == high:
        return f"full({len(flat)}, {low})"
    if len(flat) > _MOST_KEPT:
        return f"integers({len(flat)}, {low}, {high})"
    period, step = _period(flat)
    if step:
        return f"steps({len(flat)}, {int(flat[0])}, {step}, {period})"
    # Zeros and ones are a mask.
    return _packed(flat) if (low, high) == (0, 1) else f"integers({len(flat)}, {low}, {high})"


def _period(flat: Tensor) -> tuple[int, int]:
    """Returns (period, step) of numbers that rise or fall evenly, again and again; else a step of 0."""
    again = (flat[1:] == flat[0]).nonzero()
    period = int(again[0]) + 1 if len(again) else len(flat)
    if period == 1:
        return 1, 0
    step = int(flat[1]) - int(flat[0])
    places = torch.arange(len(flat), device=flat.device) % period
    return period, step if bool((flat == flat[0] + places * step).all()) else 0


def _floats(flat: Tensor) -> str:
    seen = flat if len(flat) <= _MOST_READ else flat[:: len(flat) // _MOST_KEPT]
    seen = seen.float()
    low, high = (float(x) for x in seen.aminmax())
    if low == high:
        return f"full({len(flat)}, {low!r})" if torch.isfinite(seen[0]) else _kept(flat)
    if not torch.isfinite(seen).all() or low < _FORBIDDING:
        return _kept(flat)
    return f"normal({len(flat)}, {float(seen.mean()):.4g}, {float(seen.std()):.4g})"


def _kept(flat: Tensor) -> str:
    return _packed(flat) if len(flat) <= _MOST_KEPT else f"full({len(flat)}, 0)"


def _packed(flat: Tensor) -> str:
    data = flat.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return f"packed({base64.b64encode(zlib.compress(data, 9)).decode()!r}, {flat.dtype})"
