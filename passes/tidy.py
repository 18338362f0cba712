"""Tidies: removes what nothing needs, and never a mutation."""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch.fx import Graph, Node

# FX's own dead-code elimination drops in-place methods; this list says what may go instead.
_PURE_BUILTINS: frozenset[Any] = frozenset(
    getattr(operator, name)
    for name in (
        "getitem",
        "add",
        "sub",
        "mul",
        "truediv",
        "floordiv",
        "mod",
        "neg",
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
        "and_",
        "or_",
        "not_",
        "pow",
    )
) | {
    torch.sym_max,
    torch.sym_min,
    torch.sym_not,
    torch.sym_int,
    torch.sym_float,
    torch.sym_ite,
    min,
    max,
}
_EFFECTS = (
    "_assert",
    "sym_constrain",
    "_print",
    "_functional_assert",
    "_make_dep_token",
)


def is_pure(node: Node) -> bool:
    """Tells whether a node may be dropped when nothing uses it. What is unknown may not."""
    if node.op != "call_function":
        return node.op == "get_attr"
    return is_pure_target(node.target) or is_idle_dropout(node)


def is_idle_dropout(node: Node) -> bool:
    """Tells whether a node is a dropout that drops nothing, as in a model that is not trained."""
    if node.target is not torch.ops.aten.dropout.default:
        return False
    arguments: tuple[Any, ...] = (*node.args, *node.kwargs.values())
    return bool(arguments[1] == 0 or arguments[2] is False)


@functools.cache  # a deep model asks for the same few hundred ops
def is_pure_target(target: Any) -> bool:
    """Tells whether a call of a function may be dropped when nothing uses its result."""
    if not isinstance(target, torch._ops.OpOverload):
        return target in _PURE_BUILTINS
    if target._schema.is_mutable or not target._schema.returns:
        return False
    name = target._schema.name
    if name.startswith("clsa::"):
        return True
    if not name.startswith("aten::") or any(effect in name for effect in _EFFECTS):
        return False
    # Dropping a random op would change the numbers that later ones draw.
    return torch.Tag.nondeterministic_seeded not in target.tags


def drop_dead(graph: Graph) -> int:
    """Removes pure nodes without users; returns how many."""
    dropped = 0
    for node in reversed(list(graph.nodes)):
        if not node.users and is_pure(node):
            graph.erase_node(node)
            dropped += 1
    return dropped
