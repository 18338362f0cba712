"""Order and memory: where nodes stand, what shares storage, and who writes it when."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves


def storages(value: Any) -> Iterator[int]:
    """Yields the identities of the storages that a value (a tensor or a tree of them) lives in."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, torch.Tensor):
            try:
                yield leaf.untyped_storage()._cdata
            except (NotImplementedError, RuntimeError):
                continue  # a wrapper subclass has no storage of its own


def written(node: Node) -> list[Node]:
    """Returns the argument nodes that a node writes in place. What is unknown counts as written."""
    if node.op in ("placeholder", "output", "get_attr"):
        return []
    inputs = list(node.all_input_nodes)
    if node.op != "call_function":
        return inputs
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return inputs
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    found: list[Node] = []
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
        found.extend(leaf for leaf in tree_leaves(value) if isinstance(leaf, Node))
    return found


@dataclass(frozen=True, slots=True)
class Repeated:
    """A write that stores again what the write `first` has stored in the same place."""

    write: Node
    first: Node


class Order:
    """Positions of nodes and the writes to each storage. Valid until the graph changes."""

    def __init__(self, graph: Graph) -> None:
        self._position = {node: i for i, node in enumerate(graph.nodes)}
        self._writes: dict[int, list[Node]] = {}
        for node in graph.nodes:
            for target in written(node):
                for storage in storages(target.meta.get("val")):
                    self._writes.setdefault(storage, []).append(node)

    def position(self, node: Node) -> int:
        """Returns where a node stands in the graph."""
        return self._position[node]

    def writes(self, node: Node) -> list[Node]:
        """Returns the nodes that write the storage of a node's value."""
        return [w for s in storages(node.meta.get("val")) for w in self._writes.get(s, ())]

    def write_between(self, node: Node, first: Node, last: Node) -> Node | None:
        """Returns a node that writes `node`'s storage after `first` and before `last`, if any."""
        low, high = self._position[first], self._position[last]
        for write in self.writes(node):
            if low < self._position[write] < high:
                return write
        return None

    def written_after(self, node: Node) -> bool:
        """Tells whether a node's storage is written after the node stands."""
        return any(self._position[w] > self._position[node] for w in self.writes(node))
