"""Stops early: what only a few positions of a prompt are needed for is computed for those alone.

A prompt's logits are wanted for its last token. What follows the last keys and values that a cache keeps is
then needed for that token alone: on an ordinary decoder the queries and the feed-forward network of the last
layer, on one whose second half shares keys and values that whole half. Nothing in the model has to say so.

Slices along a dimension (`[:, -1:]`, `[:, -1]`, `[:, positions]`) are pushed back through all that computes
each row by itself (`rows.py`), as far as every reader of a value wants the same rows. A value that something
else reads, such as a projection that a cache keeps, is computed whole, and its rows are taken there. Nothing
else changes, so a graph computes what it computed before.
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import SymInt
from torch.fx import Node
from torch.fx.node import map_aggregate

from clsa_compile.ir.captured import Captured
from clsa_compile.ir.ops import contract_op
from clsa_compile.passes.analyze import storages, written
from clsa_compile.passes.emit import Emitter
from clsa_compile.passes.indexing import argument, is_tensor, same, shape, sym
from clsa_compile.passes.rows import Call, RowNumbers, Take, Want, rank, reduced
from clsa_compile.passes.tidy import drop_dead

aten = torch.ops.aten
_END = 2**63 - 1
_HEAVY = {aten.linear.default, aten.matmul.default, aten.bmm.default}


@dataclass(frozen=True, slots=True)
class Selector:
    """Which rows: a slice with these bounds, or those that an integer tensor names."""

    start: int
    end: int
    index: Node | None
    want: Want


@dataclass(slots=True)
class Reduction:
    """A value that is needed for some rows along `axis` only, and the call that computes them."""

    selector: Selector
    axis: int
    call: Call


@dataclass(slots=True)
class Early:
    """What can be computed for fewer rows: values, and the slices that start it.

    `sizes` says where the graph's inputs have sizes that are not known: the node, or its dimension.
    """

    starts: dict[Node, tuple[Selector, Take]] = field(default_factory=dict)
    reductions: dict[Node, Reduction] = field(default_factory=dict)
    sizes: dict[Any, tuple[Node, int | None]] = field(default_factory=dict)


def stop_early(captured: Captured) -> int:
    """Computes for a few rows what only those are needed of; returns how many attentions that are."""
    found = reducible(captured)
    if not found.reductions:
        return 0
    _Rebuilding(captured, found).run()
    captured.module.recompile()
    return sum(contract_op(n.target) in ("attention", "sparse_attention") for n in found.reductions)


def reducible(captured: Captured) -> Early:
    """Returns what can be computed for fewer rows; changes nothing."""
    found = Early()
    nodes = list(captured.graph.nodes)
    for node in nodes:
        start = _start(node)
        if start is not None:
            found.starts[node] = start
    if not found.starts:
        return found
    position = {node: i for i, node in enumerate(nodes)}
    found.sizes = _given_sizes(nodes)
    ever = {s for n in nodes for t in written(n) for s in storages(t.meta.get("val"))}
    # From the last value back: all readers of a value have been looked at before it.
    waiting = [-position[take.node] for _, take in found.starts.values()]
    heapq.heapify(waiting)
    seen: set[int] = set()
    while waiting:
        place = -heapq.heappop(waiting)
        if place in seen:
            continue
        seen.add(place)
        reduction = _reduction(nodes[place], found, ever)
        if reduction is not None:
            found.reductions[nodes[place]] = reduction
            for take in _takes(reduction.call):
                heapq.heappush(waiting, -position[take.node])
    _settle(found)
    return found


def _given_sizes(nodes: list[Node]) -> dict[Any, tuple[Node, int | None]]:
    found: dict[Any, tuple[Node, int | None]] = {}
    for node in nodes:
        value = node.meta.get("val") if node.op == "placeholder" else None
        if isinstance(value, SymInt):
            found[sym(value)] = node, None
        elif isinstance(value, torch.Tensor):
            for i, size in enumerate(value.shape):
                if isinstance(size, SymInt):
                    found.setdefault(sym(size), (node, i))
    return found


def _start(node: Node) -> tuple[Selector, Take] | None:
    """Reads a node that takes a few rows of a tensor; the last dimension is features, not rows."""
    if node.op != "call_function" or node.target not in (
        aten.slice.Tensor,
        aten.select.int,
        aten.index.Tensor,
    ):
        return None
    source = node.args[0]
    if not is_tensor(source) or source.op != "call_function" or rank(source) < 2:
        return None
    if node.target is aten.index.Tensor:
        return _indexed(node, source)
    axis = argument(node, 1, "dim", 0) % rank(source)
    if node.target is aten.select.int:
        first = node.args[2]
        end = _END if first == -1 else first + 1 if isinstance(first, int) else None
    else:
        first, end = argument(node, 2, "start"), argument(node, 3, "end")
        first, end = 0 if first is None else first, _END if end is None else end
        if argument(node, 4, "step", 1) != 1:
            return None
    if axis == rank(source) - 1 or not isinstance(first, int) or not isinstance(end, int):
        return None
    size = shape(source)[axis]
    count = 1 if node.target is aten.select.int else node.meta["val"].shape[axis]
    if not isinstance(count, int) or same(size, sym(count)):
        return None
    begin = slice(first, end).indices(int(size))[0] if size.is_Integer else None
    return Selector(first, end, None, Want(size, count, begin)), Take(source, axis)


def _indexed(node: Node, source: Node) -> tuple[Selector, Take] | None:
    """`x[:, positions]` with positions that come from outside, so that every node may read them."""
    given = [(i, e) for i, e in enumerate(node.args[1]) if e is not None]
    if len(given) != 1:
        return None
    axis, index = given[0]
    if index.op != "placeholder" or index.meta["val"].dim() != 1 or index.meta["val"].dtype != torch.int64:
        return None
    size, count = shape(source)[axis], index.meta["val"].shape[0]
    if axis == rank(source) - 1 or not isinstance(count, int) or same(size, sym(count)):
        return None
    return Selector(0, _END, index, Want(size, count, None)), Take(source, axis)


def _reduction(node: Node, found: Early, ever: set[int]) -> Reduction | None:
    """Returns how to compute a value for the rows that all of its readers want, if that can be."""
    wanted = set(_wanted(node, found))
    if len(wanted) != 1 or None in wanted:
        return None
    (only,) = wanted
    assert only is not None
    selector, axis = only
    # Values that live in memory that is written are read when they stand, so they stay.
    if not ever.isdisjoint(storages(node.meta["val"])):
        return None
    call = reduced(node, axis, selector.want)
    if call is None or not all(same(_size(t), selector.want.size) for t in _takes(call)):
        return None
    # Rows by index are a copy, which would not see what is written after it.
    if selector.index is not None and any(
        not ever.isdisjoint(storages(n.meta["val"]))
        for n in (selector.index, *(t.node for t in _takes(call)))
    ):
        return None
    counts_rows = any(isinstance(leaf, RowNumbers) for leaf in _leaves(call))
    if counts_rows and not selector.want.size.is_Integer and selector.want.size not in found.sizes:
        return None
    return Reduction(selector, axis, call)


def _wanted(node: Node, found: Early) -> Iterator[tuple[Selector, int] | None]:
    """Yields what each reader wants of a value: rows along a dimension, or all of it (None)."""
    for user in node.users:
        if user in found.reductions:
            reduction = found.reductions[user]
            for leaf in _leaves(reduction.call):
                if isinstance(leaf, Take) and leaf.node is node:
                    yield reduction.selector, leaf.axis
                elif leaf is node:
                    yield None
        elif user in found.starts and found.starts[user][1].node is node:
            selector, take = found.starts[user]
            yield selector, take.axis
        else:
            yield None


def _settle(found: Early) -> None:
    """Forgets reductions that cannot be, and those that are no gain.

    Rows of one of several results are taken of that result where the op stays whole. A selector that leads to
    no product saves nothing.
    """
    for node in [n for n in found.reductions if n.target is operator.getitem]:
        if node.args[0] not in found.reductions:
            del found.reductions[node]
    pays = {
        r.selector
        for node, r in found.reductions.items()
        if node.target in _HEAVY or contract_op(node.target) is not None
    }
    found.reductions = {n: r for n, r in found.reductions.items() if r.selector in pays}


def _leaves(call: Call) -> list[Any]:
    found: list[Any] = []
    map_aggregate((call.args, call.kwargs), lambda leaf: found.append(leaf))
    return found


def _takes(call: Call) -> list[Take]:
    return [leaf for leaf in _leaves(call) if isinstance(leaf, Take)]


def _size(take: Take) -> Any:
    value = take.node.meta["val"]
    return sym((value[0] if isinstance(value, list | tuple) else value).shape[take.axis])


class _Rebuilding:
    """Computes values for fewer rows, each where it was computed for all."""

    def __init__(self, captured: Captured, found: Early) -> None:
        self._captured = captured
        self._found = found
        self._made: dict[Node, Node] = {}
        self._taken: dict[tuple[Node, int, Selector], Node] = {}
        self._numbers: dict[Selector, Node] = {}

    def run(self) -> None:
        """Rebuilds all reductions, and puts their rows in place of the slices that took them."""
        graph = self._captured.graph
        for node in list(graph.nodes):
            with graph.inserting_before(node):
                if node in self._found.reductions:
                    self._made[node] = self._rebuilt(node, self._found.reductions[node])
                elif node in self._found.starts:
                    self._replace_start(node)
        for node in self._found.reductions:  # readers before what they read
            graph.erase_node(node)
        drop_dead(graph)

    def _replace_start(self, node: Node) -> None:
        _, take = self._found.starts[node]
        if take.node not in self._made:
            return
        rows = self._made[take.node]
        emit = Emitter(self._captured, node)
        if node.target is aten.select.int:
            rows = emit.call(aten.select.int, rows, take.axis, 0)
        node.replace_all_uses_with(emit.like(rows, node))
        self._captured.graph.erase_node(node)

    def _rebuilt(self, node: Node, reduction: Reduction) -> Node:
        emit = Emitter(self._captured, node)

        def value(leaf: Any) -> Any:
            if isinstance(leaf, Take):
                return self._rows(emit, leaf, reduction.selector)
            if isinstance(leaf, RowNumbers):
                return self._row_numbers(emit, reduction.selector)
            return leaf

        args, kwargs = map_aggregate((reduction.call.args, reduction.call.kwargs), value)
        return emit.call(reduction.call.target, *args, **kwargs)

    def _rows(self, emit: Emitter, take: Take, selector: Selector) -> Node:
        if take.node in self._made:
            return self._made[take.node]
        key = (take.node, take.axis, selector)
        if key not in self._taken:
            self._taken[key] = _take(emit, take.node, take.axis, selector)
        return self._taken[key]

    def _row_numbers(self, emit: Emitter, selector: Selector) -> Node:
        """Returns the numbers of the wanted rows, int64 [count]."""
        if selector not in self._numbers:
            size = selector.want.size
            count = int(size) if size.is_Integer else self._size(emit, size)
            device = next(n.meta["val"].device for n in self._found.reductions if is_tensor(n))
            every = emit.call(aten.arange.default, count, device=device, pin_memory=False)
            self._numbers[selector] = _take(emit, every, 0, selector)
        return self._numbers[selector]

    def _size(self, emit: Emitter, size: Any) -> Node:
        node, axis = self._found.sizes[size]
        return node if axis is None else emit.call(aten.sym_size.int, node, axis)


def _take(emit: Emitter, node: Node, axis: int, selector: Selector) -> Node:
    if selector.index is not None:
        return emit.call(aten.index.Tensor, node, [None] * axis + [selector.index])
    return emit.call(aten.slice.Tensor, node, axis, selector.start, selector.end)
