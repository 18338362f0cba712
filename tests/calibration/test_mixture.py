"""Mixtures: weights that explain a target are found, and what a choice loses is counted as it is defined."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clsa_compile.calibration.mixture import Costs, Selection, Table, expectation_maximised, fit
from clsa_compile.calibration.records import Record
from clsa_compile.policies.anchors import followers, uniform

LAYERS, HEADS, HKV, N, T = 4, 4, 2, 3, 24
SELECTION = Selection(topk=8, keep_first=2, keep_last=3, power=0.5)


def made(seed: int, length: int = T) -> Record:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.tensor([5, length - 6, length - 1])
    readable = torch.arange(length) <= rows[:, None]

    def random(heads: int) -> Tensor:
        return (torch.rand(heads, N, length, generator=generator) ** 4 * readable).half()

    mass = tuple(random(HEADS) for _ in range(LAYERS))
    return Record(
        mass, tuple(random(1) for _ in mass), tuple(random(HKV) for _ in mass), readable, 0.5 + seed
    )


@pytest.fixture(name="table")
def _table() -> Table:
    return Table([made(0), made(1, T - 4)], SELECTION, torch.device("cpu"))


def test_only_what_is_to_be_chosen_counts(table: Table) -> None:
    """Row 0 of each sequence has 6 keys, fewer than are selected; at the ends 2 and 3 are always selected."""
    chosen = [row.nonzero().flatten().tolist() for row in table.open]
    assert chosen == [[], list(range(2, 16)), list(range(2, 21)), [], list(range(2, 12)), list(range(2, 17))]
    number = sum(map(len, chosen))
    assert {columns.shape[1] for columns in (*table.mass, *table.first, *table.second)} == {number}
    expected = made(0).second[1][:, 1, 2:16].float().mul(0.5).square()
    torch.testing.assert_close(table.second[1][:, :14], expected)


def test_what_is_lost_is_what_the_top_leaves_out(table: Table) -> None:
    score = torch.rand(int(table.open.sum()), generator=torch.Generator().manual_seed(4))
    lost, start = table.lost(score), 0
    for row in table.open:
        end = start + int(row.sum())
        ranked = score[start:end].argsort(descending=True)
        assert sorted(ranked[3:].tolist()) == lost[start:end].nonzero().flatten().tolist()
        start = end


def test_every_row_counts_as_much(table: Table) -> None:
    columns = table.by_row(table.mass[0][1])
    sums = [part.sum() for part in columns.split([14, 19, 10, 15])]
    torch.testing.assert_close(torch.stack(sums), sums[0].expand(4), rtol=1e-4, atol=0)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), features=st.integers(1, 5))
def test_weights_that_made_a_target_are_found(seed: int, features: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(features, 400, generator=generator) ** 3
    weights = torch.rand(2, features, generator=generator) + 0.05
    found = expectation_maximised(x, 7 * weights @ x, 3000)
    torch.testing.assert_close(found, weights / weights.sum(1, keepdim=True), atol=0.01, rtol=0.05)


def test_more_steps_never_fit_worse(table: Table) -> None:
    x, target = table.mass[0], table.second[2].sum(0).sqrt()

    def divergence(steps: int) -> float:
        mixed = (expectation_maximised(x, target[None], steps) @ x)[0]
        mixed = mixed * (target.sum() / mixed.sum())
        known = target > 0
        return float((target[known] * (target[known] / mixed[known].clamp(min=1e-9)).log()).sum())

    costs = [divergence(steps) for steps in (0, 1, 5, 50)]
    assert costs == sorted(costs, reverse=True)


def test_costs_of_pairs_are_losses_in_both_measures(table: Table) -> None:
    spread = uniform(LAYERS, 2)
    costs = Costs(table, spread)
    pairs = costs.pairs()
    total = sum(pairs[a][m] for a, members in followers(spread, LAYERS).items() for m in members)
    assert math.isclose(total, 2.0, rel_tol=1e-4)
    assert all(pairs[a][m] == 0 for a in range(LAYERS) for m in range(a + 1))


def test_totals_are_sums_over_followers(table: Table) -> None:
    costs = Costs(table, uniform(LAYERS, 2))
    assert costs.total(tuple(range(LAYERS))) == 0
    assert costs.total((0, 1)) > 0
    assert costs.total((0, 1, 3)) < costs.total((0,))
    assert costs.total((0,), most=costs.total((0,)) / 2) == math.inf


@pytest.mark.parametrize("sets", [1, HKV])
def test_fitted_weights_have_a_row_a_set_and_a_number_a_head(table: Table, sets: int) -> None:
    found = fit(table, (0, 2), 2, (3,), sets)
    assert set(found) == {0, 2}
    for rows in found.values():
        assert len(rows) == sets
        assert all(len(row) == HEADS and min(row) >= 0 for row in rows)
    sums = [sum(sum(rows[j]) for rows in found.values()) for j in range(sets)]
    assert all(math.isclose(total, 1, rel_tol=1e-3) for total in sums)
    assert fit(table, (0, 2), 0, (1,), 1).keys() == {0}
