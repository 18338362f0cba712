"""Score: how an indexer ranks a key, one sympy expression in `dot`, `weight` and `lse`.

A score is pointwise per index head, then reduced over heads:

    score[b, s, t] = reduce_h  f(dot[b, h, s, t], weight[b, h, s], lse[b, h, s])

with dot = scale * q_h . k_t in fp32. Its text is "reduce: f", for example
"sum: weight*Max(0, dot)", the lightning indexer of DeepSeek-V3.2 (arXiv 2512.02556, eq. 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import sympy
import torch
from torch import Tensor

from clsa_compile.errors import ExpressionError
from clsa_compile.ir.expressions import read_expression

DOT, WEIGHT, LSE = (sympy.Symbol(n, real=True) for n in ("dot", "weight", "lse"))
REDUCTIONS = ("sum", "max", "mean")


@dataclass(frozen=True, slots=True)
class Score:
    """A named pointwise expression and its reduction over index heads."""

    name: str
    pointwise: sympy.Expr
    reduce: Literal["sum", "max", "mean"] = "sum"

    @property
    def text(self) -> str:
        """The form that travels in the graph and in cache keys."""
        return f"{self.reduce}: {sympy.sstr(self.pointwise)}"

    @property
    def uses_weight(self) -> bool:
        """True when the score reads one weight per head and query."""
        return WEIGHT in self.pointwise.free_symbols

    @property
    def uses_lse(self) -> bool:
        """True when the score reads each head's log-sum-exp."""
        return LSE in self.pointwise.free_symbols


LIGHTNING = Score("lightning", WEIGHT * sympy.Max(DOT, 0))
DOT_PRODUCT = Score("dot", DOT)
MASS = Score("mass", sympy.exp(DOT - LSE))
MAX_HEAD = Score("max_head", DOT, "max")

SCORES = (LIGHTNING, DOT_PRODUCT, MASS, MAX_HEAD)


def parse_score(text: str) -> Score:
    """Reads the text of a score. Raises ExpressionError naming what is wrong."""
    reduce, colon, body = text.partition(":")
    reduce = reduce.strip()
    if not colon or reduce not in REDUCTIONS:
        raise ExpressionError(
            f"the score {text!r} must start with one of {', '.join(REDUCTIONS)} and a colon"
        )
    expr = read_expression(body, {str(s): s for s in (DOT, WEIGHT, LSE)})
    known = next((s for s in SCORES if s.pointwise == expr and s.reduce == reduce), None)
    return known or Score("custom", expr, reduce)  # type: ignore[arg-type]


def pointwise_to_torch(score: Score, dot: Tensor, weight: Tensor | None, lse: Tensor | None) -> Tensor:
    """Evaluates the pointwise part; all tensors broadcast to [B, H, S, T]."""
    values = {DOT: dot, WEIGHT: weight, LSE: lse}

    def go(e: Any) -> Any:
        if isinstance(e, sympy.Symbol):
            if values[e] is None:
                raise ExpressionError(f"the score {score.text!r} needs {e}, which was not given")
            return values[e]
        if not e.free_symbols:
            return float(e)
        args = [go(a) for a in e.args]
        if isinstance(e, sympy.Add):
            return _fold(args, lambda a, b: a + b)
        if isinstance(e, sympy.Mul):
            return _fold(args, lambda a, b: a * b)
        if isinstance(e, sympy.Max) and len(args) == 2 and sympy.S.Zero in e.args:
            return torch.relu(next(a for a in args if isinstance(a, Tensor)))
        if isinstance(e, sympy.Max):
            return _fold([_tensor(a, dot) for a in args], torch.maximum)
        if isinstance(e, sympy.Min):
            return _fold([_tensor(a, dot) for a in args], torch.minimum)
        if isinstance(e, sympy.exp):
            return torch.exp(args[0])
        if isinstance(e, sympy.tanh):
            return torch.tanh(args[0])
        if isinstance(e, sympy.Abs):
            return torch.abs(args[0])
        if _is_power(e):
            return args[0] ** int(e.exp)
        raise ExpressionError(f"a score may not contain {e.func.__name__}")

    result: Tensor = go(score.pointwise)
    return result


def pointwise_to_triton(score: Score) -> str:
    """Prints the pointwise part as Triton text over fp32 values named dot, weight and lse."""

    def go(e: Any) -> str:
        if isinstance(e, sympy.Symbol):
            return str(e)
        if not e.free_symbols:
            return repr(float(e))
        args = [go(a) for a in e.args]
        if isinstance(e, sympy.Add):
            return "(" + " + ".join(args) + ")"
        if isinstance(e, sympy.Mul):
            return "(" + " * ".join(args) + ")"
        if isinstance(e, sympy.Max | sympy.Min):
            name = "tl.maximum" if isinstance(e, sympy.Max) else "tl.minimum"
            # The tensor goes first: Triton wants one of the two to carry the shape.
            args.sort(key=lambda t: t[0].isdigit() or t[0] == "-")
            text = args[0]
            for arg in args[1:]:
                text = f"{name}({text}, {arg}, propagate_nan=tl.PropagateNan.ALL)"
            return text
        if isinstance(e, sympy.exp):
            return f"tl.exp({args[0]})"
        if isinstance(e, sympy.tanh):
            return f"(1.0 - 2.0 / (tl.exp(2.0 * ({args[0]})) + 1.0))"
        if isinstance(e, sympy.Abs):
            return f"tl.abs({args[0]})"
        if _is_power(e):
            return "(" + " * ".join([args[0]] * int(e.exp)) + ")"
        raise ExpressionError(f"a score may not contain {e.func.__name__}")

    return go(score.pointwise)


def _is_power(e: Any) -> bool:
    """Tells whether an expression is a small whole power, printed as a product."""
    return isinstance(e, sympy.Pow) and bool(e.exp.is_Integer) and 0 < int(e.exp) <= 16


def _fold(values: list[Any], combine: Any) -> Any:
    result = values[0]
    for value in values[1:]:
        result = combine(result, value)
    return result


def _tensor(value: Any, like: Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else torch.full_like(like, value)
