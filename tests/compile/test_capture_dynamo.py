"""Capturing: Dynamo's graph traced once more, with all that Inductor wants to know of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.testing._internal.two_tensor import TwoTensor

from clsa_compile.capture.dynamo import (
    capture,
    higher_order,
    placeholders,
    subclass_input,
    uses_autocast,
)
from clsa_compile.errors import CaptureError
from clsa_compile.ir.captured import Captured


class Seen:
    """Keeps Dynamo's graph and what was captured of it, and runs the capture."""

    def __init__(self) -> None:
        self.graph: GraphModule
        self.captured: Captured

    def __call__(self, gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graph, self.captured = gm, capture(gm)
        return self.captured.module.forward


def captured(fn: Any, *args: Any, **options: Any) -> Seen:
    seen = Seen()
    with torch.no_grad():
        expected = fn(*(a.clone() for a in args))
        actual = torch.compile(fn, backend=seen, fullgraph=True, **options)(*args)
    torch.testing.assert_close(actual, expected)
    return seen


def names(module: GraphModule) -> list[str]:
    return [str(n.target) for n in module.graph.nodes if n.op == "call_function"]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.register_buffer("shift", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x) + self.shift
        return F.scaled_dot_product_attention(y, y, y)


def test_the_graph_is_pre_dispatch_aten_with_values_and_origins() -> None:
    seen = captured(nn.Sequential(Layer(), nn.ReLU()), torch.randn(2, 4, 6, 8))
    ops = names(seen.captured.module)
    assert "aten.scaled_dot_product_attention.default" in ops
    assert all(op.startswith("aten.") for op in ops)
    for node in seen.captured.graph.nodes:
        if node.op == "call_function":
            assert "val" in node.meta
    attention = next(n for n in seen.captured.graph.nodes if "scaled_dot" in n.name)
    assert "nn_module_stack" in attention.meta
    assert "scaled_dot_product_attention" in attention.meta["stack_trace"]
    assert seen.captured.origin == "dynamo"


def test_the_original_is_not_touched() -> None:
    seen = Seen()
    codes: list[str] = []

    def backend(gm: GraphModule, inputs: Any) -> Any:
        codes.append(gm.code)
        run = seen(gm, inputs)
        codes.append(gm.code)
        return run

    with torch.no_grad():
        torch.compile(Layer(), backend=backend)(torch.randn(2, 4, 6, 8))
    assert codes[0] == codes[1]


def test_what_inductor_reads_of_inputs_is_carried_over_by_position() -> None:
    keys = ("tensor_dict", "grapharg", "example_value", "steal_arg")
    carried: set[str] = set()

    def backend(gm: GraphModule, inputs: Any) -> Any:
        again = capture(gm).module
        old, new = placeholders(gm), placeholders(again)
        assert [n.name for n in old] == [n.name for n in new]
        for a, b in zip(old, new, strict=True):
            assert getattr(b, "_dynamo_source", None) is getattr(a, "_dynamo_source", None)
            for key in keys:
                assert b.meta.get(key) is a.meta.get(key), key
                carried.update([key] if a.meta.get(key) is not None else [])
        assert again._param_name_to_source == gm._param_name_to_source
        return again.forward

    with torch.no_grad():
        torch.compile(Layer(), backend=backend)(torch.randn(2, 4, 6, 8))
    assert {"tensor_dict", "grapharg", "example_value"} <= carried


def test_the_fake_mode_is_that_of_the_inputs() -> None:
    seen = captured(Layer(), torch.randn(2, 4, 6, 8))
    for node in placeholders(seen.captured.module):
        assert node.meta["val"].fake_mode is seen.captured.fake_mode


def test_dynamic_sizes_stay_dynamic() -> None:
    seen = captured(lambda x: F.scaled_dot_product_attention(x, x, x), torch.randn(2, 4, 6, 8), dynamic=True)
    sizes = placeholders(seen.captured.module)[-1].meta["val"].shape
    assert any(isinstance(s, torch.SymInt) for s in sizes)


def test_in_place_writes_stay_in_the_graph() -> None:
    def fn(x: Tensor, cache: Tensor) -> Tensor:
        cache[:, :, 1:2] = x
        cache.index_copy_(2, torch.arange(1), x)
        return F.scaled_dot_product_attention(x, cache, cache)

    seen = captured(fn, torch.randn(2, 4, 1, 8), torch.randn(2, 4, 6, 8))
    ops = names(seen.captured.module)
    assert "aten.index_copy_.default" in ops
    assert any("copy_" in op for op in ops)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.tensor(0.5),
        lambda: torch.tensor([1.0, 2.0, 3.0, 4.0]),
        lambda: torch.tensor([[1, 2], [3, 4]]).flatten(),
        lambda: torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0]),
        lambda: torch.tensor([True, False, True, False]),
        lambda: torch.tensor([2.0, 2.0, 2.0, 2.0]),
        lambda: torch.tensor([0.0, -0.0, 0.0, -0.0]),
    ],
)
def test_small_constants_become_ops(make: Any) -> None:
    def fn(x: Tensor) -> Tensor:
        return torch.where(x > 0, make().to(torch.float32), x).reciprocal()

    seen = Seen()
    x = torch.tensor([1.0, -1.0, 2.0, 3.0])
    with torch.no_grad():
        actual = torch.compile(fn, backend=seen)(x)
    torch.testing.assert_close(actual, fn(x), equal_nan=True)
    assert torch.equal(actual.signbit(), fn(x).signbit()), "-0.0 is not 0.0"
    assert not [n for n in seen.captured.graph.nodes if n.op == "get_attr"]
    assert list(seen.captured.module.named_buffers()) == []


def test_large_constants_stay_attributes_that_are_no_buffers() -> None:
    seen = captured(lambda x: x + torch.tensor([float(i) for i in range(100)]), torch.randn(100))
    assert [n for n in seen.captured.graph.nodes if n.op == "get_attr"]
    assert list(seen.captured.module.named_buffers()) == []


def test_graphs_that_cannot_be_captured_are_capture_errors() -> None:
    empty = GraphModule(nn.Module(), torch.fx.Graph())
    empty.graph.output(())
    with pytest.raises(CaptureError, match="no tensors"):
        capture(empty)


def test_a_failure_while_tracing_says_what_failed_in_one_line() -> None:
    seen = captured(lambda x: x + 1, torch.randn(3))

    def broken(*_: Any) -> Any:
        raise ValueError("first line\nsecond line")

    node = next(n for n in seen.graph.graph.nodes if n.op == "call_function")
    node.target = broken
    seen.graph.recompile()
    with pytest.raises(CaptureError, match="ValueError: first line") as error:
        capture(seen.graph)
    assert "second" not in str(error.value)


def test_autocast_is_seen_around_a_graph_and_inside_it() -> None:
    seen: list[bool] = []

    def backend(gm: GraphModule, inputs: Any) -> Any:
        seen.append(uses_autocast(gm))
        return gm.forward

    def inside(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return x @ x

    x = torch.randn(3, 3)
    torch.compile(lambda x: x @ x, backend=backend)(x)
    torch.compile(inside, backend=backend)(x)
    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16):
        torch.compile(lambda x: x @ x, backend=backend)(x)
    assert seen == [False, True, True]


def test_subclasses_and_higher_order_ops_are_named() -> None:
    seen: list[tuple[str | None, str | None]] = []

    def backend(gm: GraphModule, inputs: Any) -> Any:
        seen.append((subclass_input(gm), higher_order(gm)))
        return gm.forward

    def branch(x: Tensor) -> Tensor:
        out: Tensor = torch.cond(x.sum() > 0, lambda a: a + 1, lambda a: a - 1, (x,))
        return out

    x = torch.randn(3)
    torch.compile(lambda x: x + 1, backend=backend)(x)
    torch.compile(lambda x: x + 1, backend=backend)(TwoTensor(x, x))
    torch.compile(branch, backend=backend)(x)
    (plain, two, cond) = seen
    assert plain == (None, None)
    assert two[0] is not None
    assert "is a TwoTensor" in two[0]
    assert cond == (None, "cond")
