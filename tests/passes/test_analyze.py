"""Order and memory: who writes what, and when."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Node

from clsa_compile.ir.captured import Captured
from clsa_compile.passes.analyze import Order, storages, written

Trace = Callable[..., Captured]


def nodes(captured: Captured) -> dict[str, Node]:
    return {n.name: n for n in captured.graph.nodes}


def test_views_share_their_storage_and_copies_do_not() -> None:
    x = torch.randn(3, 4)
    (own,) = storages(x)
    assert set(storages([x.t(), x[1:]])) == {own}
    assert set(storages(x.clone())) != {own}
    assert list(storages((1, None, "text"))) == []


@pytest.mark.parametrize(
    ("write", "position"),
    [
        (lambda x, y: x.add_(y), 0),
        (lambda x, y: x.copy_(y), 0),
        (lambda x, y: x.index_copy_(0, torch.arange(3), y), 0),
        (lambda x, y: torch.ops.aten.add.out(x, 1.0, out=y), None),
    ],
)
def test_the_written_operand_is_known(write: Any, position: int | None, trace: Trace) -> None:
    captured = trace(lambda x, y: write(x, y), torch.randn(3, 4), torch.randn(3, 4))
    (node,) = [n for n in captured.graph.nodes if n.op == "call_function" and written(n)]
    wanted = node.kwargs["out"] if position is None else node.args[position]
    assert written(node) == [wanted]


def test_pure_calls_inputs_and_outputs_write_nothing(trace: Trace) -> None:
    captured = trace(lambda x: x * 2, torch.randn(3))
    assert [written(n) for n in captured.graph.nodes] == [[], [], []]


def test_what_is_unknown_counts_as_written(trace: Trace) -> None:
    captured = trace(lambda x: x * 2, torch.randn(3))
    x = next(iter(captured.graph.nodes))
    with captured.graph.inserting_after(x):
        unknown = captured.graph.create_node("call_module", "anything", (x,))
    assert written(unknown) == [x]


def test_writes_are_ordered_and_seen_through_views(trace: Trace) -> None:
    def fn(x: Tensor, y: Tensor) -> Tensor:
        first = x.t()
        x[:, 1:].add_(1.0)
        second = x * 2
        y.mul_(2)
        return first + second.t()

    captured = trace(fn, torch.randn(3, 4), torch.randn(3, 4))
    at = nodes(captured)
    order = Order(captured.graph)
    x, y, view, product = at["x_1"], at["y_1"], at["t"], at["mul"]
    (write,) = order.writes(x)
    assert order.writes(view) == [write], "a view is written with its base"
    assert order.writes(y) == [at["mul_"]]
    assert order.writes(product) == []
    assert order.write_between(view, view, product) is write
    assert order.write_between(view, product, at["mul_"]) is None
    assert order.write_between(view, write, product) is None, "bounds do not count"
    assert order.written_after(x)
    assert order.written_after(view)
    assert not order.written_after(product)
    assert order.position(view) < order.position(write) < order.position(product)
