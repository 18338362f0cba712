"""Between torch.export's programs and captured graphs: the same dialect, with inputs that bear names."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputSpec,
    TensorArgument,
)
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_flatten

from clsa_compile.capture.dynamo import placeholders, spell_out
from clsa_compile.errors import CaptureError
from clsa_compile.ir.captured import Captured

__all__ = [
    "call_inputs",
    "callable_module",
    "capture_program",
    "constants_of",
    "exported",
    "inside",
    "trace",
    "without_weights",
]

_aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class _Source:
    """Where a parameter lies in the model, as Dynamo writes it."""

    name: str


def trace(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> ExportedProgram:
    """Returns a module's program in training IR, of what it does without gradients. Raises CaptureError.

    What torch assumed of sizes and cannot prove for all that they may be, the program asserts as it runs.
    """
    try:
        return _traced(module, args, kwargs, dynamic_shapes, asserts=False)
    except CaptureError:
        return _traced(module, args, kwargs, dynamic_shapes, asserts=True)


def _traced(
    module: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: Any,
    asserts: bool,
) -> ExportedProgram:
    try:
        with torch.no_grad():
            return torch.export.export(
                module,
                args,
                kwargs,
                dynamic_shapes=dynamic_shapes,
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=asserts,
            )
    except Exception as error:  # torch.export raises exceptions of many kinds
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines[:3])
        raise CaptureError(f"torch.export failed: {type(error).__name__}: {reason}") from error


def capture_program(program: ExportedProgram, inner: str = "") -> Captured:
    """Returns a program's own graph as a captured one: passes change the program.

    `inner` is the attribute under which a wrapper holds the model: names are then the model's own. Raises
    CaptureError for a program that computes with no tensors.
    """
    mode = _fake_mode(program)
    captured = Captured(program.graph_module, mode, "export")
    _name_inputs(program, inner)
    _drop_assertions(program.graph_module)
    _spell_out_constants(program, captured)
    program.graph_module.recompile()
    return captured


def call_inputs(program: ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Returns what a call gives each input of a program's graph: weights, constants and arguments."""
    given = iter(tree_flatten((args, kwargs))[0])
    known = {**program.constants, **program.state_dict}
    return [
        next(given) if spec.kind == InputKind.USER_INPUT else known.get(str(spec.target))
        for spec in program.graph_signature.input_specs
    ]


def exported(program: ExportedProgram, captured: Captured) -> ExportedProgram:
    """Returns a program of its own with the graph as it is now; weights are shared.

    Tensors that passes added become constants of the program.
    """
    graph = _copied(captured.graph)
    module = GraphModule(captured.module, graph)
    constants = dict(program.constants)
    first = next(iter(graph.nodes))
    added = [spec for node in list(graph.nodes) for spec in _lifted(module, node, first, constants)]
    signature = ExportGraphSignature(
        [*added, *program.graph_signature.input_specs],
        [_renamed(spec, arg) for spec, arg in zip(*_outputs(program, graph), strict=True)],
    )
    module.recompile()
    return ExportedProgram(
        root=module,
        graph=graph,
        graph_signature=signature,
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=copy.deepcopy(program.module_call_graph),
        example_inputs=program.example_inputs,
        constants=constants,
        verifiers=program.verifiers,
    )


def callable_module(program: ExportedProgram, captured: Captured) -> GraphModule:
    """Returns a module that takes what the program was traced with and does what its graph does now."""
    specs, outputs = _outputs(program, captured.graph)
    program.graph_signature.output_specs[:] = [
        _renamed(spec, arg) for spec, arg in zip(specs, outputs, strict=True)
    ]
    module: GraphModule = program.module(check_guards=False)
    return module


def constants_of(program: ExportedProgram) -> list[str]:
    """Returns the names of the tensors that a program reads besides its inputs."""
    used = {node.name for node in placeholders(program.graph_module) if node.users}
    kinds = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
    return [
        str(spec.target)
        for spec in program.graph_signature.input_specs
        if spec.kind in kinds and spec.arg.name in used
    ]


def without_weights(program: ExportedProgram) -> ExportedProgram:
    """Returns a program whose tensors are stubs of one element, to be replaced when it is loaded."""

    def stub(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        # Real ones: torch.export saves fake tensors as if all of them were one.
        made = torch.zeros(1, dtype=value.dtype)
        is_parameter = isinstance(value, torch.nn.Parameter)
        return torch.nn.Parameter(made, requires_grad=False) if is_parameter else made

    return ExportedProgram(
        root=program.graph_module,
        graph=_copied(program.graph),
        graph_signature=copy.deepcopy(program.graph_signature),
        state_dict={name: stub(value) for name, value in program.state_dict.items()},
        range_constraints=program.range_constraints,
        module_call_graph=copy.deepcopy(program.module_call_graph),
        constants={name: stub(value) for name, value in program.constants.items()},
        verifiers=program.verifiers,
    )


def _fake_mode(program: ExportedProgram) -> Any:
    for node in placeholders(program.graph_module):
        value = node.meta.get("val")
        if isinstance(value, Tensor) and hasattr(value, "fake_mode"):
            return value.fake_mode
    raise CaptureError("the program computes with no tensors")


def _name_inputs(program: ExportedProgram, inner: str) -> None:
    """Gives parameters a source as Dynamo's have, and modules the names that they have in the model."""
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    for node in placeholders(program.graph_module):
        spec = specs[node.name]
        if spec.kind == InputKind.PARAMETER and spec.target is not None:
            *path, name = inside(spec.target, inner).split(".")
            steps = "".join(f"._modules['{part}']" for part in path)
            node._dynamo_source = _Source(f"L['self']{steps}._parameters['{name}']")
    for node in program.graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if stack and inner:
            node.meta["nn_module_stack"] = {
                key: (inside(path, inner), *rest) for key, (path, *rest) in stack.items()
            }


def inside(path: str, inner: str) -> str:
    """Returns the name that something has in the model which a wrapper holds as `inner`."""
    return path.removeprefix(inner).removeprefix(".") if inner else path


def _drop_assertions(module: GraphModule) -> None:
    """Drops assertions about dtypes and devices of values: they hold, or the graph could not be traced."""
    for node in list(module.graph.nodes):
        if node.target is _aten._assert_tensor_metadata.default:
            module.graph.erase_node(node)


def _spell_out_constants(program: ExportedProgram, captured: Captured) -> None:
    """Turns small tensors that a model made in Python into ops, which masks can read; the inputs stay."""
    for spec in program.graph_signature.input_specs:
        if spec.kind != InputKind.CONSTANT_TENSOR:
            continue
        value = program.constants.get(str(spec.target))
        node = next(n for n in placeholders(program.graph_module) if n.name == spec.arg.name)
        if isinstance(value, Tensor) and type(value) is Tensor and node.users:
            spell_out(captured, node, value)


def _copied(graph: Graph) -> Graph:
    """Returns a copy whose inputs are called as they were, also those that bear names of Python's own."""
    made = copy.deepcopy(graph)
    for old, new in zip(graph.nodes, made.nodes, strict=True):
        if old.op == "placeholder":
            new.name = old.name
    return made


def _lifted(module: GraphModule, node: Node, first: Node, constants: dict[str, Any]) -> list[InputSpec]:
    """Makes an input, before the first one, of a tensor that the graph reads from its module."""
    if node.op != "get_attr":
        return []
    value = getattr(module, str(node.target))
    if not isinstance(value, Tensor):
        return []
    with module.graph.inserting_before(first):
        made = module.graph.placeholder(f"c_{node.target}")
    made.meta.update(node.meta)
    node.replace_all_uses_with(made)
    module.graph.erase_node(node)
    name = f"clsa_{str(node.target).removeprefix('clsa_')}"  # as most passes call theirs
    constants[name] = value
    return [InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(name=made.name), name)]


def _outputs(program: ExportedProgram, graph: Graph) -> tuple[list[OutputSpec], list[Any]]:
    output = next(node for node in graph.nodes if node.op == "output")
    return list(program.graph_signature.output_specs), list(output.args[0])


def _renamed(spec: OutputSpec, value: Any) -> OutputSpec:
    """Returns an output's specification with the name of the node that it is now."""
    if isinstance(spec.arg, ConstantArgument):
        return spec
    return replace(spec, arg=replace(spec.arg, name=value.name))
