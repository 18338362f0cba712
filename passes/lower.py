"""Lowers: replaces every contract op by what runs, traced in place.

On CUDA that is a kernel variant's launch, whose Triton calls become nodes that Inductor plans, fuses
around and captures; elsewhere, and where no variant fits, it is the reference. After it no `clsa::`
node is left, but for those that wait until sizes are known (`Variant.waits`) in graphs that Python runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from clsa_compile.ir.captured import Captured
from clsa_compile.ir.ops import contract_op
from clsa_compile.ir.references import REFERENCES
from clsa_compile.ir.variants import Facts, Variant, select
from clsa_compile.passes.analyze import written
from clsa_compile.passes.emit import Emitter
from clsa_compile.passes.indexing import step
from clsa_compile.passes.tables import hold
from clsa_compile.passes.tidy import drop_dead


@dataclass(frozen=True, slots=True)
class Choice:
    """What one contract op became: a variant's name or "reference", and why others were passed over.

    `like` is the first node that was lowered in the very same way, itself where it is the first. `waits` says
    that the op stays, and the variant is launched when it is called.
    """

    node: str
    op: str
    variant: str
    passed_over: tuple[str, ...]
    like: str
    waits: bool = False


def lower(
    captured: Captured, variants: tuple[Variant, ...], wrap: Callable[[Any], Any], may_wait: bool = False
) -> tuple[Captured, tuple[Choice, ...]]:
    """Replaces the contract ops of a graph; returns the graph and the choices.

    `variants` are tried in order; `wrap` makes a Triton kernel traceable. `may_wait`: Python runs the graph,
    so ops may stay in it.
    """
    choices = []
    _drop_loose_bounds(captured)
    traced: dict[Any, tuple[str, GraphModule]] = {}
    for node in list(captured.graph.nodes):
        op = contract_op(node.target) if node.op == "call_function" else None
        if op is None:
            continue
        if not node.users:
            captured.graph.erase_node(node)
            continue
        facts = facts_of(node, op)
        variant, reasons = select(variants, facts)
        if variant is not None and may_wait and variant.waits(facts):
            choices.append(Choice(node.name, op, variant.name, reasons, node.name, waits=True))
            continue
        if variant is not None:
            _pin_strides(captured, node)
        key = (op, variant.name if variant else "", _signature(node))
        if key not in traced:
            traced[key] = (node.name, _trace(captured, node, _implementation(op, variant, wrap)))
        like, implementation = traced[key]
        results = _inline(captured, node, implementation)
        if op == "mask_bounds":
            # Otherwise Inductor computes them again for each kernel that takes them.
            hold(captured, results[0])
        choices.append(Choice(node.name, op, variant.name if variant else "reference", reasons, like))
    drop_dead(captured.graph)
    captured.module.recompile()
    return captured, tuple(choices)


def _drop_loose_bounds(captured: Captured) -> None:
    """Takes away the bounds that a kernel would take as exact, where nothing here says that they are."""
    clsa = torch.ops.clsa
    for node in captured.graph.find_nodes(op="call_function", target=clsa.sparse_attention.default):
        values = dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False))
        bounds = values["bounds"]
        if not values.get("dense_below") or not isinstance(bounds, Node):
            continue
        if bounds.target != clsa.mask_bounds.default:
            node.update_arg(list(values).index("bounds"), None)


def _pin_strides(captured: Captured, node: Node) -> None:
    """Copies operands of a kernel whose strides Inductor may change.

    A kernel is generated for the strides that its operands have here. Graph inputs keep theirs, with
    in-place writes and views of them; any other tensor gets contiguous, in a copy that Inductor fuses
    into whatever makes it.
    """
    for leaf in dict.fromkeys(node.all_input_nodes):
        if not isinstance(leaf.meta.get("val"), torch.Tensor) or _is_input_view(leaf):
            continue
        with captured.graph.inserting_before(node):
            copy = Emitter(captured, node).call(
                torch.ops.aten.clone.default, leaf, memory_format=torch.contiguous_format
            )
        node.replace_input_with(leaf, copy)


def _is_input_view(node: Node) -> bool:
    """Tells whether a node is a graph input's memory, seen through views and in-place writes."""
    while node.op == "call_function":
        inner = step(node)
        if inner is not None and not inner.copies:
            node = inner.root
            continue
        targets = written(node)
        if len(targets) != 1 or targets[0] is not node.args[0]:
            return False
        node = targets[0]
    return node.op == "placeholder"


def _implementation(op: str, variant: Variant | None, wrap: Callable[[Any], Any]) -> Callable[..., Any]:
    if variant is None:
        return REFERENCES[op]
    launch = variant.launch
    return lambda *args: launch(*args, wrap=wrap)


def facts_of(node: Node, op: str) -> Facts:
    """Returns what is known of a contract op from its operands' values."""
    values = {
        argument.name: value.meta["val"] if isinstance(value, Node) else value
        for argument, value in zip(node.target._schema.arguments, node.args, strict=False)
    }
    lse_users = [u for u in node.users if len(u.args) == 2 and u.args[1] == 1]
    return Facts.of(op, values, lse_used=op == "attention" and any(u.users for u in lse_users))


def _signature(node: Node) -> Any:
    """Returns what a traced implementation depends on: operands' layouts and constants."""
    leaves, tree = tree_flatten((node.args, node.kwargs))
    return str(tree), tuple(_describe(leaf) for leaf in leaves)


def _describe(leaf: Any) -> Any:
    value = leaf.meta["val"] if isinstance(leaf, Node) else leaf
    if isinstance(value, torch.Tensor):
        return (str(tuple(value.shape)), str(value.stride()), value.dtype, str(value.device))
    return repr(value) if not isinstance(value, SymInt) else ("sym", str(value))


def _trace(captured: Captured, node: Node, implementation: Callable[..., Any]) -> GraphModule:
    """Traces an implementation over the fake values of a node's operands."""
    leaves, tree = tree_flatten(node.args)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Node)]

    def call(*operands: Any) -> Any:
        filled = list(leaves)
        for place, operand in zip(places, operands, strict=True):
            filled[place] = operand
        return implementation(*tree_unflatten(filled, tree))

    values = [leaves[i].meta["val"] for i in places]
    with captured.fake_mode, torch.no_grad():
        # Pre-dispatch: views that depend on strides stay `reshape`, because Inductor's own
        # decompositions may give operands other strides than they have here.
        return make_fx(call, pre_dispatch=True, tracing_mode="real")(*values)


def _inline(captured: Captured, node: Node, traced: GraphModule) -> list[Node]:
    """Copies a traced implementation before a node, and replaces the node by its results; returns them.

    The result gets the order of strides that the contract op declares: later views rely on it.
    """
    graph = captured.graph
    emit = Emitter(captured, node)
    operands = [leaf for leaf in tree_flatten(node.args)[0] if isinstance(leaf, Node)]
    copies: dict[Node, Any] = {}
    result: Any = None
    inputs = iter(operands)
    with graph.inserting_before(node):
        for inner in traced.graph.nodes:
            if inner.op == "placeholder":
                copies[inner] = next(inputs)
            elif inner.op == "output":
                result = torch.fx.map_arg(inner.args[0], lambda n: copies[n])
            else:
                copies[inner] = graph.node_copy(inner, lambda n: copies[n])
                for name in ("nn_module_stack", "stack_trace"):
                    if name in node.meta:
                        copies[inner].meta.setdefault(name, node.meta[name])
        results = [result] if isinstance(result, Node) else list(result)
        replaced = [node] if isinstance(result, Node) else [None] * len(results)
        for user in [] if isinstance(result, Node) else node.users:
            replaced[user.args[1]] = user
        for i, old in enumerate(replaced):
            if old is not None:
                results[i] = emit.like(results[i], old)
                old.replace_all_uses_with(results[i])
    for user in list(node.users):
        graph.erase_node(user)
    graph.erase_node(node)
    return results
