"""What sharing costs on the synthetic tasks, by task, length and depth, as a table, plain data and a page."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from clsa_compile.calibration import page

__all__ = ["TaskCell", "TaskReport"]


@dataclass(frozen=True, slots=True)
class TaskCell:
    """One task at one length in tokens and one depth (0..1, None where all of the text counts).

    dense_accuracy, accuracy: the share of samples whose greedy token is right at every position of the
    answer, given the right ones before it. dense_logprob, logprob: the mean log-probability of an answer's
    token, in nats. agreement: the share of answer tokens for which both have the same greedy token.
    """

    task: str
    length: int
    depth: float | None
    samples: int
    dense_accuracy: float
    accuracy: float
    dense_logprob: float
    logprob: float
    agreement: float

    @property
    def logprob_difference(self) -> float:
        """What the plan adds to the mean log-probability of an answer's token; below 0 it costs."""
        return self.logprob - self.dense_logprob


@dataclass(frozen=True, slots=True)
class TaskReport:
    """What was measured, teacher-forced and with sparse prompts; dense is the model without a plan."""

    topk: int
    schedule: str
    seed: int
    cells: tuple[TaskCell, ...]

    @property
    def samples(self) -> int:
        """The samples of all cells."""
        return sum(cell.samples for cell in self.cells)

    @property
    def dense_accuracy(self) -> float:
        """The share of all samples that the dense model has right."""
        return self._mean(lambda cell: cell.dense_accuracy)

    @property
    def accuracy(self) -> float:
        """The share of all samples that the plan has right."""
        return self._mean(lambda cell: cell.accuracy)

    @property
    def logprob_difference(self) -> float:
        """The mean over all samples of what the plan adds to the log-probability of an answer's token."""
        return self._mean(lambda cell: cell.logprob_difference)

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain data, ready for JSON."""
        cells = [{**asdict(cell), "logprob_difference": cell.logprob_difference} for cell in self.cells]
        totals = ("samples", "dense_accuracy", "accuracy", "logprob_difference")
        own = {"topk": self.topk, "schedule": self.schedule, "seed": self.seed}
        return {**own, **{name: getattr(self, name) for name in totals}, "cells": cells}

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Writes one self-contained HTML file. Raises OptionError where it cannot be written."""
        page.write(path, page.render(None, self))

    def headline(self) -> str:
        """Returns the report in one line."""
        return (
            f"tasks, schedule {self.schedule}, {self.topk} tokens: {self.dense_accuracy:.1%} right -> "
            f"{self.accuracy:.1%}, log-probability of an answer's token {self.logprob_difference:+.3f} nats, "
            f"over {self.samples} samples"
        )

    def rows(self) -> list[tuple[str, ...]]:
        """Returns a cell a row, in the order of `COLUMNS`."""
        return [_row(cell) for cell in self.cells]

    def __rich__(self) -> Table:
        return self._table(title=self.headline())

    def __str__(self) -> str:
        out = io.StringIO()
        Console(file=out, width=110, force_terminal=False, color_system=None).print(self._table(box=None))
        return "\n".join((self.headline(), *(line.rstrip() for line in out.getvalue().rstrip().splitlines())))

    def _table(self, **style: Any) -> Table:
        table = Table(pad_edge=False, header_style="bold", title_justify="left", **style)
        for column in COLUMNS:
            table.add_column(column, justify="left" if column == "task" else "right")
        for row in self.rows():
            table.add_row(*row)
        return table

    def _mean(self, of: Callable[[TaskCell], float]) -> float:
        return sum(cell.samples * of(cell) for cell in self.cells) / self.samples


COLUMNS: Sequence[str] = (
    "task",
    "length",
    "depth",
    "samples",
    "dense right",
    "right",
    "dense logprob",
    "logprob",
    "difference",
    "same token",
)


def _row(cell: TaskCell) -> tuple[str, ...]:
    return (
        cell.task,
        str(cell.length),
        "-" if cell.depth is None else f"{cell.depth:g}",
        str(cell.samples),
        f"{cell.dense_accuracy:.0%}",
        f"{cell.accuracy:.0%}",
        f"{cell.dense_logprob:.3f}",
        f"{cell.logprob:.3f}",
        f"{cell.logprob_difference:+.3f}",
        f"{cell.agreement:.0%}",
    )
