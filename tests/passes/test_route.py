"""passes/route.py: which attentions may share tokens, and why others do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clsa_compile.ir.captured import Captured
from clsa_compile.ir.masks import parse_predicate
from clsa_compile.ir.routing import Index, Layer, Pool, Request
from clsa_compile.ir.scores import LIGHTNING
from clsa_compile.passes.pipeline import decide
from clsa_compile.passes.route import PROMPT, UNMADE, is_window

Trace = Callable[..., Captured]
sdpa = F.scaled_dot_product_attention
B, H, T, D = 2, 4, 12, 8


@pytest.mark.parametrize(
    ("predicate", "window"),
    [
        ("", False),
        ("kv <= q", False),
        ("kv <= in0(q)", False),
        ("(kv <= q) & Ne(in0(b, kv), 0)", False),
        ("(kv <= q) & (kv >= in0(b))", False),
        ("(kv <= q) | (kv < 4)", False),
        ("(kv <= q) & Eq(in0(b, q), in0(b, kv))", False),
        ("(kv <= q) & (kv > q - 16)", True),
        ("(kv <= in0()) & (kv > in0() - 16)", True),
        ("Abs(kv - q) < 3", True),
        ("(kv <= q) & Eq(floordiv(kv, 8), floordiv(q, 8))", True),
    ],
)
def test_windows_and_chunks_are_told_from_all_tokens_before(predicate: str, window: bool) -> None:
    assert is_window(parse_predicate(predicate)) == window


def request(members: tuple[int, ...], topk: int = 4, prompts: bool = True, anchor: int = 0) -> Request:
    def make(layers: Any) -> tuple[Pool, ...]:
        weights = ((1.0,) * layers[0].heads,)
        return (Pool(anchor, topk, {anchor: weights}, members),)

    return Request(make, prompts)


def planned(trace: Trace, fn: Any, asked: Request, *args: Tensor) -> Any:
    return decide(trace(fn, *args), request=asked).plan


def qkv(s: int = T, t: int = T) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(B, H, s, D), torch.randn(B, H, t, D), torch.randn(B, H, t, D)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    x = sdpa(q, k, v, is_causal=True)
    return sdpa(x, k + 1, v, is_causal=True)


def test_members_become_sparse(trace: Trace) -> None:
    plan = planned(trace, causal, request((1,)), *qkv())
    assert [(e.action, e.topk, e.reason) for e in plan.sites] == [("attention", 0, ""), ("sparse", 4, "")]
    assert plan.schedule == "FS"
    assert [(g.kind, g.anchor, g.members, g.topk) for g in plan.groups] == [("mass", 0, (1,), 4)]


def _other_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(sdpa(q, k, v, is_causal=True), k, v)


def _other_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(sdpa(q, k, v), torch.cat([k, k], 2)[:, :, 6:-6], torch.cat([v, v], 2)[:, :, 6:-6])


def _other_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(sdpa(q, k, v)[:, :, 1:], k, v)


@pytest.mark.parametrize(
    ("fn", "asked", "why"),
    [
        (_other_mask, request((1,)), "another mask"),
        (_other_queries, request((1,)), "other queries"),
        (causal, request((1,), prompts=False), PROMPT),
        (causal, request((1,), topk=T), "stays dense: it has 12 keys, and 12 would be selected"),
    ],
)
def test_members_that_cannot_stay_dense(fn: Any, asked: Request, why: str, trace: Trace) -> None:
    plan = planned(trace, fn, asked, *qkv())
    assert [e.action for e in plan.sites] == ["attention", "attention"]
    assert why in plan.sites[1].reason
    assert plan.pools == ()
    assert plan.schedule == "FF"


def test_steps_are_no_prompts(trace: Trace) -> None:
    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(sdpa(q, k, v), k, v)

    assert planned(trace, step, request((1,), prompts=False), *qkv(s=8)).pools
    assert not planned(trace, step, request((1,), prompts=False), *qkv(s=9)).pools


def test_caches_that_are_shorter_than_others_are_windows(trace: Trace) -> None:
    seen: list[list[Layer]] = []

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = sdpa(q, k[:, :, :6], v[:, :, :6])
        return sdpa(sdpa(x, k, v), k, v)

    def make(layers: Any) -> tuple[Pool, ...]:
        seen.append(list(layers))
        return ()

    plan = planned(trace, fn, Request(make), *qkv(s=1))
    assert [layer.ordinal for layer in seen[0]] == [1, 2]
    assert plan.schedule == "FF"


def test_an_index_that_cannot_be_made_leaves_its_group_dense(trace: Trace) -> None:
    """These queries come from no product with a weight."""

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v) + sdpa(q * 2, k, v)

    def learned(layers: Any) -> tuple[Pool, ...]:
        return (Pool(0, 4, {}, (0, 1), index=Index("0", LIGHTNING.text, 0, 1)),)

    plan = decide(trace(step, *qkv()), request=Request(learned, True)).plan
    assert plan.pools == ()
    assert plan.schedule == "FF"
    reason = f"{UNMADE} no product with a weight makes the queries of "
    assert all(site.reason.startswith(reason) for site in plan.sites)
