"""Schema: what does not fit is named by its place."""

from __future__ import annotations

import re
from typing import Any

import pytest

from clsa_compile.errors import PlanError
from clsa_compile.ir.schema import count, each, integer_keys, named, number, record, text

POINT = record({"x": number, "tags": each(text)})
PLACES = record({"points": each(POINT), "by_layer": integer_keys(each(count)), "notes": named(number)})


def places(**changes: Any) -> dict[str, Any]:
    given = {"points": [{"x": 1, "tags": ["a"]}], "by_layer": {"3": [1, 2]}, "notes": {"kl": 0.5}}
    return {**given, **changes}


def test_plain_data_becomes_typed_values() -> None:
    expected = {"points": ({"x": 1.0, "tags": ("a",)},), "by_layer": {3: (1, 2)}, "notes": {"kl": 0.5}}
    assert PLACES(places(), "") == expected


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "the plan is []; expected an object"),
        (places(more=1, other=2), "unknown fields: more, other; expected: points, by_layer, notes"),
        ({"points": []}, "missing fields: by_layer, notes"),
        (places(points=[{"x": 1}]), "missing fields in points[0]: tags"),
        (places(points=[{"x": "1", "tags": []}]), "points[0].x is '1'; expected a finite number"),
        (places(points=[{"x": float("nan"), "tags": []}]), "points[0].x is nan"),
        (places(points=[{"x": True, "tags": []}]), "points[0].x is True"),
        (places(points=[{"x": 1, "tags": [2]}]), "points[0].tags[0] is 2; expected a text"),
        (places(points={}), "points is {}; expected a list"),
        (places(by_layer={"a": []}), "expected an object whose names are layers' numbers"),
        (places(by_layer={"-1": []}), "by_layer is {'-1': []}"),
        (places(by_layer={"3": [-1]}), "by_layer[3][0] is -1; expected a whole number from 0"),
        (places(by_layer={"3": [1.0]}), "by_layer[3][0] is 1.0"),
        (places(points=[{"x": 10**400, "tags": []}]), "expected a finite number"),
        (places(by_layer={"3": [2**63]}), "expected a whole number from 0"),
        (places(by_layer={"9" * 19: []}), "expected an object whose names are layers' numbers"),
        (places(by_layer={"3": [False]}), "by_layer[3][0] is False"),
        (places(notes={"kl": None}), "notes.kl is None"),
        (places(notes=[]), "notes is []; expected an object"),
        (places(notes={"kl": "x" * 99}), "x..."),
    ],
)
def test_what_does_not_fit_is_named(data: Any, message: str) -> None:
    with pytest.raises(PlanError, match=re.escape(message)):
        PLACES(data, "")
