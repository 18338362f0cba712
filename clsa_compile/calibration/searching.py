"""Searching: which layers may share, for a dense model or one with indexers, judged on text of its own."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from clsa_compile.calibration.finding import Found, found
from clsa_compile.calibration.given import Model, sequences
from clsa_compile.calibration.index_finder import IndexFinder
from clsa_compile.calibration.mass_finder import MassFinder
from clsa_compile.calibration.progress import Progress
from clsa_compile.calibration.stages import Stages
from clsa_compile.config import Options, is_budget, is_count
from clsa_compile.errors import OptionError
from clsa_compile.ir.sharing import SharingPlan

__all__ = ["Asked", "find", "search"]

# One sequence in so many is not used to find a plan, but to judge it.
HELD_OUT = 4


def search(
    model: Any,
    batches: Any,
    *,
    topk: int | None = None,
    budget: float | None = None,
    anchors: int | None = None,
    scope: str = "layer",
    keep_first: int = 4,
    keep_last: int = 32,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> SharingPlan:
    """Finds which layers may attend to tokens that earlier ones choose: `topk` of them in a dense model.

    In a model with indexers, which select as many tokens as they were trained to, it finds which of them
    need to run; `topk`, `scope` and what is kept are not for these. `batches` are token ids [B, T] or [T],
    or what a tokenizer returns, many of them; the last quarter of the sequences only judges what the others
    found, so mix kinds of text. `anchors` layers choose (in a dense model they attend to all tokens). With a
    `budget`, an increase of perplexity (0.01 is one percent), layers become anchors too until it holds on
    the held-out part; without `anchors` their least number is found. `folder` keeps finished stages: a
    search that was killed loses the one that it was in: a run over one sequence, one fit, or the costs of
    moving anchors. The same arguments and seed find the same plan. Raises OptionError for what cannot be
    searched, KeepError where `folder` is full.
    """
    asked = Asked(topk, budget, anchors, scope, keep_first, keep_last, seed)
    return find(model, batches, asked, folder, progress).plan


@dataclass(frozen=True, slots=True)
class Asked:
    """What `search` was asked for. Raises OptionError for what cannot be."""

    topk: int | None = None
    budget: float | None = None
    anchors: int | None = None
    scope: str = "layer"
    keep_first: int = 4
    keep_last: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.budget is None and self.anchors is None:
            raise OptionError("give 'anchors', the number of layers that choose, or a 'budget', or both")
        checks = (
            ("budget", self.budget is None or is_budget(self.budget), "a number above 0, such as 0.01"),
            ("anchors", self.anchors is None or is_count(self.anchors, 1), "a number from 1"),
            ("seed", is_count(self.seed, 0), "a number from 0"),
        )
        for name, ok, accepted in checks:
            if not ok:
                raise OptionError(f"{name!r} is {getattr(self, name)!r}; accepted: {accepted}")

    def options(self) -> Options:
        """Returns the same as options of the backend, which check the rest."""
        if self.topk is None:
            return Options()
        names = ("topk", "scope", "keep_first", "keep_last")
        return Options.read({**{name: getattr(self, name) for name in names}, "prefill": "sparse"})


def find(
    model: Any,
    batches: Any,
    asked: Asked,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Found:
    """Does what `search` says, and returns what was measured too."""
    options = asked.options()
    given = sequences(batches, {"topk": asked.topk or 0}, model)
    if len(given) < 2:
        raise OptionError("a search needs two sequences at least, one to find a plan and one to judge it")
    held = max(1, round(len(given) / HELD_OUT))
    known = Model(model, given[0], Stages(folder))
    _fits(known, asked, given[0])
    known.long_enough(given)
    make = IndexFinder if known.topk else MassFinder
    with Progress(progress) as shown:
        finder = make(known, given[:-held], given[-held:], options, asked.seed, shown)
        return found(finder, asked.anchors, asked.budget)


def _fits(known: Model, asked: Asked, first: Tensor) -> None:
    """Guards a search against what the model cannot be asked."""
    known.check_topk(asked.topk, "the search finds which of them need to run")
    if asked.anchors is None:
        return
    able = len(known.choosers) if known.topk else len(known.layers)
    if asked.anchors > able:
        raise OptionError(f"anchors={asked.anchors}, but only {able} layers can share; give fewer")
    if known.topk and asked.anchors <= len(breaks := known.forward(first).breaks()):
        layer, why = next(iter(breaks.items()))
        raise OptionError(
            f"anchors={asked.anchors}, but layers 0, {', '.join(map(str, breaks))} have to choose: they "
            f"cannot read the index before their own. Layer {layer} {why}. Give {1 + len(breaks)} at least"
        )
