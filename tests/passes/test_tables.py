"""Tables of sines: held once where several read them, and left alone where that would not be sure."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.compile_fx import compile_fx

from clsa_compile.ir.captured import Captured
from clsa_compile.passes.canonicalize import canonicalize
from clsa_compile.passes.tables import keep_tables

Trace = Callable[..., Captured]


def angles(at: Tensor) -> Tensor:
    return at.float()[..., None] * torch.tensor([1.0, 0.1, 0.01])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + x.flip(-1) * sin


def two_layers(x: Tensor, at: Tensor) -> Tensor:
    turn = angles(at)
    cos, sin = (turn.cos() * 1.5).to(x.dtype), turn.sin().to(x.dtype)
    x = rotate(x, cos, sin)
    x = x @ x.mT @ x
    return rotate(x, cos, sin)


def held(captured: Captured) -> list[Any]:
    return [n for n in captured.graph.nodes if n.target == torch.ops.aten.as_strided.default]


def traced(trace: Trace, fn: Any, *args: Any, **kwargs: Any) -> Captured:
    captured = trace(fn, *args, **kwargs)
    canonicalize(captured)
    return captured


def test_a_table_that_layers_read_is_held_once_behind_its_casts(trace: Trace) -> None:
    args = torch.randn(2, 5, 3, dtype=torch.bfloat16), torch.arange(5)
    captured = traced(trace, two_layers, *args)
    assert keep_tables(captured) == 2
    captured.graph.lint()
    captured.module.recompile()
    assert [n.meta["val"].dtype for n in held(captured)] == [torch.bfloat16] * 2
    assert all(len(n.users) == 2 for n in held(captured))
    assert torch.equal(captured.module(*args), two_layers(*args))


@pytest.mark.slow
def test_inductor_computes_a_held_table_once(trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU Inductor has a rule of its own for exp but none for sines, as on a GPU."""
    args = torch.randn(2, 5, 3), torch.arange(5)

    def sines(hold: bool) -> int:
        captured = traced(trace, two_layers, *args)
        if hold:
            keep_tables(captured)
            captured.module.recompile()
        texts: list[str] = []
        monkeypatch.setattr(torch._inductor.graph.GraphLowering, "save_output_code", texts.append)
        with torch.no_grad():
            compiled = compile_fx(captured.module, list(args), config_patches={"force_disable_caches": True})
            torch.testing.assert_close(compiled(*args), two_layers(*args))
        # A fused kernel is named for what it computes.
        return len(re.findall(r"^ +cpp_fused\w*_sin_\w*\(", texts[0], re.MULTILINE))

    assert sines(hold=False) == 2
    assert sines(hold=True) == 1


@pytest.mark.parametrize(
    ("fn", "why"),
    [
        (lambda x, at: rotate(x, angles(at).cos(), angles(at).sin()), "one reader each"),
        (lambda x, at: (x.exp() + 1) * x.exp(), "no sine"),
    ],
)
def test_what_has_one_reader_or_is_cheap_is_left(fn: Any, why: str, trace: Trace) -> None:
    captured = traced(trace, fn, torch.randn(2, 5, 3), torch.arange(5))
    assert keep_tables(captured) == 0, why
    assert not held(captured)


def test_a_table_that_is_not_dense_is_left(trace: Trace) -> None:
    def fn(x: Tensor, at: Tensor) -> Tensor:
        cos = angles(at).t().cos()
        return (x * cos).softmax(-1) * cos

    captured = traced(trace, fn, torch.randn(3, 5), torch.arange(5))
    assert keep_tables(captured) == 0


def test_a_table_of_unknown_length_is_left(trace: Trace) -> None:
    captured = traced(trace, two_layers, torch.randn(2, 5, 3), torch.arange(5), symbolic=True)
    assert keep_tables(captured) == 0
