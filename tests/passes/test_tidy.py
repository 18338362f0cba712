"""Tidying: what nothing needs goes, what has an effect stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from clsa_compile.ir.captured import Captured
from clsa_compile.passes.canonicalize import canonicalize
from clsa_compile.passes.tidy import drop_dead, is_pure

Trace = Callable[..., Captured]


def ops(captured: Captured) -> list[str]:
    return [str(n.target) for n in captured.graph.nodes if n.op == "call_function"]


def test_pure_nodes_without_users_go_and_so_do_their_inputs(trace: Trace) -> None:
    def fn(x: Tensor) -> Tensor:
        y = (x * 2).softmax(-1)
        y.topk(2)
        torch.ops.clsa.mask_bounds(x.view(1, 1, 3, 4), None, [], 1, 4, "")
        return x + 1

    captured = trace(fn, torch.randn(3, 4))
    assert len(ops(captured)) > 4
    dropped = drop_dead(captured.graph)
    assert ops(captured) == ["aten.add.Tensor"]
    assert dropped >= 4
    captured.graph.lint()


@pytest.mark.parametrize(
    "write",
    [
        lambda x, y: x.add_(1),
        lambda x, y: x.copy_(y),
        lambda x, y: x[0].fill_(1.0),
        lambda x, y: x.index_copy_(0, torch.arange(1), y[:1]),
        lambda x, y: x.index_put_((torch.arange(1),), y[:1]),
        lambda x, y: x.masked_fill_(y > 0, 0.0),
        lambda x, y: x.scatter_(0, torch.zeros(1, 4).long(), 1.0),
        lambda x, y: x.zero_(),
        lambda x, y: torch.add(x, y, out=y),
        lambda x, y: x.view(-1).mul_(3),
    ],
)
def test_a_mutation_is_never_dropped(write: Any, trace: Trace) -> None:
    def fn(x: Tensor, y: Tensor) -> Tensor:
        result = x.sum()
        write(x, y)
        return result

    captured = trace(fn, torch.randn(3, 4), torch.randn(3, 4))
    drop_dead(captured.graph)
    captured.module.recompile()
    torch.manual_seed(0)
    one = [torch.randn(3, 4), torch.randn(3, 4)]
    two = [t.clone() for t in one]
    assert torch.equal(captured.module(*one), fn(*two))
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b), "the write happened"


@pytest.mark.parametrize(
    "effect",
    [
        lambda x: torch.rand(3),
        lambda x: torch.nn.functional.dropout(x, 0.5, training=True),
        lambda x: x.bernoulli(),
        lambda x: torch.ops.aten._assert_async.msg(x.sum() > -1e9, "never"),
    ],
)
def test_random_numbers_and_assertions_stay(effect: Any, trace: Trace) -> None:
    def fn(x: Tensor) -> Tensor:
        effect(x)
        return x + 1

    captured = trace(fn, torch.rand(3))
    before = len(ops(captured))
    drop_dead(captured.graph)
    kept = [n for n in captured.graph.nodes if n.op == "call_function" and not is_pure(n)]
    assert kept, ops(captured)
    assert before >= len(ops(captured)) >= 2


@pytest.mark.parametrize(
    "target",
    [
        torch.ops.prims.convert_element_type.default,  # not ours to judge
        torch.ops.aten._functional_assert_async.msg,
        torch.ops.aten._make_dep_token.default,
        torch.ops.aten.sym_constrain_range.default,
    ],
)
def test_other_libraries_and_checks_are_not_called_pure(target: Any) -> None:
    graph = torch.fx.Graph()
    assert not is_pure(graph.call_function(target, (graph.placeholder("x"),)))


def test_size_arithmetic_goes(trace: Trace) -> None:
    def fn(x: Tensor) -> Tensor:
        torch.empty(x.shape[0] * 2 + 1)
        return x + 1

    captured = trace(fn, torch.randn(3, 4), symbolic=True)
    drop_dead(captured.graph)
    assert ops(captured) == ["aten.add.Tensor"]


def test_inputs_and_outputs_stay(trace: Trace) -> None:
    captured = trace(lambda x, y: x + 1, torch.randn(3), torch.randn(3))
    drop_dead(captured.graph)
    assert [n.op for n in captured.graph.nodes].count("placeholder") == 2
    assert not any(is_pure(n) for n in captured.graph.nodes if n.op in ("placeholder", "output"))


def test_unknown_functions_may_have_effects(trace: Trace) -> None:
    captured = trace(lambda x: x + 1, torch.randn(3))
    with captured.graph.inserting_after(next(iter(captured.graph.nodes))):
        node = captured.graph.call_function(print, ("hello",))
    assert not is_pure(node)
    drop_dead(captured.graph)
    assert node in list(captured.graph.nodes)


def test_canonicalising_leaves_users_that_count(trace: Trace) -> None:
    def fn(x: Tensor) -> Tensor:
        y = x * 2
        y.exp()  # a dead user would look like a second one
        return y + 1

    captured = canonicalize(trace(fn, torch.randn(3)))
    product = next(n for n in captured.graph.nodes if "mul" in n.name)
    assert len(product.users) == 1
    assert torch.equal(captured.module(torch.ones(2)), torch.full((2,), 3.0))


@pytest.mark.parametrize(("p", "train", "left"), [(0.5, True, 1), (0.5, False, 0), (0.0, True, 0)])
def test_a_dropout_goes_where_it_drops_nothing(trace: Trace, p: float, train: bool, left: int) -> None:
    def fn(x: Tensor) -> Tensor:
        torch.ops.aten.dropout(x.softmax(-1), p, train)
        return x + 1

    captured = trace(fn, torch.randn(3, 4))
    drop_dead(captured.graph)
    assert ops(captured).count("aten.dropout.default") == left
