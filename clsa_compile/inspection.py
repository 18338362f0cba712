"""inspect(): the pipeline up to the plan, as a report; nothing is compiled and no cache advances."""

from __future__ import annotations

import copy
import io
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode

from clsa_compile.backend import examine
from clsa_compile.capture.dynamo import GraphBreak
from clsa_compile.config import Options
from clsa_compile.ir.plan import Group, Plan, SitePlan
from clsa_compile.passes.savings import in_words


@dataclass(frozen=True, slots=True)
class Report:
    """What was found in a model's graphs, and what a compile would do.

    `plans` holds one plan a graph (a graph break makes several); `left_graphs` says why whole graphs are
    left to Inductor.
    """

    plans: tuple[Plan, ...]
    left_graphs: tuple[str, ...] = ()

    @property
    def sites(self) -> tuple[SitePlan, ...]:
        """Every attention, in execution order: layer, path, kind, action, and the reason when left."""
        return tuple(site for plan in self.plans for site in plan.sites)

    @property
    def groups(self) -> tuple[Group, ...]:
        """Layers that share one index, or one pair of keys and values."""
        return tuple(group for plan in self.plans for group in plan.groups)

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain data, ready for JSON."""
        return {
            "graphs": [plan.to_dict() for plan in self.plans],
            "left_graphs": list(self.left_graphs),
            "counts": self.counts(),
        }

    def counts(self) -> dict[str, int]:
        """Returns what `torch._dynamo.utils.counters["clsa"]` would count."""
        return {
            "sites": len(self.sites),
            "sparse_attention": sum(plan.count("sparse") for plan in self.plans),
            "attention": sum(plan.count("attention") for plan in self.plans),
            "index_topk": sum(group.kind == "index" for group in self.groups),
            "left": sum(plan.count("left") for plan in self.plans),
        }

    def __str__(self) -> str:
        counts = self.counts()
        graphs = "graph" if len(self.plans) == 1 else "graphs"
        lines = [
            f"clsa: {counts['sites']} attentions in {len(self.plans)} {graphs}: "
            f"{counts['sparse_attention']} sparse over selected tokens "
            f"({counts['index_topk']} indexers run), {counts['attention']} dense with each key read once, "
            f"{counts['left']} left as they were"
        ]
        lines += [f"left to Inductor whole: {reason}" for reason in self.left_graphs]
        for plan in self.plans:
            lines.append(_render(plan))
            lines += [_describe(group, plan) for group in plan.groups]
            lines += _schedule(plan)
            if plan.skipped:
                lines.append(f"left out on request: {', '.join(plan.skipped)}")
            if plan.savings is not None:
                lines.append(in_words(plan.savings))
        return "\n".join(lines)


def inspect(
    model: Callable[..., Any], *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any
) -> Report:
    """Captures `model(*args, **kwargs)` and reports what `backend="clsa"` would do with it.

    The model does not run: weights may be on the meta device or fake, and caches among the arguments stay
    as they are. Capturing is done under `torch.no_grad()`. Raises OptionError for impossible options.
    """
    chosen = Options.read(options)
    seen = _Seen(chosen)
    try:
        _capture(seen.stop, True, model, args, kwargs)
    except _Stop:
        return seen.report()
    except GraphBreak:
        # Graph breaks: go through all graphs with made-up results instead of stopping at the first.
        seen = _Seen(chosen)
        _capture(seen.imagine, False, model, args, kwargs)
    return seen.report()


class _Stop(BaseException):
    """Ends a captured call before it has any effect."""


class _Seen:
    """A backend that only looks."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._plans: list[Plan] = []
        self._left: list[str] = []

    def report(self) -> Report:
        return Report(tuple(self._plans), tuple(self._left))

    def _look(self, gm: GraphModule, inputs: Sequence[Any]) -> None:
        result = examine(gm, inputs, self._options)
        if isinstance(result, Plan):
            self._plans.append(result)
        else:
            self._left.append(result)

    def stop(self, gm: GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        self._look(gm, inputs)

        def run(*_: Any) -> Any:
            raise _Stop

        return run

    def imagine(self, gm: GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        self._look(gm, inputs)
        outputs = next(n for n in gm.graph.nodes if n.op == "output").args[0]
        values = [n.meta.get("example_value") if isinstance(n, torch.fx.Node) else n for n in outputs]
        return lambda *_: [_imagined(v) for v in values]


def _imagined(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.zeros([int(s) for s in value.shape], dtype=value.dtype, device=value.device)
    return int(value) if isinstance(value, torch.SymInt) else value


class _CopyTensors(TorchFunctionMode):
    """Makes copy.deepcopy treat tensors with a function of its own."""

    def __init__(self, treat: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self._treat = treat

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__deepcopy__:
            return self._treat(args[0])
        return func(*args, **(kwargs or {}))


def _capture(backend: Any, fullgraph: bool, model: Any, args: Any, kwargs: Any) -> None:
    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    # Dynamo caches by code object: a code of its own leaves the model's cache alone.
    fresh = types.FunctionType(
        call.__code__.replace(co_name="inspected"), globals(), "inspected", None, call.__closure__
    )
    model, treat = _off_meta(model)
    # Objects such as caches are copied, their tensors are not: what Python does to them is undone.
    with _CopyTensors(treat):
        args, kwargs = copy.deepcopy((args, kwargs))
    with torch.no_grad():
        torch.compile(fresh, backend=backend, fullgraph=fullgraph)(*args, **kwargs)


def _off_meta(model: Any) -> tuple[Any, Callable[[torch.Tensor], torch.Tensor]]:
    """Returns a model with fake weights on the CPU in place of meta ones, and what does that to a tensor.

    Tensors that a model makes on the meta device while it is captured, as a growing cache does, are refused
    by Dynamo; on a fake CPU they are not.
    """
    if not isinstance(model, torch.nn.Module) or not any(p.is_meta for p in model.parameters()):
        return model, lambda x: x
    mode = FakeTensorMode()
    made: dict[int, torch.Tensor] = {}

    def fake(x: torch.Tensor) -> torch.Tensor:
        if not x.is_meta:
            return x
        if id(x) not in made:
            with mode:
                made[id(x)] = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cpu")
        return made[id(x)]

    copied = copy.deepcopy(model)
    for module in copied.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(fake(parameter), requires_grad=False)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else fake(buffer)
    return copied, fake


def _render(plan: Plan) -> str:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("layers", "module", "kind", "action", "heads", "mask", "index", "reason"):
        table.add_column(column, overflow="fold")
    for first, last, entry in _runs(plan.sites):
        layers = str(first.layer) if first is last else f"{first.layer}-{last.layer}"
        table.add_row(
            layers,
            entry.path if first is last else f"{first.path} ...",
            entry.kind,
            entry.action,
            f"{entry.heads}/{entry.kv_heads}" if entry.heads else "",
            entry.mask,
            f"top {entry.topk} of {entry.score}" if entry.topk else "",
            entry.reason,
        )
    out = io.StringIO()
    Console(file=out, width=160, force_terminal=False, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())


def _runs(sites: tuple[SitePlan, ...]) -> Iterator[tuple[SitePlan, SitePlan, SitePlan]]:
    """Yields (first, last, entry) for runs of consecutive sites that differ in nothing but the layer."""
    start = 0
    for i in range(1, len(sites) + 1):
        if i == len(sites) or _kin(sites[i]) != _kin(sites[start]):
            yield sites[start], sites[i - 1], sites[start]
            start = i


def _kin(site: SitePlan) -> tuple[Any, ...]:
    return (
        site.kind, site.action, site.reason, site.family, site.heads, site.kv_heads, site.scale,
        site.softcap, site.mask, site.score, site.topk,
    )  # fmt: skip


def _schedule(plan: Plan) -> list[str]:
    if plan.pools:
        layers = {site.ordinal: str(site.layer) for site in plan.sites}
        members = ", ".join(layers[m] for pool in plan.pools for m in pool.members)
        tokens = " or ".join(sorted({str(pool.topk) for pool in plan.pools}))
        return [
            f"schedule {plan.schedule}: layers {members} attend to {tokens} tokens of each sequence "
            "instead of all. This changes results; `clsa_compile.evaluate` says by how much"
        ]
    layers = {site.ordinal: str(site.layer) for site in plan.sites}
    again = [layers[group.anchor] for group in plan.groups if group.among is not None]
    changes = []
    if plan.shares:
        members = ", ".join(layers[ordinal] for ordinal in plan.shares)
        changes.append(f"layers {members} do not run their indexers")
    if again:
        changes.append(f"layers {', '.join(again)} run them over offered tokens only")
    if not changes:
        return []
    lines = [
        f"schedule {plan.schedule}: {', '.join(changes)}. This changes results; the model was trained to "
        "select tokens in each of them"
    ]
    if plan.invalid:
        members = ", ".join(layers[ordinal] for ordinal in plan.invalid)
        lines.append(
            f"the index keys of layers {members} are not written: no other code may select tokens by them"
        )
    return lines


def _describe(group: Group, plan: Plan) -> str:
    layers = {site.ordinal: site.layer for site in plan.sites}
    members = ", ".join(str(layers[m]) for m in group.members)
    if group.kind == "kv":
        return f"layers {members} read the same keys and values"
    if group.kind == "mass":
        subject = f"layers {members} attend" if len(group.members) > 1 else f"layer {members} attends"
        return f"{subject} to the {group.topk} tokens that layer {layers[group.anchor]} looked at most"
    among = ""
    if group.among is not None:
        among = f", selected from the {group.pool} best tokens of layer {layers[group.among]}"
    if len(group.members) == 1:
        return f"layer {members} has an index of its own{among}"
    equal = f": {group.repeats + 1} indexers compute the same, one runs" if group.repeats else ""
    return f"layers {members} share the index of layer {layers[group.anchor]}{equal}{among}"
