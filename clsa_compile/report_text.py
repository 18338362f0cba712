"""A report as text: lines and tables, for a terminal of any width, or plain at a width of its own."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import sympy
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from clsa_compile.ir.plan import Group, Plan, SitePlan
from clsa_compile.layers import Index, Layer
from clsa_compile.passes.savings import in_words
from clsa_compile.prediction import Cost, Prediction, rounded

if TYPE_CHECKING:
    from clsa_compile.report import Details, Report

__all__ = [
    "alike",
    "attention_words",
    "break_even_words",
    "formula_words",
    "headlines",
    "index_words",
    "parts",
    "plain",
    "ranges",
]

WIDTH = 160
# So many layers in a row are written as a range, in sentences.
MANY = 5


def plain(report: Report) -> str:
    """Returns a report as text without colours, tables WIDTH columns wide."""
    out = io.StringIO()
    console = Console(file=out, width=WIDTH, force_terminal=False, color_system=None)
    for part in parts(report):
        if isinstance(part, Text):
            out.write(f"{part.plain}\n")
        else:
            console.print(part)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())


def parts(report: Report) -> Iterator[RenderableType]:
    """Yields lines (Text) and tables."""
    yield from map(Text, headlines(report))
    for number, plan in enumerate(report.plans):
        details = report.details[number] if number < len(report.details) else None
        if details is None:
            yield _plan_table(plan)
        else:
            yield _layer_table(details, report.lengths)
            yield from map(Text, _left(details.layers))
        yield from map(Text, _of_plan(plan, number))
        if details is not None and details.prediction is not None:
            yield from _prediction(details.prediction, report.lengths)


def headlines(report: Report) -> Iterator[str]:
    """Yields what was found in one line, and a line for each graph that is left whole."""
    counts = report.counts()
    graphs = "graph" if len(report.plans) == 1 else "graphs"
    yield (
        f"clsa: {counts['sites']} attentions in {len(report.plans)} {graphs}: "
        f"{counts['sparse_attention']} sparse over selected tokens "
        f"({counts['index_topk']} indexers run), {counts['attention']} dense with each key read once, "
        f"{counts['left']} left as they were"
    )
    for reason in report.left_graphs:
        yield f"left to Inductor whole: {reason}"


def _of_plan(plan: Plan, number: int) -> Iterator[str]:
    yield from _groups(plan)
    yield from _schedule(plan)
    if plan.skipped:
        yield f"left out on request: {', '.join(plan.skipped)}"
    if plan.savings is not None:
        yield in_words(plan.savings)
        if plan.savings.idle:
            yield f"`inspect(...).plans[{number}].strip(model)` frees the weights that are no longer read"


# -- layers ----------------------------------------------------------------------------------------


def _table(columns: Iterable[str], numbers: bool = False) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold", justify="right" if numbers else "left")
    return table


def _plan_table(plan: Plan) -> Table:
    table = _table(("layers", "module", "kind", "action", "heads", "mask", "index", "reason"))
    for run in _runs(plan.sites):
        entry = run[0]
        table.add_row(
            _numbers(run),
            _module(run),
            entry.kind,
            entry.action,
            f"{entry.heads}/{entry.kv_heads}" if entry.heads else "",
            entry.mask,
            f"top {entry.topk}" + (f" of {entry.score}" if entry.score else "") if entry.topk else "",
            entry.reason,
        )
    return table


def _layer_table(details: Details, lengths: Sequence[int]) -> Table:
    columns = ["layers", "module", "attention", "mask", "cache", "index", "what will run"]
    found = details.prediction
    costs = {} if found is None else found.layers
    tokens = 0 if found is None else found.sensible(lengths)[-1]
    table = _table([*columns, f"us at {tokens}"] if costs else columns)
    kinds: dict[Layer, list[Layer]] = {}
    for layer in details.layers:
        kinds.setdefault(alike(layer), []).append(layer)
    for kind, run in kinds.items():
        # Lines below say which layers read which one's tokens, where that differs.
        layer = run[0] if len({layer.runs for layer in run}) == 1 else replace(run[0], runs=kind.runs)
        row = [
            ranges((layer.layer for layer in run), 3),
            _module(run),
            attention_words(layer),
            layer.mask + (f" (window {layer.window})" if layer.window else ""),
            layer.cache,
            "" if layer.index is None else index_words(layer.index),
            _runs_as(layer),
        ]
        if costs:
            row.append(_times(costs.get(layer.ordinal), tokens))
        table.add_row(*(Text(cell) for cell in row))
    return table


def attention_words(layer: Layer) -> str:
    """Returns heads, widths, dtype and scale of an attention; nothing for one that is left."""
    if layer.action == "left":
        return ""
    width = str(layer.width)
    if layer.value_width != layer.width:
        width += f" and {layer.value_width}"
    heads = f"{layer.heads}/{layer.kv_heads} heads of {width} {layer.dtype}, scale {layer.scale:.4g}"
    more = [f"softcap {layer.softcap:g}"] if layer.softcap else []
    return ", ".join([heads, *more, *(["sinks"] if layer.sinks else [])])


def index_words(index: Index) -> str:
    """Returns what an indexer selects, and by which score."""
    return f"top {index.topk} of {index.score}, {index.heads} heads of {index.width}"


def _runs_as(layer: Layer) -> str:
    if layer.action == "left":
        return f"{layer.runs}, see below"
    kernels = f" [{', '.join(layer.kernels)}]" if layer.kernels else ""
    return f"{layer.runs}{kernels}" + (f"; {layer.reason}" if layer.reason else "")


def _times(costs: tuple[Cost, Cost] | None, tokens: int) -> str:
    if costs is None:
        return ""
    return " -> ".join(f"{cost.at(tokens)[2]:.4g}" for cost in costs)


def _left(layers: Sequence[Layer]) -> Iterator[str]:
    """Yields why layers are left, and the model's source line; once for those that have both in common."""
    reasons: dict[tuple[str, str, str], list[Layer]] = {}
    for layer in layers:
        if layer.action == "left":
            reasons.setdefault((layer.reason.partition(":")[0], layer.source, layer.caller), []).append(layer)
    for found in reasons.values():
        first = found[0]
        yield f"layer {first.layer} ({first.path}) is left as it was: {first.reason}"
        for place in (first.source, first.caller):
            if place:
                yield f"    {place}"
        if found[1:]:
            yield f"    so are layers {ranges((layer.layer for layer in found[1:]), MANY)}"


def _runs(entries: Sequence[SitePlan]) -> Iterator[list[SitePlan]]:
    """Yields runs of consecutive entries that differ in nothing but the layer."""
    run: list[SitePlan] = []
    for entry in entries:
        if run and _kin(entry) != _kin(run[0]):
            yield run
            run = []
        run.append(entry)
    if run:
        yield run


def _kin(site: SitePlan) -> SitePlan:
    return replace(site, ordinal=0, layer=0, path="")


def alike(layer: Layer) -> Layer:
    """Returns a layer without what tells it from those that are listed with it."""
    runs = re.sub(r"layer \d+", "an earlier layer", layer.runs)
    return replace(layer, ordinal=0, layer=0, path="", source="", caller="", group="", runs=runs)


def _numbers(run: Sequence[Any]) -> str:
    return str(run[0].layer) if len(run) == 1 else f"{run[0].layer}-{run[-1].layer}"


def _module(run: Sequence[Any]) -> str:
    return str(run[0].path) if len(run) == 1 else f"{run[0].path} ..."


# -- groups and schedules --------------------------------------------------------------------------


def _groups(plan: Plan) -> Iterator[str]:
    layers = {site.ordinal: site.layer for site in plan.sites}
    alone = [g for g in plan.groups if g.kind == "index" and len(g.members) == 1 and g.among is None]
    if len(alone) < MANY:
        alone = []
    for group in plan.groups:
        if group not in alone:
            yield _describe(group, plan)
        elif group is alone[0]:
            yield f"layers {ranges([layers[g.anchor] for g in alone], 3)} have an index of their own each"


def ranges(numbers: Iterable[int], least: int) -> str:
    """Returns ascending numbers as `0-9, 12`: so many in a row, and more, as a range."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][-1] + 1:
            found[-1].append(number)
        else:
            found.append([number])
    texts = [[f"{run[0]}-{run[-1]}"] if len(run) >= least else map(str, run) for run in found]
    return ", ".join(text for run in texts for text in run)


def _schedule(plan: Plan) -> list[str]:
    if plan.pools:
        layers = {site.ordinal: site.layer for site in plan.sites}
        members = ranges((layers[m] for pool in plan.pools for m in pool.members), MANY)
        tokens = " or ".join(sorted({str(pool.topk) for pool in plan.pools}))
        return [
            f"schedule {plan.schedule}: layers {members} attend to {tokens} tokens of each sequence "
            "instead of all. This changes results; `clsa_compile.evaluate` says by how much"
        ]
    layers = {site.ordinal: site.layer for site in plan.sites}
    again = [layers[group.anchor] for group in plan.groups if group.among is not None]
    changes = []
    if plan.shares:
        members = ranges((layers[ordinal] for ordinal in plan.shares), MANY)
        changes.append(f"layers {members} do not run their indexers")
    if again:
        changes.append(f"layers {ranges(again, MANY)} run them over offered tokens only")
    if not changes:
        return []
    lines = [
        f"schedule {plan.schedule}: {', '.join(changes)}. This changes results; the model was trained to "
        "select tokens in each of them"
    ]
    if plan.invalid:
        members = ranges((layers[ordinal] for ordinal in plan.invalid), MANY)
        lines.append(
            f"the index keys of layers {members} are not written: no other code may select tokens by them"
        )
    return lines


def _describe(group: Group, plan: Plan) -> str:
    layers = {site.ordinal: site.layer for site in plan.sites}
    members = ranges((layers[m] for m in group.members), MANY)
    if group.kind == "kv":
        return f"layers {members} read the same keys and values"
    if group.kind == "mass":
        subject = f"layers {members} attend" if len(group.members) > 1 else f"layer {members} attends"
        return f"{subject} to the {group.topk} tokens that layer {layers[group.anchor]} looked at most"
    if group.kind == "distilled":
        subject = f"layers {members} share" if len(group.members) > 1 else f"layer {members} has"
        return f"{subject} an index trained for them, over the keys of layer {layers[group.anchor]}"
    among = ""
    if group.among is not None:
        among = f", selected from the {group.pool} best tokens of layer {layers[group.among]}"
    if len(group.members) == 1:
        return f"layer {members} has an index of its own{among}"
    equal = f": {group.repeats + 1} indexers compute the same, one runs" if group.repeats else ""
    return f"layers {members} share the index of layer {layers[group.anchor]}{equal}{among}"


# -- prediction ------------------------------------------------------------------------------------


def _prediction(found: Prediction, lengths: Sequence[int]) -> Iterator[RenderableType]:
    rows = f"{found.queries} tokens" if found.queries > 1 else "a token"
    yield Text(f"predicted for {rows} a sequence, batch {found.batch}, on {found.device}:")
    table = _table(("tokens in cache", "bytes", "->", "flops", "->", "ms", "->", "faster"), numbers=True)
    for tokens in found.sensible(lengths):
        before, after = found.before.at(tokens), found.after.at(tokens)
        pairs = [text for i in (0, 1) for text in (_short(before[i]), _short(after[i]))]
        times = [f"{side[2] / 1e3:.4g}" for side in (before, after)]
        table.add_row(str(tokens), *pairs, *times, f"{before[2] / after[2]:.3g}x")
    yield table
    for name in ("bytes", "flops", "us"):
        sides = [formula_words(getattr(side, name)) for side in (found.before, found.after)]
        yield Text(f"    {name}(T) = {sides[0]}  ->  {sides[1]}")
    yield from map(Text, break_even_words(found))


def break_even_words(found: Prediction) -> Iterator[str]:
    """Yields from how many tokens on selected ones are faster, where any are selected."""
    if not found.break_evens:
        return
    each = sorted({at for at in found.break_evens.values() if at is not None})
    if not each:
        yield "no layer is faster over selected tokens than over all of them, at any length"
        return
    span = f"{each[0]} tokens" if len(each) == 1 else f"{each[0]} to {each[-1]} tokens, by layer,"
    whole = "never is" if found.break_even is None else f"is from {found.break_even} on"
    yield f"break-even: selected tokens are faster than all of them from {span} on; the whole step {whole}"


def formula_words(expression: Any) -> str:
    """Returns a formula in T, its broken numbers with four digits."""
    return str(sympy.sstr(rounded(expression), full_prec=False))


def _short(count: float) -> str:
    power = 0
    while count >= 999.5 and power < 5:
        count, power = count / 1000, power + 1
    return f"{count:.3g}{' kMGTP'[power]}".rstrip()
