"""Owned memory: what a graph writes into memory that it made itself becomes a value.

Where y is a result of the graph, nobody sees `y += z` or `y[1:] += z` but nodes after it. The write becomes
what it computes, `slice_scatter` puts that into the rest of y, and views that are read later are taken of the
new y. AOTAutograd does so to all writes, but after the passes: until then rows of such memory cannot be
computed by themselves (`early.py`).

Only elementwise writes and copies count, into memory all of whose readers and writers are known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_map

from clsa_compile.ir.captured import Captured
from clsa_compile.passes.analyze import Order, storages, written
from clsa_compile.passes.emit import Emitter, example, value_of
from clsa_compile.passes.indexing import argument, is_tensor, same, shape
from clsa_compile.passes.tidy import is_pure
from clsa_compile.passes.verify import verify_owned

aten = torch.ops.aten

# Views that are the tensor itself, where they are in its memory.
_SAME = {
    aten.alias.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.to.device,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.type_as.default,
}


@dataclass(slots=True)
class Memory:
    """Memory that a graph made: the node that did, all that live in it, and those of them that write it.

    While writes become values, `whole` is what the memory holds now, and `views` the parts that were taken.
    """

    maker: Node
    nodes: list[Node]
    writes: list[Node]
    whole: Node | None = None
    views: dict[str, Node] = field(default_factory=dict)


def make_values(captured: Captured) -> list[Node]:
    """Makes values of what is written into owned memory; returns the writes that are gone.

    Raises VerifyError where it is not proven that nobody else sees one.
    """
    found = owned(captured)
    if not found:
        return []
    gone = [write for memory in found for write in memory.writes]
    verify_owned(captured.graph, Order(captured.graph), gone)
    _Rewriting(captured, found).run()
    captured.module.recompile()
    return gone


def owned(captured: Captured) -> list[Memory]:
    """Returns the memory whose writes can become values; changes nothing."""
    living: dict[int, list[Node]] = {}
    writers: dict[int, list[Node]] = {}
    for node in captured.graph.nodes:
        if node.op == "output":
            continue
        for storage in set(storages(node.meta.get("val"))):
            living.setdefault(storage, []).append(node)
        for target in written(node):
            for storage in set(storages(target.meta.get("val"))):
                writers.setdefault(storage, []).append(node)
    found = [Memory(living[s][0], living[s], writes) for s, writes in writers.items() if s in living]
    return [memory for memory in found if _is_owned(captured, memory)]


def _is_owned(captured: Captured, memory: Memory) -> bool:
    maker, inside = memory.maker, set(memory.nodes)
    if not _is_call(maker) or written(maker) or not _is_dense(maker.meta["val"]):
        return False
    if torch.Tag.dynamic_output_shape in maker.target.tags:
        return False  # to compute its value again would make sizes that nobody asks for
    # A view of what a pass has put in place of another node stands first in that one's memory.
    made = value_of(captured, maker.target, maker.args, maker.kwargs)
    if any(not set(storages(made)).isdisjoint(storages(n.meta.get("val"))) for n in maker.all_input_nodes):
        return False
    writes = set(memory.writes)
    views = [node for node in memory.nodes if node is not maker and node not in writes]
    if not all(_is_call(view) and is_pure(view) and view.args and view.args[0] in inside for view in views):
        return False
    return inside >= writes and all(_is_value(write, maker, inside, writes) for write in writes)


def _is_call(node: Node) -> bool:
    """Tells whether a node is an op whose schema says what it does, with one tensor as a result."""
    known = node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)
    return known and isinstance(node.meta.get("val"), Tensor)


def _is_dense(value: Tensor) -> bool:
    """Tells whether elements lie side by side in some order; examples of sizes say so, and add no guard."""
    expected = 1
    pairs = [tuple(map(example, pair)) for pair in zip(value.stride(), value.shape, strict=True)]
    for stride, size in sorted(pair for pair in pairs if pair[1] != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _is_value(write: Node, maker: Node, inside: set[Node], writes: set[Node]) -> bool:
    """Tells whether a write can become a value: what it computes, and where in the memory that goes."""
    if not _is_call(write) or [*written(write)] != [write.args[0]] or write.args[0] not in inside:
        return False
    target = write.args[0]
    if write.target is aten.copy_.default:
        source = write.args[1]
        if not is_tensor(source) or source.meta["val"].device != target.meta["val"].device:
            return False
        alike = len(shape(source)) == len(shape(target))
        if not alike or not all(map(same, shape(source), shape(target))):
            return False
    elif computed(write.target) is None:
        return False
    # What an earlier write returns is where that one wrote, which is asked for that one.
    while target is not maker and target not in writes:
        if target.target not in _PUT_BACK and target.target not in _SAME:
            return False
        if target.target in (aten.slice.Tensor, aten.select.int) and not _is_fixed(target):
            return False
        target = target.args[0]
    return True


def _is_fixed(view: Node) -> bool:
    """Tells whether a slice's bounds are numbers, of a dimension whose size is one."""
    source = view.args[0].meta["val"]
    axis = argument(view, 1, "dim", 0) % source.dim()
    bounds = view.args[2:] if view.target is aten.slice.Tensor else view.args[2:3]
    return (
        not view.kwargs
        and isinstance(source.shape[axis], int)
        and all(bound is None or isinstance(bound, int) for bound in bounds)
    )


@cache
def computed(target: Any) -> Any:
    """Returns the op that computes what an elementwise op in place writes, or None."""
    name = target._schema.name
    if not name.startswith("aten::") or not name.endswith("_") or name.endswith("__"):
        return None
    packet = getattr(aten, name[len("aten::") : -1], None)
    found = getattr(packet, target._overloadname, None) if packet is not None else None
    if found is None or found._schema.is_mutable or torch.Tag.pointwise not in found.tags:
        return None
    # pow_.Scalar raises to a number; pow.Scalar raises a number.
    if _arguments(found) != _arguments(target) or torch.Tag.nondeterministic_seeded in found.tags:
        return None
    return found


def _arguments(target: Any) -> list[tuple[str, str]]:
    return [(argument.name, str(argument.type)) for argument in target._schema.arguments]


def _put_permuted(emit: Emitter, view: Node, part: Node, whole: Callable[[], Node]) -> Node:
    order = [int(d) % len(view.args[1]) for d in view.args[1]]
    return emit.call(aten.permute.default, part, [order.index(i) for i in range(len(order))])


# What makes a whole of it where a view of it holds other values.
_PUT_BACK: dict[Any, Any] = {
    aten.slice.Tensor: lambda emit, view, part, whole: emit.call(
        aten.slice_scatter.default, whole(), part, *view.args[1:]
    ),
    aten.select.int: lambda emit, view, part, whole: emit.call(
        aten.select_scatter.default, whole(), part, *view.args[1:]
    ),
    aten.transpose.int: lambda emit, view, part, whole: emit.call(aten.transpose.int, part, *view.args[1:]),
    aten.unsqueeze.default: lambda emit, view, part, whole: emit.call(aten.squeeze.dim, part, view.args[1]),
    aten.permute.default: _put_permuted,
}


class _Rewriting:
    """One walk over a graph, with what each memory holds at the node it stands at."""

    def __init__(self, captured: Captured, found: list[Memory]) -> None:
        self._captured = captured
        self._memory = {node: memory for memory in found for node in memory.nodes}
        self._writes = {write for memory in found for write in memory.writes}
        # Of each write so far, the maker or the view that it wrote: that is what it returns.
        self._places: dict[Node, Node] = {}

    def run(self) -> None:
        graph = self._captured.graph
        for node in list(graph.nodes):
            with graph.inserting_before(node):
                if node in self._writes:
                    self._write(node)
                else:
                    self._read(node)
        # Views of what a write gave have no readers any more, and go before it.
        for node in reversed(list(graph.nodes)):
            if node in self._writes or (not node.users and is_pure(node)):
                graph.erase_node(node)

    def _read(self, node: Node) -> None:
        """Has a node read what memory holds now; views of that memory are taken where they are read."""
        for read in node.all_input_nodes:
            memory = self._memory.get(read)
            if memory is not None and memory is not self._memory.get(node):
                node.replace_input_with(read, self._now(read))

    def _write(self, node: Node) -> None:
        memory, emit = self._memory[node], Emitter(self._captured, node)
        first, *others = node.args
        target = self._places[node] = self._places.get(first, first)
        part, given = self._now(target), self._mapped(others)
        if node.target is aten.copy_.default and given[0] is part:
            # `y[1:] += z` ends so: it puts y[1:] into itself.
            memory.whole = memory.whole or memory.maker
            return
        if node.target is aten.copy_.default:
            value = emit.call(aten.clone.default, given[0])
        else:
            value = emit.call(computed(node.target), part, *given, **self._mapped(node.kwargs))
        if value.meta["val"].dtype != target.meta["val"].dtype:
            value = emit.call(aten.to.dtype, value, target.meta["val"].dtype)
        while target is not memory.maker:
            parent = self._places.get(target.args[0], target.args[0])
            if target.target in _PUT_BACK:
                value = _PUT_BACK[target.target](emit, target, value, partial(self._now, parent))
            target = parent
        # Views are what they were, for they are taken of the same sizes and strides.
        memory.whole = emit.like(value, memory.maker)
        memory.views.clear()

    def _now(self, node: Node) -> Node:
        """Returns what holds a node's values at this place of the graph."""
        node = self._places.get(node, node)
        memory = self._memory.get(node)
        if memory is None or memory.whole is None:
            return node
        if node is memory.maker:
            return memory.whole
        key = str((node.target, self._mapped(node.args), self._mapped(node.kwargs)))
        if key not in memory.views:
            memory.views[key] = Emitter(self._captured, node).copy(node, self._now)
        return memory.views[key]

    def _mapped(self, arguments: Any) -> Any:
        return tree_map(lambda a: self._now(a) if isinstance(a, Node) else a, arguments)
