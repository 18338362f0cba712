"""Searching: records what layers look at, finds who may choose for whom, and judges it on other text."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from clsa_compile.calibration.fingerprint import data_hash, sequence_hash
from clsa_compile.calibration.given import Model, sequences
from clsa_compile.calibration.judging import Judge
from clsa_compile.calibration.mixture import Costs, Selection, Table, fit
from clsa_compile.calibration.progress import Progress
from clsa_compile.calibration.quality import Quality
from clsa_compile.calibration.records import Record, chosen_rows, record
from clsa_compile.calibration.stages import Stages
from clsa_compile.config import Options
from clsa_compile.errors import OptionError
from clsa_compile.ir.routing import Pool, Request
from clsa_compile.ir.sharing import SharingPlan
from clsa_compile.policies import planned
from clsa_compile.policies.anchors import best, followers, improved, uniform

__all__ = ["Asked", "Found", "find", "search"]

# Rows of all sequences that are looked at, and elements of their records.
ROWS = 144
MOST_ELEMENTS = 400_000_000
FEWEST_ROWS, MOST_ROWS = 4, 48
# Mass is the square root of the probability: sums of roots find what several heads look at a little.
POWER = 0.5
# One sequence in so many is not used to find a plan, but to judge it.
HELD_OUT = 4


@dataclass(frozen=True, slots=True)
class Found:
    """A plan, and what was measured of it on the sequences that were held out."""

    plan: SharingPlan
    quality: Quality


def search(
    model: Any,
    batches: Any,
    *,
    topk: int,
    budget: float | None = None,
    anchors: int | None = None,
    scope: str = "layer",
    keep_first: int = 4,
    keep_last: int = 32,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> SharingPlan:
    """Finds which layers of a dense model may attend to `topk` tokens that earlier ones choose.

    `batches` are token ids [B, T] or [T], many of them; the last quarter of the sequences only judges what
    the others found, so mix kinds of text. `anchors` layers attend to all tokens and choose. With a `budget`,
    an increase of perplexity (0.01 is one percent), layers become anchors too until it holds on the held-out
    part; without `anchors` their least number is found. `folder` keeps finished stages: a search that was
    killed loses the one that it was in. The same arguments and seed find the same plan. Raises OptionError
    for what cannot be searched.
    """
    asked = Asked(topk, budget, anchors, scope, keep_first, keep_last, seed)
    return find(model, batches, asked, folder, progress).plan


@dataclass(frozen=True, slots=True)
class Asked:
    """What `search` was asked for. Raises OptionError for what cannot be."""

    topk: int
    budget: float | None = None
    anchors: int | None = None
    scope: str = "layer"
    keep_first: int = 4
    keep_last: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.budget is None and self.anchors is None:
            raise OptionError(
                "give 'anchors', the number of layers that attend to all tokens, or a 'budget', or both"
            )
        checks = (
            ("budget", self.budget is None or _is_budget(self.budget), "a number above 0, such as 0.01"),
            ("anchors", self.anchors is None or _is_count(self.anchors, 1), "a number from 1"),
            ("seed", _is_count(self.seed, 0), "a number from 0"),
        )
        for name, ok, accepted in checks:
            if not ok:
                raise OptionError(f"{name!r} is {getattr(self, name)!r}; accepted: {accepted}")

    def options(self) -> Options:
        """Returns the same as options of the backend, which check the rest."""
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
    given = sequences(batches, asked.topk)
    if len(given) < 2:
        raise OptionError("a search needs two sequences at least, one to find a plan and one to judge it")
    held = max(1, round(len(given) / HELD_OUT))
    known = Model(model, given[0], Stages(folder))
    if asked.anchors is not None and asked.anchors > len(known.layers):
        found = f"only {len(known.layers)} layers can share"
        raise OptionError(f"anchors={asked.anchors}, but {found}; give fewer")
    with Progress(progress) as shown:
        finder = _Finder(known, given[:-held], given[-held:], options, asked.seed, shown)
        return finder.found(asked.anchors, asked.budget)


class _Finder:
    """One search: what it has recorded, and the plans that it has judged."""

    def __init__(
        self,
        model: Model,
        fitted: Sequence[Tensor],
        held: Sequence[Tensor],
        options: Options,
        seed: int,
        shown: Progress,
    ) -> None:
        self._model, self._options, self._shown = model, options, shown
        self._layers = len(model.layers)
        self._seed = seed
        self._data = data_hash((*fitted, *held))
        self._judge = Judge(model, held, options)
        self._held = len(held)
        assert options.topk is not None
        self._selection = Selection(options.topk, options.keep_first, options.keep_last, POWER)
        records = self._records(fitted)
        self._table = Table(records, self._selection, model.device)
        self._costs = Costs(self._table, uniform(self._layers, max(2, self._layers // 4)))
        self._key = [model.key, data_hash(fitted), len(records[0].readable), seed, asdict(self._selection)]
        self._starts = best(self._costs.pairs())

    def found(self, count: int | None, budget: float | None) -> Found:
        """Returns the plan for a number of anchors, a budget, or both."""
        if count is None:
            assert budget is not None
            return self._least(self._anchors, 1, budget)
        first = self._anchors(count)
        if budget is None:
            return self._judged(first)
        grown = [first]
        while len(grown[-1]) < self._layers:
            grown.append(self._grown(grown[-1]))
        return self._least(lambda n: grown[n - count], count, budget)

    def _least(self, anchors: Callable[[int], tuple[int, ...]], low: int, budget: float) -> Found:
        """Returns the plan of the fewest anchors, `low` at least, that stays within a budget."""
        high, kept = self._layers, None
        while low < high:
            middle = (low + high) // 2
            tried = self._judged(anchors(middle))
            if tried.quality.perplexity_increase <= budget:
                high, kept = middle, tried
            else:
                low = middle + 1
        return kept if kept is not None else self._judged(anchors(high))

    def _records(self, sequences: Sequence[Tensor]) -> list[Record]:
        widths = sum(layer.heads + layer.kv_heads + 1 for layer in self._model.layers)
        longest = max(ids.shape[1] for ids in sequences)
        total = min(ROWS, MOST_ELEMENTS // (widths * longest))
        count = max(FEWEST_ROWS, min(MOST_ROWS, total // len(sequences)))
        done = self._shown.stage("recording", len(sequences))
        found = []
        for number, ids in enumerate(sequences):
            seed = self._seed + number

            def make(ids: Tensor = ids, seed: int = seed) -> dict[str, Tensor]:
                rows = chosen_rows(ids.shape[1], count, torch.Generator().manual_seed(seed))
                given = ids.to(self._model.device)
                return record(self._model.forward(given).graph(), given, rows, POWER, seed).to_tensors()

            key = [self._model.key, sequence_hash(ids), count, seed, POWER]
            found.append(Record.from_tensors(self._model.stages.tensors("record", key, make)))
            done()
        return found

    def _anchors(self, count: int) -> tuple[int, ...]:
        """Returns the best anchors of a number: exact for pairs, then moved for choosing together."""
        done = self._shown.stage(f"placing {count} anchors", None)

        def cost(anchors: tuple[int, ...], most: float = math.inf) -> float:
            done()
            return self._costs.total(anchors, most)

        def make() -> list[int]:
            start = min(self._starts[count - 1], uniform(self._layers, count), key=cost)
            return list(improved(cost, start, self._layers))

        return tuple(self._model.stages.data("anchors", [*self._key, count], make))

    def _grown(self, anchors: tuple[int, ...]) -> tuple[int, ...]:
        """Returns anchors with one more: the layer whose followers, and itself, then lose least."""
        free = [layer for layer in range(self._layers) if layer not in anchors]
        return min((tuple(sorted((*anchors, layer))) for layer in free), key=self._costs.total)

    def _judged(self, anchors: tuple[int, ...]) -> Found:
        """Returns the plan of some anchors with fitted weights, and its quality on what was held out."""
        plan = self._plan(anchors)
        request = Request(planned.route(plan), prompts=True)
        done = self._shown.stage(f"judging {len(anchors)} anchors", self._held)
        figures, pools = self._judge.measure(request, plan.digest(), done)
        quality = self._judge.quality(figures, pools)
        return Found(replace(plan, quality=quality.numbers()), quality)

    def _plan(self, anchors: tuple[int, ...]) -> SharingPlan:
        done = self._shown.stage(f"fitting {len(anchors)} anchors", len(followers(anchors, self._layers)))
        pools = []
        for anchor, members in followers(anchors, self._layers).items():
            pools.append(self._pool(anchors, anchor, members))
            done()
        return SharingPlan(
            topk=self._selection.topk,
            layers=self._model.layers,
            pools=tuple(pools),
            keep_first=self._selection.keep_first,
            keep_last=self._selection.keep_last,
            scope=self._options.scope,
            power=POWER,
            model=self._model.fingerprint,
            data=self._data,
        )

    def _pool(self, anchors: tuple[int, ...], anchor: int, members: tuple[int, ...]) -> Pool:
        kv_heads = {self._model.layers[m].kv_heads for m in members}
        # A set a kv head needs as many of them in every follower.
        sets = kv_heads.pop() if self._options.scope == "kv_head" and len(kv_heads) == 1 else 1
        return Pool(
            anchor=anchor,
            topk=self._selection.topk,
            sources=fit(self._table, anchors, anchor, members, sets),
            members=members,
            rows={m: tuple(range(sets)) for m in members} if sets > 1 else {},
            keep_first=self._selection.keep_first,
            keep_last=self._selection.keep_last,
            power=POWER,
        )


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_budget(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
