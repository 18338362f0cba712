"""Products in one form: every op's index equations, against torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from clsa_compile.ir.captured import Captured
from clsa_compile.passes.indexing import dim
from clsa_compile.passes.patterns.product import SUM, Product, product

Trace = Callable[..., Captured]


def found(trace: Trace, fn: Any, a: Tensor, b: Tensor) -> Product | None:
    captured = trace(fn, a, b)
    return product(next(n for n in captured.graph.nodes if n.op == "output").args[0])


def by_index(p: Product, a: Tensor, b: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Evaluates out[d] = sum over SUM of left[...] * right[...], one element at a time."""
    operands = {"a_1": a, "b_1": b}
    left, right = operands[p.left.name], operands[p.right.name]
    out = torch.zeros(shape, dtype=torch.float64)
    for place in itertools.product(*map(range, shape)):
        table = {dim(i): n for i, n in enumerate(place)}
        for c in range(int(p.summed)):
            table[SUM] = c
            one = left[tuple(int(e.subs(table)) for e in p.left_index)]
            two = right[tuple(int(e.subs(table)) for e in p.right_index)]
            out[place] += float(one) * float(two)
    return out


@pytest.mark.parametrize(
    ("fn", "a", "b"),
    [
        (lambda a, b: a @ b, (3, 4), (4, 5)),
        (lambda a, b: a @ b, (2, 3, 4), (2, 4, 5)),
        (lambda a, b: a @ b, (2, 1, 3, 4), (1, 5, 4, 2)),
        (lambda a, b: a @ b, (2, 3, 4), (4, 5)),
        (lambda a, b: a @ b, (3, 4), (2, 2, 4, 5)),
        (lambda a, b: a @ b, (2, 1, 4), (2, 4, 1)),
        (lambda a, b: a @ b, (2, 3, 1), (2, 1, 3)),
        (lambda a, b: torch.bmm(a, b), (2, 3, 4), (2, 4, 5)),
        (lambda a, b: torch.einsum("bhqd,bhkd->bhqk", a, b), (2, 2, 3, 4), (2, 2, 5, 4)),
        (lambda a, b: torch.einsum("bshd, btd -> bsht", a, b), (2, 3, 2, 4), (2, 5, 4)),
        (lambda a, b: torch.einsum("bhqk,bhkd->bqhd", a, b), (2, 2, 3, 5), (2, 2, 5, 4)),
        (lambda a, b: torch.einsum("ij,jk->ki", a, b), (3, 4), (4, 2)),
        (lambda a, b: torch.einsum("bh,bht->bt", a, b), (2, 3), (2, 3, 4)),
    ],
)
def test_the_index_equation_is_the_product(
    fn: Any, a: tuple[int, ...], b: tuple[int, ...], trace: Trace
) -> None:
    torch.manual_seed(0)

    def named(a: Tensor, b: Tensor) -> Tensor:
        result: Tensor = fn(a, b)
        return result

    one, two = torch.randn(a), torch.randn(b)
    p = found(trace, named, one, two)
    assert p is not None
    wanted = fn(one, two)
    torch.testing.assert_close(by_index(p, one, two, tuple(wanted.shape)).float(), wanted)


@pytest.mark.parametrize(
    ("fn", "a", "b"),
    [
        (lambda a, b: a @ b, (4,), (4, 5)),
        (lambda a, b: a @ b, (3, 4), (4,)),
        (lambda a, b: a * b, (3, 4), (3, 4)),
        (lambda a, b: torch.einsum("...qd,...kd->...qk", a, b), (2, 3, 4), (2, 5, 4)),
        (lambda a, b: torch.einsum("ij,jk", a, b), (3, 4), (4, 2)),
        (lambda a, b: torch.einsum("ijk,ijk->i", a, b), (2, 3, 4), (2, 3, 4)),
        (lambda a, b: torch.einsum("ii,ij->ij", a, b), (3, 3), (3, 2)),
        (lambda a, b: torch.einsum("ij,ij->ij", a, b), (3, 2), (3, 2)),
        (lambda a, b: torch.einsum("ij,k->ik", a, b), (3, 2), (4,)),
        (lambda a, b: torch.nn.functional.linear(a, b), (3, 4), (5, 4)),
    ],
)
def test_what_is_no_product_of_two_over_one_dimension_is_none(
    fn: Any, a: tuple[int, ...], b: tuple[int, ...], trace: Trace
) -> None:
    assert found(trace, fn, torch.randn(a), torch.randn(b)) is None


def test_a_product_of_three_is_none(trace: Trace) -> None:
    captured = trace(lambda a, b: torch.einsum("ij,jk,kl->il", a, b, a), torch.randn(3, 3), torch.randn(3, 3))
    assert product(next(n for n in captured.graph.nodes if n.op == "output").args[0]) is None
