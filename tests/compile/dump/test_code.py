"""Graphs as Python: what is written does what the graph does, and says nothing of this process."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from clsa_compile.dump.code import HEADER, code_of, describe


def run(module: GraphModule, *args: Any) -> Any:
    namespace: dict[str, Any] = {}
    exec(HEADER + code_of(module), namespace)
    return namespace["Graph"]()(*args)


def everything(x: Tensor, n: Tensor) -> Any:
    x = x.masked_fill(n > 1, -math.inf).transpose(0, 1).contiguous()
    kept, places = x.topk(2)
    y = torch.full((2, 2), math.nan, dtype=torch.float32, device="cpu")
    return (
        kept + y.nan_to_num(),
        places,
        x[:, 1:3],
        torch.cat([x, x], -1).clone(memory_format=torch.contiguous_format),
    )


def test_what_is_written_does_what_the_graph_does() -> None:
    args = torch.randn(4, 2), torch.tensor([[0, 2], [1, 0], [0, 0], [2, 1]])
    module = make_fx(everything, pre_dispatch=True)(*args)
    for actual, expected in zip(run(module, *args), everything(*args), strict=True):
        assert torch.equal(actual, expected)


def with_branches(x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda a: a + 1, lambda a: a.sin(), (x,))  # type: ignore[no-any-return]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_inner_graphs_are_inner_classes(sign: float) -> None:
    x = torch.full((3,), sign)
    module = make_fx(with_branches)(x)
    assert "class TrueGraph0(torch.nn.Module):" in code_of(module)
    assert torch.equal(run(module, x), with_branches(x))


@pytest.mark.parametrize("size", [3, 100])
def test_constants_are_kept(size: int) -> None:
    table = torch.randn(size).to(torch.bfloat16)
    module = make_fx(lambda x: x + table)(torch.zeros(size))
    assert torch.equal(run(module, torch.zeros(size)), table.float())


def test_large_constants_are_not() -> None:
    table = torch.randn(1 << 17)
    text = code_of(make_fx(lambda x: x + table)(torch.zeros(1 << 17)))
    assert len(text) < 1000
    assert "torch.zeros([131072]" in text


def test_graphs_of_methods_and_plain_functions_can_be_written() -> None:
    """Dynamo's own graphs are of this kind."""
    module = torch.fx.symbolic_trace(lambda x: F.relu(x.view(2, -1)) @ torch.sin(x.mT) - 1)
    x = torch.randn(2, 2)
    torch.testing.assert_close(run(module, x), module(x))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.empty(2, 3), "f32[2, 3]"),
        (torch.empty(2, 3, dtype=torch.bfloat16).mT, "bf16[3, 2] strides (1, 3)"),
        (torch.empty(1, 3, dtype=torch.int64).mT, "i64[3, 1]"),
        (torch.empty((), dtype=torch.bool), "bool[]"),
        (torch.empty(2, dtype=torch.float8_e4m3fn), "float8_e4m3fn[2]"),
        (torch.empty(2, device="meta"), "f32[2] meta"),
        ((torch.empty(2), None), "(f32[2], NoneType)"),
        (3, "3"),
    ],
)
def test_values_are_described_by_what_matters(value: Any, text: str) -> None:
    assert describe(value) == text


def test_sizes_that_are_not_known_are_named_and_not_compared() -> None:
    x = torch.empty(5, 7)
    module = make_fx(lambda x: x.mT.contiguous() * x.shape[0], tracing_mode="symbolic")(x)
    environment = next(n for n in module.graph.nodes if n.op == "placeholder").meta["val"].fake_mode.shape_env
    before = len(environment.guards)
    text = code_of(module)
    assert len(environment.guards) == before
    assert re.search(r"f32\[s\d+, s\d+\]\n", text)
    assert re.search(r"strides \(1, s\d+\)", text)
    assert torch.equal(run(module, torch.ones(5, 7)), torch.full((7, 5), 5.0))


def test_nothing_of_this_process_is_written() -> None:
    mode = FakeTensorMode()
    with mode:
        module = make_fx(everything, pre_dispatch=True)(
            torch.empty(4, 2), torch.empty(4, 2, dtype=torch.int64)
        )
    for node in module.graph.nodes:
        node.meta["stack_trace"] = f'File "{__file__}", line 3, in f\n    x = 1\n'
    text = code_of(module)
    assert "test_code.py:3 in f: x = 1" in text
    assert "0x" not in text
    assert not re.search(r"[\s\"'(]/\w+/", text), "no absolute paths"


def test_inputs_may_be_computed_from_others() -> None:
    module = make_fx(lambda x, n: x * n)(torch.ones(3), torch.tensor(3))
    names = [n.name for n in module.graph.nodes if n.op == "placeholder"]
    namespace: dict[str, Any] = {}
    exec(HEADER + code_of(module, {names[1]: f"{names[0]}.shape[0]"}), namespace)
    assert torch.equal(namespace["Graph"]()(torch.ones(3)), torch.full((3,), 3.0))


OPERATORS: list[Callable[..., Any]] = [operator.add, operator.floordiv, operator.mod, operator.neg, math.ceil]


@pytest.mark.parametrize("target", OPERATORS)
def test_arithmetic_on_sizes_is_written(target: Callable[..., Any]) -> None:
    graph = torch.fx.Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    args = (a,) if target in (operator.neg, math.ceil) else (a, b)
    graph.output(graph.call_function(target, args))
    module = GraphModule({}, graph)
    assert run(module, 7, 2) == module(7, 2)
