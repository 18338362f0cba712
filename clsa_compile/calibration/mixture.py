"""Mixtures: the weights by which the heads of all anchors so far choose tokens, and what a choice loses.

A token is worth to a layer what `records` measured. Anchors choose the top k of a weighted sum over heads of
the probabilities' roots; the weights are those whose sum comes nearest to the roots of the followers' worth,
fitted by expectation maximisation (multiplicative updates, which keep weights positive).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from clsa_compile.calibration.attend import ends
from clsa_compile.calibration.records import Record
from clsa_compile.ir.routing import Weights
from clsa_compile.policies.anchors import followers

__all__ = ["Costs", "Selection", "Table", "fit"]

FIT_STEPS = 60
SEARCH_STEPS = 12
# Weights have so many digits in a plan.
DIGITS = 5


@dataclass(frozen=True, slots=True)
class Selection:
    """How many tokens are selected, and which always are."""

    topk: int
    keep_first: int
    keep_last: int
    power: float


class Table:
    """Records of several sequences side by side: N columns, one for each token that a row may select or not.

    Tokens that are always selected are none of them, nor those of rows with no more keys than are selected.
    """

    def __init__(self, records: Sequence[Record], selection: Selection, device: torch.device) -> None:
        length = max(r.readable.shape[1] for r in records)
        self.selection = selection
        self.layers = len(records[0].mass)
        readable = torch.cat([_padded(r.readable, length, device) for r in records])
        forced = ends(readable, selection.keep_first, selection.keep_last)
        short = readable.sum(-1, keepdim=True) <= selection.topk
        self.open = readable & ~forced & ~short
        self.slots = selection.topk - selection.keep_first - selection.keep_last
        self._where = self.open.flatten().nonzero()[:, 0]

        def columns(name: str, layer: int, in_units: bool) -> Tensor:
            parts = [_padded(getattr(r, name)[layer], length, device) for r in records]
            units = [r.unit if in_units else 1.0 for r in records]
            whole = torch.cat([p.float() * unit for p, unit in zip(parts, units, strict=True)], 1)
            return whole.flatten(1)[:, self._where]

        self.mass = [columns("mass", i, False) for i in range(self.layers)]
        self.first = [columns("first", i, True) for i in range(self.layers)]
        self.second = [columns("second", i, True).square_() for i in range(self.layers)]

    @cached_property
    def pooled(self) -> Tensor:
        """Returns the mean over heads of each layer's mass [L, N], not raised to any power."""
        power = self.selection.power
        return torch.stack([(m.square() if power == 0.5 else m ** (1 / power)).mean(0) for m in self.mass])

    def lost(self, score: Tensor) -> Tensor:
        """Returns 1 at the columns [N] that the top of a score [N] leaves out, else 0."""
        whole = self._spread(score, -torch.inf)
        picked = whole.topk(min(self.slots, whole.shape[-1]), -1, sorted=False).indices
        lost = torch.ones_like(whole).scatter_(1, picked, 0.0)
        return lost.flatten()[self._where]

    def by_row(self, columns: Tensor) -> Tensor:
        """Divides columns [N] by their row's sum, so that every row counts as much as the mean one."""
        total = self._spread(columns, 0.0).sum(-1, keepdim=True)
        total = total / total[self.open.any(-1)].mean() + 1e-9
        return columns / total.expand(self.open.shape).flatten()[self._where]

    def _spread(self, columns: Tensor, rest: float) -> Tensor:
        """Returns rows [R, T] of columns [N], with `rest` where nothing is to be chosen."""
        whole = columns.new_full((self.open.numel(),), rest)
        whole[self._where] = columns
        return whole.view(self.open.shape)


class Costs:
    """What it costs to follow: the worth, in two measures, of the tokens that followers do not get to see.

    The first measure is the sum of |u|, the second that of u^2; each counts relative to what evenly spread
    anchors lose, since neither alone predicts the loss of a model.
    """

    def __init__(self, table: Table, spread: Sequence[int]) -> None:
        self._table = table
        self._features = table.pooled**table.selection.power
        self._targets = torch.stack([second.sum(0) for second in table.second])
        self._known: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = {}
        both = []
        for measure in (torch.cat(table.first), self._targets):
            total = sum(
                (measure[list(members)] @ table.lost(table.pooled[a])).sum()
                for a, members in followers(spread, table.layers).items()
            )
            both.append(measure / max(float(total), 1e-30))
        self._worth = both[0] + both[1]

    def pairs(self) -> list[list[float]]:
        """Returns [L, L]: what layer l loses when it follows the mass of layer a alone, at [a][l]."""
        costs = torch.stack([self._worth @ self._table.lost(f) for f in self._features])
        return costs.triu(1).tolist()

    def total(self, anchors: tuple[int, ...], most: float = math.inf) -> float:
        """Returns what all followers lose; infinite as soon as that is above `most`."""
        total = 0.0
        for anchor, members in followers(anchors, self._table.layers).items():
            key = (tuple(a for a in anchors if a <= anchor), members)
            if key not in self._known:
                lost = self._table.lost(self._score(*key))
                self._known[key] = float((self._worth[list(members)] @ lost).sum())
            total += self._known[key]
            if total > most:
                return math.inf
        return total

    def _score(self, anchors: tuple[int, ...], members: tuple[int, ...]) -> Tensor:
        features, worth = self._features[list(anchors)], self._targets[list(members)].sum(0)
        return (_mixed(self._table, features, worth[None], SEARCH_STEPS) @ features)[0]


def fit(
    table: Table, anchors: Sequence[int], anchor: int, members: Sequence[int], sets: int
) -> dict[int, Weights]:
    """Returns the weights [sets, H] of all heads of the anchors up to one, for the layers that follow it.

    With more sets than one, set j is for the kv head j of every follower.
    """
    before = [a for a in anchors if a <= anchor]
    features = torch.cat([table.mass[a] for a in before])
    worth = sum(table.second[m] if sets > 1 else table.second[m].sum(0, keepdim=True) for m in members)
    assert isinstance(worth, Tensor)
    weights = _mixed(table, features, worth, FIT_STEPS)
    parts = weights.split([len(table.mass[a]) for a in before], 1)
    return {
        a: tuple(tuple(float(f"{w:.{DIGITS}g}") for w in row) for row in part.tolist())
        for a, part in zip(before, parts, strict=True)
    }


def _mixed(table: Table, features: Tensor, worth: Tensor, steps: int) -> Tensor:
    """Returns weights [J, F] of features [F, N] whose sums are nearest to the roots of J worths [J, N]."""
    target = torch.stack([table.by_row(one.sqrt()) for one in worth]).sqrt()
    return expectation_maximised(features, target, steps)


def expectation_maximised(features: Tensor, target: Tensor, steps: int) -> Tensor:
    """Returns w >= 0 [J, F], each to lessen KL(target || w features), that sum to 1.

    features [F, N]; target [J, N], whose J rows have nothing to do with each other.
    """
    total = features.sum(1)
    weights = (target.sum(1) / total.mean().clamp(min=1e-30) / len(total))[:, None].expand(-1, len(total))
    floor = 1e-6 * target.mean(1, keepdim=True)
    for _ in range(steps):
        mixed = weights @ features + floor
        weights = weights * ((target / mixed) @ features.T) / total.clamp(min=1e-30)
    return weights / weights.sum(1, keepdim=True).clamp(min=1e-30)


def _padded(part: Tensor, length: int, device: torch.device) -> Tensor:
    return torch.nn.functional.pad(part.to(device), (0, length - part.shape[-1]))
