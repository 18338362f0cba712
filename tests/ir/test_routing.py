"""Pools as plain data."""

from __future__ import annotations

import json

import pytest

from clsa_compile.ir.routing import Pool

POOL = Pool(
    anchor=3,
    topk=8,
    sources={0: ((0.5, 0.25), (0.0, 1.0)), 3: ((1.0, 0.0), (0.5, 0.5))},
    members=(4, 5),
    rows={4: (0, 1), 5: (1, 1)},
    keep_first=1,
    keep_last=2,
    power=0.5,
)


def test_pools_go_through_json() -> None:
    assert Pool.from_dict(json.loads(json.dumps(POOL.to_dict()))) == POOL


def test_sets_are_rows_of_weights() -> None:
    assert POOL.sets == 2


def test_unknown_fields_are_errors() -> None:
    with pytest.raises(TypeError, match="depth"):
        Pool.from_dict({**POOL.to_dict(), "depth": 1})
