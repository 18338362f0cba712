"""Reads the texts of predicates and scores; they may come from files, so nothing else is evaluated."""

from __future__ import annotations

import ast
from typing import Any

import sympy

from clsa_compile.errors import ExpressionError

_NODES = (
    ast.Expression,
    ast.BinOp,
    ast.UnaryOp,
    ast.Compare,
    ast.Call,
    ast.Name,
    ast.Constant,
    ast.Load,
    ast.operator,
    ast.unaryop,
    ast.cmpop,
)
_FUNCTIONS = ("Abs", "Eq", "Ge", "Gt", "Le", "Lt", "Max", "Min", "Ne", "And", "Or", "Not", "exp", "tanh")
_LARGEST_POWER = 16


def read_expression(text: str, names: dict[str, Any]) -> Any:
    """Returns the sympy expression that `text` spells over `names`.

    Raises ExpressionError for anything but arithmetic, comparisons, logic, the names given and a few
    functions of sympy.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError as error:
        raise ExpressionError(f"cannot read {text!r}: {error.msg}") from error
    known = {"True", "False", *names, *_FUNCTIONS}
    for node in ast.walk(tree):
        if not isinstance(node, _NODES):
            raise ExpressionError(f"{text!r} may not contain {type(node).__name__}")
        if isinstance(node, ast.Call) and not isinstance(node.func, ast.Name):
            raise ExpressionError(f"{text!r} calls something that has no name")
        if isinstance(node, ast.Constant) and not isinstance(node.value, bool | int | float):
            raise ExpressionError(f"{text!r} may not contain {node.value!r}")
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow) and not _is_small(node.right):
            raise ExpressionError(f"{text!r} raises to more than the power of {_LARGEST_POWER}")
        if isinstance(node, ast.Name) and node.id not in known:
            raise ExpressionError(f"{text!r} names {node.id}; it may use {', '.join(sorted(names))}")
    try:
        return sympy.sympify(sympy.parse_expr(text.strip(), local_dict=dict(names)))
    except Exception as error:
        raise ExpressionError(f"cannot read {text!r}: {error}") from error


def _is_small(node: ast.expr) -> bool:
    """Tells whether an exponent is a small whole number; 9**9**9 would never end."""
    return (
        isinstance(node, ast.Constant) and isinstance(node.value, int) and 0 <= node.value <= _LARGEST_POWER
    )
