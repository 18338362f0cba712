"""A program without side effects: weights, inputs and caches go in, caches and outputs come out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import sympy
import torch
from torch import SymInt, Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, TensorArgument
from torch.fx import Graph, Node
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

from clsa_compile.errors import MlirError

__all__ = ["Argument", "Functional", "Result", "functional"]

aten, prims = torch.ops.aten, torch.ops.prims
Kind = Literal["parameter", "buffer", "constant", "input"]
_KINDS: dict[InputKind, Kind] = {
    InputKind.PARAMETER: "parameter",
    InputKind.BUFFER: "buffer",
    InputKind.CONSTANT_TENSOR: "constant",
    InputKind.USER_INPUT: "input",
}
_MUTATIONS = (OutputKind.USER_INPUT_MUTATION, OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION)
# Of what knows symbols, how many conditions it had when it was first seen: those are the exporter's.
_KNOWN: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)


@dataclass(frozen=True, slots=True)
class Argument:
    """An argument of a function: its name, the tensor's name in the model ("" of an input), dtype and sizes.

    Sizes are numbers, and expressions over symbols where they may vary.
    """

    name: str
    kind: Kind
    tensor: str
    dtype: str
    sizes: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class Result:
    """A result: the new value of the argument `writes`, or an output of the model where that is ""."""

    name: str
    writes: str
    dtype: str
    sizes: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class Functional:
    """A graph that torch-mlir can import, with inputs and outputs as `arguments` and `results` say."""

    graph: Graph
    arguments: tuple[Argument, ...]
    results: tuple[Result, ...]
    tensors: Mapping[str, Tensor]


def functional(name: str, program: ExportedProgram, table: Mapping[Any, Callable[..., Any]]) -> Functional:
    """Returns a program, decomposed by a table, as a function; the program is not touched.

    What it writes in place (caches, buffers) becomes results, in front of its outputs. Weights that nothing
    reads are left out. Raises MlirError for inputs and outputs that are no tensors.
    """
    unread = {node.name for node in program.graph.nodes if node.op == "placeholder" and not node.users}
    environment = _environment(program.graph)
    if environment is not None:
        # torch notes a condition once, so those of an earlier attempt count.
        _KNOWN.setdefault(environment, len(environment.guards))
    try:
        with torch.no_grad():
            decomposed = program.run_decompositions(dict(table))
    except Exception as error:  # whatever a decomposition raises
        reason = str(error).partition("\n")[0]
        raise MlirError(
            f"the program {name!r} cannot be decomposed: {type(error).__name__}: {reason}"
        ) from error
    graph = decomposed.graph_module.graph
    if environment is not None:
        _refuse_guesses(name, environment, program.range_constraints)
    values = {node.name: node for node in graph.nodes}
    arguments = []
    for spec in decomposed.graph_signature.input_specs:
        node = values[spec.arg.name]
        is_left_out = isinstance(spec.arg, ConstantArgument) or spec.kind != InputKind.USER_INPUT
        if is_left_out and node.name in unread and not node.users:
            graph.erase_node(node)
            continue
        if spec.kind not in _KINDS or not isinstance(node.meta.get("val"), Tensor):
            raise MlirError(
                f"the input {spec.arg.name!r} of the program {name!r} is no tensor; export it with that "
                "input fixed, or as a tensor"
            )
        target = "" if spec.kind == InputKind.USER_INPUT else str(spec.target)
        arguments.append(Argument(node.name, _KINDS[spec.kind], target, *_described(node)))
    results = _results(name, decomposed, graph, {a.tensor: a.name for a in arguments if a.tensor})
    _simplify(graph)
    graph.lint()
    return Functional(graph, tuple(arguments), results, {**decomposed.constants, **decomposed.state_dict})


def _environment(graph: Graph) -> Any:
    """Returns what knows the symbols of a graph's sizes, or None where all of them are numbers."""
    for node in graph.nodes:
        value = node.meta.get("val")
        for size in value.shape if isinstance(value, Tensor) else ():
            if isinstance(size, SymInt):
                return size.node.shape_env
    return None


def _refuse_guesses(name: str, environment: Any, exported: Mapping[Any, Any]) -> None:
    """Refuses a program of which a decomposition was chosen by its example sizes, and not for all sizes.

    `exported` are the ranges of sizes that it was exported for: conditions narrow those that torch keeps.
    """
    for guard in environment.guards[_KNOWN[environment] :]:
        condition = environment.simplify(guard.expr)
        ranges = {s: exported.get(s, ValueRanges.unknown_int()) for s in condition.free_symbols}
        if bound_sympy(condition, ranges).lower != sympy.true:
            raise MlirError(
                f"the program {name!r} would hold only where {condition}, which is not so for all sizes that "
                "it was exported for; export it with other example sizes, or with fewer sizes that vary"
            )


def _results(
    name: str, program: ExportedProgram, graph: Graph, holders: Mapping[str, str]
) -> tuple[Result, ...]:
    """Describes what a graph returns; what is no tensor and always the same is returned no more."""
    output = graph.output_node()
    kept, results, count = [], [], 0
    for spec, value in zip(program.graph_signature.output_specs, output.args[0], strict=True):
        if isinstance(spec.arg, ConstantArgument):
            continue
        if not isinstance(spec.arg, TensorArgument) or not isinstance(value, Node):
            raise MlirError(f"an output of the program {name!r} is no tensor: {spec.arg}")
        kept.append(value)
        if spec.kind in _MUTATIONS:
            written = holders.get(str(spec.target), str(spec.target))
            results.append(Result(written, written, *_described(value)))
        else:
            results.append(Result(f"output_{count}", "", *_described(value)))
            count += 1
    output.args = (tuple(kept),)
    return tuple(results)


def _described(node: Node) -> tuple[str, tuple[int | str, ...]]:
    value = node.meta["val"]
    sizes = tuple(size if isinstance(size, int) else str(size) for size in value.shape)
    return str(value.dtype).removeprefix("torch."), sizes


def _simplify(graph: Graph) -> None:
    """Takes out what torch-mlir does not import, or lowers wrongly."""
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if not node.users and _is_assertion(node):
            graph.erase_node(node)
        elif node.target is aten.as_strided.default and _is_whole(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target in _VIEWS:
            _merge(graph, node)


def _is_assertion(node: Node) -> bool:
    name = str(node.target)
    return "_assert" in name or "sym_constrain_range" in name


def _is_whole(node: Node) -> bool:
    """Tells whether a strided view is of all elements, in their order: `passes/tables.py` makes such ones."""
    value = node.args[0].meta["val"]
    sizes, strides = list(value.shape), list(value.stride())
    given = (list(node.args[1]), list(node.args[2]), node.args[3:] in ((), (0,), (None,)))
    return given == (sizes, strides, True) and value.is_contiguous()


def _merge(graph: Graph, node: Node) -> None:
    """Spells a view that merges dimensions as merges, where several of its sizes vary.

    torch-mlir would take all but one of those sizes for 1 (llvm/torch-mlir issues 3852 and 4743).
    """
    source = node.args[0]
    sizes = [_expression(size) for size in source.meta["val"].shape]
    groups = _groups(sizes, [_expression(size) for size in node.meta["val"].shape])
    if groups is None or sum(not size.is_Integer for size in sizes) < 2:
        return
    with graph.inserting_before(node):
        # From the last dimension on, so that those before it keep their numbers.
        for first, last in reversed(groups):
            if first != last:
                value = source.meta["val"]
                source = graph.call_function(prims.collapse.default, (source, first, last))
                source.meta.update(node.meta, val=prims.collapse.default(value, first, last))
    node.replace_all_uses_with(source)
    graph.erase_node(node)


def _groups(sizes: list[Any], wanted: list[Any]) -> list[tuple[int, int]] | None:
    """Returns the first and last dimension that make each wanted one, None where merging is not enough."""
    groups, start = [], 0
    for size in wanted:
        end, product = start, sympy.Integer(1)
        while end < len(sizes) and (end == start or product != size):
            product *= sizes[end]
            end += 1
        if product != size or end == start:
            return None
        groups.append((start, end - 1))
        start = end
    return groups if start == len(sizes) else None


def _expression(size: int | SymInt) -> Any:
    return sympy.Integer(size) if isinstance(size, int) else size.node.expr
