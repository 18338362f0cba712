"""Borrowed keys: puts an index into a graph that ranks the keys which a layer caches anyway.

Its queries are made as the layer makes its own: of the same values, through the same norms and rotation,
with another weight in the one product that makes them. So nothing about a model's queries is known here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from clsa_compile.ir.captured import Captured
from clsa_compile.ir.routing import Index
from clsa_compile.ir.sites import AttentionSite, Operand
from clsa_compile.ir.tensors import placed
from clsa_compile.passes.analyze import Order
from clsa_compile.passes.emit import Emitter
from clsa_compile.passes.indexing import shape, sym
from clsa_compile.passes.rows import Take, Want, rank, reduced

aten = torch.ops.aten

# Products of rows with a weight, and where their arguments are: (rows, weight).
_PRODUCTS: dict[Any, tuple[int, int]] = {
    aten.linear.default: (0, 1),
    aten.mm.default: (0, 1),
    aten.matmul.default: (0, 1),
    aten.addmm.default: (1, 2),
}
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
# What may stand between a weight and the product.
_OF_WEIGHTS = (
    aten.t.default,
    aten.numpy_T.default,
    aten.mT.default,
    aten.transpose.int,
    aten.permute.default,
    aten.alias.default,
    aten.to.dtype,
)

# A tensor as a node of the graph, by name.
Constant = Callable[[str, Tensor], Node]


@dataclass(frozen=True, slots=True)
class Product:
    """What makes a layer's queries: a product of rows with a weight, and the nodes from there on."""

    node: Node
    rows: Node
    weight: Node
    after: tuple[Node, ...]


def product(site: AttentionSite) -> Product | str:
    """Returns the product that makes a layer's queries, or why an index cannot be made as they are."""
    found: dict[Node, tuple[Node, Node]] = {}
    after: list[Node] = []
    seen: set[Node] = set()
    pending = [site.q.root]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if operands := _operands(node):
            found[node] = operands
            continue
        after.append(node)
        pending.extend(node.all_input_nodes)
    if len(found) != 1:
        what = "no product with a weight makes" if not found else f"{len(found)} products with weights make"
        return f"{what} the queries of {site.path}"
    (node, (rows, weight)), *_ = found.items()
    between = _between(node, after)
    if _is_written(site, (node, *between)):
        return f"the queries of {site.path}, or what they are made of, are written in place"
    made = Product(node, rows, weight, between)
    if not _is_in_order(site, made):
        return f"the queries of {site.path} are made of rows in another order than sequence by sequence"
    return made


def index_operands(
    emit: Emitter, site: AttentionSite, index: Index, constant: Constant
) -> tuple[Node, Node, Node]:
    """Adds an index's operands: q [B, Hi, S, D], k [B, n, T, D], weight [B, Hi, S].

    `constant` adds one of its tensors to the graph.
    """
    made = product(site)
    assert isinstance(made, Product), made
    query, head, bias = index.tensor_names()
    rows = emit.current(made.rows)
    copies = {made.weight: constant(query, made.weight.meta["val"])}
    for node in (made.node, *made.after):
        copies[node] = emit.copy(node, lambda n: copies.get(n, emit.current(n)))
    q = emit.operand(Operand(copies[site.q.root], site.q.dims))
    group = site.heads // site.kv_heads
    q = _heads(emit, q, index.first_head * group, index.kv_heads * group, site.heads)
    k = _heads(emit, emit.operand(site.k), index.first_head, index.kv_heads, site.kv_heads)
    value = rows.meta["val"]
    weights = emit.call(aten.linear.default, rows, constant(head, value), constant(bias, value))
    if value.dim() == 2:
        b, s = (emit.size(q, axis) for axis in (0, 2))
        weights = emit.call(aten.view.default, weights, [b, s, index.kv_heads * group])
    return q, k, emit.call(aten.permute.default, weights, [0, 2, 1])


class Constants:
    """The tensors of indices as buffers of a graph's module, one a name."""

    def __init__(self, captured: Captured, tensors: Mapping[str, Tensor]) -> None:
        self._captured = captured
        self._tensors = tensors
        self._attributes: dict[str, str] = {}

    def __call__(self, name: str, like: Tensor) -> Node:
        """Adds a read of one, on the device and in the dtype of a value of the graph."""
        if name not in self._attributes:
            attribute = f"clsa_index_{len(self._attributes)}"
            tensor = placed(self._tensors[name], like.device, like.dtype)
            self._captured.module.register_buffer(attribute, tensor)
            self._attributes[name] = attribute
        attribute = self._attributes[name]
        node = self._captured.graph.get_attr(attribute)
        value = getattr(self._captured.module, attribute)
        node.meta["val"] = self._captured.fake_mode.from_tensor(value, static_shapes=True)
        return node

    @property
    def attributes(self) -> dict[str, str]:
        """Returns by name the module's attribute that holds a tensor."""
        return dict(self._attributes)


def _operands(node: Node) -> tuple[Node, Node] | None:
    """Returns the rows and the weight of a product with a weight of the model, None for other nodes."""
    if node.target not in _PRODUCTS:
        return None
    rows, weight = (node.args[i] for i in _PRODUCTS[node.target])
    if not (isinstance(rows, Node) and isinstance(weight, Node)) or weight.meta["val"].dim() != 2:
        return None
    source = weight
    while source.target in _OF_WEIGHTS:
        source = source.all_input_nodes[0]
    return (rows, weight) if source.op in ("placeholder", "get_attr") else None


def _between(first: Node, nodes: list[Node]) -> tuple[Node, ...]:
    """Returns those nodes that depend on the first, in the graph's order."""
    inside = set(nodes)
    reached = {first}
    found = []
    for node in first.graph.nodes:
        if node in inside and any(n in reached for n in node.all_input_nodes):
            reached.add(node)
            found.append(node)
    return tuple(found)


def _is_written(site: AttentionSite, nodes: tuple[Node, ...]) -> bool:
    """Tells whether a copy of nodes that stands right before an attention would compute something else."""
    order = Order(site.out.graph)
    if any(order.writes(node) for node in nodes):
        return True
    reads = ((operand, node) for node in nodes for operand in node.all_input_nodes)
    return any(order.write_between(operand, node, site.out) is not None for operand, node in reads)


def _is_in_order(site: AttentionSite, made: Product) -> bool:
    """Tells whether row s of sequence b is made of x[b, s], or of x[b * S + s]; sizes of 1 have no order."""
    for role, wanted in ((0, 0), (2, 1)):
        axis = site.q.dims[role]
        if axis is None or shape(site.q.root)[axis] == 1:
            continue
        if _reached(site.q.root, axis, made) != {wanted}:
            return False
    return made.node.meta["val"].dim() == 3 or _is_flat(made)


def _reached(node: Node, axis: int, made: Product) -> set[int]:
    """Returns which of the dimensions B and S of the product a dimension comes from; -1 where it is mixed."""
    if node is made.node:
        return {axis if rank(node) == 3 else -1}
    if node.args and node.args[0] is made.node and rank(made.node) == 2 and node.target in _VIEWS:
        whole = shape(made.rows.args[0])[:2] if _is_flat(made) else ()
        return {axis if axis < 2 and shape(node)[:2] == whole else -1}
    value = node.meta["val"]
    part = value[0] if isinstance(value, list | tuple) else value
    call = reduced(node, axis, Want(sym(part.shape[axis]), 1, None))
    if call is None:
        return {-1}
    taken = [leaf for leaf in tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Take)]
    inside = (made.node, *made.after)
    return {a for take in taken if take.node in inside for a in _reached(take.node, take.axis, made)}


def _is_flat(made: Product) -> bool:
    """Tells whether the rows are those of a tensor [B, S, E], one sequence after the other."""
    source = made.rows.args[0] if made.rows.target in _VIEWS else None
    return isinstance(source, Node) and rank(source) == 3


def _heads(emit: Emitter, node: Node, first: int, count: int, of: int) -> Node:
    return node if count == of else emit.call(aten.slice.Tensor, node, 1, first, first + count)
