"""Scores: their text, and their printers against each other and against plain Python."""

from __future__ import annotations

import math
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from clsa_compile.errors import ExpressionError
from clsa_compile.ir.scores import (
    DOT,
    LSE,
    REDUCTIONS,
    SCORES,
    WEIGHT,
    Score,
    parse_score,
    pointwise_to_torch,
    pointwise_to_triton,
)

Draw = Any


@st.composite
def expressions(draw: Draw, depth: int = 3) -> Any:
    if depth == 0:
        return draw(st.sampled_from([DOT, WEIGHT, LSE, sympy.Float(0.5), sympy.Integer(2)]))
    a = draw(expressions(depth=depth - 1))
    kind = draw(st.sampled_from(["leaf", "+", "*", "relu", "max", "min", "tanh", "exp", "abs", "^"]))
    b = draw(expressions(depth=depth - 1)) if kind in ("+", "*", "max", "min") else None
    return {
        "leaf": lambda: a,
        "+": lambda: a + b,
        "*": lambda: a * b,
        "relu": lambda: sympy.Max(a, 0),
        "max": lambda: sympy.Max(a, b),
        "min": lambda: sympy.Min(a, b),
        "tanh": lambda: sympy.tanh(a),
        "exp": lambda: sympy.exp(sympy.tanh(a)),
        "abs": lambda: sympy.Abs(a),
        "^": lambda: a**2,
    }[kind]()


def values() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "dot": torch.randn(2, 3, 4, 5, dtype=torch.float64),
        "weight": torch.randn(2, 3, 4, 1, dtype=torch.float64),
        "lse": torch.randn(2, 3, 4, 1, dtype=torch.float64),
    }


def by_sympy(expr: Any) -> Tensor:
    """Evaluates with sympy's own numerics: independent of both printers."""
    fn = sympy.lambdify((DOT, WEIGHT, LSE), expr, modules="math")
    inputs = torch.broadcast_tensors(*values().values())
    flat = [fn(*(float(x) for x in row)) for row in zip(*(i.flatten() for i in inputs), strict=True)]
    return torch.tensor(flat, dtype=torch.float64).view(inputs[0].shape)


class Language:
    """The few functions of triton.language that a score may call, on torch tensors."""

    class PropagateNan:
        ALL = "all"

    @staticmethod
    def exp(x: Any) -> Tensor:
        return torch.exp(torch.as_tensor(x, dtype=torch.float64))

    @staticmethod
    def abs(x: Any) -> Tensor:
        return torch.as_tensor(x).abs()

    @staticmethod
    def maximum(a: Any, b: Any, propagate_nan: str = "all") -> Tensor:
        assert propagate_nan == "all", "as torch.maximum does"
        return torch.maximum(*torch.broadcast_tensors(*map(_double, (a, b))))

    @staticmethod
    def minimum(a: Any, b: Any, propagate_nan: str = "all") -> Tensor:
        assert propagate_nan == "all", "as torch.minimum does"
        return torch.minimum(*torch.broadcast_tensors(*map(_double, (a, b))))


def _double(x: Any) -> Tensor:
    return torch.as_tensor(x, dtype=torch.float64)


def by_triton_text(score: Score) -> Tensor:
    text = pointwise_to_triton(score)
    return _double(eval(text, {"tl": Language, **values()}))


def by_torch(score: Score) -> Tensor:
    return _double(pointwise_to_torch(score, **values()))


@given(expr=expressions())
def test_both_printers_and_sympy_agree(expr: Any) -> None:
    score = Score("drawn", expr)
    wanted = by_sympy(expr)
    torch.testing.assert_close(by_torch(score).expand(wanted.shape), wanted)
    torch.testing.assert_close(by_triton_text(score).expand(wanted.shape), wanted)


@given(expr=expressions(), reduce=st.sampled_from(REDUCTIONS))
def test_what_is_printed_is_read_back(expr: Any, reduce: Any) -> None:
    score = Score("drawn", expr, reduce)
    again = parse_score(score.text)
    assert again.reduce == reduce
    assert again.text == score.text, "the text is stable: it is part of cache keys"
    torch.testing.assert_close(by_sympy(again.pointwise), by_sympy(expr))


@pytest.mark.parametrize("score", SCORES, ids=lambda s: s.name)
def test_named_scores_keep_their_names(score: Score) -> None:
    assert parse_score(score.text) == score
    torch.testing.assert_close(by_torch(score), by_triton_text(score))


def test_named_scores_are_what_their_papers_say() -> None:
    torch.manual_seed(1)
    v = {k: x.float() for k, x in values().items()}
    named = {s.name: pointwise_to_torch(s, **v) for s in SCORES}
    torch.testing.assert_close(named["lightning"], v["weight"] * v["dot"].relu())
    torch.testing.assert_close(named["mass"], (v["dot"] - v["lse"]).exp())
    torch.testing.assert_close(named["dot"], v["dot"])
    assert {s.name: s.reduce for s in SCORES}["max_head"] == "max"


def test_what_a_score_reads_is_known() -> None:
    reads = {s.name: (s.uses_weight, s.uses_lse) for s in SCORES}
    assert reads["lightning"] == (True, False)
    assert reads["dot"] == (False, False)
    assert reads["mass"] == (False, True)


@pytest.mark.parametrize(
    "text",
    [
        "dot",
        "median: dot",
        "sum dot",
        ": dot",
        "sum: ",
        "sum: dot +",
        "sum: score",
        "sum: __import__('os')",
        "sum: dot.real",
        "sum: [dot]",
        "sum: dot if weight else lse",
    ],
)
def test_texts_that_are_no_scores_are_errors(text: str) -> None:
    with pytest.raises(ExpressionError):
        parse_score(text)


def test_what_a_score_needs_must_be_given() -> None:
    with pytest.raises(ExpressionError, match="needs weight"):
        pointwise_to_torch(parse_score("sum: weight*dot"), torch.zeros(1), None, None)
    with pytest.raises(ExpressionError, match="needs lse"):
        pointwise_to_torch(parse_score("sum: exp(dot - lse)"), torch.zeros(1), None, None)


def test_functions_that_a_score_may_not_use_are_errors() -> None:
    for expr in (sympy.sin(DOT), sympy.gamma(DOT)):
        score = Score("strange", expr)
        with pytest.raises(ExpressionError, match=type(expr).__name__):
            pointwise_to_torch(score, torch.zeros(1), None, None)
        with pytest.raises(ExpressionError, match=type(expr).__name__):
            pointwise_to_triton(score)


def test_relu_keeps_nan_as_torch_does() -> None:
    out = pointwise_to_torch(parse_score("sum: Max(0, dot)"), torch.tensor([math.nan, -1.0]), None, None)
    assert torch.isnan(out[0])
    assert out[1] == 0
