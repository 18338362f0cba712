"""Report: what was found in a model's graphs, what a compile would do, and what that is predicted to cost."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import RenderableType

from clsa_compile.errors import OptionError
from clsa_compile.ir.plan import Group, Plan, SitePlan
from clsa_compile.ir.sharing import SharingPlan
from clsa_compile.layers import Layer
from clsa_compile.prediction import LENGTHS, Prediction
from clsa_compile.sources import Sources

__all__ = ["SCHEMA", "Details", "Report"]

# Of `Report.to_dict`; a change of what a field means, or a field that goes, makes it a new one.
SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Details:
    """Of one graph: each attention, the cost of a call where one was understood, and its kernels' sources."""

    layers: tuple[Layer, ...]
    prediction: Prediction | None
    sources: Sources | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """What was found in a model's graphs, and what a compile would do.

    `plans` holds one plan a graph (a graph break makes several), `details` what `inspect` adds to it;
    `left_graphs` says why whole graphs are left to Inductor. Numbers are shown at `lengths`, tokens.
    `sharing` is the plan that the options named, where they named one.
    """

    plans: tuple[Plan, ...]
    left_graphs: tuple[str, ...] = ()
    details: tuple[Details, ...] = ()
    lengths: tuple[int, ...] = LENGTHS
    sharing: SharingPlan | None = None

    @property
    def sites(self) -> tuple[SitePlan, ...]:
        """Every attention, in execution order: layer, path, kind, action, and the reason when left."""
        return tuple(site for plan in self.plans for site in plan.sites)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Every attention, in execution order, with all that is known of it."""
        return tuple(layer for details in self.details for layer in details.layers)

    @property
    def groups(self) -> tuple[Group, ...]:
        """Layers that share one index, or one pair of keys and values."""
        return tuple(group for plan in self.plans for group in plan.groups)

    @property
    def predictions(self) -> tuple[Prediction, ...]:
        """The cost of each graph in which an attention was understood."""
        return tuple(d.prediction for d in self.details if d.prediction is not None)

    def at(self, *lengths: int) -> Report:
        """Returns the same report with its numbers at other lengths. Raises OptionError for none."""
        if not lengths or any(length < 1 for length in lengths):
            raise OptionError(f"lengths are {lengths!r}; give numbers of tokens, such as {LENGTHS}")
        return replace(self, lengths=tuple(sorted(set(lengths))))

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain data, ready for JSON."""
        graphs = [plan.to_dict() for plan in self.plans]
        for graph, details in zip(graphs, self.details, strict=False):
            prediction = details.prediction
            graph["layers"] = [asdict(layer) for layer in details.layers]
            graph["prediction"] = None if prediction is None else prediction.to_dict(self.lengths)
        return {
            "schema": SCHEMA,
            "graphs": graphs,
            "left_graphs": list(self.left_graphs),
            "counts": self.counts(),
        }

    def counts(self) -> dict[str, int]:
        """Returns what `torch._dynamo.utils.counters["clsa"]` would count."""
        return {
            "sites": len(self.sites),
            "sparse_attention": sum(plan.count("sparse") for plan in self.plans),
            "attention": sum(plan.count("attention") for plan in self.plans),
            "index_topk": sum(group.runs_index for group in self.groups),
            "left": sum(plan.count("left") for plan in self.plans),
        }

    def to_html(self, path: str | os.PathLike[str], title: str = "") -> None:
        """Writes one self-contained HTML file. Raises OptionError where it cannot be written."""
        from clsa_compile.html.file import write
        from clsa_compile.html.page import render

        write(path, render({"": self}, title))

    def __str__(self) -> str:
        from clsa_compile.report_text import plain

        return plain(self)

    def __rich_console__(self, *_: Any) -> Iterator[RenderableType]:
        from clsa_compile.report_text import parts

        yield from parts(self)
