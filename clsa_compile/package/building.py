"""export(): the pipeline up to AOTInductor, ahead of time, into one file."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from clsa_compile.aot import Runner
from clsa_compile.capture.export import constants_of, inside
from clsa_compile.config import Options
from clsa_compile.errors import ExportError, OptionError
from clsa_compile.ir.sharing import SharingPlan
from clsa_compile.package.archive import Contents, write
from clsa_compile.package.digest import seal
from clsa_compile.package.machine import describe
from clsa_compile.package.manifest import Kind, Manifest, ProgramInfo
from clsa_compile.package.programs import Program, Source
from clsa_compile.package.weights import Collected
from clsa_compile.report import Report

__all__ = ["Exported", "export", "options_of", "target_of"]

Format = Literal["pt2", "program", "mlir"]
FORMATS = ("pt2", "program", "mlir")
WEIGHTS = ("inside", "outside")


@dataclass(frozen=True, slots=True)
class Exported:
    """A file that was written: its digest to pin it by, its bytes, seconds of each stage, the report."""

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

    A Hugging Face decoder called on tokens becomes two programs, "prefill" and "decode", over static caches
    that they write in place; batch, prompt and cache length may vary: `dynamic_shapes` gives each a number or
    a pair (least, most). An `attention_mask` among `kwargs` (whatever it holds) gives the programs
    a number of padding tokens for each row. Any other module becomes one program, "forward"; `args`, `kwargs`
    and `dynamic_shapes` are then torch.export's.

    format: "pt2" (AOTInductor's code, and the rewritten programs beside it), "program" (the programs alone,
    for any device) or "mlir". weights: "inside", or "outside": parameters are then bound when the package is
    loaded. plan: what `share` takes, a plan or its file.
    Raises OptionError, CaptureError and ExportError; then nothing is written.
    """
    chosen = options_of(options, plan)
    if isinstance(chosen.share, SharingPlan):
        chosen.share.check_weights(model.named_parameters())
    target = target_of(path, format, weights)
    started = time.perf_counter()
    source = Source.of(model, tuple(args), dict(kwargs or {}), dynamic_shapes)
    programs = source.programs(chosen)
    if format == "mlir":
        return _mlir(programs, target, weights == "inside", started)
    return _Built(format, programs, source, weights).write(target, started)


def options_of(options: Mapping[str, Any] | None, plan: Any) -> Options:
    """Returns the options of an export. Raises OptionError for what cannot be."""
    given = dict(options or {})
    if plan is not None:
        if "share" in given:
            raise OptionError("the plan is given twice: as 'plan' and as the option 'share'")
        given["share"] = plan if isinstance(plan, SharingPlan) else os.fspath(plan)
    return Options.read(given)


def target_of(path: str | os.PathLike[str], format: str, weights: str) -> Path:
    """Returns where a package goes. Raises ExportError for a request that is spelled wrongly."""
    target = Path(path)
    for name, value, accepted in (("format", format, FORMATS), ("weights", weights, WEIGHTS)):
        if value not in accepted:
            raise ExportError(f"{name} is {value!r}; accepted: {', '.join(map(repr, accepted))}")
    if format != "mlir" and target.suffix != ".pt2":
        raise ExportError(f"path is {os.fspath(target)!r}; a package's file ends in .pt2")
    return target


def _mlir(programs: Mapping[str, Program], target: Path, weights: bool, started: float) -> Exported:
    """Hands the rewritten programs, with contract ops and caches written in place, to the MLIR half."""
    from clsa_compile.mlir import write as write_mlir

    rewritten = {name: program.rewritten for name, program in programs.items()}
    inner = next(iter(programs.values())).traced.inner
    size = write_mlir(rewritten, target, weights=weights, inner=inner)
    seconds = {"all": time.perf_counter() - started}
    return Exported(target, "", size, seconds, _report(programs))


@dataclass(slots=True)
class _Built:
    """A package that is about to be written."""

    kind: Kind
    programs: Mapping[str, Program]
    source: Source
    weights: str

    def write(self, target: Path, started: float) -> Exported:
        """Compiles what is to be compiled and writes the file, whole or not at all."""
        report = _report(self.programs)
        contents = self._contents(report)
        folder = target.parent / f".{target.name}.{uuid.uuid4().hex[:12]}.tmp"
        try:
            folder.mkdir(parents=True)
            collected = self._collect(folder, contents)
            contents.weights = collected.inside
            write(folder / target.name, contents)  # torch names the archive's own folder after its file
            digest = seal(folder / target.name)
            os.replace(folder / target.name, target)
        except OSError as error:
            raise ExportError(f"no package can be written to {os.fspath(target)!r}: {error}") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        seconds = {name: program.seconds for name, program in self.programs.items()}
        seconds["all"] = time.perf_counter() - started
        return Exported(target, digest, target.stat().st_size, seconds, report)

    def _contents(self, report: Report) -> Contents:
        """Returns texts, rewritten programs and native code."""
        plan = json.dumps([p.decision.plan.to_dict() for p in self.programs.values()], indent=1)
        extra = {
            "plan.json": plan,
            "report.txt": f"{report}\n",
            "report.json": json.dumps(report.to_dict(), indent=1),
        }
        for program in self.programs.values():
            extra |= program.texts
            if self.kind == "pt2":
                program.compile(_hash(plan))
        saved = {name: program.saved() for name, program in self.programs.items()}
        return Contents(extra, saved, {name: p.files for name, p in self.programs.items() if p.files})

    def _collect(self, folder: Path, contents: Contents) -> Collected:
        """Returns the tensors that programs need, each once, and adds the manifest to the contents."""
        collected = Collected(self._outside())
        infos = {}
        for program in self.programs.values():
            known, names = program.tensors(), self._constants(folder, program)
            constants = {
                name: collected.add(inside(name, program.traced.inner), known[name]) for name in names
            }
            actions = {
                action: program.decision.plan.count(action) for action in ("sparse", "attention", "left")
            }
            infos[program.name] = ProgramInfo(
                program.inputs, program.ranges, constants, actions, round(program.seconds, 3)
            )
        for name, value in self.source.model.state_dict(keep_vars=True).items():
            collected.name(name, value)
        manifest = Manifest(
            kind=self.kind,
            clsa=_version(),
            model=type(self.source.model).__name__,
            machine=describe(next(iter(self.programs.values())).device),
            plan=_hash(contents.extra["plan.json"]),
            programs=infos,
            tensors=collected.infos,
            decoding=self.source.decoding,
        )
        contents.extra["package.json"] = manifest.to_json()
        contents.extra["layout.txt"] = manifest.layout()
        return collected

    def _outside(self) -> frozenset[str]:
        """Returns the names of what is left out: what a checkpoint of the model holds."""
        if self.weights == "inside":
            return frozenset()
        return frozenset(self.source.model.state_dict())

    def _constants(self, folder: Path, program: Program) -> list[str]:
        """Returns the tensors that a program needs besides its inputs, by the names of its export."""
        if self.kind == "program":
            return constants_of(program.rewritten)
        probe = folder / f"{program.name}.pt2"
        write(probe, Contents(code={program.name: program.files}))
        found = Runner(probe, program.name, program.device).constants()
        probe.unlink()
        return found


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _report(programs: Mapping[str, Program]) -> Report:
    plans = tuple(program.decision.plan for program in programs.values())
    return Report(plans, (), tuple(program.details for program in programs.values()))


def _version() -> str:
    import clsa_compile

    return clsa_compile.__version__
