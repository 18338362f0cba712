"""Verification: each rule, broken by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from clsa_compile.errors import VerifyError
from clsa_compile.ir.captured import Captured
from clsa_compile.passes.analyze import Order
from clsa_compile.passes.verify import mutations, verify, verify_owned

Trace = Callable[..., Captured]


def writes(x: Tensor, y: Tensor) -> Tensor:
    x.add_(1)
    y.mul_(2)
    x[0] = 5.0
    return x + y


@pytest.fixture
def captured(trace: Trace) -> Captured:
    return trace(writes, torch.randn(3), torch.randn(3))


def named(captured: Captured, part: str) -> torch.fx.Node:
    return next(n for n in captured.graph.nodes if part in n.name)


def test_mutations_are_found_in_order(captured: Captured) -> None:
    assert [n.name for n in mutations(captured.graph)][:2] == ["add_", "mul_"]
    assert len(mutations(captured.graph)) == 3


def test_a_good_graph_passes(captured: Captured) -> None:
    verify(captured, "rewrite", mutations(captured.graph))


def test_a_malformed_graph_is_named(captured: Captured) -> None:
    last = list(captured.graph.nodes)[-2]
    first = next(n for n in captured.graph.nodes if n.op == "call_function")
    first.prepend(last)
    with pytest.raises(VerifyError, match="after rewrite: the graph is malformed"):
        verify(captured, "rewrite", [])


def test_a_call_without_a_value_is_named(captured: Captured) -> None:
    node = named(captured, "mul_")
    del node.meta["val"]
    with pytest.raises(VerifyError, match="after rewrite: mul_ has no value"):
        verify(captured, "rewrite", mutations(captured.graph))


def test_a_lost_mutation_is_named(captured: Captured) -> None:
    kept = mutations(captured.graph)
    node = named(captured, "mul_")
    node.replace_all_uses_with(node.args[0])
    captured.graph.erase_node(node)
    with pytest.raises(VerifyError, match="mutations were lost or moved: mul_"):
        verify(captured, "rewrite", kept)


def test_moved_mutations_are_named(captured: Captured) -> None:
    kept = mutations(captured.graph)
    kept[0].prepend(kept[1])
    with pytest.raises(VerifyError, match="order changed"):
        verify(captured, "rewrite", kept)


def test_contract_ops_may_be_left_before_lowering_only(trace: Trace) -> None:
    def fn(q: Tensor) -> Tensor:
        out: Tensor = torch.ops.clsa.attention(q, q, q, None, None, [], None, 1.0, 0.0, "")[0]
        return out

    captured = trace(fn, torch.randn(1, 2, 3, 4))
    verify(captured, "rewrite", [])
    with pytest.raises(VerifyError, match="after lower: the contract op attention"):
        verify(captured, "lower", [])


def inside(x: Tensor, y: Tensor) -> Tensor:
    made = x * 2
    made.add_(y)
    made[1:].mul_(y[1:])
    y.sub_(1)
    return made


def test_writes_that_only_the_graph_sees_may_go(trace: Trace) -> None:
    graph = trace(inside, torch.randn(3), torch.randn(3)).graph
    first, second, given = mutations(graph)
    verify_owned(graph, Order(graph), [first, second])
    with pytest.raises(VerifyError, match="sub_ writes what is seen outside of the graph"):
        verify_owned(graph, Order(graph), [first, second, given])
    with pytest.raises(VerifyError, match="add_ goes, but mul_ writes the same memory"):
        verify_owned(graph, Order(graph), [first])
    first.args[0].meta["val"] = None
    with pytest.raises(VerifyError, match="add_ writes what is seen outside of the graph"):
        verify_owned(graph, Order(graph), [first, second])
