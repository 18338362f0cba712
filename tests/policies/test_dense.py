"""policies/dense.py: who attends to whose tokens without a search."""

from __future__ import annotations

import pytest

from clsa_compile.errors import OptionError
from clsa_compile.ir.routing import Layer, Pool, is_reindex
from clsa_compile.policies.dense import Dense, roles, route


def layers(count: int, heads: int = 4, kv_heads: int = 2) -> list[Layer]:
    # Window layers between them take ordinals too.
    return [Layer(2 * i, heads, kv_heads, f"layer {i}") for i in range(count)]


def pools(dense: Dense, count: int = 6) -> list[tuple[int, tuple[int, ...]]]:
    return [(pool.anchor, pool.members) for pool in route(dense)(layers(count))]


@pytest.mark.parametrize(
    ("share", "first", "schedule"),
    [(1, 0, "FFFFFF"), (2, 0, "FSFSFS"), (4, 0, "FSSSFS"), (9, 0, "FSSSSS"), (4, 1, "FFSSSF"),
     (3, 2, "FFFSSF"), ("FSSFFS", 0, "FSSFFS"), (2, 8, "FFFFFF")],
)  # fmt: skip
def test_schedules(share: int | str, first: int, schedule: str) -> None:
    assert roles(Dense(8, share, dense_layers=first), 6) == schedule


def test_an_anchor_with_followers_has_a_pool() -> None:
    assert pools(Dense(8, 4)) == [(0, (2, 4, 6)), (8, (10,))]
    assert pools(Dense(8, "FFSSFF")) == [(2, (4, 6))]
    assert pools(Dense(8, 1)) == []
    assert pools(Dense(8, 4), 0) == []


def test_layers_that_choose_again_read_what_the_last_full_one_offers() -> None:
    found = route(Dense(8, "FSRSRF", pool=20))(layers(6))
    assert [(p.anchor, p.members, p.topk) for p in found] == [
        (0, (4, 8), 20), (0, (2,), 8), (4, (6,), 8)
    ]  # fmt: skip
    assert [is_reindex(found, 2 * i) for i in range(6)] == [False, False, True, False, False, False]
    assert [pool.topk for pool in route(Dense(8, "FRSFFF"))(layers(6))] == [32, 8]
    assert [pool.topk for pool in route(Dense(2000, "FRSFFF"))(layers(6))] == [4096, 2000]
    heads = route(Dense(8, "FRSFFF", scope="kv_head"))(layers(6))
    assert [pool.sets for pool in heads] == [1, 2]


def test_without_sharing_every_layer_chooses_for_itself() -> None:
    assert pools(Dense(8), 3) == [(0, (0,)), (2, (2,)), (4, (4,))]
    assert pools(Dense(8, dense_layers=2), 3) == [(4, (4,))]


def test_one_set_is_pooled_over_heads() -> None:
    (pool,) = route(Dense(8, 2, keep_first=1, keep_last=2))(layers(2))
    assert pool == Pool(0, 8, {0: ((0.25,) * 4,)}, (2,), {}, 1, 2)
    assert pool.sets == 1


def test_a_set_a_kv_head_is_pooled_over_its_heads() -> None:
    (pool,) = route(Dense(8, 2, scope="kv_head"))(layers(2))
    assert pool.sources == {0: ((0.5, 0.5, 0.0, 0.0), (0.0, 0.0, 0.5, 0.5))}
    assert pool.rows == {2: (0, 1)}


def test_sets_of_kv_heads_need_as_many_of_them() -> None:
    unlike = [Layer(0, 4, 2, "a"), Layer(1, 4, 4, "b")]
    message = (
        r"needs as many kv heads in b \(4\) as in a \(2\); use scope='layer', or write a plan whose 'rows' "
        r"say which set each kv head reads \(docs/sharing.md\)"
    )
    with pytest.raises(OptionError, match=message):
        route(Dense(8, 2, scope="kv_head"))(unlike)


def test_a_schedule_of_another_length_is_an_error() -> None:
    with pytest.raises(OptionError, match="'FSS' is for 3 layers; this graph has 6 dense layers"):
        roles(Dense(8, "FSS"), 6)
    # A graph without such layers, as a vision tower's, is left alone.
    assert roles(Dense(8, "FSS"), 0) == ""
