"""Products: what a graph reads and computes outside of its attentions, above all its weights."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from clsa_compile.passes.analyze import written
from clsa_compile.passes.indexing import step

__all__ = ["Outside", "Product", "outside"]

aten = torch.ops.aten

# Position of the operand whose last dimension is summed over.
_PRODUCTS = {
    aten.linear.default: 0,
    aten.mm.default: 0,
    aten.bmm.default: 0,
    aten.matmul.default: 0,
    aten.addmm.default: 1,
    aten.baddbmm.default: 1,
    aten._grouped_mm.default: 0,
}
# Position of the numbers of the rows that are looked up.
_LOOKUPS = {aten.embedding.default: 1, aten.index.Tensor: 1, aten.index_select.default: 2}
# Kernels that Inductor does not fuse with what is around them.
_ALONE = (aten.topk.default, aten.sort.default, aten.cumsum.default, aten.histc.default)


@dataclass(frozen=True, slots=True)
class Product:
    """A product with weights: the bytes of them that it reads, its flops, and bytes a weight."""

    bytes: int
    flops: int
    itemsize: int


@dataclass(slots=True)
class Outside:
    """What runs beside attentions: products, and `others`, the kernels that prepare what they read."""

    products: list[Product] = field(default_factory=list)
    looked_up: int = 0
    others: int = 0

    @property
    def bytes(self) -> int:
        """Bytes of weights that are read."""
        return self.looked_up + sum(product.bytes for product in self.products)

    @property
    def flops(self) -> int:
        """Multiplications and additions of products."""
        return sum(product.flops for product in self.products)


def outside(
    graph: Graph, is_gone: Callable[[Node], bool], operands: frozenset[Node], attentions: frozenset[Node]
) -> Outside:
    """Counts a graph's work but for its attentions; nodes that `is_gone` says are gone cost nothing.

    A weight is read once for each product that takes it. Of an embedding, and of experts that are gathered,
    the rows that are looked up are read; of grouped experts as many as there are rows to multiply, at most.
    `operands` are what `attentions` read, which some kernel has to write as well.
    """
    found = Outside()
    weights: dict[Node, float] = {}  # by node that is a weight, seen through views: the share that is read
    made: set[Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            if _is_parameter(node):
                weights[node] = 1.0
            continue
        if node.op != "call_function" or is_gone(node):
            continue
        inputs = node.all_input_nodes
        held = [source for source in inputs if source in weights]
        if node.target in _LOOKUPS and node.args[0] in weights:
            found.looked_up += _looked_up(node)
            if node.target is not aten.embedding.default:
                weights[node] = 0.0  # what was gathered is read again, but not from where the weights are
        elif node.target in _PRODUCTS:
            made.update(_maker(source) for source in inputs if source not in weights)
            if held:
                found.products.append(_product(node, held, weights))
        elif len(inputs) == 1 and held:
            weights[node] = weights[held[0]]
        elif node.target in _ALONE:
            found.others += 1
        elif written(node) and _is_large(node):
            made.add(node)
    made.update(_maker(node) for node in operands if not is_gone(node))
    made -= attentions
    counted = {*_PRODUCTS, *_ALONE}
    found.others += sum(node.op == "call_function" and node.target not in counted for node in made)
    return found


def _is_large(node: Node) -> bool:
    """Tells whether a write is of more than a counter."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and _numel(value) > 1


def _is_parameter(node: Node) -> bool:
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", "")
    return "_parameters[" in str(name() if callable(name) else name)


def _product(node: Node, held: list[Node], weights: dict[Node, float]) -> Product:
    weight = max(held, key=lambda source: source.meta["val"].numel())
    value = weight.meta["val"]
    rows: Any = node.args[_PRODUCTS[node.target]]
    share = weights[weight]
    if node.target is aten._grouped_mm.default:
        share *= min(1.0, _count(rows.meta["val"].shape[0]) / _count(value.shape[0]))
    flops = 2 * _numel(node.meta["val"]) * _count(rows.meta["val"].shape[-1])
    return Product(round(share * _numel(value) * value.itemsize), flops, value.itemsize)


def _looked_up(node: Node) -> int:
    table: Any = node.args[0]
    numbers: Any = node.args[1]
    if node.target is aten.index.Tensor:
        numbers = next(n for n in numbers if n is not None)
    if node.target is aten.index_select.default:
        numbers = node.args[2]
    value = table.meta["val"]
    rows = min(_numel(numbers.meta["val"]), _count(value.shape[0]))
    return rows * (_numel(value) // max(_count(value.shape[0]), 1)) * value.itemsize


def _maker(node: Node) -> Node:
    """Returns the node that computes what a node sees through views."""
    while node.op == "call_function":
        view = step(node)
        if view is not None and not view.copies:
            node = view.root
        elif node.target is operator.getitem and isinstance(node.args[0], Node):
            node = node.args[0]
        else:
            break
    return node


def _numel(value: torch.Tensor) -> int:
    total = 1
    for size in value.shape:
        total *= _count(size)
    return total


def _count(size: Any) -> int:
    """Returns a size's example value; reading a hint adds no guard."""
    return int(size.node.hint or 0) if isinstance(size, torch.SymInt) else int(size)
