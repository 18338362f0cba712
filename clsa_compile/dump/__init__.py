"""Dumps: what a graph was at each stage, in a numbered folder a graph. `docs/debugging.md` reads one."""

from __future__ import annotations

import difflib
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from clsa_compile.config import Options
from clsa_compile.dump.code import HEADER, code_of
from clsa_compile.dump.dot import dot_of
from clsa_compile.dump.findings import findings, in_words
from clsa_compile.dump.folder import Folder
from clsa_compile.dump.kernels import write_kernels
from clsa_compile.dump.repro import repro
from clsa_compile.ir.captured import Captured
from clsa_compile.ir.plan import Plan
from clsa_compile.passes.lower import Choice
from clsa_compile.passes.pipeline import Decision

__all__ = ["Dump"]

_FILES = {
    "captured": "00_captured.py",
    "canonical": "01_canonical.py",
    "rewritten": "05_rewritten.py",
    "lowered": "06_lowered.py",
}
# What was done when a stage is reached.
_WORK = {
    "captured": "capture",
    "canonical": "canonicalize",
    "matched": "match",
    "plan": "plan",
    "rewritten": "rewrite",
    "lowered": "lower",
    "compiled": "inductor",
}


@dataclass(slots=True)
class Dump:
    """One graph's folder, told of each stage as it is reached. Raises OptionError where it cannot be written.

    The seconds that it counts are those of the stages: its own clock stands while it writes.
    """

    folder: Folder
    options: Options
    inputs: Sequence[Any]
    _texts: dict[str, str] = field(default_factory=dict)
    _seconds: dict[str, float] = field(default_factory=dict)
    _since: float = field(default_factory=time.perf_counter)

    def stage(self, name: str, captured: Captured) -> None:
        """Writes a graph as Python; the first time also a script that reproduces it."""
        self._lap(name)
        if name in _FILES:
            self._texts[name] = HEADER + "\n\n" + code_of(captured.module)
            self.folder.write(_FILES[name], self._texts[name])
        if name == "captured":
            self.folder.write("repro.py", repro(captured, self.inputs, self.options))
        if name == "rewritten":
            self._write_difference()
        if name == "lowered":
            write_kernels(self.folder, captured)
        self._since = time.perf_counter()

    def decision(self, captured: Captured, decision: Decision) -> None:
        """Writes what was found, and what will be done with it."""
        self._lap("plan")
        found = findings(captured, decision.sites)
        self.folder.write("02_sites.txt", in_words(found))
        self.folder.write_json("02_sites.json", found)
        self.folder.write("03_analysis.dot", dot_of(decision))
        self.folder.write_json("04_plan.json", decision.plan.to_dict())
        self.folder.write("04_plan.txt", _report(decision.plan))
        if self.options.skip:
            self.folder.write("repro.py", repro(captured, self.inputs, self.options, decision.plan))
        self._since = time.perf_counter()

    def choices(self, choices: tuple[Choice, ...]) -> None:
        """Writes what each contract op became."""
        self.folder.write_json("07_choices.json", [asdict(choice) for choice in choices])

    def left(self, why: str, error: BaseException | None = None) -> None:
        """Writes why the graph went to Inductor as it came, with where that was found out."""
        where = "".join(traceback.format_exception(error)) if error is not None else ""
        self.folder.write("left.txt", f"{why}\n\n{where}".rstrip() + "\n")

    def done(self) -> None:
        """Writes the seconds of each stage, of which the last is Inductor's."""
        self._lap("compiled")
        self.folder.write_json("timings.json", {k: round(v, 6) for k, v in self._seconds.items()})

    def _lap(self, stage: str) -> None:
        self._seconds[_WORK[stage]] = time.perf_counter() - self._since

    def _write_difference(self) -> None:
        before, after = (self._texts[name].splitlines(keepends=True) for name in ("captured", "rewritten"))
        lines = difflib.unified_diff(before, after, _FILES["captured"], _FILES["rewritten"])
        self.folder.write("diff.patch", "".join(lines))


def _report(plan: Plan) -> str:
    # The report looks at graphs through the backend, which dumps.
    from clsa_compile.inspection import Report

    return f"{Report((plan,))}\n"
