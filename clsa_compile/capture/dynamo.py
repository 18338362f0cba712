"""From Dynamo's torch-level graph to pre-dispatch ATen, by tracing it once more."""

from __future__ import annotations

import torch
from torch._dynamo.exc import Unsupported as GraphBreak
from torch._dynamo.source import LocalSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from clsa_compile.capture.replay import Replaying
from clsa_compile.errors import CaptureError
from clsa_compile.ir.captured import Captured
from clsa_compile.passes.emit import Emitter
from clsa_compile.passes.indexing import root
from clsa_compile.passes.savings import parameter

__all__ = [
    "GraphBreak",
    "capture",
    "higher_order",
    "placeholders",
    "returns_growing_cache",
    "spell_out",
    "subclass_input",
    "uses_autocast",
]

# Inductor reads these to know which inputs have static addresses; without them it skips CUDA graphs.
_SPELLED = 64
_INPUT_META = ("tensor_dict", "grapharg", "example_value", "_dynamo_source", "steal_arg")


def placeholders(module: GraphModule) -> list[Node]:
    """Returns the inputs of a graph, in order."""
    return [n for n in module.graph.nodes if n.op == "placeholder"]


def subclass_input(module: GraphModule) -> str | None:
    """Returns the name of an input that is a tensor subclass (DTensor, quantised), if there is one."""
    for node in placeholders(module):
        value = node.meta.get("example_value")
        if isinstance(value, torch.Tensor) and is_traceable_wrapper_subclass(value):
            return f"{node.name} is a {type(value).__name__}"
    return None


def uses_autocast(module: GraphModule) -> bool:
    """Tells whether autocast decides dtypes, around the graph or inside it."""
    inside = any(n.op == "call_function" and "_enter_autocast" in str(n.target) for n in module.graph.nodes)
    return inside or any(torch.is_autocast_enabled(d) for d in ("cpu", "cuda"))


def higher_order(module: GraphModule) -> str | None:
    """Returns the name of a higher-order op in a graph that tracing once more may not carry, if any."""
    for node in module.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return str(node.target.name())
    return None


def returns_growing_cache(module: GraphModule) -> bool:
    """Tells whether a graph returns an input, or nothing yet, with more appended, for the next call."""
    (output,) = module.graph.find_nodes(op="output")
    return any(_grows(node) for node in output.all_input_nodes)


def _grows(node: Node) -> bool:
    node = root(node)  # layers with a window return the last rows
    if node.target not in (torch.cat, torch.ops.aten.cat.default):
        return False
    parts = node.args[0] if node.args else node.kwargs["tensors"]
    first = parts[0] if isinstance(parts, list | tuple) else None
    if not isinstance(first, Node):
        return False
    value = first.meta.get("val", first.meta.get("example_value"))
    is_state = first.op == "placeholder" and not parameter(first)
    return is_state or (isinstance(value, torch.Tensor) and value.shape == (0,))


def capture(module: GraphModule, replays: bool = True) -> Captured:
    """Returns Dynamo's graph in the dialect that passes read; the original is not touched.

    With `replays`, calls that were traced before are written down again from what they became then.
    Raises CaptureError when an input has no fake value, or tracing fails.
    """
    inputs = placeholders(module)
    values = [n.meta.get("example_value") for n in inputs]
    fake_mode = _fake_mode(module)
    try:
        # An interpreter keeps every node's origin while the dispatcher is traced.
        with fake_mode, preserve_node_meta():
            traced = make_fx(
                (Replaying(module) if replays else Interpreter(module)).run,
                pre_dispatch=True,
                tracing_mode="real",
            )(*values)
        _carry_over(module, traced)
        captured = Captured(traced, fake_mode, "dynamo")
        _spell_out_constants(captured)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise CaptureError(f"the graph could not be traced: {type(error).__name__}: {reason}") from error
    return captured


def _fake_mode(module: GraphModule) -> FakeTensorMode:
    # The values' own mode: the tracing context's is another one, and the two do not mix.
    for node in module.graph.nodes:
        value = node.meta.get("example_value")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    raise CaptureError("the graph computes with no tensors")


def _carry_over(source: GraphModule, traced: GraphModule) -> None:
    for old, new in zip(placeholders(source), placeholders(traced), strict=True):
        for key in _INPUT_META:
            if key in old.meta:
                new.meta[key] = old.meta[key]
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
        new._rename(old.name)
    traced.meta.update({k: v for k, v in source.meta.items() if k not in traced.meta})
    if hasattr(source, "_param_name_to_source"):
        traced._param_name_to_source = source._param_name_to_source
    traced.recompile()


def _spell_out_constants(captured: Captured) -> None:
    """Turns tensor constants into ops that make them.

    Tracing keeps `torch.tensor(...)` as a buffer of the graph, which AOTAutograd refuses because Dynamo
    knows no source for it; as ops, masks can read them too.
    """
    module = captured.module
    for node in list(module.graph.nodes):
        if node.op != "get_attr":
            continue
        value = getattr(module, str(node.target), None)
        if not isinstance(value, torch.Tensor) or isinstance(value, torch.nn.Parameter):
            continue
        if not spell_out(captured, node, value):
            # A plain attribute is a constant to AOTAutograd, a buffer is not.
            delattr(module, str(node.target))
            object.__setattr__(module, str(node.target), value)
            continue
        module.graph.erase_node(node)
    used = {str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
    for name in [n for n, _ in module.named_buffers(recurse=False) if n not in used]:
        delattr(module, name)
    module.recompile()


def spell_out(captured: Captured, node: Node, value: torch.Tensor) -> bool:
    """Lets ops that make a small constant stand for a node that holds it; tells whether it is small enough.

    The node stays, and nothing reads it any more.
    """
    if value.numel() > _SPELLED:
        return False
    # Ops stand after all inputs.
    is_input = node.op == "placeholder"
    place = next(n for n in captured.graph.nodes if n in node.users) if is_input else node
    with captured.graph.inserting_before(place):
        made = _spelled(Emitter(captured, node), value)
    _replace_lifted(captured.module, node, made)
    return True


def _replace_lifted(module: GraphModule, node: Node, made: Node) -> None:
    """Puts `made` where a constant and the copies that lift it out of tracing stood."""
    aten = torch.ops.aten
    lifts = (aten.lift_fresh_copy.default, aten.lift_fresh.default, aten.detach_.default)
    for user in list(node.users):
        if user.target in lifts:
            _replace_lifted(module, user, made)
            module.graph.erase_node(user)
    node.replace_all_uses_with(made)


def _spelled(emit: Emitter, value: torch.Tensor) -> Node:
    aten = torch.ops.aten
    place = {"dtype": value.dtype, "device": value.device}
    flat = value.reshape(-1).tolist()
    if len(set(map(repr, flat))) <= 1:
        return emit.call(aten.full.default, list(value.shape), flat[0] if flat else 0, **place)
    parts = [emit.call(aten.full.default, [], element, **place) for element in flat]
    stacked = emit.call(aten.stack.default, parts)
    if value.dim() == 1:
        return stacked
    # A tensor of its own, not a view: what follows may write it.
    return emit.call(aten.clone.default, emit.call(aten.view.default, stacked, list(value.shape)))


def name_buffers(module: GraphModule) -> None:
    """Gives the buffers that passes added a source: AOTAutograd wants one for each, as Dynamo's own have.

    A graph that is not Dynamo's has no sources, and needs none.
    """
    known = getattr(module, "_param_name_to_source", None)
    if known is None:
        return
    added = {name: LocalSource(name) for name, _ in module.named_buffers() if name not in known}
    module._param_name_to_source = {**known, **added}
