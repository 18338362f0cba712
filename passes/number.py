"""Numbers values: what computes the same from the same becomes one node, and a repeated write goes.

Layers that share modules spell the same indexer again and again: each projects the same hidden state with
the same weights, writes the same keys into the same slots, and selects the same tokens. One walk over a
graph gives each value a number, by what computes it and from which numbers, as compilers do within a block.
Nodes of one number are one value, so all layers that read a selection read one node, and are one group.

Memory is what makes it exact:

- A node that reads memory which is written between two spellings has two values.
- Two results are one tensor only where nothing writes either of them, and no caller gets both.
- A write is repeated where the last write of that memory was the same op, of the same values, to the same
  place: then the memory holds those values already. `verify` proves this again from the order of writes.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves

from clsa_compile.ir.captured import Captured
from clsa_compile.passes.analyze import Order, Repeated, storages, written
from clsa_compile.passes.indexing import argument
from clsa_compile.passes.patterns.product import TARGETS as PRODUCTS
from clsa_compile.passes.tidy import is_pure_target
from clsa_compile.passes.verify import mutations, verify, verify_repeated

aten = torch.ops.aten

# Writes whose result does not depend on what was there before.
_OVERWRITES = {
    aten.copy_.default,
    aten.fill_.Scalar,
    aten.fill_.Tensor,
    aten.zero_.default,
    aten.index_copy_.default,
    aten.index_fill_.int_Scalar,
    aten.index_put_.default,
    aten.masked_fill_.Scalar,
    aten.masked_fill_.Tensor,
    aten.scatter_.src,
    aten.scatter_.value,
}
# Ops whose results are not a function of what they read, or whose schema does not say what they do.
_UNLIKE = {
    torch.Tag.nondeterministic_seeded,
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.maybe_aliasing_or_mutating,
}


@dataclass(slots=True)
class Numbering:
    """What repeats what. `first` leads from each repeated node to the first of its number.

    `scores` are the repeated nodes that a product of two activations went into.
    """

    first: dict[Node, Node] = field(default_factory=dict)
    repeated: list[Repeated] = field(default_factory=list)
    scores: set[Node] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Merged:
    """What was merged: how many nodes each remaining one stands for besides itself, and writes that went."""

    repeats: Counter[Node] = field(default_factory=Counter)
    writes: tuple[Repeated, ...] = ()


def merge(captured: Captured) -> Merged:
    """Merges nodes of one value and drops repeated writes. Raises VerifyError where that is not proven."""
    graph = captured.graph
    found = number(graph)
    if not found.first:
        return Merged()
    if found.repeated:
        verify_repeated(Order(graph), found.repeated)
    dropped = {pair.write for pair in found.repeated}
    kept = [node for node in mutations(graph) if node not in dropped]
    repeats: Counter[Node] = Counter()
    # From the last one back: a node whose readers are all merged has none any more.
    for node, first in reversed(found.first.items()):
        # A score tensor that has a reader of its own stays a tensor of its own: patterns take whole chains,
        # and an indexer is found where nothing else reads its scores.
        if node.users and node in found.scores:
            continue
        node.replace_all_uses_with(first)
        graph.erase_node(node)
        repeats[first] += 1
    verify(captured, "number", kept)
    captured.module.recompile()
    return Merged(repeats, tuple(found.repeated))


def number(graph: Graph) -> Numbering:
    """Returns which nodes of a graph repeat earlier ones; changes nothing."""
    walk = _Walk(graph)
    if not walk.is_blind:
        for position, node in enumerate(graph.nodes):
            walk.visit(node, position)
    return walk.found


class _Walk:
    """One walk over a graph, with what is known at the node it stands at."""

    def __init__(self, graph: Graph) -> None:
        self.found = Numbering()
        # An op that changes what an existing tensor is (t_, resize_): nodes then no longer name one shape.
        self.is_blind = any(_kind(node) == "reshapes" for node in graph.nodes)
        outputs = next(iter(reversed(graph.nodes))).all_input_nodes
        self._outputs = set(outputs)
        self._escaping = {s for node in outputs for s in storages(node.meta.get("val"))}
        self._ever_written = {
            s
            for node in graph.nodes
            if _kind(node) != "pure"
            for target in written(node)
            for s in storages(target.meta.get("val"))
        }
        self._position: dict[Node, int] = {}
        self._last_write: dict[int, int] = {}
        self._known: dict[Any, Node] = {}
        # Gradients on or off, and what else the nodes around say in ways that are not understood.
        self._mode: Any = None

    def visit(self, node: Node, position: int) -> None:
        """Numbers one node."""
        self._position[node] = position
        kind = _kind(node)
        if kind == "pure":
            self._number(node)
        elif targets := written(node):
            self._write(node, targets, position)
        elif kind == "gradients":
            self._mode = node.args
        elif kind == "unknown":
            self._mode = position

    # -- values --------------------------------------------------------------------------------

    def _number(self, node: Node) -> None:
        earlier = self._earlier(self._key(node.target, node.args, node.kwargs), node)
        if earlier is None or not self._may_be_one(earlier, node):
            return
        self.found.first[node] = earlier
        if node.target is aten.topk.default:
            return  # what is selected is no score any more
        if _multiplies_activations(node) or any(n in self.found.scores for n in node.all_input_nodes):
            self.found.scores.add(node)

    def _earlier(self, key: Any, node: Node) -> Node | None:
        """Returns the node that has computed the same from memory that has not been written since."""
        try:
            earlier = self._known.setdefault(key, node)
        except TypeError:
            return None  # an argument that cannot be compared
        if earlier is node:
            return None
        if self._written_since(self._position[earlier], node.all_input_nodes):
            self._known[key] = node
            return None
        return earlier

    def _written_since(self, position: int, nodes: Iterable[Node]) -> bool:
        """Tells whether the memory of nodes was written at a position or later."""
        return any(
            self._last_write.get(s, -1) >= position for node in nodes for s in storages(node.meta.get("val"))
        )

    def _key(self, target: Any, args: Any, kwargs: Any) -> Any:
        named = (tuple((name, self._of(kwargs[name])) for name in sorted(kwargs))) if kwargs else ()
        return (target, self._mode, named, *map(self._of, args))

    def _of(self, value: Any) -> Any:
        """Returns an argument's number. Python's 1, 1.0 and True are equal, but mean different dtypes."""
        kind = type(value)
        if kind is Node:
            return self.found.first.get(value, value)
        if isinstance(value, list | tuple):
            return ("list", *map(self._of, value))
        if kind is float or kind is complex:
            return kind, repr(value)  # 0.0 and -0.0
        if kind is slice:
            return ("slice", *map(self._of, (value.start, value.stop, value.step)))
        return kind, value

    def _may_be_one(self, first: Node, node: Node) -> bool:
        """Tells whether two nodes of one value may be one tensor, whatever is done to them later."""
        pairs = list(zip(_leaves(first), _leaves(node), strict=True))
        if not pairs or not all(_alike(a, b) for a, b in pairs):
            return False
        own = set(storages([b for _, b in pairs]))
        inputs = {s for n in node.all_input_nodes for s in storages(n.meta.get("val"))}
        if own <= inputs:
            # The same view of the same memory; a caller that gets both may tell them apart.
            return not (node in self._outputs and first in self._outputs)
        both = own | set(storages([a for a, _ in pairs]))
        if not self._ever_written.isdisjoint(both):
            return False
        if not self._escaping.isdisjoint(own):
            if not self._escaping.isdisjoint(both - own):
                return False
            self._escaping |= both
        return True

    # -- writes --------------------------------------------------------------------------------

    def _write(self, node: Node, targets: list[Node], position: int) -> None:
        earlier = self._repeated(node, targets)
        if earlier is not None:
            self.found.first[node] = earlier
            self.found.repeated.append(Repeated(node, earlier))
            return
        for target in targets:
            for s in storages(target.meta.get("val")):
                self._last_write[s] = position

    def _repeated(self, node: Node, targets: list[Node]) -> Node | None:
        """Returns the write that a node repeats, if it was the last one to that memory."""
        if node.target not in _OVERWRITES or len(targets) != 1 or node.args[0] is not targets[0]:
            return None
        if node.target is aten.index_put_.default and argument(node, 3, "accumulate", False):
            return None
        place = self._place(targets[0])
        try:
            key = ("write", place, self._key(node.target, node.args[1:], node.kwargs))
            earlier = self._known.setdefault(key, node)
        except TypeError:
            return None
        own = list(storages(targets[0].meta.get("val")))
        position = self._position[earlier]
        others = [n for n in node.all_input_nodes if n is not targets[0]]
        if (
            earlier is not node
            and own
            and all(self._last_write.get(s) == position for s in own)
            and not self._written_since(position, others)
        ):
            return earlier
        self._known[key] = node
        return None

    def _place(self, node: Node) -> Any:
        """Returns what names the memory that a node is, whenever it is read: a root, and views of it."""
        source = node.args[0] if node.op == "call_function" and node.args else None
        if not isinstance(source, Node):
            return self._of(node)
        if node.target in _OVERWRITES:
            return self._place(source)  # hands back what it wrote
        own = list(storages(node.meta.get("val")))
        if not own or _kind(node) != "pure" or own != list(storages(source.meta.get("val"))):
            return self._of(node)
        return "view", self._place(source), self._key(node.target, node.args[1:], node.kwargs)


def _kind(node: Node) -> str:
    """Returns what a node may do, as far as its schema says."""
    if node.op != "call_function":
        return "pure" if node.op == "get_attr" else "other"
    return _kind_of(node.target)


@functools.cache
def _kind_of(target: Any) -> str:
    if target is torch._C._set_grad_enabled:
        return "gradients"
    if isinstance(target, torch._ops.HigherOrderOperator):
        return "other"
    if not isinstance(target, torch._ops.OpOverload):
        return "pure" if is_pure_target(target) else "unknown"
    if torch.Tag.inplace_view in target.tags:
        return "reshapes"
    return "pure" if is_pure_target(target) and _UNLIKE.isdisjoint(target.tags) else "other"


def _leaves(node: Node) -> list[Any]:
    return tree_leaves(node.meta["val"]) if "val" in node.meta else []


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.device == b.device
    return type(a) is type(b)


def _multiplies_activations(node: Node) -> bool:
    if node.target not in PRODUCTS:
        return False
    return all(_root(n).op not in ("placeholder", "get_attr") for n in node.all_input_nodes)


def _root(node: Node) -> Node:
    """Returns what a node is made of, where it is made of one thing: a weight behind its transposition."""
    while node.op == "call_function" and len(inputs := node.all_input_nodes) == 1:
        node = inputs[0]
    return node
