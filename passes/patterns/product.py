"""Matrix products in one form, whichever op spells them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import Node

from clsa_compile.passes.indexing import dim, is_tensor, shape

aten = torch.ops.aten

# The summed dimension.
SUM = sympy.Symbol("c", integer=True, nonnegative=True)

TARGETS = (aten.matmul.default, aten.bmm.default, aten.einsum.default)


@dataclass(frozen=True, slots=True)
class Product:
    """out[d0..dn] = sum over SUM of left[left_index] * right[right_index]."""

    out: Node
    left: Node
    left_index: tuple[Any, ...]
    right: Node
    right_index: tuple[Any, ...]
    summed: Any


def product(node: Node) -> Product | None:
    """Returns a node as a product, or None when it is not one of two tensors of rank 2 and more."""
    if node.op != "call_function" or node.target not in TARGETS:
        return None
    if node.target is aten.einsum.default:
        return _einsum(node)
    left, right = node.args[:2]
    if not is_tensor(left) or not is_tensor(right):
        return None
    a, b = shape(left), shape(right)
    rank = node.meta["val"].dim()
    if len(a) < 2 or len(b) < 2:
        return None
    return Product(
        node,
        left,
        (*_batch(a, rank), _at(a[-2], dim(rank - 2)), _at(a[-1], SUM)),
        right,
        (*_batch(b, rank), _at(b[-2], SUM), _at(b[-1], dim(rank - 1))),
        a[-1],
    )


def _at(size: Any, symbol: Any) -> Any:
    return sympy.S.Zero if size == 1 else symbol


def _batch(own: tuple[Any, ...], rank: int) -> tuple[Any, ...]:
    shift = rank - len(own)
    return tuple(_at(own[i], dim(i + shift)) for i in range(len(own) - 2))


def _einsum(node: Node) -> Product | None:
    equation, operands = node.args[:2]
    if not isinstance(equation, str) or not isinstance(operands, list | tuple) or len(operands) != 2:
        return None
    left, right = operands
    text = equation.replace(" ", "")
    if "..." in text or "->" not in text or not is_tensor(left) or not is_tensor(right):
        return None
    inputs, output = text.split("->")
    first, second = inputs.split(",")
    if any(len(set(part)) != len(part) for part in (first, second, output)):
        return None
    summed = [c for c in dict.fromkeys(first + second) if c not in output]
    if len(summed) != 1 or summed[0] not in first or summed[0] not in second:
        return None
    symbols = {c: dim(i) for i, c in enumerate(output)} | {summed[0]: SUM}
    a, b = shape(left), shape(right)
    return Product(
        node,
        left,
        tuple(_at(size, symbols[c]) for c, size in zip(first, a, strict=True)),
        right,
        tuple(_at(size, symbols[c]) for c, size in zip(second, b, strict=True)),
        a[first.index(summed[0])],
    )
