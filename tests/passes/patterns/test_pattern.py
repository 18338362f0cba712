"""What patterns share: constants, users, sizes, and how operands and masks are checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor

from clsa_compile.ir.captured import Captured
from clsa_compile.ir.masks import B_, H_, INDEX_SYMBOLS, KV_, Q_
from clsa_compile.ir.sites import Reason, Refused
from clsa_compile.passes.patterns.pattern import (
    constant,
    number,
    refuse_unless,
    role_index,
    roles_of,
    score_sizes,
    sole_user,
)

Trace = Callable[..., Captured]
Rewritten = Callable[..., Any]
B, H, S, T, D = 2, 4, 3, 6, 8


def qkv() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(B, H, S, D), torch.randn(B, H, T, D), torch.randn(B, H, T, D)


@pytest.mark.parametrize(
    ("value", "expected"), [(1, 1.0), (0.5, 0.5), (True, None), (None, None), ("1", None), ([1], None)]
)
def test_numbers_are_numbers(value: Any, expected: float | None) -> None:
    assert number(value) == expected


def test_constants_are_seen_through_the_nodes_that_hold_them(trace: Trace) -> None:
    captured = trace(
        lambda x: (
            x * torch.full((), 0.5), x * torch.scalar_tensor(2), x * torch.full((1,), 3.0), x * x.sum()
        ),
        torch.randn(3),
    )  # fmt: skip
    factors = [n.args[1] for n in captured.graph.nodes if n.target is torch.ops.aten.mul.Tensor]
    assert [constant(f) for f in factors] == [0.5, 2.0, None, None]
    assert constant(4) == 4.0


def test_a_condition_that_does_not_hold_is_a_refusal_with_its_reason() -> None:
    refuse_unless(True, Reason.SHAPE, "fine")
    with pytest.raises(Refused, match="too wide") as refusal:
        refuse_unless(False, Reason.SHAPE, "too wide")
    assert refusal.value.reason is Reason.SHAPE


def test_a_second_user_is_refused_by_name(trace: Trace) -> None:
    captured = trace(lambda x: (x * 2, x.exp()), torch.randn(3))
    x, product, exp, _ = captured.graph.nodes
    sole_user(product)
    sole_user(x, (product, exp))
    for allowed in ((), (product,)):
        with pytest.raises(Refused, match="exp") as refusal:
            sole_user(x, allowed)
        assert refusal.value.reason is Reason.USERS


def test_roles_and_sizes_of_scores(trace: Trace) -> None:
    assert roles_of(4) == (0, 1, 2, 3)
    assert roles_of(3) == (0, 2, 3)
    assert roles_of(2) is roles_of(5) is None
    captured = trace(lambda x: x + 1, torch.randn(2, 4, 1, 6))
    node = next(iter(captured.graph.nodes))
    sizes = score_sizes(node, (0, 1, 2, 3))
    assert [sizes[s] for s in INDEX_SYMBOLS] == [2, 4, 1, 6]
    assert isinstance(sizes[H_], int)
    assert role_index((0, 1, 2, 3), sizes) == (B_, H_, sympy.S.Zero, KV_)
    assert role_index((0, 2, 3), score_sizes(node, (0, 1, 2, 3))) == (B_, sympy.S.Zero, KV_)
    symbolic = trace(lambda x: x + 1, torch.randn(2, 4, 3, 6), symbolic=True)
    sizes = score_sizes(next(iter(symbolic.graph.nodes)), (0, 1, 2, 3))
    assert not isinstance(sizes[Q_], int)


# -- masks that cannot be recovered are carried as tensors -----------------------------------------


def with_mask(build: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def fn(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=build(*rest))

    return fn


def test_a_mask_of_unknown_making_is_carried_as_it_is(rewritten: Rewritten) -> None:
    def build(a: Tensor, b: Tensor) -> Tensor:
        return torch.logical_xor(a, b) | torch.ones(S, T, dtype=torch.bool).tril()

    outcome = rewritten(with_mask(build), *qkv(), torch.rand(S, T) > 0.5, torch.rand(S, T) > 0.5)
    outcome.assert_equal()
    assert outcome.site.mask.tensor is not None


def test_two_materialised_masks_are_carried_as_their_combination(rewritten: Rewritten) -> None:
    a, b = torch.rand(S, T) > 0.2, torch.rand(B, 1, S, T) > 0.2
    a[:, 0] = b[..., 0] = True
    outcome = rewritten(with_mask(lambda a, b: a & b), *qkv(), a, b)
    outcome.assert_equal()
    assert outcome.site.mask.tensor is not None


def test_a_mask_whose_parts_are_written_later_is_carried_as_it_was(rewritten: Rewritten) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> Tensor:
        mask = a & torch.ones(S, T, dtype=torch.bool).tril(2)
        a.zero_()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    a = torch.ones(S, T, dtype=torch.bool)
    outcome = rewritten(fn, *qkv(), a)
    outcome.assert_equal()
    assert len(outcome.sites) == 1


def test_a_mask_written_between_its_making_and_its_use_is_read_after_the_write(
    rewritten: Rewritten,
) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> Tensor:
        mask = torch.where(a, 0.0, -1.0)
        mask[:, 1] = -2.0
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    outcome = rewritten(fn, *qkv(), torch.rand(S, T) > 0.5)
    outcome.assert_equal()
    assert len(outcome.sites) == 1


@pytest.mark.parametrize("shape", [(S, T), (1, S, T), (B, 1, S, T), (H, 1, 1), (B, H, 1, 1)])
def test_biases_that_broadcast_are_right(shape: tuple[int, ...], rewritten: Rewritten) -> None:
    # One number a head or a batch changes nothing in a softmax: it must not change anything here.
    outcome = rewritten(lambda q, k, v, m: (q @ k.mT + m).softmax(-1) @ v, *qkv(), torch.randn(shape))
    outcome.assert_equal()
