"""checking/differences.py: budgets, and what is no number."""

from __future__ import annotations

import math

import pytest
import torch

from clsa_compile.checking.differences import Check, Difference, Measure, differences, largest

ONES = torch.ones(4, dtype=torch.float64)


def compared(ours: torch.Tensor, eager: torch.Tensor) -> Difference:
    (found,) = differences(Measure(({"x": ONES}, {}), ({"x": eager}, {}), 32), 0, {"x": ours}, {})
    return found


def test_the_budget_is_eagers_own_distance_and_some_roundings() -> None:
    eager = ONES.float() + 1e-3
    found = compared(ONES.float() + 2e-3, eager)
    assert found.eager == pytest.approx(1e-3, rel=1e-3)
    assert found.budget == pytest.approx(3e-3, rel=1e-2)
    assert not found.departs
    assert compared(ONES.float() + 4e-3, eager).departs
    exact = compared(ONES.float() + 1e-5, ONES.float())
    assert exact.budget == pytest.approx(32 * torch.finfo(torch.float32).eps)
    assert exact.departs
    assert not compared(ONES.bfloat16(), ONES.bfloat16()).departs


@pytest.mark.parametrize("ours", [ONES[:2], ONES * math.nan, ONES * math.inf])
def test_another_shape_or_no_number_departs(ours: torch.Tensor) -> None:
    assert compared(ours.float(), ONES.float()).departs
    assert math.isinf(compared(ours.float(), ONES.float()).clsa)


def test_what_is_no_number_in_both_agrees() -> None:
    both = torch.tensor([math.nan, math.inf, -math.inf, 1.0])
    assert largest(both, both.double()) == 0
    assert largest(torch.tensor([math.inf]), torch.tensor([-math.inf])) == math.inf
    assert largest(torch.empty(0), torch.empty(0)) == 0
    assert largest(None, ONES) == math.inf


def test_a_check_reads_as_a_table() -> None:
    layers = (Difference("layer 0", 1e-7, 1e-7, 1e-6), Difference("layer 1", 1e-7, 1e-2, 1e-6))
    made = Check(layers, (Difference("output", 1e-7, 2e-2, 1e-6, 1e-7),), ("the rewrite of layer 1",))
    assert str(made).splitlines() == [
        "layer 1 departs by 1.00e-02, 1.00e-06 are allowed: the rewrite of layer 1",
        "            eager  inductor      clsa    budget",
        "layer 0  1.00e-07            1.00e-07  1.00e-06",
        "layer 1  1.00e-07            1.00e-02  1.00e-06  departs",
        "output   1.00e-07  1.00e-07  2.00e-02  1.00e-06  departs",
    ]
    assert "no single rewrite explains it" in str(Check(layers, ()))
