"""Rewriting: random attentions equal eager, and what several layers share is made once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from clsa_compile.ir.captured import Captured
from clsa_compile.ir.routing import Pool, Request, Weights
from clsa_compile.passes.pipeline import decide
from clsa_compile.passes.rewrite import rewrite

Rewritten = Callable[..., Any]
Draw = Any
LOWEST = torch.finfo(torch.float32).min
sdpa = F.scaled_dot_product_attention


# -- random attention modules ------------------------------------------------------------------------


@st.composite
def attentions(draw: Draw) -> tuple[Callable[..., Tensor], list[Tensor], str, Tensor]:
    """Draws an attention of a decoder: its function, its inputs, its family, the rows with keys."""
    b, kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    s, t = draw(st.sampled_from([1, 3])), draw(st.sampled_from([1, 5]))
    d, dv = draw(st.sampled_from([1, 4])), draw(st.sampled_from([1, 4, 6]))
    h = kv_heads * group
    eager = draw(st.booleans())
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float64]))
    scale = draw(st.sampled_from([0.5, 1.0]))
    softcap = draw(st.sampled_from([0.0, 3.0])) if eager else 0.0
    sink = eager and draw(st.booleans())
    window = draw(st.sampled_from([0, 2]))
    causal = draw(st.booleans())
    padding = draw(st.booleans())
    form = draw(st.sampled_from(["boolean", "lowest", "-inf"]))
    grow = draw(st.sampled_from(["expand", "interleave", "index"])) if group > 1 else "none"
    tokens_first = draw(st.booleans())

    def allowed(kept: Tensor) -> Tensor | None:
        rows = torch.arange(s)[:, None] + max(t - s, 0)
        keys = torch.arange(t)[None]
        parts = [
            *([keys <= rows] if causal else []),
            *([keys > rows - window] if window else []),
            *([kept[:, None, None, :]] if padding else []),
        ]
        return reduce(torch.logical_and, parts) if parts else None

    def mask_of(kept: Tensor) -> Tensor | None:
        mask = allowed(kept)
        if mask is None or (form == "boolean" and not eager):
            return mask
        return torch.where(mask, 0.0, -math.inf if form == "-inf" else LOWEST).to(dtype)

    def fn(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, sinks: Tensor) -> Tensor:
        if tokens_first:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if grow == "expand":
            k, v = (x[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2) for x in (k, v))
        elif grow == "interleave":
            k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        elif grow == "index":
            places = torch.arange(h) // group
            k, v = k[:, places], v[:, places]
        mask = mask_of(kept)
        if not eager:
            return sdpa(q, k, v, attn_mask=mask, scale=scale)
        scores = q @ k.mT * scale
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        if mask is not None:
            scores = scores + mask
        if not sink:
            return scores.softmax(-1) @ v
        column = sinks.reshape(1, -1, 1, 1).expand(b, -1, s, -1)
        joined = torch.cat([scores, column], dim=-1)
        joined = joined - joined.amax(dim=-1, keepdim=True)
        return joined.softmax(-1)[..., :-1] @ v

    torch.manual_seed(draw(st.integers(0, 3)))
    shapes = [(b, h, s, d), (b, kv_heads, t, d), (b, kv_heads, t, dv)]
    if tokens_first:
        shapes = [(x[0], x[2], x[1], x[3]) for x in shapes]
    kept = torch.rand(b, t) > 0.3
    kept[:, -1] = True  # the last token is seen by every last row
    inputs = [torch.randn(x).to(dtype) for x in shapes]
    mask = allowed(kept)
    rows = torch.ones(b, h, s, dtype=torch.bool)
    if mask is not None:
        rows &= mask.expand(b, h, s, t).any(-1)
    return fn, [*inputs, kept, torch.randn(h).to(dtype)], "eager" if eager else "sdpa", rows


@given(case=attentions())
def test_a_random_attention_equals_eager(case: Any, rewritten: Rewritten) -> None:
    fn, inputs, family, rows = case
    outcome = rewritten(fn, *inputs)
    assert len(outcome.sites) == 1, [str(r) for r in outcome.rejects]
    assert outcome.site.family == family
    assert outcome.actual.dtype == outcome.expected.dtype
    steps = [
        [n for n, size in zip(x.stride(), x.shape, strict=True) if size > 1]
        for x in (outcome.actual, outcome.expected)
    ]
    assert steps[0] == steps[1], "later views rely on strides"
    assert torch.isfinite(outcome.actual).all()
    torch.testing.assert_close(outcome.actual[rows], outcome.expected[rows], atol=2e-5, rtol=2e-5)


# -- the graph ---------------------------------------------------------------------------------------


def qkv() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 4, 3, 8), torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8)


def count(graph: Any, name: str) -> int:
    return sum(name in str(n.target) for n in graph.nodes if n.op == "call_function")


def rewritten_only(trace: Any, fn: Any, *args: Tensor) -> Captured:
    captured = trace(fn, *args)
    decision = decide(captured)
    return rewrite(captured, decision.sites, decision.plan)


def test_every_attention_becomes_one_contract_op_with_a_value(trace: Any) -> None:
    captured = rewritten_only(trace, lambda q, k, v: (sdpa(q, k, v), sdpa(v, k, v)), *qkv())
    captured.graph.lint()
    nodes = [n for n in captured.graph.nodes if "clsa.attention" in str(n.target)]
    assert len(nodes) == 2
    assert count(captured.graph, "scaled_dot_product") == 0
    for node in captured.graph.nodes:
        if node.op == "call_function":
            assert "val" in node.meta, node


def test_an_attention_may_read_what_another_gave(rewritten: Rewritten) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = sdpa(q, k, v)
        y = sdpa(x, k, v)
        return sdpa(q, y, x.clone())

    outcome = rewritten(fn, *qkv())
    outcome.assert_equal()
    assert len(outcome.sites) == 3


def test_a_mask_may_come_from_an_attention(rewritten: Rewritten) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = sdpa(q, k, v)[..., :6]
        return sdpa(q, k, v, attn_mask=bias)

    outcome = rewritten(fn, *qkv())
    outcome.assert_equal()
    assert len(outcome.sites) == 2


@pytest.mark.parametrize("after", ["view", "reshape", "transpose and view", "einsum"])
def test_what_follows_reads_the_layout_that_it_was_traced_with(after: str, rewritten: Rewritten) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if after == "einsum":
            weights = torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1)
            return torch.einsum("bhqk,bhkd->bqhd", weights, v).reshape(2, 3, 32)
        out = sdpa(q, k, v)
        if after == "view":
            return out.view(2, 4, 24)
        if after == "reshape":
            return out.transpose(1, 2).reshape(2, 3, 32)
        return out.transpose(1, 2).contiguous().view(2, 3, 32)

    outcome = rewritten(fn, *qkv())
    outcome.assert_equal()
    assert len(outcome.sites) == 1


def test_a_left_attention_stays_beside_those_that_are_rewritten(rewritten: Rewritten) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        weights = (q @ k.mT).softmax(-1)
        return weights @ v, weights, sdpa(q, k, v)

    outcome = rewritten(fn, *qkv())
    outcome.assert_equal()
    assert (len(outcome.sites), len(outcome.rejects)) == (1, 1)
    assert any("aten.softmax" in op for op in outcome.ops), "the left one"


def test_a_plan_that_leaves_a_site_is_obeyed(trace: Any) -> None:
    captured = trace(lambda q, k, v: (sdpa(q, k, v), sdpa(v, k, v)), *qkv())
    decision = decide(captured)
    first, second = decision.plan.sites
    plan = replace(decision.plan, sites=(replace(first, action="left"), second))
    rewrite(captured, decision.sites, plan)
    assert count(captured.graph, "clsa.attention") == 1
    assert count(captured.graph, "scaled_dot_product") == 1


# -- bounds ------------------------------------------------------------------------------------------


def on_a_device(fn: Any, *args: Tensor) -> Captured:
    """Rewrites for a device that has kernels. Nothing runs, so the meta device will do."""
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(a.to("meta")) for a in args]
    with mode:
        module = make_fx(fn, pre_dispatch=True)(*fakes)
    captured = Captured(module, mode, "dynamo")
    decision = decide(captured)
    assert not decision.sites.rejects
    return rewrite(captured, decision.sites, decision.plan)


def test_bounds_are_computed_once_for_each_mask() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> tuple[Tensor, ...]:
        keys, rows = torch.arange(6, device="meta")[None], torch.arange(3, device="meta")[:, None]
        causal = (keys <= rows) & kept[:, None, None]
        window = causal & (keys > rows - 2)
        out = [sdpa(q + i, k, v, attn_mask=causal) for i in range(3)]
        out += [sdpa(q + i, k, v, attn_mask=window) for i in range(2)]
        return (*out, sdpa(q, k, v))

    graph = on_a_device(fn, *qkv(), torch.ones(2, 6).bool()).graph
    assert count(graph, "clsa.attention") == 6
    assert count(graph, "clsa.mask_bounds") == 2
    graph.lint()
    without = [n for n in graph.nodes if "clsa.attention" in str(n.target) and n.args[4] is None]
    assert len(without) == 1, "nothing is masked: no bounds"


def test_bounds_of_other_lengths_are_not_shared() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return (
            sdpa(q, k, v, is_causal=True),
            sdpa(q, k[:, :, :4], v[:, :, :4], is_causal=True),
            sdpa(q[:, :, :2], k, v, is_causal=True),
        )

    assert count(on_a_device(fn, *qkv()).graph, "clsa.mask_bounds") == 3


# -- mass --------------------------------------------------------------------------------------------


def test_mass_is_added_up_as_it_comes(trace: Any) -> None:
    """A pool holds one sum until its anchor; the sum is in the order of the layers."""
    anchors = 5

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for i in range(anchors):
            q = sdpa(q, k + i, v, is_causal=True)
        return q

    def pools(layers: Any) -> tuple[Pool, ...]:
        def weight(pool: int, source: int) -> Weights:
            return (tuple(1.0 + head + pool * source for head in range(layers[0].heads)),)

        return tuple(
            Pool(i, 4, {j: weight(i, j) for j in range(i + 1)}, (i,), power=0.5) for i in range(anchors)
        )

    captured = trace(fn, *(torch.randn(2, 4, 12, 8) for _ in range(3)))
    decision = decide(captured, request=Request(pools, prompts=True))
    graph = rewrite(captured, decision.sites, decision.plan).graph
    graph.lint()
    layer, added, chosen = -1, {}, []
    for node in graph.nodes:
        layer += "attention_mass" in str(node.target)
        if node.target is torch.ops.aten.add.Tensor and node.meta["val"].shape[-2:] == (12, 12):
            added[node] = (*added.get(node.args[0], (0,)), layer)
        elif "select_topk" in str(node.target):
            chosen.append(added.get(node.args[0], (0,)))
    assert chosen == [tuple(range(i + 1)) for i in range(anchors)], "by layer, where the sum is made"
