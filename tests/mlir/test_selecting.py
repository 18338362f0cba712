"""Selections without a sort are those of the references, to the last bit of a score."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from clsa_compile.errors import MlirError
from clsa_compile.ir.references import select_topk_reference
from clsa_compile.mlir.selecting import _ranges, best, ranked

KEYS = (1, 5, 127, 128, 129, 255, 256, 1000)
COUNTS = (1, 3, 8, 64)


def bits(values: Tensor) -> Tensor:
    return values.to(torch.int32).view(torch.float32)


def kinds(keys: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(keys)
    sizes = (2, 1, 3, keys)
    plain = torch.randn(sizes, generator=generator)
    chance = torch.rand(sizes, generator=generator)
    near = torch.tensor([1.0, 1.0000001, 0.99999994, 2.0, 1.9999999, -1.0, -1.0000001, -0.99999994])
    large = torch.full(sizes, torch.finfo(torch.float32).max)
    masked = torch.where(chance < 0.5, -math.inf, plain)
    infinite = torch.where(chance > 0.8, math.inf, masked)
    return {
        "plain": plain,
        "tied": (3 * plain).round(),
        "masked": masked,
        "infinite": infinite,
        "nan": torch.where(chance > 0.9, math.nan, infinite),
        "all nan": torch.full(sizes, math.nan),
        "all masked": torch.full(sizes, -math.inf),
        "zeros of both signs": torch.where(chance < 0.5, 0.0, -0.0),
        "any bits": bits(torch.randint(-(2**31), 2**31, sizes, generator=generator)),
        "tiny": bits(torch.randint(0, 300, sizes, generator=generator)) * torch.where(chance < 0.5, 1, -1),
        "neighbours": near[torch.randint(0, 8, sizes, generator=generator)],
        "the largest": torch.where(chance < 0.5, large, -large),
    }


@pytest.mark.parametrize("keys", KEYS)
def test_the_best_are_those_of_the_reference(keys: int) -> None:
    for name, scores in kinds(keys).items():
        for count in COUNTS:
            wanted = select_topk_reference(scores, None, count, 0, 0)
            assert torch.equal(best(scores, count), wanted), (name, count)


def test_ranges_cover_every_number_once() -> None:
    begins, widths = (x.double() for x in _ranges(torch.zeros(1)))
    assert len(begins) == len(widths) == 512
    finite = begins[:510]
    assert torch.equal(finite[1:], finite[1:].sort().values)
    # The first begins one unit late, at the lowest number that there is.
    assert torch.equal((finite + widths[:510])[1:-1], finite[2:])
    assert finite[0] == -torch.finfo(torch.float32).max
    assert begins[510:].isinf().all()


def test_scores_of_float64_are_refused() -> None:
    with pytest.raises(MlirError, match=r"float64; MLIR selects by fp32 scores"):
        best(torch.zeros(1, 1, 1, 9, dtype=torch.float64), 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_ranked_is_topk_with_ties_at_the_lowest_position(dtype: torch.dtype) -> None:
    values = (3 * torch.randn(4, 50, generator=torch.Generator().manual_seed(0))).to(dtype)
    for count in (1, 7, 50):
        stable = values.sort(dim=-1, descending=True, stable=True)
        assert torch.equal(ranked(values, count), stable.indices[:, :count])


def test_ranked_puts_nan_first() -> None:
    values = torch.tensor([1.0, math.nan, math.inf, math.nan])
    assert ranked(values, 3).tolist() == [1, 3, 2]
