"""Search over a dense model: layers that attend to all tokens choose for others, by weighted mass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial

from torch import Tensor

from clsa_compile.calibration.finding import Found
from clsa_compile.calibration.fingerprint import data_hash
from clsa_compile.calibration.given import Model
from clsa_compile.calibration.judging import Judge
from clsa_compile.calibration.mixture import Costs, Selection, Table, fit
from clsa_compile.calibration.progress import Progress
from clsa_compile.calibration.records import recorded
from clsa_compile.config import Options
from clsa_compile.ir.routing import Pool, Request, Weights
from clsa_compile.ir.sharing import SharingPlan
from clsa_compile.policies import planned
from clsa_compile.policies.anchors import best, flipped, followers, grown, improved, moves, uniform

__all__ = ["POWER", "MassFinder"]

# Flips that are tried: of those that the mass says cost at most so much more, the likeliest.
FLIPS = 10
NEAR = 1.2
# Mass is the square root of the probability: sums of roots find what several heads look at a little.
POWER = 0.5


class MassFinder:
    """One search over a model with weights: what it has recorded, and the plans that it has judged."""

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
        self._seed = seed
        self._data = data_hash((*fitted, *held))
        self._fitted, self._held = (Judge(model, part, options) for part in (fitted, held))
        self._numbers = len(fitted), len(held)
        assert options.topk is not None
        self._selection = Selection(options.topk, options.keep_first, options.keep_last, POWER)
        records = recorded(model, fitted, POWER, seed, shown.stage("recording", len(fitted)))
        self._table = Table(records, self._selection, model.device)
        self._costs = Costs(self._table, uniform(self.layers, max(2, self.layers // 4)))
        self._key = [model.key, data_hash(fitted), len(records[0].readable), seed, asdict(self._selection)]
        self._starts = best(self._costs.pairs())

    @property
    def fewest(self) -> int:
        """The fewest anchors: one will do for all layers."""
        return 1

    @property
    def layers(self) -> int:
        """The layers that can choose."""
        return len(self._model.layers)

    def anchors(self, count: int) -> tuple[int, ...]:
        """Returns the best anchors of a number: exact for pairs, then moved for choosing together."""
        done = self._shown.stage(f"placing {count} anchors", None)

        def cost(anchors: tuple[int, ...], most: float = math.inf) -> float:
            done()
            return self._costs.total(anchors, most)

        def make() -> list[int]:
            start = min(self._starts[count - 1], uniform(self.layers, count), key=cost)
            return list(improved(cost, start, self.layers))

        return tuple(self._model.stages.data("anchors", [*self._key, count], make))

    def grown(self, anchors: tuple[int, ...]) -> tuple[int, ...]:
        """Returns anchors with one more: the layer whose followers, and itself, then lose least."""
        make = partial(grown, anchors, self.layers, self._costs.total)
        return tuple(self._model.stages.data("grown", [*self._key, anchors], make))

    def flipped(self, anchors: tuple[int, ...]) -> tuple[int, ...]:
        """Returns anchors after flips that cost hardly more by the mass, and less by the divergence."""

        def near(at: tuple[int, ...]) -> list[tuple[int, ...]]:
            kept = self._model.stages.data("moves", [*self._key, NEAR, at], partial(self._near, at))
            return list(map(tuple, kept))

        return flipped(self._divergences, anchors, near, FLIPS)

    def _near(self, at: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Returns the moves of one anchor that cost hardly more, the cheapest first."""
        most = NEAR * self._costs.total(at)
        costs = {move: self._costs.total(move, most) for move in moves(at, self.layers)}
        return sorted((move for move, cost in costs.items() if cost <= most), key=costs.__getitem__)

    def _divergences(self, anchors: tuple[int, ...]) -> list[float]:
        plan = self._plan(anchors)
        done = self._shown.stage(f"trying {len(anchors)} anchors", self._numbers[0])
        figures, _ = self._fitted.measure(_request(plan), plan.digest(), done)
        return [f["kl"] / f["tokens"] for f in figures]

    def judged(self, anchors: tuple[int, ...]) -> Found:
        """Returns the plan of some anchors with fitted weights, and its quality on what was held out."""
        plan = self._plan(anchors)
        done = self._shown.stage(f"judging {len(anchors)} anchors", self._numbers[1])
        figures, pools = self._held.measure(_request(plan), plan.digest(), done)
        quality = self._held.quality(figures, pools)
        if quality.schedule != plan.pattern():
            # What has another mask than its anchor stays dense, whoever it was to follow.
            plan = replace(plan, pools=tuple(map(_of_members, pools)))
        return Found(replace(plan, quality=quality.numbers()), quality)

    def _plan(self, anchors: tuple[int, ...]) -> SharingPlan:
        done = self._shown.stage(f"fitting {len(anchors)} anchors", len(followers(anchors, self.layers)))
        pools = []
        for anchor, members in followers(anchors, self.layers).items():
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
            sources=self._weights(tuple(a for a in anchors if a <= anchor), members, sets),
            members=members,
            rows={m: tuple(range(sets)) for m in members} if sets > 1 else {},
            keep_first=self._selection.keep_first,
            keep_last=self._selection.keep_last,
            power=POWER,
        )

    def _weights(self, anchors: tuple[int, ...], members: tuple[int, ...], sets: int) -> dict[int, Weights]:
        """Returns the weights of anchors for those that follow the last of them, see `fit`."""

        def make() -> dict[str, Weights]:
            found = fit(self._table, anchors, anchors[-1], members, sets)
            return {str(anchor): weights for anchor, weights in found.items()}

        kept = self._model.stages.data("fitted", [*self._key, anchors, members, sets], make)
        return {int(anchor): tuple(map(tuple, weights)) for anchor, weights in kept.items()}


def _of_members(pool: Pool) -> Pool:
    return replace(pool, rows={m: sets for m, sets in pool.rows.items() if m in pool.members})


def _request(plan: SharingPlan) -> Request:
    return Request(planned.route(plan), prompts=True)
