"""Tables: sines and cosines that several layers read are computed once.

Inductor fuses what is pointwise into each of its readers, and so computes the angles of a rotary embedding
and their sines again in every layer, for queries and for keys. At positions beyond 1e5 each is a slow
reduction of its argument: 1 to 2.5 us a kernel on an H100, where reading the table takes none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from clsa_compile.ir.captured import Captured
from clsa_compile.passes.emit import Emitter

aten = torch.ops.aten

_COSTLY = {aten.sin.default, aten.cos.default}
# What stands between a sine and the table that layers read; all of them have one tensor operand.
_LIGHT = {aten.mul.Scalar, aten.mul.Tensor, aten.to.dtype, aten._to_copy.default, aten.unsqueeze.default}


def keep_tables(captured: Captured) -> int:
    """Makes Inductor hold every table of sines that has more than one reader; returns how many."""
    tables = dict.fromkeys(_table(node) for node in captured.graph.nodes if node.target in _COSTLY)
    return sum(len(table.users) > 1 and hold(captured, table) for table in tables)


def hold(captured: Captured, node: Node) -> bool:
    """Makes Inductor write a tensor to memory once for all of its readers; returns whether that was possible.

    It takes a tensor that lies dense in memory and has sizes that are known.
    """
    value: Any = node.meta["val"]
    if not all(isinstance(n, int) for n in (*value.shape, *value.stride())) or not value.is_contiguous():
        return False
    readers = list(node.users)
    with captured.graph.inserting_after(node):
        # A strided view is a view of memory: Inductor writes what it is a view of.
        held = Emitter(captured, node).call(
            aten.as_strided.default, node, list(value.shape), list(value.stride())
        )
    for reader in readers:
        reader.replace_input_with(node, held)
    return True


def _table(node: Node) -> Node:
    """Returns what readers take of a sine: the end of the chain of its only users."""
    while len(node.users) == 1:
        (user,) = node.users
        if user.target not in _LIGHT or len(user.all_input_nodes) != 1:
            return node
        node = user
    return node
