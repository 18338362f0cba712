"""Fingerprint: what tells one model from another, whatever dtype its weights were loaded in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["Fingerprint", "content_hash", "middles"]

# Weights that went through half precision still agree this well, as far as half precision goes.
_AGREE = 0.02
_SMALLEST = 1e-6
_CHUNK = 1 << 22
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What tells one model from another.

    name: the model's class. layers: attentions of one forward. shapes: sha256 of the parameters' names and
    shapes. weights: one value of each parameter, by name. tables: one of each table of one dimension, as
    frequencies of rotary embeddings are.
    """

    name: str
    layers: int
    shapes: str
    weights: Mapping[str, float]
    tables: Mapping[str, float]

    def difference(self, other: Fingerprint) -> str:
        """Returns what tells the other model from this one, or ""."""
        if self.name != other.name:
            return f"it is a {other.name}, the plan is for a {self.name}"
        if self.layers != other.layers:
            return f"it has {other.layers} attentions, the plan's has {self.layers}"
        if self.shapes != other.shapes:
            return "its parameters have other names or shapes"
        return self.departs(other.weights) or _departs(self.tables, other.tables, 0.0)

    def departs(self, weights: Mapping[str, float]) -> str:
        """Returns which weight of another model has another value than this one's of that name, or "".

        Names may begin elsewhere, as those of a module inside of this one do, or of one around it.
        """
        # Rounding depends on the largest values of a tensor, of which the middle of it says little.
        return _departs(self.weights, weights, 0.1 * max(map(abs, self.weights.values()), default=0.0))


def _departs(ours: Mapping[str, float], theirs: Mapping[str, float], size: float) -> str:
    for name, other in _pairs(ours, theirs):
        a, b = ours[name], theirs[other]
        if not abs(a - b) <= _AGREE * max(abs(a), abs(b), size) + _SMALLEST:
            return f"its weights are others, as {name}"
    return ""


def _pairs(ours: Mapping[str, float], theirs: Mapping[str, float]) -> Iterable[tuple[str, str]]:
    """Yields names that mean one weight: equal ones, or else the only one of ours that ends alike."""
    if equal := [name for name in ours if name in theirs]:
        yield from zip(equal, equal, strict=True)
        return
    for other in theirs:
        alike = [n for n in ours if n.endswith(f".{other}") or other.endswith(f".{n}")]
        if len(alike) == 1:
            yield alike[0], other


def middles(tensors: Iterable[tuple[str, Tensor]], part: float = 0.5) -> dict[str, float]:
    """Returns one value of each tensor, by name: ends are often padding, or tokens that no text has.

    Tensors without values are left out: those on the meta device, fake ones, and those that were freed.
    """
    found = {}
    for name, tensor in tensors:
        if tensor.is_floating_point() and _has_values(tensor) and not is_traceable_wrapper_subclass(tensor):
            value = tensor.detach().reshape(-1)[int(part * tensor.numel())].item()
            found[name] = float(f"{value:.4g}")
    return found


def _has_values(tensor: Tensor) -> bool:
    if isinstance(tensor, FakeTensor) or tensor.is_meta or tensor.numel() == 0:
        return False
    return tensor.untyped_storage().nbytes() > 0


@torch.no_grad()
def content_hash(tensors: Iterable[Tensor]) -> str:
    """Returns a hash of all bits of tensors, in their order: any single value that differs changes it."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}{_sums(tensor)};".encode())
    return digest.hexdigest()


def _sums(tensor: Tensor) -> list[int]:
    """Returns sums modulo 2^64 of a tensor's bits as numbers: plain, and weighted by odd numbers."""
    if is_traceable_wrapper_subclass(tensor):
        return [n for name in tensor.__tensor_flatten__()[0] for n in _sums(getattr(tensor, name))]
    if not _has_values(tensor):
        return []
    bits = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    bits = bits.detach().reshape(-1).contiguous()
    bits = bits.view(_INTEGERS[bits.itemsize])
    plain = weighted = 0
    for begin in range(0, bits.numel(), _CHUNK):
        part = bits[begin : begin + _CHUNK].long()
        odd = torch.arange(begin, begin + part.numel(), device=part.device) * 2 + 1
        plain += int(part.sum())
        weighted += int((part * odd).sum())
    return [plain % (1 << 64), weighted % (1 << 64)]
