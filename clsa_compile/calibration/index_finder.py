"""Search over a model with indexers: which of them need to run, and whose index the other layers read.

Where a layer's own attention would lie within another one's selection says who may read whose index; dynamic
programming finds the best anchors for that, and flips of single anchors follow the divergence from the model
as it is. Every layer reads the last anchor before it, as engines read a schedule: one that cannot, because it
selects another number of tokens, is an anchor, and so is the one after it that cannot read its index.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from torch import Tensor

from clsa_compile.calibration.finding import Found
from clsa_compile.calibration.fingerprint import data_hash
from clsa_compile.calibration.given import Model
from clsa_compile.calibration.judging import Judge
from clsa_compile.calibration.progress import Progress
from clsa_compile.config import Options
from clsa_compile.ir.routing import Pool
from clsa_compile.ir.sharing import SharingPlan
from clsa_compile.policies import planned
from clsa_compile.policies.anchors import best, flipped, followers, grown, moves, pair_cost, uniform

__all__ = ["IndexFinder"]

# Flips that are tried, for each anchor.
FLIPS = 4


class IndexFinder:
    """One search; anchors are counted among the layers that have an indexer in the model."""

    def __init__(
        self,
        model: Model,
        fitted: Sequence[Tensor],
        held: Sequence[Tensor],
        options: Options,
        seed: int,
        shown: Progress,
    ) -> None:
        self._model, self._shown = model, shown
        self._data = data_hash((*fitted, *held))
        self._fitted, self._held = (Judge(model, part, options) for part in (fitted, held))
        self._numbers = len(fitted), len(held)
        self._known: dict[tuple[int, ...], list[float]] = {}
        self._choosers = model.choosers
        self._fitted.dense(shown.stage("recording", len(fitted)))
        self._breaks = model.forward(fitted[0]).breaks()
        self._costs = self._pairs(self._fitted.serves())
        self._starts = best(self._costs)

    @property
    def fewest(self) -> int:
        """The fewest anchors: the first layer, and those that cannot read the index before theirs."""
        return 1 + len(self._breaks)

    @property
    def layers(self) -> int:
        """The layers that can choose."""
        return len(self._choosers)

    def anchors(self, count: int) -> tuple[int, ...]:
        """Returns the best anchors of a number, exact for kept mass, or evenly spread ones that lose less."""
        starts = [a for a in (self._starts[count - 1], uniform(self.layers, count)) if self._can(a)]
        return min(starts, key=lambda anchors: sum(self._divergences(anchors)))

    def flipped(self, anchors: tuple[int, ...]) -> tuple[int, ...]:
        """Returns anchors after flips, those that keep most mass first."""

        def likeliest(at: tuple[int, ...]) -> list[tuple[int, ...]]:
            return sorted(filter(self._can, moves(at, self.layers)), key=self._total)

        return flipped(self._divergences, anchors, likeliest, FLIPS * len(anchors))

    def _divergences(self, anchors: tuple[int, ...]) -> list[float]:
        if anchors not in self._known:
            plan = self._plan(anchors)
            done = self._shown.stage(f"trying {len(anchors)} anchors", self._numbers[0])
            figures, _ = self._fitted.measure(partial(planned.shares, plan), plan.digest(), done)
            self._known[anchors] = [f["kl"] / f["tokens"] for f in figures]
        return self._known[anchors]

    def grown(self, anchors: tuple[int, ...]) -> tuple[int, ...]:
        """Returns anchors with one more: the layer with which the others then keep most."""
        return grown(anchors, self.layers, self._total)

    def judged(self, anchors: tuple[int, ...]) -> Found:
        """Returns the plan of some anchors, and its quality on what was held out."""
        plan = self._plan(anchors)
        done = self._shown.stage(f"judging {len(anchors)} anchors", self._numbers[1])
        figures, pools = self._held.measure(partial(planned.shares, plan), plan.digest(), done)
        quality = self._held.quality(figures, pools)
        return Found(self._plan(anchors, quality.numbers()), quality)

    def _pairs(self, serves: Sequence[Sequence[float]]) -> list[list[float]]:
        """Returns [C, C] of the share [L, L] that layers keep: what chooser j loses by reading i's index.

        A layer that has no indexer goes where the one goes whose index it reads. Infinite where j cannot.
        """
        owned = {c: [i for i, owner in enumerate(self._model.owners) if owner == c] for c in self._choosers}

        def cost(anchor: int, owner: int) -> float:
            if anchor >= owner:
                return 0.0
            if any(anchor < broken <= owner for broken in self._breaks):
                return math.inf
            return sum(serves[owner][i] - serves[anchor][i] for i in owned[owner])

        return [[cost(anchor, owner) for owner in self._choosers] for anchor in self._choosers]

    def _can(self, anchors: tuple[int, ...]) -> bool:
        """Tells whether all layers can read the index of the last anchor before them."""
        return self._total(anchors) < math.inf

    def _total(self, anchors: tuple[int, ...]) -> float:
        return pair_cost(self._costs, anchors)

    def _plan(self, anchors: tuple[int, ...], quality: dict[str, float] | None = None) -> SharingPlan:
        chosen = {a: self._choosers[a] for a in anchors}
        for anchor, members in followers(anchors, self.layers).items():
            chosen.update(dict.fromkeys(members, self._choosers[anchor]))
        reads = {self._choosers[c]: anchor for c, anchor in chosen.items()}
        members_of: dict[int, list[int]] = {}
        for i, owner in enumerate(self._model.owners):
            if reads[owner] != i:
                members_of.setdefault(reads[owner], []).append(i)
        return SharingPlan(
            kind="index",
            topk=self._model.topk,
            layers=self._model.layers,
            pools=tuple(
                Pool(anchor, self._model.topk, {}, tuple(members)) for anchor, members in members_of.items()
            ),
            keep_first=0,
            keep_last=0,
            model=self._model.fingerprint,
            data=self._data,
            quality=quality or {},
        )
