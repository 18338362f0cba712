"""Times on which two measurements agree."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from timing import SPREAD, Timing, settled


def given(*milliseconds: float) -> Callable[[], Timing]:
    left = iter(milliseconds)
    return lambda: Timing(next(left), 0.0)


@pytest.mark.parametrize(
    ("times", "expected", "spread"),
    [
        ((2.0, 2.01, 9.0), 2.01, 0.005),
        ((2.01, 2.0, 9.0), 2.01, 0.005),
        ((9.0, 2.0, 3.0, 2.0), 2.0, 0.0),
        ((9.0, 9.01, 2.0), 9.01, 0.01 / 9),
        ((8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.5), 2.0, 1.0),
    ],
    ids=["first two", "either way round", "disturbed twice", "disturbed alike", "never"],
)
def test_the_longer_of_the_two_shortest_that_agree(
    times: tuple[float, ...], expected: float, spread: float
) -> None:
    found = settled(given(*times))
    assert found.timing.device == expected
    assert found.spread == pytest.approx(spread)
    assert (found.spread <= SPREAD) == (spread < 1)
