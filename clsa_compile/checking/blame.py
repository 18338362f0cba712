"""Blame: leaves passes and layers out until nothing departs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch.fx import GraphModule

from clsa_compile.backend import transform
from clsa_compile.checking.calls import Call
from clsa_compile.checking.differences import Check, Measure, differences
from clsa_compile.checking.traced import Backend
from clsa_compile.config import Options
from clsa_compile.errors import ClsaError, ClsaWarning
from clsa_compile.ir.skips import PASSES

__all__ = ["blame", "interpreted", "least"]

# A pass that only changes how a graph is traced.
_KEPT = ("replay",)


def interpreted(options: Options) -> Backend:
    """Returns a backend that runs lowered graphs without Inductor."""

    def compiled(gm: GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        try:
            # What is left out on purpose need not be said.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ClsaWarning)
                return transform(gm, options).forward
        except ClsaError:
            return gm.forward

    return compiled


def blame(call: Call, options: Options, measure: Measure, made: Check, compiled: bool) -> tuple[str, ...]:
    """Returns what nothing departs without: the least layers, and every single pass."""
    if not any(d.departs for d in made.tensors):
        return ("no result shows it",)

    def departs(*skipped: str) -> bool:
        ours = call.run(interpreted(replace(options, skip=(*options.skip, *skipped))))
        return any(d.departs for d in differences(measure, 0, ours, {}))

    if compiled and not departs():
        return ("Inductor's code for the rewritten graph: run node by node it agrees",)
    layers = [d.name.partition(" (")[0].removeprefix("layer ") for d in made.layers]
    layers = [n for n in dict.fromkeys(layers) if n.isdigit() and n not in options.skip]
    found = []
    if layers and not departs(*layers):
        found.append(f"the rewrite of layer {', '.join(least(layers, departs))}")
    for name, meaning in PASSES.items():
        if name not in (*_KEPT, *options.skip) and not departs(name):
            found.append(f"the pass {name!r} (without it {meaning})")
    return tuple(found)


def least(names: Sequence[str], departs: Callable[..., bool]) -> list[str]:
    """Returns names of which none can be missing: without all of them nothing departs, found by halves."""
    kept: list[str] = []

    def search(some: Sequence[str], others: Sequence[str]) -> None:
        # Leaving out `kept` and `others` does not suffice, leaving out `some` too does.
        if len(some) == 1:
            kept.extend(some)
            return
        half = len(some) // 2
        first, second = some[:half], some[half:]
        if not departs(*kept, *others, *first):
            search(first, others)
        elif not departs(*kept, *others, *second):
            search(second, others)
        else:
            search(first, [*others, *second])
            search(second, others)

    search(names, [])
    return kept
