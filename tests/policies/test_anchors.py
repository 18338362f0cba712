"""Anchors: exact for costs of pairs, never worse for others."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clsa_compile.policies.anchors import (
    best,
    flipped,
    followers,
    grown,
    improved,
    moves,
    pair_cost,
    uniform,
)


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


@given(data=st.data(), layers=st.integers(1, 7))
def test_moves_are_all_that_differ_by_one_anchor(data: st.DataObject, layers: int) -> None:
    able = choices(layers, data.draw(st.integers(1, layers)))
    start = data.draw(st.sampled_from(able))
    differ = [other for other in able if len(set(other) - set(start)) == 1]
    assert sorted(moves(start, layers)) == differ


def flips(losses: dict[tuple[int, ...], list[float]], tries: int = 99) -> tuple[tuple[int, ...], list[Any]]:
    """Returns what flips end at from (0, 1) among 5 layers, and whose losses were asked for."""
    asked = []

    def of(anchors: tuple[int, ...]) -> list[float]:
        asked.append(anchors)
        return losses[anchors]

    return flipped(of, (0, 1), lambda at: moves(at, 5), tries), asked


def test_flips_follow_the_loss_and_ask_for_none_twice() -> None:
    found, asked = flips({(0, a): [10.0 - a, 20.0 - a] for a in range(1, 5)})
    assert found == (0, 4)
    assert asked == [(0, 1), (0, 2), (0, 3), (0, 4)]


def test_where_nothing_is_proposed_no_loss_is_asked_for() -> None:
    assert flipped(lambda anchors: pytest.fail("asked"), (0, 1), lambda at: [at], 9) == (0, 1)


def test_flips_end_after_so_many() -> None:
    found, asked = flips({(0, a): [10.0 - a] for a in range(1, 5)}, tries=2)
    assert found == (0, 3)
    assert len(asked) == 3


def test_a_gain_on_some_texts_only_is_none() -> None:
    """The mean gain is 0.1, and its standard error 0.9: what fits one text is not taken."""
    level = [5.0, 5.0]
    fits_one = [4.0, 5.8]
    assert flips({(0, 1): level, (0, 2): fits_one, (0, 3): level, (0, 4): level})[0] == (0, 1)
    gains = {(0, 1): level, (0, 2): [4.9, 4.8], (0, 3): level, (0, 4): [4.9, 4.8]}
    assert flips(gains)[0] == (0, 2), "an equal loss is no gain"


@pytest.mark.parametrize(
    ("layers", "count", "expected"),
    [(30, 4, (0, 7, 15, 22)), (6, 6, (0, 1, 2, 3, 4, 5)), (5, 1, (0,)), (1, 1, (0,))],
)
def test_uniform_anchors_are_spread_evenly(layers: int, count: int, expected: tuple[int, ...]) -> None:
    assert uniform(layers, count) == expected


def test_followers_end_at_the_next_anchor() -> None:
    assert followers((0, 1, 4), 6) == {1: (2, 3), 4: (5,)}
    assert followers((0,), 3) == {0: (1, 2)}


def test_one_anchor_more_is_the_cheapest() -> None:
    cost = [[0.0, 1.0, 5.0, 4.0], [9.0, 0.0, 2.0, 2.0], [9.0, 9.0, 0.0, 1.0], [9.0, 9.0, 9.0, 0.0]]
    assert pair_cost(cost, (0,)) == 10.0
    assert pair_cost(cost, (0, 2)) == 2.0
    assert grown((0,), 4, lambda anchors: pair_cost(cost, anchors)) == (0, 2)
