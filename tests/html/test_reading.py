"""Who reads what, before and after, and which layers are drawn as one."""

from __future__ import annotations

from typing import Any

from clsa_compile.html.reading import Reading, after, before, colours, folded
from clsa_compile.ir.plan import Group, Plan, SitePlan


def plan(*groups: Group, shares: tuple[int, ...] = (), count: int = 4) -> Plan:
    sites = tuple(SitePlan(i, i, f"layers.{i}", "topk", "sparse", topk=8) for i in range(count))
    return Plan(sites, groups, shares=shares)


def choosers(readings: dict[int, Reading]) -> list[int | None]:
    return [reading.chooser for reading in readings.values()]


def test_a_shared_index_is_each_layers_own_in_the_model() -> None:
    shared = plan(Group("index", 0, (0, 1, 2, 3), 8), shares=(1, 2, 3))
    assert choosers(before(shared)) == [0, 1, 2, 3]
    assert [reading.chooses for reading in before(shared).values()] == ["index"] * 4
    assert choosers(after(shared)) == [0, 0, 0, 0]
    assert [reading.chooses for reading in after(shared).values()] == ["index", "", "", ""]


def test_what_the_model_shares_by_itself_is_shared_on_both_sides() -> None:
    """Layers 1 and 3 have no indexer; 2 has one that does not run."""
    shared = plan(Group("index", 0, (0, 1, 2, 3), 8), shares=(2,))
    assert choosers(before(shared)) == [0, 0, 2, 2]
    assert choosers(after(shared)) == [0, 0, 0, 0]


def test_equal_indexers_run_in_each_layer_of_the_model() -> None:
    equal = plan(Group("index", 0, (0, 1, 2, 3), 8, repeats=3))
    assert choosers(before(equal)) == [0, 1, 2, 3]
    assert choosers(after(equal)) == [0, 0, 0, 0]


def test_mass_is_chosen_after_only() -> None:
    chosen = plan(Group("mass", 0, (1, 2), 8))
    assert choosers(before(chosen)) == [None] * 4
    assert choosers(after(chosen)) == [None, 0, 0, None]
    assert after(chosen)[0].chooses == "mass"


def test_keys_are_shared_on_both_sides() -> None:
    shared = plan(Group("kv", 1, (1, 3)))
    for side in (before(shared), after(shared)):
        assert [reading.keys for reading in side.values()] == [0, 1, 2, 1]


def test_an_index_among_the_best_tokens_of_another_one() -> None:
    again = plan(Group("index", 0, (0, 1), 8), Group("index", 2, (2, 3), 8, among=0, pool=32), shares=(1, 3))
    assert after(again)[2] == Reading(2, 2, "index", among=0)


def test_an_index_that_selects_all_tokens_is_the_models_own(make: Any) -> None:
    report = make(2)
    bare = Plan(report.plans[0].sites, ())
    assert choosers(before(bare, report.layers)) == [0, 1]
    assert choosers(after(bare)) == [None, None]


def test_groups_have_colours_and_single_layers_none() -> None:
    groups = [Group("index", i, (i, i + 1), 8) for i in range(0, 8, 2)]
    alone = Group("index", 8, (8,), 8)
    found = colours(plan(*groups, alone, count=9), 3)
    assert [found.get(i) for i in range(9)] == [0, 0, 1, 1, 2, 2, 0, 0, None]


def test_an_anchor_that_reads_all_tokens_has_the_colour_of_those_that_it_chooses_for() -> None:
    assert colours(plan(Group("mass", 0, (1, 2), 8)), 6) == {0: 0, 1: 0, 2: 0}


def rows_of(report: Any) -> tuple[tuple[int, ...], ...]:
    (made,) = report.plans
    sides = (before(made, report.layers), after(made))
    return folded(made, {layer.ordinal: layer for layer in report.layers}, sides)


def test_followers_that_are_alike_are_one_row_and_who_chooses_is_another(make: Any) -> None:
    assert rows_of(make(8, "mass")) == ((0,), (1, 2, 3), (4,), (5, 6, 7))
    assert rows_of(make(8, "dense")) == (tuple(range(8)),)


def test_a_layer_that_is_left_or_read_from_is_a_row_of_its_own(make: Any) -> None:
    assert rows_of(make(8, "dense", left=(3,))) == ((0, 1, 2), (3,), (4, 5, 6, 7))
    assert rows_of(make(8, "dense", keys=(5, 6))) == ((0, 1, 2, 3), (4,), (5, 6), (7,))
