"""Plans: one entry an attention, and the layers that share an index or a pair of keys and values."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor

from clsa_compile.ir.captured import Captured
from clsa_compile.ir.masks import B_, load
from clsa_compile.ir.plan import Group, Plan
from clsa_compile.ir.routing import Shares
from clsa_compile.ir.sites import MaskSpec
from clsa_compile.passes.group import describe_mask
from clsa_compile.passes.pipeline import decide

Trace = Callable[..., Captured]
sdpa = F.scaled_dot_product_attention
B, H, T, D, K = 2, 4, 10, 8, 3


def q(seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(B, H, T, D)


def selection(iq: Tensor, ik: Tensor, causal: Tensor, k: int = K) -> Tensor:
    scores = torch.einsum("bshd,btd->bsht", iq, ik).relu().sum(2)
    indices = scores.masked_fill(~causal, -math.inf).topk(k, dim=-1).indices
    chosen = torch.zeros(B, *causal.shape, dtype=torch.bool).scatter(-1, indices, True)
    return (chosen & causal)[:, None]


def plan_of(trace: Trace, fn: Any, *args: Tensor) -> Plan:
    return decide(trace(fn, *args)).plan


def two_layers(
    one: tuple[int, int, int], other: tuple[int, int, int], back: int = 0
) -> Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Two layers with indexers of their own: (queries, keys, selected) of each; the second's mask shifted."""

    def fn(x: Tensor, y: Tensor, iq: Tensor, ik: Tensor) -> tuple[Tensor, Tensor]:
        outs = []
        for (s, t, k), shift in ((one, 0), (other, back)):
            causal = torch.arange(t)[None] <= torch.arange(s)[:, None] + (t - s - shift)
            mask = selection(iq[:, :s] + shift, ik[:, :t], causal, k)
            outs.append(sdpa(x[:, :, :s], y[:, :, :t], y[:, :, :t] + shift, attn_mask=mask))
            iq, x = iq * 2, x + 1
        return outs[0], outs[1]

    return fn


WHOLE = (T, T, K)


@pytest.mark.parametrize(
    ("other", "back", "why"),
    [
        (WHOLE, 0, ""),
        ((T, T, K - 1), 0, f"it selects {K - 1} tokens"),
        (WHOLE, 1, "its mask is not that of"),
        ((T - 2, T, K), 0, "its mask is not that of"),
        ((T - 2, T - 2, K), 0, "it has other queries"),
    ],
)
def test_an_index_is_read_only_where_it_means_the_same(
    trace: Trace, other: tuple[int, int, int], back: int, why: str
) -> None:
    args = (q(), q(1), torch.randn(B, T, 4, 5), torch.randn(B, T, 5))
    captured = trace(two_layers(WHOLE, other, back), *args)
    plan = decide(captured, lambda owners, _: Shares((0,) * len(owners))).plan
    assert [site.action for site in plan.sites] == ["sparse", "sparse"]
    if not why:
        assert (plan.schedule, plan.shares) == ("FS", (1,))
        return
    assert (plan.schedule, plan.shares) == ("FF", ())
    assert re.search(f"keeps its own index: .*({why})", plan.sites[1].reason), plan.sites[1].reason
    assert plan.sites[0].reason == ""


def test_other_keys_are_another_index(trace: Trace) -> None:
    def fn(x: Tensor, y: Tensor, iq: Tensor, ik: Tensor) -> tuple[Tensor, Tensor]:
        every = torch.ones(T, T, dtype=torch.bool)
        fewer = torch.ones(T, T - 2, dtype=torch.bool)
        one, two = selection(iq, ik, every), selection(iq * 2, ik[:, :-2], fewer)
        return sdpa(x, y, y, attn_mask=one), sdpa(x, y[:, :, :-2], y[:, :, :-2], attn_mask=two)

    captured = trace(fn, q(), q(1), torch.randn(B, T, 4, 5), torch.randn(B, T, 5))
    plan = decide(captured, lambda owners, _: Shares((0,) * len(owners))).plan
    assert plan.schedule == "FF"
    assert "keeps its own index: it has other keys" in plan.sites[1].reason


def test_layers_of_one_index_are_one_group(trace: Trace) -> None:
    def fn(x: Tensor, y: Tensor, iq: Tensor, ik: Tensor) -> tuple[Tensor, ...]:
        causal = torch.ones(T, T, dtype=torch.bool).tril()
        one, two = selection(iq, ik, causal), selection(iq * 2, ik, causal)
        return (
            sdpa(x, y, y, attn_mask=one),
            sdpa(x, y + 1, y, attn_mask=two),
            sdpa(y, x, x, attn_mask=one),
            sdpa(y, x + 1, x),
        )

    plan = plan_of(trace, fn, q(), q(1), torch.randn(B, T, 4, 5), torch.randn(B, T, 5))
    index = [g for g in plan.groups if g.kind == "index"]
    assert [(g.anchor, g.members, g.topk) for g in index] == [(0, (0, 2), K), (1, (1,), K)]
    assert all(g.score == "sum: Max(0, dot)" for g in index)
    assert [s.action for s in plan.sites] == ["sparse", "sparse", "sparse", "attention"]
    assert [s.kind for s in plan.sites] == ["topk", "topk", "topk", "dense"]


def test_layers_that_read_the_same_keys_and_values_are_one_group(trace: Trace) -> None:
    def fn(x: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return sdpa(x, k, v), sdpa(x + 1, v, k), sdpa(x + 2, k, v), sdpa(x, v, v), sdpa(x, k, v)

    plan = plan_of(trace, fn, q(), q(1), q(2))
    assert plan.groups == (Group("kv", 0, (0, 2, 4)),)


def test_views_of_the_same_keys_and_values_are_one_group(trace: Trace) -> None:
    """Layers may each take the heads apart for themselves; other heads, tokens or widths are others."""

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (H, D)).transpose(1, 2)

    def fn(x: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        swapped = k.unflatten(-1, (D, H)).permute(0, 3, 1, 2)
        return (
            sdpa(x, heads(k), heads(v)),
            sdpa(x, k.view(B, T, H, D).permute(0, 2, 1, 3), heads(v)),
            sdpa(x, swapped, heads(v)),
            sdpa(x, heads(k)[:, :, :6], heads(v)[:, :, :6]),
            sdpa(x, heads(k + 0), heads(v)),
            sdpa(x, heads(k), heads(v)),
        )

    plan = plan_of(trace, fn, q(), *(q(seed).transpose(1, 2).flatten(-2) for seed in (1, 2)))
    assert not [site.reason for site in plan.sites if site.reason]
    assert plan.groups == (Group("kv", 0, (0, 1, 5)),)


def test_rejects_are_entries_too(trace: Trace) -> None:
    def fn(x: Tensor) -> tuple[Tensor, ...]:
        return sdpa(x, x, x), sdpa(x, x, x, dropout_p=0.5), sdpa(x, x, x, is_causal=True)

    plan = plan_of(trace, fn, q())
    assert [(s.ordinal, s.action, s.mask) for s in plan.sites] == [
        (0, "attention", "none"), (1, "left", ""), (2, "attention", "kv <= q"),
    ]  # fmt: skip
    assert plan.sites[1].reason == "dropout: dropout_p is 0.5"
    assert plan.count("left") == 1


def test_masks_are_described_with_the_names_of_their_tensors(trace: Trace) -> None:
    def fn(x: Tensor, positions: Tensor, kept: Tensor, whole: Tensor) -> tuple[Tensor, ...]:
        at = (torch.arange(T)[None] <= positions[:, None]) & kept[:, None, None]
        return (
            sdpa(x, x, x, attn_mask=at),
            sdpa(x, x, x, attn_mask=whole),
            sdpa(x, x, x, attn_mask=whole & kept[:, None, None]),
        )

    captured = trace(fn, q(), torch.arange(T), torch.ones(B, T).bool(), torch.ones(B, 1, T, T).bool())
    sites = decide(captured).sites.attention
    texts = [describe_mask(s.mask) for s in sites]
    assert texts[0] == "(kv <= positions_1(q)) & Ne(kept_1(b, kv), 0)"
    assert texts[1] == "bool tensor whole_1"
    assert texts[2] == "Ne(kept_1(b, kv), 0) & bool tensor whole_1"


def test_many_inputs_keep_their_own_names(trace: Trace) -> None:
    # in1 is a prefix of in10: names are put in from the last one on.

    captured = trace(lambda *a: a[0] + 1, *(torch.ones(2) for _ in range(12)))
    inputs = tuple(n for n in captured.graph.nodes if n.op == "placeholder")
    both = sympy.And(sympy.Ne(load(1)(B_), 0), sympy.Ne(load(10)(B_), 0))
    text = describe_mask(MaskSpec(both, inputs))
    assert f"{inputs[1].name}(b)" in text
    assert f"{inputs[10].name}(b)" in text
