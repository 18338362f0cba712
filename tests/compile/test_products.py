"""Products: weights that are read, whole or by the row, and the kernels around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clsa_compile.capture.dynamo import capture
from clsa_compile.products import Outside, outside

NOTHING: frozenset[Any] = frozenset()


def counted(model: nn.Module, *inputs: Tensor, gone: Callable[[Any], bool] = lambda _: False) -> Outside:
    found: list[Outside] = []

    def backend(gm: Any, _: Any) -> Any:
        found.append(outside(capture(gm).graph, gone, NOTHING, NOTHING))
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(*inputs)
    return found[0]


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(100, 16)
        self.up = nn.Linear(16, 32, bias=False)
        self.down = nn.Linear(32, 16, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return self.down(F.silu(self.up(x)))


def test_weights_are_read_once_and_tables_by_the_row() -> None:
    found = counted(Network(), torch.zeros(2, 3, dtype=torch.long))
    assert [p.bytes for p in found.products] == [16 * 32 * 4] * 2
    assert [p.flops for p in found.products] == [2 * 6 * 16 * 32] * 2
    assert found.looked_up == 6 * 16 * 4
    assert found.bytes == 2 * 16 * 32 * 4 + 6 * 16 * 4
    assert found.flops == 2 * 2 * 6 * 16 * 32
    assert found.others == 2, "the table's rows, and silu"


def test_rows_are_looked_up_no_more_often_than_there_are() -> None:
    assert counted(Network(), torch.zeros(50, 3, dtype=torch.long)).looked_up == 100 * 16 * 4


def test_what_is_gone_costs_nothing() -> None:
    found = counted(Network(), torch.zeros(1, 1, dtype=torch.long), gone=lambda _: True)
    assert (found.bytes, found.flops, found.others) == (0, 0, 0)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(100, 16))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight) @ (self.weight * 2).T


def test_a_tied_table_is_read_whole_by_the_product_through_casts_and_views() -> None:
    found = counted(Tied(), torch.zeros(1, 1, dtype=torch.long))
    (product,) = found.products
    assert product.bytes == 100 * 16 * 4


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(8, 16, 32))

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        return torch.bmm(x, self.experts[chosen])


@pytest.mark.parametrize(("rows", "read"), [(2, 2), (20, 8)])
def test_experts_that_are_gathered_are_read_by_the_expert(rows: int, read: int) -> None:
    found = counted(Experts(), torch.randn(rows, 1, 16), torch.zeros(rows, dtype=torch.long))
    assert found.looked_up == read * 16 * 32 * 4
    (product,) = found.products
    assert product.flops == 2 * rows * 16 * 32
    assert product.bytes == 0


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(8, 16, 32, dtype=torch.bfloat16))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return torch._grouped_mm(x, self.experts, ends)


@pytest.mark.parametrize(("rows", "read"), [(2, 2), (20, 8)])
def test_grouped_experts_are_as_many_as_there_are_rows(rows: int, read: int) -> None:
    ends = torch.full((8,), rows, dtype=torch.int32)
    (product,) = counted(Grouped(), torch.randn(rows, 16).bfloat16(), ends).products
    assert product.bytes == read * 16 * 32 * 2
    assert product.flops == 2 * rows * 16 * 32


def test_products_without_weights_are_not_counted() -> None:
    class Scores(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x @ x.mT).sort().values @ x

    found = counted(Scores(), torch.randn(2, 4, 4))
    assert found.products == []
    assert found.others == 1, "sort"
