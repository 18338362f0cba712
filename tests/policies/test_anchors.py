"""Anchors: exact for costs of pairs, never worse for others."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clsa_compile.policies.anchors import best, followers, improved, uniform


def total(cost: list[list[float]], anchors: tuple[int, ...]) -> float:
    return sum(cost[a][m] for a, members in followers(anchors, len(cost)).items() for m in members)


def choices(layers: int, count: int) -> list[tuple[int, ...]]:
    return [(0, *rest) for rest in combinations(range(1, layers), count - 1)]


@st.composite
def costs(draw: st.DrawFn) -> list[list[float]]:
    layers = draw(st.integers(1, 7))
    row = st.lists(st.integers(0, 20).map(float), min_size=layers, max_size=layers)
    return draw(st.lists(row, min_size=layers, max_size=layers))


@given(cost=costs())
def test_no_other_anchors_cost_less(cost: list[list[float]]) -> None:
    found = best(cost)
    assert [len(anchors) for anchors in found] == list(range(1, len(cost) + 1))
    for anchors in found:
        assert anchors[0] == 0
        assert list(anchors) == sorted(set(anchors))
        assert total(cost, anchors) == min(total(cost, c) for c in choices(len(cost), len(anchors)))


@given(cost=costs(), data=st.data())
def test_moves_only_make_it_better_and_end_where_no_move_does(
    cost: list[list[float]], data: st.DataObject
) -> None:
    layers = len(cost)
    start = data.draw(st.sampled_from(choices(layers, data.draw(st.integers(1, layers)))))
    found = improved(lambda anchors, most: total(cost, anchors), start, layers, passes=99)
    assert found[0] == 0
    assert len(found) == len(start)
    assert total(cost, found) <= total(cost, start)
    for anchor in found[1:]:
        for other in set(range(1, layers)) - set(found):
            moved = tuple(sorted({*found, other} - {anchor}))
            assert total(cost, moved) >= total(cost, found) * 0.999


@pytest.mark.parametrize(
    ("layers", "count", "expected"),
    [(30, 4, (0, 7, 15, 22)), (6, 6, (0, 1, 2, 3, 4, 5)), (5, 1, (0,)), (1, 1, (0,))],
)
def test_uniform_anchors_are_spread_evenly(layers: int, count: int, expected: tuple[int, ...]) -> None:
    assert uniform(layers, count) == expected


def test_followers_end_at_the_next_anchor() -> None:
    assert followers((0, 1, 4), 6) == {1: (2, 3), 4: (5,)}
    assert followers((0,), 3) == {0: (1, 2)}
