"""Reclaims: index keys that nobody reads any more are not written, and all others are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clsa_compile.ir.captured import Captured
from clsa_compile.ir.routing import Shares
from clsa_compile.passes.pipeline import carry_out, decide

Trace = Callable[..., Captured]
sdpa = F.scaled_dot_product_attention
aten = torch.ops.aten
B, H, T, D, K = 2, 4, 10, 8, 3


def selection(iq: Tensor, ik: Tensor, causal: Tensor) -> Tensor:
    scores = torch.einsum("bshd,btd->bsht", iq, ik).relu().sum(2)
    indices = scores.masked_fill(~causal, -torch.inf).topk(K, dim=-1).indices
    chosen = torch.zeros(B, T, T, dtype=torch.bool).scatter(-1, indices, True)
    return (chosen & causal)[:, None]


def two_layers(more: Callable[..., tuple[Tensor, ...]], again: bool = False) -> Any:
    """Two layers with key caches of their own; `more(cache, written)` are further results."""

    def fn(x: Tensor, y: Tensor, iq: Tensor, new: Tensor, c1: Tensor, c2: Tensor) -> tuple[Tensor, ...]:
        at = torch.arange(T)
        causal = at[None] <= at[:, None]
        before = c2
        one, two = c1.index_copy_(1, at, new), c2.index_copy_(1, at, new * 2)
        if again:
            two = two.index_copy_(1, at[:2], new[:, :2])
        first = sdpa(x, y, y, attn_mask=selection(iq, one, causal))
        second = sdpa(first, y + 1, y, attn_mask=selection(iq * 2, two, causal))
        return (second, *more(before, two))

    return fn


def reclaimed(trace: Trace, fn: Any) -> tuple[tuple[int, ...], int]:
    """Returns the layers whose keys are not written, and how many writes are left."""
    torch.manual_seed(0)
    args = (torch.randn(B, H, T, D), torch.randn(B, H, T, D), torch.randn(B, T, 4, 5))
    args += tuple(torch.randn(B, T, 5) for _ in range(3))
    captured = trace(fn, *args)
    decision = decide(captured, lambda owners, _: Shares((0,) * len(owners)), reclaims=True)
    assert decision.plan.shares == (1,)
    left: list[int] = []

    def observe(stage: str, now: Captured) -> None:
        if stage == "rewritten":
            left.append(sum(n.target is aten.index_copy_.default for n in now.graph.nodes))

    carry_out(captured, decision, (), lambda kernel: kernel, observe)
    return decision.plan.invalid, left[0]


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (lambda cache, keys: (), "nothing else"),
        (lambda cache, keys: (keys,), "handed back, as a cache is"),
        (lambda cache, keys: (cache,), "handed back by its old name"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_keys_that_only_an_idle_indexer_reads(trace: Trace, more: Any, why: str) -> None:
    assert reclaimed(trace, two_layers(more)) == ((1,), 1)


def test_all_writes_of_a_buffer_go(trace: Trace) -> None:
    assert reclaimed(trace, two_layers(lambda cache, keys: (), again=True)) == ((1,), 1)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (lambda cache, keys: (keys.sum(),), "read elsewhere"),
        (lambda cache, keys: (keys.clone(),), "copied"),
        (lambda cache, keys: (keys[:, :2],), "seen through a view"),
        (lambda cache, keys: (cache.view(B, -1).sum(),), "read by its old name"),
        (lambda cache, keys: (cache.add_(1),), "written elsewhere"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_keys_that_something_else_needs_stay(trace: Trace, more: Any, why: str) -> None:
    invalid, writes = reclaimed(trace, two_layers(more))
    assert (invalid, writes) == ((), 2)


def test_keys_that_the_anchor_reads_too_stay(trace: Trace) -> None:
    def fn(x: Tensor, y: Tensor, iq: Tensor, new: Tensor, c1: Tensor, c2: Tensor) -> tuple[Tensor, ...]:
        at = torch.arange(T)
        causal = at[None] <= at[:, None]
        keys = c1.index_copy_(1, at, new)
        first = sdpa(x, y, y, attn_mask=selection(iq, keys, causal))
        return (sdpa(first, y + 1, y, attn_mask=selection(iq * 2, keys, causal)),)

    assert reclaimed(trace, fn) == ((), 1)


def test_keys_that_attention_reads_too_stay(trace: Trace) -> None:
    """An indexer that scores the keys of attention itself: idle, but its keys are not."""

    def fn(x: Tensor, y: Tensor, iq: Tensor, new: Tensor, c1: Tensor, c2: Tensor) -> tuple[Tensor, ...]:
        at = torch.arange(T)
        causal = at[None] <= at[:, None]
        one, two = c1.index_copy_(1, at, new), c2.index_copy_(1, at, new * 2)
        outs = []
        for scale, keys in ((1, one), (2, two)):
            k = keys[:, None].expand(B, H, T, 5)
            mask = selection(iq * scale, keys, causal)
            outs.append(sdpa(x[..., :5] * scale, k, y * scale, attn_mask=mask))
        return tuple(outs)

    assert reclaimed(trace, fn) == ((), 2)


def test_nothing_is_reclaimed_unasked(trace: Trace) -> None:
    torch.manual_seed(0)
    args = (torch.randn(B, H, T, D), torch.randn(B, H, T, D), torch.randn(B, T, 4, 5))
    captured = trace(two_layers(lambda cache, keys: ()), *args, *(torch.randn(B, T, 5) for _ in range(3)))
    decision = decide(captured, lambda owners, _: Shares((0,) * len(owners)))
    assert decision.plan.shares == (1,)
    assert (decision.plan.invalid, decision.reclaimed) == ((), ())
