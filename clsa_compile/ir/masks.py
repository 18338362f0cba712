"""Mask: which (b, h, q, kv) may attend, as a sympy predicate and the tensors it reads.

`q` and `kv` are positions inside this call: query row 0..S-1 and key slot 0..T-1. A predicate
reads a tensor through a load such as `in0(b, kv)`; a boolean tensor is read as `Ne(in0(..), 0)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import Boolean, BooleanFalse, BooleanTrue
from torch import Tensor

from clsa_compile.errors import ExpressionError
from clsa_compile.ir.expressions import read_expression

B_, H_, Q_, KV_ = (sympy.Symbol(n, integer=True, nonnegative=True) for n in ("b", "h", "q", "kv"))
INDEX_SYMBOLS = (B_, H_, Q_, KV_)
TRUE = sympy.true
MAX_SLOTS = 16

# Integer division and remainder as Python and torch define them (towards minus infinity).
floordiv = sympy.Function("floordiv", integer=True)
mod = sympy.Function("mod", integer=True)


def load(slot: int) -> Any:
    """Returns the function that reads mask input number `slot`."""
    return sympy.Function(f"in{slot}", integer=True)


def slot_of(name: str) -> int | None:
    """Returns the input number that a load's name stands for, or None for another function."""
    return int(name[2:]) if name.startswith("in") and name[2:].isdigit() else None


def print_predicate(predicate: Boolean) -> str:
    """Returns the text of a predicate; the empty string means that everything is allowed."""
    return "" if predicate == TRUE else sympy.sstr(predicate)


def parse_predicate(text: str) -> Boolean:
    """Reads what `print_predicate` wrote. Raises ExpressionError for anything else."""
    if not text:
        return TRUE
    names: dict[str, Any] = {str(s): s for s in INDEX_SYMBOLS}
    names.update({"floordiv": floordiv, "mod": mod})
    names.update({f"in{i}": load(i) for i in range(MAX_SLOTS)})
    parsed = read_expression(text, names)
    if not isinstance(parsed, Boolean) or isinstance(parsed, sympy.Symbol):
        raise ExpressionError(f"the predicate {text!r} is not a condition")
    return parsed


def conjuncts(predicate: Boolean) -> tuple[Boolean, ...]:
    """Returns the conditions that must hold together."""
    if predicate == TRUE:
        return ()
    return tuple(predicate.args) if isinstance(predicate, sympy.And) else (predicate,)


def interval(predicate: Boolean) -> tuple[tuple[Any, ...], tuple[Any, ...]] | None:
    """Returns (lows, highs) where the predicate says max(lows) <= kv < min(highs), whatever h is.

    None for a predicate that says anything else.
    """
    lows, highs = [], []
    for condition in conjuncts(predicate):
        if not isinstance(condition, sympy.Le | sympy.Lt | sympy.Ge | sympy.Gt):
            return None
        difference = sympy.expand(condition.lts - condition.gts)  # at most 0
        slope = difference.coeff(KV_, 1)
        rest = sympy.expand(difference - slope * KV_)
        if slope not in (1, -1) or rest.has(KV_) or rest.has(H_):
            return None
        gap = 1 if isinstance(condition, sympy.Lt | sympy.Gt) else 0
        if slope == 1:
            highs.append(1 - gap - rest)
        else:
            lows.append(rest + gap)
    return tuple(lows), tuple(highs)


_TORCH_RELATIONS: dict[Any, Callable[[Any, Any], Any]] = {
    sympy.Le: lambda a, b: a <= b,
    sympy.Lt: lambda a, b: a < b,
    sympy.Ge: lambda a, b: a >= b,
    sympy.Gt: lambda a, b: a > b,
    sympy.Eq: lambda a, b: a == b,
    sympy.Ne: lambda a, b: a != b,
}


def is_triangle(text: str, rows: object, keys: object) -> bool:
    """Tells whether a predicate, as text, is exactly `kv <= q` over as many rows as keys."""
    if not text or not isinstance(rows, int) or rows != keys:
        return False
    return bool(parse_predicate(text) in (KV_ <= Q_, Q_ >= KV_))


def predicate_to_torch(predicate: Any, index: dict[str, Tensor], inputs: Sequence[Tensor]) -> Any:
    """Evaluates a predicate, or a number in one, over broadcastable index tensors.

    `index` maps "b", "h", "q", "kv" to int64 tensors that broadcast together; the result broadcasts
    to the same shape. Raises ExpressionError for a function that a predicate may not use.
    """

    def go(e: Any) -> Any:
        if isinstance(e, BooleanTrue | BooleanFalse):
            return torch.full((), bool(e), dtype=torch.bool, device=index["kv"].device)
        if isinstance(e, sympy.Integer):
            return int(e)
        if isinstance(e, sympy.Symbol):
            return index[e.name]
        if isinstance(e, sympy.Not):
            return ~go(e.args[0])
        if isinstance(e, sympy.And | sympy.Or):
            parts = [go(a) for a in e.args]
            result = parts[0]
            for part in parts[1:]:
                result = result & part if isinstance(e, sympy.And) else result | part
            return result
        if type(e) in _TORCH_RELATIONS:
            left, right = (go(a) for a in e.args)
            result = _TORCH_RELATIONS[type(e)](left, right)
            if isinstance(result, bool):
                return torch.full((), result, dtype=torch.bool, device=index["kv"].device)
            return result
        if isinstance(e, sympy.Add | sympy.Mul):
            parts = [go(a) for a in e.args]
            result = parts[0]
            for part in parts[1:]:
                result = result + part if isinstance(e, sympy.Add) else result * part
            return result
        if isinstance(e, sympy.Abs):
            return abs(go(e.args[0]))
        if isinstance(e, sympy.Min | sympy.Max):
            pick = torch.minimum if isinstance(e, sympy.Min) else torch.maximum
            parts = [_as_tensor(go(a), index["kv"]) for a in e.args]
            result = parts[0]
            for part in parts[1:]:
                result = pick(result, part)
            return result
        if isinstance(e, AppliedUndef):
            name = e.func.__name__
            slot = slot_of(name)
            args = [go(a) for a in e.args]
            if slot is not None:
                return _read(inputs[slot], args)
            if name == "floordiv":
                return args[0] // args[1]
            if name == "mod":
                return args[0] % args[1]
        raise ExpressionError(f"a predicate may not contain {e}")

    return go(predicate)


def _as_tensor(value: Any, like: Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else torch.full_like(like, value)


def _read(source: Tensor, args: list[Any]) -> Tensor:
    """Reads `source[args]`, broadcasting; a single-element dimension is always read at 0."""
    if not args:
        return source
    return source[tuple(args)]


def predicate_to_triton(predicate: Any, loads: Callable[[int, list[str]], str]) -> str:
    """Prints a predicate as Triton text over the names b, h, q, kv.

    `loads(slot, args)` returns the text that reads input `slot` at the index texts `args`.
    """
    relations = {
        sympy.Le: "<=",
        sympy.Lt: "<",
        sympy.Ge: ">=",
        sympy.Gt: ">",
        sympy.Eq: "==",
        sympy.Ne: "!=",
    }

    def go(e: Any) -> str:
        if isinstance(e, BooleanTrue | BooleanFalse):
            return "True" if e == TRUE else "False"
        if isinstance(e, sympy.Integer | sympy.Symbol):
            return str(e)
        if isinstance(e, sympy.Not):
            return f"(({go(e.args[0])}) == 0)"
        if isinstance(e, sympy.And | sympy.Or):
            return (
                "(" + (" & " if isinstance(e, sympy.And) else " | ").join(f"({go(a)})" for a in e.args) + ")"
            )
        if type(e) in relations:
            return f"({go(e.args[0])} {relations[type(e)]} {go(e.args[1])})"
        if isinstance(e, sympy.Add | sympy.Mul):
            return "(" + (" + " if isinstance(e, sympy.Add) else " * ").join(go(a) for a in e.args) + ")"
        if isinstance(e, sympy.Abs):
            return f"tl.abs({go(e.args[0])})"
        if isinstance(e, sympy.Min | sympy.Max):
            name = "tl.minimum" if isinstance(e, sympy.Min) else "tl.maximum"
            text = go(e.args[0])
            for a in e.args[1:]:
                text = f"{name}({text}, {go(a)})"
            return text
        if isinstance(e, AppliedUndef):
            name = e.func.__name__
            slot = slot_of(name)
            args = [go(a) for a in e.args]
            if slot is not None:
                return loads(slot, args)
            if name not in ("mod", "floordiv"):
                raise ExpressionError(f"a predicate may not contain {e}")
            # Triton divides towards zero, predicates towards minus infinity.
            remainder = f"((({args[0]}) % ({args[1]}) + ({args[1]})) % ({args[1]}))"
            if name == "mod":
                return remainder
            return f"((({args[0]}) - {remainder}) // ({args[1]}))"
        raise ExpressionError(f"a predicate may not contain {e}")

    return go(predicate)


def index_grid(sizes: Sequence[int], device: torch.device) -> dict[str, Tensor]:
    """Returns int64 index tensors of shapes [B,1,1,1], [1,H,1,1], [1,1,S,1], [1,1,1,T]."""
    grid = {}
    for axis, (symbol, size) in enumerate(zip(INDEX_SYMBOLS, sizes, strict=True)):
        shape = [1, 1, 1, 1]
        shape[axis] = -1
        grid[symbol.name] = torch.arange(size, device=device).view(shape)
    return grid
