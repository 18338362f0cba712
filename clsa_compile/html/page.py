"""The page of a report: what it shows, as plain values, and the file that it becomes."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import jinja2

from clsa_compile.html import plots
from clsa_compile.html.axes import scaled, tokens_words
from clsa_compile.html.heat import Heads, Map, heads_of, map_of
from clsa_compile.html.layer_graph import COLOURS, HEIGHT, Graph, graph_of
from clsa_compile.html.plots import CostPlot, Roofline, cost_plot, roofline
from clsa_compile.html.reading import colours
from clsa_compile.ir.plan import Plan, SitePlan
from clsa_compile.layers import Layer
from clsa_compile.prediction import Prediction
from clsa_compile.report_text import (
    attention_words,
    break_even_words,
    formula_words,
    headlines,
    index_words,
    plain,
    ranges,
)
from clsa_compile.sources import Call, Sources

if TYPE_CHECKING:
    from clsa_compile.report import Details, Report

__all__ = ["GraphPage", "pages", "render"]

# The files of this folder that a page is made of.
TEMPLATE, STYLE, SCRIPT = "page.html.jinja", "page.css", "page.js"


@dataclass(frozen=True, slots=True)
class Row:
    """One attention in the table; times: microseconds (before, after) by length, nothing where unknown."""

    layer: Layer
    colour: int | None
    attention: str
    index: str
    times: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Figures:
    """The cost of a call with so many tokens in the cache, before and after."""

    tokens: str
    ms: tuple[str, str]
    bytes: tuple[str, str]
    flops: tuple[str, str]
    faster: str


@dataclass(frozen=True, slots=True)
class Text:
    """A kernel: its name without the hash, the hash, its text, and who calls it, by layers."""

    name: str
    digest: str
    text: str
    calls: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True, slots=True)
class GraphPage:
    """What is shown of one graph of a report."""

    name: str
    headline: str
    plan: Plan
    prediction: Prediction | None
    picture: Graph
    rows: tuple[Row, ...]
    figures: tuple[Figures, ...]
    formulas: tuple[tuple[str, str, str], ...]
    break_even: tuple[str, ...]
    cost: CostPlot | None
    rooflines: tuple[Roofline, ...]
    map: Map | None
    heads: tuple[Heads, ...]
    plan_text: str
    plan_json: str
    sources: Sources | None
    texts: tuple[Text, ...]
    others: tuple[tuple[str, str], ...]


def render(reports: Mapping[str, Report], title: str = "", subtitle: str = "") -> str:
    """Returns the page of reports by name, such as "decode"; whatever it shows is escaped."""
    script = _file(SCRIPT)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    sharing = next((report.sharing for report in reports.values() if report.sharing is not None), None)
    graphs = [page for name, report in reports.items() for page in pages(name, report)]
    return _template().render(
        title=title or "what clsa would do",
        subtitle=subtitle,
        graphs=graphs,
        lengths=max((len(page.figures) for page in graphs), default=0),
        left=list(dict.fromkeys(reason for report in reports.values() for reason in report.left_graphs)),
        sharing=sharing,
        style=_file(STYLE),
        script=script,
        script_hash=digest,
        plots=plots,
        colours=COLOURS,
        box=HEIGHT,
    )


def pages(name: str, report: Report) -> Iterator[GraphPage]:
    """Yields what is shown of each graph of a report."""
    for number, plan in enumerate(report.plans):
        details = report.details[number] if number < len(report.details) else None
        whose = name if len(report.plans) == 1 else f"{name} graph {number + 1}".strip()
        yield _page(whose or "the graph", report, plan, details)


def _page(name: str, report: Report, plan: Plan, details: Details | None) -> GraphPage:
    from clsa_compile.report import Report

    layers = tuple(map(_bare, plan.sites)) if details is None else details.layers
    found = None if details is None else details.prediction
    sources = None if details is None else details.sources
    lengths = () if found is None else found.sensible(report.lengths)
    return GraphPage(
        name=name,
        headline=next(headlines(Report((plan,)))),
        plan=plan,
        prediction=found,
        picture=graph_of(plan, layers),
        rows=tuple(_rows(plan, layers, found, lengths)),
        figures=() if found is None else tuple(_figures(found, tokens) for tokens in lengths),
        formulas=() if found is None else _formulas(found),
        break_even=() if found is None else tuple(break_even_words(found)),
        cost=None if found is None else cost_plot(found, report.lengths),
        rooflines=() if found is None else tuple(r for t in lengths if (r := roofline(found, t)) is not None),
        map=map_of(plan),
        heads=heads_of(plan),
        plan_text=plain(Report((plan,))),
        plan_json=_json(plan.to_dict()),
        sources=sources,
        texts=() if sources is None else tuple(_texts(sources, layers)),
        others=()
        if sources is None
        else tuple((call.variant, _whose(call, layers)) for call in sources.others),
    )


def _bare(site: SitePlan) -> Layer:
    """Returns what a plan alone tells of an attention."""
    return Layer(
        ordinal=site.ordinal,
        layer=site.layer,
        path=site.path,
        kind=site.kind,
        action=site.action,
        runs={"sparse": f"{site.topk} tokens", "attention": "dense, each key read once"}.get(
            site.action, "left as it was"
        ),
        reason=site.reason,
        mask=site.mask,
    )


def _rows(
    plan: Plan, layers: Sequence[Layer], found: Prediction | None, lengths: Sequence[int]
) -> Iterator[Row]:
    painted = colours(plan, COLOURS)
    costs = {} if found is None else found.layers
    # Layers that cost the same are many, and sympy takes its time.
    known: dict[Any, tuple[tuple[str, str], ...]] = {}
    for layer in layers:
        pair = costs.get(layer.ordinal)
        if pair not in known:
            known[pair] = tuple(
                (f"{pair[0].at(t)[2]:,.1f}", f"{pair[1].at(t)[2]:,.1f}") if pair else ("", "")
                for t in lengths
            )
        yield Row(
            layer,
            painted.get(layer.ordinal),
            attention_words(layer) if layer.heads else "",
            "" if layer.index is None else index_words(layer.index),
            known[pair],
        )


def _figures(found: Prediction, tokens: int) -> Figures:
    before, after = found.before.at(tokens), found.after.at(tokens)
    return Figures(
        tokens_words(tokens),
        (scaled(before[2] / 1e6, "s"), scaled(after[2] / 1e6, "s")),
        (scaled(before[0], "B"), scaled(after[0], "B")),
        (scaled(before[1], "flop"), scaled(after[1], "flop")),
        f"{before[2] / after[2]:.3g}",
    )


def _formulas(found: Prediction) -> tuple[tuple[str, str, str], ...]:
    return tuple(
        (
            f"{name}(T)",
            formula_words(getattr(found.before, name)),
            formula_words(getattr(found.after, name)),
        )
        for name in ("bytes", "flops", "us")
    )


def _json(data: Mapping[str, Any]) -> str:
    """Returns plain data as JSON that can be read: an entry of a list takes one line."""
    lines = []
    for name, value in data.items():
        text = json.dumps(value)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            entries = ",\n".join(f"  {json.dumps(entry)}" for entry in value)
            text = f"[\n{entries}\n ]"
        lines.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}"


def _texts(sources: Sources, layers: Sequence[Layer]) -> Iterator[Text]:
    for kernel in sources.kernels:
        name, _, digest = kernel.name.rpartition("_")
        calls = tuple((call.variant, _whose(call, layers), _constants(call)) for call in kernel.calls)
        yield Text(name, digest, kernel.text, calls)


def _constants(call: Call) -> str:
    return ", ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in call.constants.items()
    )


def _whose(call: Call, layers: Sequence[Layer]) -> str:
    """Returns the layers that make a call, or the modules where those are in none."""
    # An indexer is a module inside of its layer's attention.
    by_path = {layer.path: layer.layer for layer in layers}
    numbers, modules = [], []
    for path in call.paths:
        parts = path.split(".")
        inside = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
        number = next((by_path[p] for p in inside if p in by_path), None)
        if number is None:
            modules.append(path)
        else:
            numbers.append(number)
    found = sorted(set(numbers))
    named = [f"layer{'s' if len(found) > 1 else ''} {ranges(found, 3)}"] if found else []
    return ", ".join([*named, *modules])


@cache
def _file(name: str) -> str:
    return (importlib.resources.files("clsa_compile.html") / name).read_text(encoding="utf-8")


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["scaled"] = scaled
    environment.filters["tokens"] = tokens_words
    environment.filters["layers"] = lambda ordinals, rows: ranges((rows[o].layer.layer for o in ordinals), 3)
    return environment.from_string(_file(TEMPLATE))
