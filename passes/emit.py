"""Emits nodes with values and origin, as every node of the dialect has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import Node
from torch.utils._pytree import tree_leaves, tree_map

from clsa_compile.ir.captured import Captured
from clsa_compile.ir.sites import Operand

aten = torch.ops.aten

# Names for people and for provenance: they follow the node that is replaced.
_ORIGIN = ("nn_module_stack", "stack_trace", "source_fn_stack", "from_node", "seq_nr")


def value_of(captured: Captured, target: Any, args: Any, kwargs: Any) -> Any:
    """Computes the fake value of a call; the graph stays as it is."""
    values = tree_map(lambda a: a.meta["val"] if isinstance(a, Node) else a, (args, kwargs))
    with captured.fake_mode, _dispatcher(values):
        return target(*values[0], **values[1])


class Emitter:
    """Adds nodes to a graph at its insertion point, on behalf of the node that they replace."""

    def __init__(self, captured: Captured, origin: Node, replaced: Mapping[Node, Node] | None = None) -> None:
        self._captured = captured
        self._replaced = replaced or {}
        self._meta = {key: origin.meta[key] for key in _ORIGIN if key in origin.meta}

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Adds a call and computes its fake value."""
        node = self._captured.graph.call_function(target, args, kwargs)
        node.meta.update(self._meta, val=value_of(self._captured, target, args, kwargs))
        return node

    def copy(self, node: Node, renamed: Callable[[Node], Node]) -> Node:
        """Adds a call like another node's, of other operands."""
        args, kwargs = (
            tree_map(lambda a: renamed(a) if isinstance(a, Node) else a, x) for x in (node.args, node.kwargs)
        )
        return self.call(node.target, *args, **kwargs)

    def size(self, node: Node, axis: int) -> int | Node:
        """Returns a size of a node's value, as a node where it is not a number."""
        size = node.meta["val"].shape[axis]
        return size if isinstance(size, int) else self.call(aten.sym_size.int, node, axis)

    def current(self, node: Node) -> Node:
        """Returns what stands for a node now, where it has been replaced already."""
        return self._replaced.get(node, node)

    def operand(self, operand: Operand) -> Node:
        """Adds what turns an operand's root into the wanted order of dimensions."""
        node = self.current(operand.root)
        present = [d for d in operand.dims if d is not None]
        if present != sorted(present):
            node = self.call(aten.permute.default, node, present)
        for position, d in enumerate(operand.dims):
            if d is None:
                node = self.call(aten.unsqueeze.default, node, position)
        return node

    def like(self, node: Node, original: Node) -> Node:
        """Adds what gives `node` the dtype and the strides of `original`."""
        value, wanted = node.meta["val"], original.meta["val"]
        if value.dtype != wanted.dtype:
            node = self.call(aten.to.dtype, node, wanted.dtype)
        order = _stride_order(wanted)
        if order == _stride_order(node.meta["val"]):
            return node
        # Later views were traced with the strides of the original.
        inverse = [order.index(i) for i in range(len(order))]
        node = self.call(aten.permute.default, node, order)
        node = self.call(aten.clone.default, node, memory_format=torch.contiguous_format)
        return self.call(aten.permute.default, node, inverse)


def _dispatcher(values: Any) -> AbstractContextManager[Any]:
    """Returns what has ops made of others take them apart in Python where sizes are symbols.

    In C++ some of them ask for sizes as numbers: `linear` does, in torch 2.11.
    """
    tensors = (leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))
    symbolic = any(isinstance(size, torch.SymInt) for leaf in tensors for size in leaf.shape)
    return enable_python_dispatcher() if symbolic else nullcontext()


def _stride_order(value: torch.Tensor) -> list[int]:
    """Returns the dimensions from the slowest to the fastest; those of size 1 stay where they are."""
    strides = [example(s) for s in value.stride()]
    movable = [i for i, size in enumerate(value.shape) if not (isinstance(size, int) and size == 1)]
    ranked = sorted(movable, key=lambda i: (-strides[i], i))
    order = list(range(value.dim()))
    for place, i in zip(movable, ranked, strict=True):
        order[place] = i
    return order


def example(size: Any) -> int:
    """Returns the example value of a size or a stride, 1 where there is none; reading it adds no guard."""
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return int(hint) if hint is not None else 1
