"""Stopping early: a prompt's last rows are computed alone, as far as every reader wants no others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clsa_compile.ir.captured import Captured
from clsa_compile.passes.canonicalize import canonicalize
from clsa_compile.passes.early import stop_early
from clsa_compile.passes.indexing import is_tensor
from clsa_compile.passes.pipeline import carry_out, decide

Trace = Callable[..., Captured]
aten = torch.ops.aten
clsa = torch.ops.clsa
sdpa = F.scaled_dot_product_attention
B, S, D, H = 2, 7, 8, 2


def x(rows: int = S) -> Tensor:
    return torch.randn(B, rows, D, generator=torch.Generator().manual_seed(rows))


def w(seed: int = 1) -> Tensor:
    return torch.randn(D, D, generator=torch.Generator().manual_seed(seed)) / 3


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (H, -1)).transpose(1, 2)


def rows_of(
    trace: Trace, fn: Any, *args: Tensor, symbolic: bool = False, others: Any = (), whole: bool = False
) -> dict[Any, list[Any]]:
    """Runs the pass (with `whole`, all passes), compares with `fn`, and returns the rows of products."""
    captured = canonicalize(trace(fn, *args, symbolic=symbolic))
    found: dict[Any, list[Any]] = {}

    def observe(stage: str, now: Captured) -> None:
        for node in now.graph.nodes if stage == "rewritten" else ():
            value = node.meta.get("val")
            value = value[0] if isinstance(value, list | tuple) else value
            if node.target in (aten.linear.default, aten.matmul.default):
                found.setdefault(node.target, []).append(value.shape[1])
            elif str(node.target).startswith("clsa.") and isinstance(value, Tensor):
                found.setdefault(node.target, []).append(value.shape[2])

    if whole:
        carry_out(captured, decide(captured), (), lambda kernel: kernel, observe)
    else:
        stop_early(captured)
        observe("rewritten", captured)
    for given in (args, *others):
        mine, theirs = ([a.clone() for a in given] for _ in range(2))
        with torch.no_grad():
            torch.testing.assert_close(captured.module(*theirs), fn(*mine), atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(theirs, mine, atol=2e-5, rtol=2e-5)
    return found


def network(x: Tensor, w: Tensor) -> Tensor:
    """What a decoder does to each row: a norm, a gated network, a residual."""
    y = F.layer_norm(x, [D])
    variance = y.pow(2).mean(-1, keepdim=True)
    y = (y * torch.rsqrt(variance + 1e-6)).to(torch.float64).type_as(x)
    return x + F.linear(F.silu(F.linear(y, w)) * F.linear(y, w.t()), w)


# -- what is pushed back ---------------------------------------------------------------------------

SLICES: dict[str, Callable[[Tensor], Tensor]] = {
    "the last row": lambda x: x[:, -1:],
    "the last row, without its dimension": lambda x: x[:, -1],
    "the last three rows": lambda x: x[:, -3:],
    "rows in the middle": lambda x: x[:, 2:4],
    "one row in the middle": lambda x: x[:, 3],
}


@pytest.mark.parametrize("which", SLICES)
def test_rows_of_a_network_are_computed_alone(trace: Trace, which: str) -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(SLICES[which](network(F.relu(x), w)), w)

    count = SLICES[which](x()).shape[1] if SLICES[which](x()).dim() == 3 else 1
    rows = rows_of(trace, fn, x(), w())[aten.linear.default]
    assert rows[:3] == [count] * 3


def test_rows_that_a_tensor_names(trace: Trace) -> None:
    def fn(x: Tensor, w: Tensor, keep: Tensor) -> Tensor:
        return F.linear(network(F.relu(x), w)[:, keep], w)

    rows = rows_of(trace, fn, x(), w(), torch.tensor([-1, 2]), others=[(x(), w(), torch.tensor([0, 5]))])
    assert rows[aten.linear.default] == [2] * 4


def test_lengths_that_are_not_known(trace: Trace) -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        y = network(F.relu(x), w).reshape(x.shape[0], x.shape[1], H, D // H).transpose(1, 2)
        return F.linear(y.transpose(1, 2).reshape(x.shape[0], x.shape[1], D)[:, -1:], w)

    rows = rows_of(trace, fn, x(), w(), symbolic=True, others=[(x(3), w()), (x(11), w())])
    assert rows[aten.linear.default] == [1] * 4


def test_heads_and_rotary_angles(trace: Trace) -> None:
    def fn(x: Tensor, w: Tensor, angles: Tensor) -> Tensor:
        q = heads(F.linear(F.relu(x), w))
        first, second = q.chunk(2, dim=-1)
        q = q * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin()
        return q.transpose(1, 2).flatten(-2)[:, -1:].sum(-1)

    assert rows_of(trace, fn, x(), w(), torch.randn(S, D // H))[aten.linear.default] == [1]


def attend(x: Tensor, w: Tensor, mask: Tensor | None, **kwargs: Any) -> Tensor:
    q, k, v = (heads(F.linear(x, w * i)) for i in (1, 2, 3))
    return sdpa(q, k, v, attn_mask=mask, **kwargs).transpose(1, 2).flatten(-2)


@pytest.mark.parametrize("symbolic", [False, True])
def test_the_query_side_of_attention(trace: Trace, symbolic: bool) -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        x = F.relu(x)
        return network(x + attend(x, w, None, is_causal=True), w)[:, -2 if not symbolic else -1 :]

    others = [(x(5), w())] if symbolic else []
    rows = rows_of(trace, fn, x(), w(), whole=True, symbolic=symbolic, others=others)
    few = 1 if symbolic else 2
    assert [str(r) == str(few) for r in rows[aten.linear.default]] == [True, False, False, True, True, True]


MASKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "rows": lambda at, pad: at[None] <= at[:, None],
    "rows and a window": lambda at, pad: (at[None] <= at[:, None]) & (at[None] > at[:, None] - 3),
    "positions of rows": lambda at, pad: at[None] <= pad.long()[:S, None] + at[:, None],
    "chunks": lambda at, pad: at[None] // 3 == at[:, None] // 3,
    "packed sequences": lambda at, pad: (pad[:S] // 2)[None] == (pad[:S] // 2)[:, None],
    "packed sequences, given": lambda at, pad: (pad[None] == pad[:, None]) & (at[None] <= at[:, None]),
    "a tensor": lambda at, pad: torch.sin(at[None] * at[:, None] + 1.0) > -0.5,
    "a bias": lambda at, pad: torch.sin(at[None] * at[:, None] + 1.0),
}


@pytest.mark.parametrize("select", [-1, -3, 2])
@pytest.mark.parametrize("which", MASKS)
def test_masks_of_the_wanted_rows(trace: Trace, which: str, select: int) -> None:
    def fn(x: Tensor, w: Tensor, pad: Tensor) -> Tensor:
        x = F.relu(x)
        mask = MASKS[which](torch.arange(S), pad)
        return F.linear(attend(x, w, mask)[:, select:], w)

    pad = torch.tensor([0, 0, 1, 1, 1, 2, 2])
    rows = rows_of(trace, fn, x(), w(), pad, whole=True)
    count = S - select % S
    assert rows[aten.linear.default] == [count, S, S, count]


def test_rows_by_index_shift_a_mask_too(trace: Trace) -> None:
    def fn(x: Tensor, w: Tensor, keep: Tensor) -> Tensor:
        return F.linear(attend(F.relu(x), w, None, is_causal=True)[:, keep], w)

    rows = rows_of(trace, fn, x(), w(), torch.tensor([4, 1]), whole=True)
    assert rows[aten.linear.default] == [2, S, S, 2]


def test_an_indexers_rows(trace: Trace) -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        x = F.relu(x)
        at = torch.arange(S)
        causal = at[None] <= at[:, None]
        scores = F.linear(x, w) @ F.linear(x, w.t()).transpose(1, 2)
        picked = scores.masked_fill(~causal, -torch.inf).topk(3, dim=-1).indices
        chosen = causal & torch.zeros_like(scores, dtype=torch.bool).scatter(-1, picked, True)
        return attend(x, w, chosen[:, None])[:, -1:]

    rows = rows_of(trace, fn, x(), w(), whole=True)
    assert rows[clsa.index_topk.default] == [1]
    assert rows[clsa.sparse_attention.default] == [1]


def test_bounds_and_additive_masks_of_contract_ops(trace: Trace) -> None:
    """Bounds are asked for on CUDA only, so the ops are called by hand."""

    def fn(x: Tensor, w: Tensor, at: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (heads(F.linear(F.relu(x), w * i)) for i in (1, 2, 3))
        text = "(kv <= in0(q)) & (kv > q - 4)"
        bounds = torch.ops.clsa.mask_bounds(q, None, [at], H, S, text)
        out = torch.ops.clsa.attention(q, k, v, bias, bounds, [at], None, 0.5, 0.0, text)[0]
        return F.linear(out.transpose(1, 2).flatten(-2)[:, -2:], w)

    args = (x(), w(), torch.arange(S), torch.randn(1, 1, S, S))
    rows = rows_of(trace, fn, *args)
    assert rows[aten.linear.default] == [2, S, S, 2]
    captured = canonicalize(trace(fn, *args))
    assert stop_early(captured) == 1
    (bounds,) = (n for n in captured.graph.nodes if n.target is clsa.mask_bounds.default)
    assert bounds.meta["val"].shape == (B, 2, 2)
    assert bounds.args[-1] == "(kv <= in0(q)) & (kv > q + 1)"


# -- what is not -----------------------------------------------------------------------------------


def whole_rows(trace: Trace, fn: Any, *args: Tensor) -> bool:
    """Tells whether the first product is computed for all rows."""
    return rows_of(trace, fn, *args)[aten.linear.default][0] == S


MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "a running sum": lambda y: y.cumsum(1),
    "a mean over rows": lambda y: y - y.mean(1, keepdim=True),
    "a softmax over rows": lambda y: y.softmax(1),
    "a shift": lambda y: torch.cat((y[:, :1], y[:, :-1]), dim=1),
    "a roll": lambda y: y.roll(1, 1),
    "a flip": lambda y: y.flip(1),
    "a convolution": lambda y: F.conv1d(y.mT, torch.ones(D, 1, 3), padding=1, groups=D).mT,
    "a product over rows": lambda y: y.transpose(1, 2).matmul(y).matmul(y.transpose(1, 2)).transpose(1, 2),
    "a norm over rows": lambda y: F.layer_norm(y, [S, D]),
    "a selection of rows": lambda y: y.topk(S, dim=1).values,
    "rows merged with the batch": lambda y: (y.reshape(B * S, D).cumsum(0)).reshape(B, S, D),
    "rows taken apart": lambda y: y.reshape(B, S * 2, D // 2).flip(1).reshape(B, S, D),
    "dropout": lambda y: F.dropout(y, 0.0, training=True) * 0 + y.cumsum(1),
}  # fmt: skip


@pytest.mark.parametrize("why", MIXING)
def test_an_op_that_mixes_rows_stops_it(trace: Trace, why: str) -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(MIXING[why](F.linear(F.relu(x), w))[:, -1:], w)

    assert whole_rows(trace, fn, x(), w())


READERS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "it is returned": lambda y, cache: y,
    "a sum of it is returned": lambda y, cache: y.sum(),
    "it is written into a cache": lambda y, cache: cache.copy_(y)[0, 0, 0],
    "other rows of it are returned": lambda y, cache: y[:, :2] + 1,
    "it is transposed for another product": lambda y, cache: y.transpose(1, 2) @ y,
}


@pytest.mark.parametrize("why", READERS)
def test_a_reader_of_all_rows_stops_it(trace: Trace, why: str) -> None:
    def fn(x: Tensor, w: Tensor, cache: Tensor) -> Any:
        y = F.linear(F.relu(x), w)
        return F.linear(y[:, -1:], w), READERS[why](y, cache)

    assert whole_rows(trace, fn, x(), w(), torch.zeros(B, S, D))


def test_a_value_that_is_written_in_place_is_computed_whole(trace: Trace) -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        y = F.linear(F.relu(x), w)
        y[:, 1:].add_(y[:, :-1].clone())
        return F.linear(y[:, -1:], w)

    assert whole_rows(trace, fn, x(), w())


def test_random_rows_stay_as_they_are(trace: Trace) -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(F.dropout(F.linear(F.relu(x), w), 0.5)[:, -1:], w)

    captured = canonicalize(trace(fn, x(), w()))
    assert stop_early(captured) == 0
    (drop,) = (n for n in captured.graph.nodes if n.target is aten.dropout.default)
    assert drop.meta["val"].shape[1] == S


def test_pointwise_work_alone_is_left(trace: Trace) -> None:
    captured = canonicalize(trace(lambda x: F.relu(x).mul(2)[:, -1:], x()))
    before = [n.name for n in captured.graph.nodes]
    stop_early(captured)
    assert [n.name for n in captured.graph.nodes] == before


def test_a_decode_step_has_nothing_to_save(trace: Trace) -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(F.linear(F.relu(x), w)[:, -1:], w)

    captured = canonicalize(trace(fn, x(1), w()))
    before = [n.name for n in captured.graph.nodes]
    assert stop_early(captured) == 0
    assert [n.name for n in captured.graph.nodes] == before


def test_slices_of_features_and_of_inputs_are_left(trace: Trace) -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x[:, -1:], w)[..., :4]

    captured = canonicalize(trace(fn, x(), w()))
    before = [n.name for n in captured.graph.nodes]
    stop_early(captured)
    assert [n.name for n in captured.graph.nodes] == before
    assert all(is_tensor(n) for n in captured.graph.nodes if n.op == "call_function")
