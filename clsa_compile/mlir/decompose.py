"""Decompositions: contract ops, and writes into caches, as ops that torch-mlir lowers to linalg.

The references of `ir/ops.py` are traced as they are; only what they sort or scatter is spelled in another
way, because torch-mlir takes those to loops of a dialect that is its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from clsa_compile.ir.references import REFERENCES, index_topk_reference, select_topk_reference
from clsa_compile.mlir.selecting import best, ranked

__all__ = ["decompositions"]

aten = torch.ops.aten


def decompositions(base: dict[Any, Callable[..., Any]]) -> dict[Any, Callable[..., Any]]:
    """Returns a table of decompositions to which those of contract ops are added."""
    ours: dict[str, Callable[..., Any]] = {
        **REFERENCES,
        "index_topk": partial(index_topk_reference, best=best),
        "select_topk": partial(select_topk_reference, best=best),
    }
    found: dict[Any, Callable[..., Any]] = {
        getattr(torch.ops.clsa, op).default: function for op, function in ours.items()
    }
    spelled: dict[Any, Callable[..., Any]] = {
        aten.index_copy.default: _index_copy,
        aten.scatter.value: _scatter_value,
        aten.topk.default: _topk,
    }
    return {**base, **found, **spelled}


def _index_copy(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    """Reads each slot from the last row that was written to it, or from what it held; no scatter is left."""
    dim %= max(x.dim(), 1)
    slots = torch.arange(x.shape[dim], device=x.device)
    shape = [-1 if d == dim else 1 for d in range(x.dim())]
    if isinstance(index.shape[0], int) and index.shape[0] == 1:
        return torch.where((slots == index).view(shape), source, x)
    rows = torch.arange(index.shape[0], device=x.device)
    row = torch.where(slots[:, None] == index, rows, -1).amax(-1)
    return torch.where((row >= 0).view(shape), source.index_select(dim, row.clamp(min=0)), x)


def _scatter_value(x: Tensor, dim: int, index: Tensor, value: float) -> Tensor:
    """Asks of each slot of the last dimension whether any index names it."""
    same = [d for d in range(x.dim() - 1) if not _is_same(x.shape[d], index.shape[d])]
    if x.dim() == 0 or dim % x.dim() != x.dim() - 1 or same:
        return NotImplemented
    slots = torch.arange(x.shape[-1], device=x.device)
    named = (index[..., None, :] == slots[:, None]).any(-1)
    return torch.where(named, torch.full((), value, dtype=x.dtype, device=x.device), x)


def _is_same(one: Any, other: Any) -> bool:
    """Tells whether two sizes are the same, of symbols as expressions: nothing is assumed of a length."""
    return str(one) == str(other)


def _topk(
    x: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> tuple[Tensor, Tensor]:
    """Ranks each value among all: for few values, as a router has experts."""
    if x.dim() == 0 or not largest:
        return NotImplemented
    values = x.transpose(dim, -1)
    places = ranked(values, k)
    return values.gather(-1, places).transpose(dim, -1), places.transpose(dim, -1)
