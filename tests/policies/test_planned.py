"""Routes of plans: layers are named as a graph counts them, and another graph is an error."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from clsa_compile.errors import PlanError
from clsa_compile.ir.routing import Layer, Pool
from clsa_compile.ir.sharing import SharingPlan
from clsa_compile.policies.planned import route

LAYERS = tuple(Layer(i, 4, 2, f"model.layers.{i}", 16, 16, 0.25, 0.0) for i in range(3))
ROWS = ((0.5, 0.5, 0.0, 0.0), (0.0, 0.0, 0.5, 0.5))
POOL = Pool(0, 64, {0: ROWS}, (1, 2), {1: (0, 1), 2: (1, 1)}, 4, 32, 0.5)
PLAN = SharingPlan(64, LAYERS, (POOL,), scope="kv_head", power=0.5)


def graph(**changes: Any) -> list[Layer]:
    """The same layers as a graph with windows between them counts them, under other names."""
    layers = [replace(layer, ordinal=2 * layer.ordinal + 1, path=f"x.{layer.path}") for layer in LAYERS]
    return [*layers[:-1], replace(layers[-1], **changes)]


def test_layers_are_named_by_their_ordinals() -> None:
    (pool,) = route(PLAN)(graph())
    assert pool == replace(POOL, anchor=1, sources={1: ROWS}, members=(3, 5), rows={3: (0, 1), 5: (1, 1)})


def test_a_part_of_a_model_without_layers_has_no_pools() -> None:
    assert route(PLAN)([]) == ()


def test_scales_may_differ_as_rounding_does() -> None:
    assert route(PLAN)(graph(scale=0.25 * (1 + 1e-7)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 8}, r"layer x.model.layers.2 has heads 8, the plan's 4 \(model.layers.2\)"),
        ({"kv_heads": 4}, "kv_heads 4, the plan's 2"),
        ({"width": 32}, "width 32, the plan's 16"),
        ({"value_width": 32}, "value_width 32"),
        ({"scale": 0.125}, "scale 0.125, the plan's 0.25"),
        ({"softcap": 30.0}, "softcap 30, the plan's 0"),
    ],
)
def test_another_layer_is_an_error(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        route(PLAN)(graph(**change))


def test_another_number_of_layers_is_an_error() -> None:
    with pytest.raises(PlanError, match="is for 3 dense layers that can share, and this graph has 2"):
        route(PLAN)(graph()[:2])
