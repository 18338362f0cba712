"""Pools as plain data."""

from __future__ import annotations

import json

import pytest

from clsa_compile.ir.routing import Index, Pool, role

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


def test_a_pool_of_a_trained_index_is_the_same_after_json() -> None:
    pool = Pool(1, 8, {}, (1, 2), index=Index("0", "sum: exp(dot + weight)", 0, 2))
    assert Pool.from_dict(json.loads(json.dumps(pool.to_dict()))) == pool
    assert pool.sets == 1
    assert [role((pool,), layer) for layer in range(4)] == ["F", "I", "S", "F"]
    assert pool.index is not None
    assert pool.index.tensor_names() == ("0.query", "0.head", "0.bias")
