"""Layers: what attentions put out, in a graph as it came and in the rewritten one, run node by node."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from clsa_compile.backend import decided
from clsa_compile.capture.dynamo import capture
from clsa_compile.checking.calls import Call
from clsa_compile.config import Options
from clsa_compile.errors import ClsaError
from clsa_compile.ir.captured import Captured
from clsa_compile.ir.plan import SitePlan
from clsa_compile.ir.skips import PASSES
from clsa_compile.passes.pipeline import carry_out
from clsa_compile.passes.rewrite import SITE

__all__ = ["layers"]


def layers(call: Call, options: Options | None) -> dict[str, Tensor]:
    """Returns every attention's output by layer: rewritten by some options, or as the model has it."""
    taps = _Taps(options)
    call.run(taps)
    return taps.found


@dataclass(slots=True)
class _Taps:
    """A backend that runs graphs node by node and keeps what attentions put out."""

    options: Options | None
    found: dict[str, Tensor] = field(default_factory=dict)
    _graphs: int = 0

    def __call__(self, gm: GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        number, self._graphs = self._graphs, self._graphs + 1
        try:
            module, taps = _tapped(gm, self.options)
        except ClsaError:
            return gm.forward  # no attention of it is rewritten
        names = {node: f"{'' if number == 0 else f'graph {number}, '}{name}" for node, name in taps.items()}

        def run(*values: Any) -> Any:
            interpreter = _Keeping(module, names)
            result = interpreter.run(*values)
            self.found.update(interpreter.found)
            return result

        return run


class _Keeping(Interpreter):
    def __init__(self, module: GraphModule, names: Mapping[Node, str]) -> None:
        super().__init__(module)
        self.found: dict[str, Tensor] = {}
        self._names = names

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n in self._names and isinstance(result, Tensor):
            self.found[self._names[n]] = result.detach().clone()
        return result


class _Reached(Exception):
    """The rewritten graph is there."""


def _tapped(gm: GraphModule, options: Options | None) -> tuple[GraphModule, dict[Node, str]]:
    """Returns a graph, rewritten or as it came, and the names of the nodes that attentions put out."""
    captured = capture(gm)
    chosen = options or Options(skip=tuple(PASSES))
    decision = decided(captured, chosen)
    names = {site.ordinal: _name(site) for site in decision.plan.sites}
    if options is None:
        return captured.module, {site.out: names[site.ordinal] for site in decision.sites.attention}

    def stop(stage: str, _: Captured) -> None:
        if stage == "rewritten":
            raise _Reached

    with contextlib.suppress(_Reached):
        carry_out(captured, decision, (), lambda kernel: kernel, stop)
    kept = {n: names[n.meta[SITE]] for n in captured.graph.nodes if SITE in n.meta}
    left = {s.out: names[s.ordinal] for s in decision.sites.attention if s.out in set(captured.graph.nodes)}
    captured.module.recompile()
    return captured.module, {**left, **kept}


def _name(site: SitePlan) -> str:
    return f"layer {site.layer} ({site.path})" if site.path else f"layer {site.layer}"
