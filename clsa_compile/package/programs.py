"""Programs: what is exported, taken through the passes that `torch.compile` takes graphs through."""

from __future__ import annotations

import io
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, TensorArgument
from torch.fx import GraphModule
from torch.utils._pytree import tree_flatten

from clsa_compile.aot import compile_module
from clsa_compile.backend import carried_out, inductor_settings
from clsa_compile.capture.export import (
    call_inputs,
    callable_module,
    capture_program,
    exported,
    trace,
    without_weights,
)
from clsa_compile.capture.launches import launch_of
from clsa_compile.config import Options
from clsa_compile.dump.code import HEADER, code_of
from clsa_compile.errors import ExportError
from clsa_compile.ir.captured import Captured
from clsa_compile.layers import layers_of
from clsa_compile.pace import roomy
from clsa_compile.package.decoders import Decoder, Traced, is_decoder
from clsa_compile.package.manifest import Decoding, Input
from clsa_compile.passes.pipeline import Decision
from clsa_compile.prediction import device_of, predict
from clsa_compile.report import Details
from clsa_compile.watch import Watch

__all__ = ["Program", "Source"]

_BUILT_IN = ("aten", "prim", "prims")


@dataclass(frozen=True, slots=True)
class Source:
    """What is exported: a decoder, or another module with its example arguments."""

    model: nn.Module
    decoder: Decoder | None
    plain: Traced | None

    @classmethod
    def of(cls, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any) -> Source:
        """Returns what a call of a model is exported as. Raises ExportError."""
        if not isinstance(model, nn.Module):
            raise ExportError(f"a {type(model).__name__} cannot be exported; give a torch.nn.Module")
        if model.training:
            raise ExportError("the model is in training mode; call model.eval() first")
        if is_decoder(model, args, kwargs):
            return cls(model, Decoder(model, args, kwargs, shapes), None)
        for value in tree_flatten((args, kwargs))[0]:
            if isinstance(value, Tensor) and not value.is_contiguous():
                raise ExportError(
                    f"an argument of sizes {list(value.shape)} is not contiguous, and programs take tensors "
                    "as they were exported; give it as tensor.contiguous()"
                )
        return cls(model, None, Traced(model, args, kwargs, shapes))

    def programs(self, options: Options) -> dict[str, Program]:
        """Returns the programs by name: "prefill" and "decode", or "forward"."""
        if self.decoder is None:
            assert self.plain is not None
            return {"forward": Program.made("forward", self.plain, options)}
        with self.decoder.exportable():
            return {
                name: Program.made(name, self.decoder.traced(name), options) for name in ("prefill", "decode")
            }

    @property
    def decoding(self) -> Decoding | None:
        """How caches look, of a decoder."""
        return None if self.decoder is None else self.decoder.decoding()


@dataclass(slots=True)
class Program:
    """One program on its way: `rewritten` has contract ops still, `lowered` is what is compiled."""

    name: str
    traced: Traced
    inputs: tuple[Input, ...]
    ranges: dict[str, tuple[int, int]]
    rewritten: ExportedProgram
    lowered: GraphModule
    details: Details
    decision: Decision
    texts: dict[str, str]
    options: Options
    seconds: float
    files: list[Path] = field(default_factory=list)

    @classmethod
    @roomy
    def made(cls, name: str, traced: Traced, options: Options) -> Program:
        """Exports one program and takes it through the passes that `torch.compile` takes graphs through."""
        started = time.perf_counter()
        program = trace(traced.module, traced.args, traced.kwargs, traced.dynamic_shapes)
        inputs, ranges = _inputs(program), _ranges(program)
        _check_outputs(program)
        captured = capture_program(program, traced.inner)
        texts = {f"graphs/{name}_before.py": _text(captured)}
        kept: dict[str, Any] = {}

        def observe(stage: str, graph: Captured) -> None:
            if stage == "rewritten":
                kept["program"] = exported(program, graph)
                texts[f"graphs/{name}_after.py"] = _text(graph)

        def look(decision: Decision) -> None:
            kept["details"] = Details(
                layers_of(captured, decision), predict(captured, decision, device_of(None))
            )

        watch = Watch.open(options, call_inputs(program, traced.args, traced.kwargs))
        captured, decision = carried_out(captured, options, watch, observe, look)
        if "program" not in kept:
            observe("rewritten", captured)  # nothing was rewritten
        texts[f"graphs/{name}_lowered.py"] = _text(captured)
        texts |= _kernels(captured)
        watch.done()
        return cls(
            name=name,
            traced=traced,
            inputs=inputs,
            ranges=ranges,
            rewritten=kept["program"],
            lowered=callable_module(program, captured),
            details=kept["details"],
            decision=decision,
            texts=texts,
            options=options,
            seconds=time.perf_counter() - started,
        )

    @property
    def device(self) -> torch.device:
        """The device that the program runs on."""
        return next(
            value.device
            for node in self.lowered.graph.nodes
            if isinstance(value := node.meta.get("val"), Tensor) and value.device.type != "meta"
        )

    def saved(self) -> bytes:
        """Returns the rewritten program as torch.export saves it, without weights and example inputs."""
        buffer = io.BytesIO()
        torch.export.save(without_weights(self.rewritten), buffer)
        return buffer.getvalue()

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors that the program may need, by the names that its two forms give them."""
        made = {name: value for name, value in vars(self.lowered).items() if isinstance(value, Tensor)}
        made |= dict(self.lowered.named_buffers()) | dict(self.lowered.named_parameters())
        return made | {**self.rewritten.constants, **self.rewritten.state_dict}

    def compile(self, plan: str) -> None:
        """Compiles the program's native code."""
        started = time.perf_counter()
        _check_ops(self.lowered)
        # CUDA graphs are captured by who runs a package; the code is the same.
        settings = {k: v for k, v in inductor_settings(self.options).items() if k != "triton.cudagraphs"}
        marks = {"clsa_plan": plan, "clsa_program": self.name}
        self.files = compile_module(self.lowered, self.traced.args, self.traced.kwargs, marks, settings)
        self.seconds += time.perf_counter() - started


def _text(captured: Captured) -> str:
    return f"{HEADER}\n\n{code_of(captured.module)}"


def _kernels(captured: Captured) -> dict[str, str]:
    """Returns the sources of the kernels that a lowered graph launches, by record."""
    launches = (launch_of(node) for node in captured.graph.nodes)
    files = {launch.name: launch.file for launch in launches if launch is not None}
    return {f"kernels/{name}.py": file.read_text(encoding="utf-8") for name, file in files.items()}


def _inputs(program: ExportedProgram) -> tuple[Input, ...]:
    """Returns the flat inputs that a caller gives. Raises ExportError for sizes that are no names."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    found = []
    for spec in program.graph_signature.input_specs:
        if spec.kind != InputKind.USER_INPUT:
            continue
        if isinstance(spec.arg, ConstantArgument):
            found.append(Input(spec.arg.name, constant=_plain(spec.arg)))
        elif isinstance(spec.arg, TensorArgument):
            value = values[spec.arg.name]
            sizes = tuple(size if isinstance(size, int) else str(size) for size in value.shape)
            found.append(Input(spec.arg.name, str(value.dtype).removeprefix("torch."), sizes))
        else:
            raise ExportError(f"the argument {spec.arg.name!r} is a number that may vary; give a tensor")
    return tuple(found)


def _plain(argument: ConstantArgument) -> Any:
    value = argument.value
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ExportError(
        f"the argument {argument.name!r} is a {type(value).__name__}; give tensors and plain values"
    )


def _check_outputs(program: ExportedProgram) -> None:
    for spec in program.graph_signature.output_specs:
        if spec.kind == OutputKind.USER_OUTPUT and not isinstance(spec.arg, TensorArgument):
            raise ExportError(f"the model returns what is no tensor: {spec.arg}; return tensors only")


def _ranges(program: ExportedProgram) -> dict[str, tuple[int, int]]:
    """Returns the least and the most that each name among the sizes may be."""
    most = 1 << 62
    return {
        str(symbol): (int(max(limits.lower, 0)), int(min(limits.upper, most)))
        for symbol, limits in program.range_constraints.items()
    }


def _check_ops(module: GraphModule) -> None:
    """Guards a package against ops that run in Python only. Raises ExportError naming one."""
    made_in_python: set[str] = getattr(torch.library, "_defs", set())
    for node in module.graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace in _BUILT_IN:
            continue
        name = node.target.name().partition(".")[0]
        if name in made_in_python:
            raise ExportError(
                f"the model calls {name}, an op that exists in Python only, which native code cannot run; "
                "format='program' keeps it"
            )
