"""Numbering: what computes the same is one node, and what only looks the same is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clsa_compile.errors import VerifyError
from clsa_compile.ir.captured import Captured
from clsa_compile.passes.analyze import Order, Repeated
from clsa_compile.passes.canonicalize import canonicalize
from clsa_compile.passes.number import merge, number
from clsa_compile.passes.verify import mutations, verify_repeated

Trace = Callable[..., Captured]
aten = torch.ops.aten
B, S, T, D, K = 2, 6, 8, 4, 3


def merged(trace: Trace, fn: Any, *args: Tensor, symbolic: bool = False) -> tuple[dict[str, int], int]:
    """Merges, checks results and inputs against `fn`, and returns counts of ops and of dropped writes."""
    captured = canonicalize(trace(fn, *args, symbolic=symbolic))
    found = merge(captured)
    mine, theirs = ([a.clone() for a in args] for _ in range(2))
    with torch.no_grad():
        torch.manual_seed(3)
        expected = fn(*mine)
        torch.manual_seed(3)
        actual = captured.module(*theirs)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    torch.testing.assert_close(theirs, mine, rtol=0, atol=0)
    counts: dict[str, int] = {}
    for node in captured.graph.nodes:
        if node.op == "call_function":
            name = getattr(node.target, "__name__", str(node.target)).partition(".")[0]
            counts[name] = counts.get(name, 0) + 1
    return counts, len(found.writes)


def x() -> Tensor:
    return torch.randn(B, S, D, generator=torch.Generator().manual_seed(0))


def w(seed: int = 1) -> Tensor:
    return torch.randn(D, D, generator=torch.Generator().manual_seed(seed))


def buffer() -> Tensor:
    return torch.zeros(B, T, D)


# -- values ------------------------------------------------------------------------------------


def test_equal_chains_become_one(trace: Trace) -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        parts = [F.linear(x, w).view(B, S, 2, 2).transpose(1, 2).relu() for _ in range(3)]
        return parts[0] + parts[1] * parts[2]

    counts, _ = merged(trace, fn, x(), w())
    assert counts == {"linear": 1, "view": 1, "transpose": 1, "relu": 1, "mul": 1, "add": 1}


def test_equal_chains_become_one_with_symbolic_sizes(trace: Trace) -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        parts = [F.linear(x, w).view(x.shape[0], x.shape[1], 2, 2) for _ in range(2)]
        return parts[0] + parts[1].relu()

    counts, _ = merged(trace, fn, x(), w(), symbolic=True)
    assert counts["linear"] == counts["view"] == 1


DIFFERENT: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "other weights": lambda x, w, v: (F.linear(x, w), F.linear(x, v)),
    "another eps": lambda x, w, v: (F.layer_norm(x, [D], eps=1e-5), F.layer_norm(x, [D], eps=1e-6)),
    "another dtype": lambda x, w, v: (x.to(torch.float64), x.to(torch.bfloat16)),
    "another dimension": lambda x, w, v: (x.sum(1), x.sum(2)),
    "1 and 1.0 of integers": lambda x, w, v: (x.long() + 1, x.long() + 1.0),
    "True and 1": lambda x, w, v: (torch.full([3], True), torch.full([3], 1)),
    "0.0 and -0.0": lambda x, w, v: (x.clamp(max=0) * 0.0, x.clamp(max=0) * -0.0),
    "operands swapped": lambda x, w, v: (torch.matmul(w, v), torch.matmul(v, w)),
    "dropout": lambda x, w, v: (F.dropout(x, 0.5), F.dropout(x, 0.5)),
    "random numbers": lambda x, w, v: (x + torch.rand(D), x + torch.rand(D)),
    "random numbers like": lambda x, w, v: (torch.randn_like(x), torch.randn_like(x)),
    "a write in between": lambda x, w, v: (x.sum(), x.add_(1).sum()),
    "a write in between, by another name": lambda x, w, v: (x.sum(), (x[0].zero_(), x.sum())[1]),
}


@pytest.mark.parametrize("why", DIFFERENT)
def test_what_differs_stays(trace: Trace, why: str) -> None:
    captured = canonicalize(trace(DIFFERENT[why], x(), w(), w(2)))
    last = [node for node in next(iter(reversed(captured.graph.nodes))).args[0]]
    merge(captured)
    assert list(next(iter(reversed(captured.graph.nodes))).args[0]) == last
    merged(trace, DIFFERENT[why], x(), w(), w(2))


def test_a_result_that_is_written_later_stays_its_own(trace: Trace) -> None:
    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = x * 2, x * 2
        second.add_(1)
        return first.sum(), second.sum()

    assert merged(trace, fn, x())[0]["mul"] == 2


def test_a_result_whose_view_is_written_later_stays_its_own(trace: Trace) -> None:
    def fn(x: Tensor) -> Tensor:
        first, second = torch.zeros(B, S), torch.zeros(B, S)
        first[:, 1:3] = x[:, 1:3, 0]
        return first + second

    assert merged(trace, fn, x())[0]["zeros"] == 2


def test_two_results_that_a_caller_gets_stay_two(trace: Trace) -> None:
    def fn(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first, second, third = x * 2, x * 2, x * 2
        return first, second.view(-1), third.sum()

    counts, _ = merged(trace, fn, x())
    assert counts["mul"] == 2, "what the caller writes into one must not show in the other"


def test_a_selection_is_merged_where_attention_differs(trace: Trace) -> None:
    def fn(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        out = x
        for weight in (w, v):
            scores = torch.matmul(F.linear(x, w), F.linear(x, v).transpose(1, 2))
            picked = scores.topk(K, dim=-1).indices
            mask = torch.zeros(B, S, S, dtype=torch.bool).scatter(-1, picked, True)
            out = F.scaled_dot_product_attention(F.linear(out, weight), x, x, attn_mask=mask)
        return out

    counts, _ = merged(trace, fn, x(), w(), w(2))
    assert counts["topk"] == counts["matmul"] == counts["transpose"] == 1


def test_scores_with_readers_of_their_own_stay_apart(trace: Trace) -> None:
    """A pattern takes a chain whose links have one reader; half a merged chain would be none."""

    def fn(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        parts = []
        for k in (K, K + 1):
            scores = torch.matmul(F.linear(x, w), F.linear(x, v).transpose(1, 2)).relu()
            parts.append(scores.topk(k, dim=-1).values.sum())
        return parts[0] + parts[1]

    counts, _ = merged(trace, fn, x(), w(), w(2))
    assert counts["linear"] == 2, "what the scores are made of is merged"
    assert counts["matmul"] == counts["relu"] == 2


def test_modes_are_not_mixed(trace: Trace) -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        with torch.enable_grad():
            first = F.linear(x, w)
        return first + F.linear(x, w)

    captured = trace(fn, x(), w())
    spelled = [n for n in captured.graph.nodes if n.target is torch._C._set_grad_enabled]
    kinds = {n.target for n in number(captured.graph).first}
    assert (aten.linear.default in kinds) == (not spelled)


def test_an_op_that_changes_the_shape_of_a_tensor_stops_everything(trace: Trace) -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        first = x.sum(0)
        w.t_()
        return first + x.sum(0) + w.sum()

    captured = trace(fn, x(), w())
    assert not number(captured.graph).first


# -- writes ------------------------------------------------------------------------------------


def at() -> Tensor:
    return torch.tensor([1, 2, 3, 4, 5, 7])


WRITES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Any]] = {
    "index_copy_": lambda cache, x, w, at: cache.index_copy_(1, at, F.linear(x, w)),
    "a slice": lambda cache, x, w, at: cache[:, :S].copy_(F.linear(x, w)),
    "index_put_": lambda cache, x, w, at: cache.__setitem__((slice(None), at), F.linear(x, w)),
    "fill_": lambda cache, x, w, at: cache[0].fill_(3.0),
}


def layers(cache: Tensor, x: Tensor, w: Tensor, at: Tensor, write: Any, between: Any = None) -> Tensor:
    total = x
    for layer in range(3):
        write(cache, x, w, at)
        if layer == 1 and between is not None:
            between(cache, x, w, at)
        total = total + torch.matmul(x, cache.transpose(1, 2)).sum(-1, keepdim=True) * (layer + 1)
    return total


@pytest.mark.parametrize("how", WRITES)
def test_repeated_writes_go(trace: Trace, how: str) -> None:
    def fn(cache: Tensor, x: Tensor, w: Tensor, at: Tensor) -> Tensor:
        return layers(cache, x, w, at, WRITES[how])

    counts, dropped = merged(trace, fn, buffer(), x(), w(), at())
    assert dropped == 2
    assert counts.get("linear", 1) == 1


BETWEEN: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Any]] = {
    "the whole buffer is written": lambda cache, x, w, at: cache.zero_(),
    "a part of the buffer is written": lambda cache, x, w, at: cache[:, 3:4].mul_(2),
    "what is written is changed": lambda cache, x, w, at: x.add_(1),
    "the weights are changed": lambda cache, x, w, at: w.mul_(2),
    "the positions are changed": lambda cache, x, w, at: at.sub_(1),
}


@pytest.mark.parametrize("why", BETWEEN)
@pytest.mark.parametrize("how", ["index_copy_", "a slice"])
def test_writes_that_store_something_else_stay(trace: Trace, how: str, why: str) -> None:
    def fn(cache: Tensor, x: Tensor, w: Tensor, at: Tensor) -> Tensor:
        return layers(cache, x, w, at, WRITES[how], BETWEEN[why])

    _, dropped = merged(trace, fn, buffer(), x(), w(), at())
    unread = how == "a slice" and why == "the positions are changed"
    assert dropped == (2 if unread else 1), "the second write repeats the first, the third does not"


APART: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Any]] = {
    "other values": lambda cache, x, w, at: (
        cache.index_copy_(1, at, x),
        cache.index_copy_(1, at, x * 2),
        cache.index_copy_(1, at, x),
    ),
    "other places": lambda cache, x, w, at: (cache[:, :S].copy_(x), cache[:, T - S :].copy_(x)),
    "other buffers": lambda cache, x, w, at: (cache[0].copy_(cache[1] + 1), cache[1].copy_(cache[0] + 1)),
    "it adds": lambda cache, x, w, at: (cache.index_add_(1, at, x), cache.index_add_(1, at, x)),
    "it accumulates": lambda cache, x, w, at: (
        aten.index_put_(cache, [None, at], x, True),
        aten.index_put_(cache, [None, at], x, True),
    ),
    "it moves what is there": lambda cache, x, w, at: (
        cache[:, 1:].copy_(cache[:, :-1].clone()),
        cache[:, 1:].copy_(cache[:, :-1].clone()),
    ),
    "it is random": lambda cache, x, w, at: (cache.copy_(torch.rand(D)), cache.copy_(torch.rand(D))),
    "another dtype on the way": lambda cache, x, w, at: (
        cache.index_copy_(1, at, x),
        cache.index_copy_(1, at, x.bfloat16().float()),
    ),
}


@pytest.mark.parametrize("why", APART)
def test_writes_that_are_no_repetition_stay(trace: Trace, why: str) -> None:
    def fn(cache: Tensor, x: Tensor, w: Tensor, at: Tensor) -> Tensor:
        APART[why](cache, x, w, at)
        return cache.sum()

    _, dropped = merged(trace, fn, buffer(), x(), w(), at())
    assert dropped == 0


def test_a_write_of_its_own_source_is_no_repetition(trace: Trace) -> None:
    def fn(cache: Tensor) -> Tensor:
        for _ in range(2):
            cache[:, 2:4].copy_(cache[:, 1:3].clone())
        return cache.sum()

    assert merged(trace, fn, torch.randn(B, T, D))[1] == 0


# -- the proof of a dropped write ---------------------------------------------------------------


def pair(trace: Trace, fn: Any) -> tuple[Captured, Repeated]:
    captured = canonicalize(trace(fn, buffer(), x()))
    writes = mutations(captured.graph)
    return captured, Repeated(writes[-1], writes[0])


def test_a_proven_repetition_passes(trace: Trace) -> None:
    def fn(cache: Tensor, x: Tensor) -> Tensor:
        cache[:, :S].copy_(x)
        cache[:, :S].copy_(x)
        return cache.sum()

    captured, repeated = pair(trace, fn)
    verify_repeated(Order(captured.graph), [repeated])


@pytest.mark.parametrize(
    ("fn", "why"),
    [
        (lambda c, x: (c[:, :S].copy_(x), c.mul_(2), c[:, :S].copy_(x)), "written between"),
        (lambda c, x: (c[:, :S].copy_(x), x.mul_(2), c[:, :S].copy_(x)), "mul written|written between"),
        (lambda c, x: (c[:, :S].copy_(x), x.zero_()), "does not write what"),
        (lambda c, x: (x.copy_(c[:, :S]), c[:, :S].copy_(x)), "does not write what"),
    ],
)
def test_an_unproven_repetition_is_named(trace: Trace, fn: Any, why: str) -> None:
    def whole(cache: Tensor, x: Tensor) -> Tensor:
        fn(cache, x)
        return cache.sum()

    captured, repeated = pair(trace, whole)
    with pytest.raises(VerifyError, match=why):
        verify_repeated(Order(captured.graph), [repeated])


def test_modules_that_share_weights_share_results(trace: Trace) -> None:
    norm = nn.LayerNorm(D).requires_grad_(False)

    def fn(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        same = [F.layer_norm(x, [D], weight, bias, norm.eps) for _ in range(4)]
        return torch.stack(same).sum(0)

    counts, _ = merged(trace, fn, x(), norm.weight.detach(), norm.bias.detach())
    assert counts["layer_norm"] == 1
