"""Finding: from the best anchors of a number to the fewest that hold a budget, whatever is searched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from clsa_compile.calibration.quality import Quality
from clsa_compile.ir.sharing import SharingPlan

__all__ = ["Finder", "Found", "found"]


@dataclass(frozen=True, slots=True)
class Found:
    """A plan, and what was measured of it on the sequences that were held out."""

    plan: SharingPlan
    quality: Quality


class Finder(Protocol):
    """One search: the best anchors of a number, and plans with their quality on what was held out."""

    @property
    def fewest(self) -> int:
        """The fewest anchors with which every layer has one that it can follow."""

    @property
    def layers(self) -> int:
        """The layers that can choose."""

    def anchors(self, count: int) -> tuple[int, ...]:
        """Returns the best anchors of a number."""

    def grown(self, anchors: tuple[int, ...]) -> tuple[int, ...]:
        """Returns anchors with one more."""

    def flipped(self, anchors: tuple[int, ...]) -> tuple[int, ...]:
        """Returns anchors after greedy flips by the divergence on sequences that a search may look at."""

    def judged(self, anchors: tuple[int, ...]) -> Found:
        """Returns the plan of some anchors, and what was measured of it."""


def found(finder: Finder, count: int | None, budget: float | None) -> Found:
    """Returns the plan for a number of anchors, a budget, or both."""
    if budget is None:
        assert count is not None
        return finder.judged(finder.flipped(finder.anchors(count)))
    if count is None:
        anchors, kept = _least(finder, finder.anchors, finder.fewest, budget)
    else:
        grown = [finder.anchors(count)]
        while len(grown[-1]) < finder.layers:
            grown.append(finder.grown(grown[-1]))
        anchors, kept = _least(finder, lambda n: grown[n - count], count, budget)
    moved = finder.flipped(anchors)
    if moved == anchors:
        return kept
    tried = finder.judged(moved)
    return tried if tried.quality.perplexity_increase <= budget else kept


def _least(
    finder: Finder, anchors: Callable[[int], tuple[int, ...]], low: int, budget: float
) -> tuple[tuple[int, ...], Found]:
    """Returns the fewest anchors, `low` at least, whose plan stays within a budget, and that plan."""
    high, kept = finder.layers, None
    while low < high:
        middle = (low + high) // 2
        tried = finder.judged(anchors(middle))
        if tried.quality.perplexity_increase <= budget:
            high, kept = middle, tried
        else:
            low = middle + 1
    return anchors(high), kept if kept is not None else finder.judged(anchors(high))
