"""Dumps: what a graph was at each stage, in a numbered folder a graph."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from clsa_compile.errors import OptionError
from clsa_compile.ir.captured import Captured
from clsa_compile.ir.plan import Plan
from clsa_compile.passes.lower import Choice

_STAGES = {"captured": 0, "plan": 1, "rewritten": 2, "lowered": 3, "choices": 4}


@dataclass(frozen=True, slots=True)
class Dump:
    """A folder for one compiled graph, or nothing when `folder` is None."""

    folder: Path | None

    @classmethod
    def open(cls, root: str | None) -> Dump:
        """Makes the next numbered folder under `root`. Raises OptionError when that cannot be."""
        if root is None:
            return cls(None)
        base = Path(root)
        try:
            base.mkdir(parents=True, exist_ok=True)
            number = 0
            while True:
                try:
                    (base / f"graph_{number:03d}").mkdir()
                    return cls(base / f"graph_{number:03d}")
                except FileExistsError:
                    number += 1
        except OSError as error:
            raise OptionError(
                f"the option 'dump' is {root!r}, where no folder can be made: {error}"
            ) from error

    def graph(self, stage: str, captured: Captured) -> None:
        """Writes a graph as readable Python."""
        if self.folder is None:
            return
        text = captured.module.print_readable(print_output=False)
        self._write(f"{_STAGES[stage]}_{stage}.py", text)

    def plan(self, plan: Plan) -> None:
        """Writes the plan as JSON."""
        self._write(f"{_STAGES['plan']}_plan.json", json.dumps(plan.to_dict(), indent=1))

    def choices(self, choices: tuple[Choice, ...]) -> None:
        """Writes what each contract op became."""
        text = json.dumps([asdict(c) for c in choices], indent=1)
        self._write(f"{_STAGES['choices']}_choices.json", text)

    def _write(self, name: str, text: str) -> None:
        if self.folder is None:
            return
        temporary = self.folder / f".{name}.tmp"
        temporary.write_text(text)
        os.replace(temporary, self.folder / name)
