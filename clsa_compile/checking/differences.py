"""Differences: how far each tensor is from what it should be, and how far it may be."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

__all__ = ["Check", "Difference", "Measure", "differences"]

Named = Mapping[str, Tensor]

# A result may be so many times as far from float64 as eager is, and so many roundings of its largest value.
FACTOR = 3
ROUNDINGS = 32
# Where eager is the measure both round.
ROUNDINGS_OF_TWO = 1024


@dataclass(frozen=True, slots=True)
class Difference:
    """How far one tensor is from what float64 gives: the largest absolute difference of its elements.

    `inductor` and `clsa` are NaN where they were not run, and infinite where theirs has another shape.
    """

    name: str
    eager: float
    clsa: float
    budget: float
    inductor: float = math.nan

    @property
    def departs(self) -> bool:
        """Whether clsa's is further away than the budget allows."""
        return not self.clsa <= self.budget


@dataclass(frozen=True, slots=True)
class Check:
    """What was compared. `layers` are outputs of attentions in order of execution, `tensors` what the call
    returned and what it left in its arguments, as caches. `blame` names the rewrites without which nothing
    departs; `changes_results` says that the options ask for other results than the model's, `note` what they
    were compared with where that is not float64.
    """

    layers: tuple[Difference, ...]
    tensors: tuple[Difference, ...]
    blame: tuple[str, ...] = ()
    changes_results: bool = False
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether everything is within its budget."""
        return not any(d.departs for d in (*self.layers, *self.tensors))

    @property
    def first(self) -> Difference | None:
        """The first layer that departs, or else the first tensor, or None."""
        return next((d for d in (*self.layers, *self.tensors) if d.departs), None)

    def __str__(self) -> str:
        lines = [self._verdict()]
        if self.changes_results:
            lines.append("the options change results, so that is part of what is compared here")
        if self.note:
            lines.append(self.note)
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("", "eager", "inductor", "clsa", "budget", ""):
            table.add_column(column, justify="left" if not column else "right")
        for d in (*self.layers, *self.tensors):
            numbers = ("" if math.isnan(x) else f"{x:.2e}" for x in (d.eager, d.inductor, d.clsa, d.budget))
            table.add_row(d.name, *numbers, "departs" if d.departs else "")
        out = io.StringIO()
        Console(file=out, width=120, force_terminal=False, color_system=None).print(table)
        return "\n".join((*lines, *(line.rstrip() for line in out.getvalue().rstrip().splitlines())))

    def _verdict(self) -> str:
        first = self.first
        if first is None:
            return f"clsa agrees: all {len(self.layers)} attentions and {len(self.tensors)} tensors"
        blame = "; ".join(self.blame) or "no single rewrite explains it"
        return f"{first.name} departs by {first.clsa:.2e}, {first.budget:.2e} are allowed: {blame}"


@dataclass(frozen=True, slots=True)
class Measure:
    """What results and layers should be, and what they are in eager mode; `roundings` are allowed besides."""

    expected: tuple[Named, Named]
    eager: tuple[Named, Named]
    roundings: int
    note: str = ""


def differences(
    measure: Measure, part: int, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]
) -> tuple[Difference, ...]:
    """Returns the differences of results (part 0) or layers (part 1) that eager has too."""
    expected, eager = measure.expected[part], measure.eager[part]
    made = []
    for name in (n for n in expected if n in eager):
        own = largest(eager[name], expected[name])
        size = expected[name].abs().nan_to_num(0.0, 0.0, 0.0).max().item() if expected[name].numel() else 0.0
        budget = FACTOR * own + measure.roundings * torch.finfo(eager[name].dtype).eps * size
        inductor = largest(theirs.get(name), expected[name]) if theirs else math.nan
        made.append(Difference(name, own, largest(ours.get(name), expected[name]), budget, inductor))
    return tuple(made)


def largest(tensor: Tensor | None, reference: Tensor) -> float:
    """Returns the largest difference; infinite where one is missing, shaped otherwise, or not finite."""
    if tensor is None or tensor.shape != reference.shape:
        return math.inf
    if not tensor.numel():
        return 0.0
    tensor = tensor.double()
    same = (tensor == reference) | (tensor.isnan() & reference.isnan())
    return torch.where(same, 0.0, (tensor - reference).abs()).nan_to_num(math.inf, math.inf).max().item()
