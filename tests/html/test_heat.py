"""The heat map: who chooses for whom."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from clsa_compile.html.heat import heads_of, map_of
from clsa_compile.ir.plan import Plan
from clsa_compile.ir.routing import Index, Pool


@pytest.fixture
def plan(make: Any) -> Plan:
    """Layers 5 to 7 read what layer 4 chooses by its own mass, and by twice as much weight of layer 0."""
    (plan,) = make(8, "mass").plans
    first, second = plan.pools
    both = replace(second, sources={0: ((0.4, 0.2, 0.2),), 4: ((0.1, 0.1, 0.2),)})
    return replace(plan, pools=(first, both))


def test_a_cell_for_each_layer_that_reads_and_each_that_is_asked(plan: Plan) -> None:
    found = map_of(plan)
    assert found is not None
    assert [text for text, _ in found.rows] == ["0", "4"]
    assert len(found.cells) == 3 + 3 + 3
    asked = [cell for cell in found.cells if cell.share < 1]
    assert sorted({round(cell.share, 3) for cell in asked}) == [0.333, 0.667]
    assert {cell.says for cell in asked if cell.anchor} == {
        f"layer {i} reads what layer 4 chose; 33.3% of the weight is on layer 4" for i in (5, 6, 7)
    }


def test_cells_stand_in_the_row_of_who_chooses_and_the_column_of_who_reads(plan: Plan) -> None:
    found = map_of(plan)
    assert found is not None
    columns = dict(found.columns)
    rows = dict(found.rows)
    cell = next(cell for cell in found.cells if cell.says.startswith("layer 6") and cell.anchor)
    assert cell.x < columns["6"] < cell.x + found.side
    assert cell.y < rows["4"] < cell.y + 22
    assert all(cell.x + found.side <= found.width and cell.y <= found.height for cell in found.cells)


def test_layers_whose_index_is_not_run_are_in_the_map(make: Any) -> None:
    found = map_of(make(8).plans[0])
    assert found is not None
    assert len(found.cells) == 6
    assert {cell.share for cell in found.cells} == {1.0}


def test_an_index_that_was_trained_for_layers_chooses_for_them(plan: Plan) -> None:
    index = Index("pool0", "sum: weight * dot", 0, 2)
    pool = Pool(4, 2048, {}, (4, 5, 6), index=index)
    found = map_of(replace(plan, pools=(pool,)))
    assert found is not None
    assert [cell.says for cell in found.cells] == [f"layer {i} reads what layer 4 chose" for i in (5, 6)]
    assert heads_of(replace(plan, pools=(pool,))) == ()


def test_where_nobody_chooses_for_another_there_is_no_map(make: Any) -> None:
    assert map_of(make(8, "dense").plans[0]) is None


def test_many_layers_have_narrow_cells_and_few_labels(make: Any) -> None:
    found = map_of(make(500, "mass").plans[0])
    assert found is not None
    assert found.side == 6
    assert len(found.columns) == 125


def test_weights_of_heads_are_shares_of_the_largest(plan: Plan) -> None:
    found = heads_of(plan)
    assert found[1].says == "layer 0, for what layer 4 chooses"
    assert found[1].shares == pytest.approx((1, 0.5, 0.5))
    assert found[2].shares == pytest.approx((0.25, 0.25, 0.5))


def test_weights_that_are_all_the_same_say_nothing(plan: Plan) -> None:
    even = tuple(Pool(p.anchor, p.topk, {p.anchor: ((0.5, 0.5),)}, p.members) for p in plan.pools)
    assert heads_of(replace(plan, pools=even)) == ()
