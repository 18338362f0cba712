"""Texts of predicates and scores are read, never evaluated."""

from __future__ import annotations

import pytest
import sympy

from clsa_compile.errors import ExpressionError
from clsa_compile.ir.expressions import read_expression

X = sympy.Symbol("x")


def test_arithmetic_comparisons_and_logic_are_read() -> None:
    assert read_expression("2*x + 1", {"x": X}) == 2 * X + 1
    assert read_expression("(x <= 3) & Ne(x, 1)", {"x": X}) == sympy.And(X <= 3, sympy.Ne(X, 1))
    assert read_expression("x**2", {"x": X}) == X**2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("__import__('os')", "may not contain|names __import__"),
        ("x.args", "may not contain Attribute"),
        ("[x]", "may not contain List"),
        ("(lambda: x)()", "calls something that has no name"),
        ("y + 1", "names y"),
        ("x +", "cannot read"),
        ("9**9**9", "power"),
        ("'x'", "may not contain 'x'"),
    ],
)
def test_anything_else_is_an_error_that_says_what(text: str, said: str) -> None:
    with pytest.raises(ExpressionError, match=said):
        read_expression(text, {"x": X})
