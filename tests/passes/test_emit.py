"""Emitting: nodes have values and origins, operands their order, results their strides."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from clsa_compile.ir.captured import Captured
from clsa_compile.ir.sites import Operand
from clsa_compile.passes.emit import Emitter

Trace = Callable[..., Captured]
aten = torch.ops.aten


def prepared(trace: Trace, *shape: int) -> tuple[Captured, Any, Emitter]:
    captured = trace(lambda x: x + 1, torch.randn(shape))
    x, add, _ = captured.graph.nodes
    add.meta.update(stack_trace="there", nn_module_stack={"a": ("b", int)}, seq_nr=7, secret=1)
    return captured, x, Emitter(captured, add)


def result_of(captured: Captured, node: Any, *inputs: Tensor) -> Tensor:
    next(n for n in captured.graph.nodes if n.op == "output").args = (node,)
    captured.module.recompile()
    captured.graph.lint()
    value: Tensor = captured.module(*inputs)
    return value


def insert(captured: Captured) -> Any:
    return captured.graph.inserting_before(list(captured.graph.nodes)[-1])


def test_calls_have_a_value_and_the_origin_of_what_they_replace(trace: Trace) -> None:
    captured, x, emit = prepared(trace, 2, 3)
    with insert(captured):
        node = emit.call(aten.sum.dim_IntList, x, [1], True)
    assert tuple(node.meta["val"].shape) == (2, 1)
    assert {k: node.meta[k] for k in ("stack_trace", "seq_nr")} == {"stack_trace": "there", "seq_nr": 7}
    assert "secret" not in node.meta


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_operands_are_permuted_into_their_roles(order: tuple[int, ...], trace: Trace) -> None:
    captured, x, emit = prepared(trace, 2, 3, 4)
    with insert(captured):
        node = emit.operand(Operand(x, order))
    value = torch.randn(2, 3, 4)
    assert torch.equal(result_of(captured, node, value), value.permute(order))


@pytest.mark.parametrize(
    ("dims", "shape"),
    [
        ((None, 1, None, 0), (1, 3, 1, 2)),
        ((0, None, 1, None), (2, 1, 3, 1)),
        ((None, None, 0, 1), (1, 1, 2, 3)),
    ],
)
def test_roles_that_a_root_has_not_become_dimensions_of_one(
    dims: tuple[int | None, ...], shape: tuple[int, ...], trace: Trace
) -> None:
    captured, x, emit = prepared(trace, 2, 3)
    with insert(captured):
        node = emit.operand(Operand(x, dims))
    value = torch.randn(2, 3)
    out = result_of(captured, node, value)
    assert out.shape == shape
    swapped = [d for d in dims if d is not None]
    assert torch.equal(out.flatten(), value.permute(swapped).flatten())


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_results_get_the_strides_of_the_original(order: tuple[int, ...], trace: Trace) -> None:
    inverse = [order.index(i) for i in range(3)]

    def fn(x: Tensor) -> Tensor:
        return x.permute(order).contiguous().permute(inverse)

    value = torch.randn(2, 3, 4)
    captured = trace(fn, value)
    original = next(n for n in captured.graph.nodes if n.op == "output").args[0]
    x = next(iter(captured.graph.nodes))
    with insert(captured):
        node = Emitter(captured, original).like(x, original)
    assert node.meta["val"].stride() == original.meta["val"].stride()
    out = result_of(captured, node, value)
    assert torch.equal(out, value)
    assert out.stride() == original.meta["val"].stride()


def test_results_get_the_dtype_of_the_original(trace: Trace) -> None:
    captured = trace(lambda x: x.half(), torch.randn(2, 3))
    x, half, _ = captured.graph.nodes
    with insert(captured):
        node = Emitter(captured, half).like(x, half)
    assert node.meta["val"].dtype == torch.float16
    assert result_of(captured, node, torch.ones(2, 3)).dtype == torch.float16


def test_nothing_is_added_where_nothing_differs(trace: Trace) -> None:
    captured, x, emit = prepared(trace, 2, 3)
    with insert(captured):
        assert emit.like(x, x) is x
        assert emit.operand(Operand(x, (0, 1))) is x
