"""export(): the pipeline up to AOTInductor, ahead of time, into one file."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, TensorArgument
from torch.fx import GraphModule
from torch.utils._pytree import tree_flatten

from clsa_compile.aot import Runner, compile_module
from clsa_compile.backend import carried_out, inductor_settings
from clsa_compile.capture.export import (
    callable_module,
    capture_program,
    constants_of,
    exported,
    inside,
    trace,
    without_weights,
)
from clsa_compile.capture.launches import launch_of
from clsa_compile.config import Options
from clsa_compile.dump.code import HEADER, code_of
from clsa_compile.errors import ExportError, OptionError
from clsa_compile.ir.captured import Captured
from clsa_compile.ir.sharing import SharingPlan
from clsa_compile.layers import layers_of
from clsa_compile.pace import roomy
from clsa_compile.package.archive import Contents, write
from clsa_compile.package.decoders import Decoder, Traced, is_decoder
from clsa_compile.package.digest import seal
from clsa_compile.package.machine import describe
from clsa_compile.package.manifest import Decoding, Input, Kind, Manifest, ProgramInfo
from clsa_compile.package.weights import Collected
from clsa_compile.passes.pipeline import Decision
from clsa_compile.prediction import device_of, predict
from clsa_compile.report import Details, Report
from clsa_compile.watch import Watch

__all__ = ["Exported", "export"]

Format = Literal["pt2", "program", "mlir"]
FORMATS = ("pt2", "program", "mlir")
WEIGHTS = ("inside", "outside")


@dataclass(frozen=True, slots=True)
class Exported:
    """A file that was written: its digest to pin it by, its size in bytes, seconds of each stage, the report."""

    path: Path
    digest: str
    size: int
    seconds: Mapping[str, float]
    report: Report

    def __str__(self) -> str:
        took = ", ".join(f"{name} {value:.1f} s" for name, value in self.seconds.items())
        return f"{self.path}: {self.size / 1e6:.1f} MB ({took})\ndigest {self.digest}"


def export(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    path: str | os.PathLike[str],
    options: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    plan: SharingPlan | str | os.PathLike[str] | None = None,
    format: Format = "pt2",
    weights: Literal["inside", "outside"] = "inside",
) -> Exported:
    """Writes a model, compiled ahead of time for the device that it is on, into one file.

    A Hugging Face decoder called on tokens becomes two programs, "prefill" and "decode", over static caches that
    they write in place; batch, prompt and cache length may vary. An `attention_mask` among `kwargs` (what it
    holds does not matter) gives the programs a number of padding tokens for each row. Any other module becomes
    one program, "forward"; `args`, `kwargs` and `dynamic_shapes` are then torch.export's.

    format: "pt2" (AOTInductor's code, and the rewritten programs beside it), "program" (the programs alone, for
    any device) or "mlir". weights: "inside", or "outside": parameters are then bound when the package is loaded.
    plan: what `share` takes, a plan or its file. Raises OptionError and ExportError; then nothing is written.
    """
    given = dict(kwargs or {})
    chosen = _options(options, plan)
    target = _target(path, format, weights)
    source = _Source.of(model, tuple(args), given, dynamic_shapes)
    started = time.perf_counter()
    programs = {}
    for name, traced in source.traced():
        programs[name] = _Program.made(name, traced, chosen)
    if format == "mlir":
        return _mlir(programs, target, started)
    built = _Built(format, programs, source, weights)
    return built.write(target, started)


def _options(options: Mapping[str, Any] | None, plan: Any) -> Options:
    given = dict(options or {})
    if plan is not None:
        if "share" in given:
            raise OptionError("the plan is given twice: as 'plan' and as the option 'share'")
        given["share"] = plan if isinstance(plan, SharingPlan) else os.fspath(plan)
    return Options.read(given)


def _target(path: str | os.PathLike[str], format: str, weights: str) -> Path:
    target = Path(path)
    for name, value, accepted in (("format", format, FORMATS), ("weights", weights, WEIGHTS)):
        if value not in accepted:
            raise ExportError(f"{name} is {value!r}; accepted: {', '.join(map(repr, accepted))}")
    if format != "mlir" and target.suffix != ".pt2":
        raise ExportError(f"path is {os.fspath(target)!r}; a package's file ends in .pt2")
    return target


def _mlir(programs: Mapping[str, _Program], target: Path, started: float) -> Exported:
    """Hands the rewritten programs, with contract ops and caches written in place, to the MLIR half."""
    from clsa_compile.mlir import write as write_mlir  # type: ignore[import-not-found]

    size = write_mlir({name: program.rewritten for name, program in programs.items()}, target)
    seconds = {"all": time.perf_counter() - started}
    return Exported(target, "", size, seconds, _report(programs))


@dataclass(frozen=True, slots=True)
class _Source:
    """What is exported: a decoder, or another module with its example arguments."""

    model: nn.Module
    decoder: Decoder | None
    plain: Traced | None

    @classmethod
    def of(cls, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any) -> _Source:
        if not isinstance(model, nn.Module):
            raise ExportError(f"a {type(model).__name__} cannot be exported; give a torch.nn.Module")
        if model.training:
            raise ExportError("the model is in training mode; call model.eval() first")
        if is_decoder(model, args, kwargs):
            return cls(model, Decoder(model, args, kwargs, shapes), None)
        for value in tree_flatten((args, kwargs))[0]:
            if isinstance(value, Tensor) and not value.is_contiguous():
                raise ExportError(
                    f"an argument of sizes {list(value.shape)} is not contiguous, and programs take tensors as "
                    "they were exported; give it as tensor.contiguous()"
                )
        return cls(model, None, Traced(model, args, kwargs, shapes))

    def traced(self) -> list[tuple[str, Traced]]:
        """Returns what becomes a program, by name."""
        if self.decoder is not None:
            return [(name, self.decoder.traced(name)) for name in ("prefill", "decode")]
        assert self.plain is not None
        return [("forward", self.plain)]

    @property
    def decoding(self) -> Decoding | None:
        """How caches look, of a decoder."""
        return None if self.decoder is None else self.decoder.decoding()


@dataclass(slots=True)
class _Program:
    """One program on its way: `rewritten` still holds contract ops, `lowered` is what AOTInductor compiles."""

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
    def made(cls, name: str, traced: Traced, options: Options) -> _Program:
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

        watch = Watch.open(options, tree_flatten((traced.args, traced.kwargs))[0])
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

    def compile(self, plan: str) -> None:
        """Compiles the program's native code."""
        started = time.perf_counter()
        # CUDA graphs are captured by who runs a package; the code is the same.
        settings = {k: v for k, v in inductor_settings(self.options).items() if k != "triton.cudagraphs"}
        marks = {"clsa_plan": plan, "clsa_program": self.name}
        self.files = compile_module(self.lowered, self.traced.args, self.traced.kwargs, marks, settings)
        self.seconds += time.perf_counter() - started


@dataclass(slots=True)
class _Built:
    """A package that is about to be written."""

    kind: Kind
    programs: Mapping[str, _Program]
    source: _Source
    weights: str

    def write(self, target: Path, started: float) -> Exported:
        """Compiles what is to be compiled and writes the file, whole or not at all."""
        report = _report(self.programs)
        plan = json.dumps([p.decision.plan.to_dict() for p in self.programs.values()], indent=1)
        digest = hashlib.sha256(plan.encode()).hexdigest()
        for program in self.programs.values():
            if self.kind == "pt2":
                program.compile(digest)
        contents = Contents(code={name: p.files for name, p in self.programs.items() if p.files})
        contents.extra["plan.json"] = plan
        contents.extra["report.txt"] = f"{report}\n"
        contents.extra["report.json"] = json.dumps(report.to_dict(), indent=1)
        for program in self.programs.values():
            contents.extra |= program.texts
            contents.extra[f"programs/{program.name}.pt2"] = _saved(program.rewritten)
        folder = target.parent / f".{target.name}.{uuid.uuid4().hex[:12]}.tmp"
        try:
            folder.mkdir(parents=True)
            pinned = self._write(folder, target.name, contents, digest)
            os.replace(folder / target.name, target)
        except OSError as error:
            raise ExportError(f"no package can be written to {os.fspath(target)!r}: {error}") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        seconds = {name: program.seconds for name, program in self.programs.items()}
        seconds["all"] = time.perf_counter() - started
        return Exported(target, pinned, target.stat().st_size, seconds, report)

    def _write(self, folder: Path, name: str, contents: Contents, plan: str) -> str:
        """Writes the archive into a folder of its own; returns its digest."""
        collected = Collected(self._outside())
        infos = {}
        for program in self.programs.values():
            wanted = self._constants(folder, program)
            known = {**program.rewritten.constants, **program.rewritten.state_dict}
            constants = {
                constant: collected.add(inside(constant, program.traced.inner), known[constant])
                for constant in wanted
            }
            actions = {
                action: program.decision.plan.count(action) for action in ("sparse", "attention", "left")
            }
            infos[program.name] = ProgramInfo(
                program.inputs, program.ranges, constants, actions, round(program.seconds, 3)
            )
        device = next(iter(self.programs.values())).device
        manifest = Manifest(
            kind=self.kind,
            clsa=_version(),
            model=type(self.source.model).__name__,
            machine=describe(device),
            plan=plan,
            programs=infos,
            tensors=collected.infos,
            decoding=self.source.decoding,
        )
        contents.extra["package.json"] = manifest.to_json()
        contents.weights = collected.inside
        write(folder / name, contents)
        return seal(folder / name)

    def _outside(self) -> frozenset[str]:
        """Returns the names of what is left out: what a checkpoint of the model holds."""
        if self.weights == "inside":
            return frozenset()
        return frozenset(self.source.model.state_dict())

    def _constants(self, folder: Path, program: _Program) -> list[str]:
        """Returns the tensors that a program needs besides its inputs, by the names of its export."""
        if self.kind == "program":
            return constants_of(program.rewritten)
        probe = folder / f"{program.name}.pt2"
        write(probe, Contents(code={program.name: program.files}))
        found = Runner(probe, program.name, program.device).constants()
        probe.unlink()
        return found


def _report(programs: Mapping[str, _Program]) -> Report:
    plans = tuple(program.decision.plan for program in programs.values())
    return Report(plans, (), tuple(program.details for program in programs.values()))


def _version() -> str:
    import clsa_compile

    return clsa_compile.__version__


def _text(captured: Captured) -> str:
    return f"{HEADER}\n\n{code_of(captured.module)}"


def _kernels(captured: Captured) -> dict[str, str]:
    """Returns the sources of the kernels that a lowered graph launches, by record."""
    launches = (launch_of(node) for node in captured.graph.nodes)
    files = {launch.name: launch.file for launch in launches if launch is not None}
    return {f"kernels/{name}.py": file.read_text(encoding="utf-8") for name, file in files.items()}


def _saved(program: ExportedProgram) -> bytes:
    """Returns a program as torch.export saves it, without weights and example inputs."""
    buffer = io.BytesIO()
    torch.export.save(without_weights(program), buffer)
    return buffer.getvalue()


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
            raise ExportError(
                f"the argument {spec.arg.name!r} is no tensor and may vary; give it as a tensor"
            )
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
            raise ExportError(
                f"the model returns something that is no tensor: {spec.arg}; return tensors only"
            )


def _ranges(program: ExportedProgram) -> dict[str, tuple[int, int]]:
    """Returns the least and the most that each name among the sizes may be."""
    most = 1 << 62
    return {
        str(symbol): (int(max(limits.lower, 0)), int(min(limits.upper, most)))
        for symbol, limits in program.range_constraints.items()
    }
