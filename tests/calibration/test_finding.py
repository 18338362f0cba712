"""calibration/finding.py: the fewest anchors that hold a budget, without a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clsa_compile.calibration.finding import found


@dataclass(frozen=True)
class Quality:
    perplexity_increase: float


@dataclass(frozen=True)
class Judged:
    anchors: tuple[int, ...]
    quality: Quality


@dataclass
class Finder:
    """Costs by number of anchors; those of a number are the first ones, and flips may change them."""

    costs: list[float]
    after: tuple[tuple[int, ...], float] | None = None
    fewest: int = 1
    judged_counts: list[int] = field(default_factory=list)

    @property
    def layers(self) -> int:
        return len(self.costs)

    def anchors(self, count: int) -> tuple[int, ...]:
        return tuple(range(count))

    def grown(self, anchors: tuple[int, ...]) -> tuple[int, ...]:
        return (*anchors, len(anchors))

    def flipped(self, anchors: tuple[int, ...]) -> tuple[int, ...]:
        return anchors if self.after is None else self.after[0]

    def judged(self, anchors: tuple[int, ...]) -> Any:
        self.judged_counts.append(len(anchors))
        flips = self.after is not None and anchors == self.after[0]
        return Judged(anchors, Quality(self.after[1] if flips else self.costs[len(anchors) - 1]))


falling = st.lists(st.floats(0, 1), min_size=1, max_size=40).map(lambda costs: sorted(costs, reverse=True))


@given(costs=falling, budget=st.floats(0, 1), low=st.integers(1, 5) | st.none())
def test_the_fewest_anchors_that_hold_a_budget(costs: list[float], budget: float, low: int | None) -> None:
    low = None if low is None else min(low, len(costs))
    finder = Finder(costs)
    made = found(finder, low, budget)
    holding = [n for n in range(low or 1, len(costs) + 1) if costs[n - 1] <= budget]
    assert len(made.anchors) == min(holding, default=len(costs))
    assert len(finder.judged_counts) <= len(costs).bit_length() + 1


def test_fewer_anchors_than_can_be_are_not_tried() -> None:
    finder = Finder([0.1] * 6, fewest=3)
    assert found(finder, None, 0.2).anchors == (0, 1, 2)
    assert min(finder.judged_counts) == 3


@pytest.mark.parametrize("count", [1, 3])
def test_without_a_budget_the_number_is_taken(count: int) -> None:
    finder = Finder([0.5, 0.4, 0.3])
    assert found(finder, count, None).anchors == tuple(range(count))
    assert finder.judged_counts == [count]


def test_flips_are_judged_last_and_only_where_they_change_something() -> None:
    finder = Finder([0.5, 0.4, 0.3], after=((0, 2), 0.35))
    assert found(finder, 2, None).anchors == (0, 2)
    assert finder.judged_counts == [2]


@pytest.mark.parametrize("count", [None, 1])
@pytest.mark.parametrize(("cost", "expected"), [(0.4, (0, 2)), (0.41, (0, 1))])
def test_flips_that_break_a_budget_are_dropped(
    count: int | None, cost: float, expected: tuple[int, ...]
) -> None:
    assert found(Finder([0.5, 0.4, 0.3], after=((0, 2), cost)), count, 0.4).anchors == expected
