"""Each decomposition computes what its op computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from clsa_compile.ir.references import REFERENCES
from clsa_compile.mlir.decompose import decompositions

aten, clsa = torch.ops.aten, torch.ops.clsa
TABLE = decompositions({})


def made(*sizes: int) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(sum(sizes)))


def test_every_contract_op_has_one() -> None:
    for op in REFERENCES:
        assert getattr(clsa, op).default in TABLE


def test_what_is_there_already_stays_unless_it_is_ours() -> None:
    kept = lambda x: x  # noqa: E731
    table = decompositions({aten.sin.default: kept, aten.topk.default: kept})
    assert table[aten.sin.default] is kept
    assert table[aten.topk.default] is not kept


@pytest.mark.parametrize("per_kv_head", [False, True])
@pytest.mark.parametrize("offered", [None, 7])
def test_index_topk(per_kv_head: bool, offered: int | None) -> None:
    q, k = made(2, 4, 3, 8), made(2, 2, 40, 8)
    candidates = None
    if offered:
        candidates = clsa.index_topk(q, k, None, None, None, None, [], offered, 0.3, "sum: dot", "", False)
    args = (q, k, made(2, 4, 3), None, made(2, 1, 3, 40), None, [torch.tensor([5, 20])], 5, 0.3)
    rest = ("sum: weight*Max(0, dot)", "kv <= in0(b)", per_kv_head, None, candidates)
    found = TABLE[clsa.index_topk.default](*args, *rest)
    assert torch.equal(found, clsa.index_topk(*args, *rest))


def test_select_topk_keeps_both_ends() -> None:
    mass = made(2, 2, 1, 300).masked_fill(made(2, 2, 1, 300) > 1, -torch.inf)
    for ends in ((0, 0), (2, 5)):
        found = TABLE[clsa.select_topk.default](mass, None, 9, *ends)
        assert torch.equal(found, clsa.select_topk(mass, None, 9, *ends))


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
@pytest.mark.parametrize("rows", [1, 4])
def test_index_copy(dim: int, rows: int) -> None:
    x = made(6, 7, 8)
    index = torch.tensor([5, 0, 3, 2][:rows])
    sizes = list(x.shape)
    sizes[dim] = rows
    source = made(*sizes)
    assert torch.equal(
        TABLE[aten.index_copy.default](x, dim, index, source), x.index_copy(dim, index, source)
    )


def test_index_copy_of_one_place_twice_takes_the_last_row() -> None:
    index, source = torch.tensor([2, 2]), made(2, 3)
    found = TABLE[aten.index_copy.default](torch.zeros(4, 3), 0, index, source)
    assert torch.equal(found[2], source[1])


@pytest.mark.parametrize(("value", "dtype"), [(True, torch.bool), (2.5, torch.float32), (3, torch.int64)])
def test_scatter_of_one_value(value: Any, dtype: torch.dtype) -> None:
    x = made(2, 3, 9).to(dtype)
    index = torch.randint(0, 9, (2, 3, 4), generator=torch.Generator().manual_seed(0))
    assert torch.equal(TABLE[aten.scatter.value](x, -1, index, value), x.scatter(-1, index, value))


def test_scatters_that_are_not_understood_stay() -> None:
    x, index = made(3, 3), torch.zeros(2, 3, dtype=torch.long)
    assert TABLE[aten.scatter.value](x, 0, index, 1.0) is NotImplemented
    assert TABLE[aten.scatter.value](x, 1, index, 1.0) is NotImplemented, "index has fewer rows"


@pytest.mark.parametrize("dim", [0, -1])
def test_topk(dim: int) -> None:
    x = made(5, 6)
    for found, wanted in zip(TABLE[aten.topk.default](x, 3, dim), x.topk(3, dim), strict=True):
        assert torch.equal(found, wanted)


def test_the_smallest_are_left_to_torch_mlir() -> None:
    assert TABLE[aten.topk.default](made(5), 3, largest=False) is NotImplemented
