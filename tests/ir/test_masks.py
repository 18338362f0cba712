"""Predicates: their text, their value in torch, and their Triton text, against plain Python."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import sympy
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from clsa_compile.errors import ExpressionError
from clsa_compile.ir.masks import (
    B_,
    H_,
    INDEX_SYMBOLS,
    KV_,
    Q_,
    TRUE,
    conjuncts,
    floordiv,
    index_grid,
    interval,
    is_triangle,
    load,
    mod,
    parse_predicate,
    predicate_to_torch,
    predicate_to_triton,
    print_predicate,
    slot_of,
)

Draw = Any
SIZES = (2, 2, 3, 5)
IN0 = torch.tensor([[1, 0, 1, 1, 0], [0, 3, 2, 4, 1]])  # over (b, kv)
IN1 = torch.tensor([2, 0, 4])  # over q
IN2 = torch.tensor(3)  # over nothing
INPUTS = [IN0, IN1, IN2]


@st.composite
def integers(draw: Draw, depth: int = 2) -> Any:
    leaf = draw(
        st.sampled_from(
            [*INDEX_SYMBOLS, load(0)(B_, KV_), load(1)(Q_), load(2)(), sympy.Integer(2),
             sympy.Integer(-1)]
        )
    )  # fmt: skip
    if depth == 0 or draw(st.booleans()):
        return leaf
    other = draw(integers(depth=depth - 1))
    kind = draw(st.sampled_from(["+", "-", "*", "floordiv", "mod", "abs", "min", "max"]))
    by = sympy.Integer(draw(st.sampled_from([1, 2, 3, 7])))
    return {
        "+": leaf + other,
        "-": leaf - other,
        "*": leaf * by,
        "floordiv": floordiv(other, by),
        "mod": mod(other, by),
        "abs": sympy.Abs(other),
        "min": sympy.Min(leaf, other),
        "max": sympy.Max(leaf, other),
    }[kind]


@st.composite
def predicates(draw: Draw, depth: int = 2) -> Any:
    kind = draw(st.sampled_from(["relation", "relation", "and", "or", "not", "constant"]))
    if kind == "constant":
        return draw(st.sampled_from([sympy.true, sympy.false]))
    if depth == 0 or kind == "relation":
        relation = draw(st.sampled_from([sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt, sympy.Eq, sympy.Ne]))
        return relation(draw(integers()), draw(integers()))
    first = draw(predicates(depth=depth - 1))
    if kind == "not":
        return sympy.Not(first)
    second = draw(predicates(depth=depth - 1))
    return sympy.And(first, second) if kind == "and" else sympy.Or(first, second)


def value_at(e: Any, place: dict[str, int]) -> Any:
    """Evaluates an expression at one (b, h, q, kv), in Python's own arithmetic."""
    if e in (sympy.true, sympy.false):
        return bool(e)
    if isinstance(e, sympy.Integer):
        return int(e)
    if isinstance(e, sympy.Symbol):
        return place[e.name]
    args = [value_at(a, place) for a in e.args]
    name = type(e).__name__
    operations: dict[str, Any] = {
        "LessThan": lambda a, b: a <= b,
        "StrictLessThan": lambda a, b: a < b,
        "GreaterThan": lambda a, b: a >= b,
        "StrictGreaterThan": lambda a, b: a > b,
        "Equality": lambda a, b: a == b,
        "Unequality": lambda a, b: a != b,
        "And": lambda *a: all(a),
        "Or": lambda *a: any(a),
        "Not": lambda a: not a,
        "Add": lambda *a: sum(a),
        "Mul": lambda *a: math.prod(a),
        "Abs": abs,
        "Min": min,
        "Max": max,
        "floordiv": lambda a, b: a // b,
        "mod": lambda a, b: a % b,
        "in0": lambda b, kv: int(IN0[b, kv]),
        "in1": lambda q: int(IN1[q]),
        "in2": lambda: int(IN2),
    }
    return operations[name](*args)


def everywhere(predicate: Any) -> Tensor:
    out = torch.zeros(SIZES, dtype=torch.bool)
    for place in itertools.product(*map(range, SIZES)):
        at = dict(zip(["b", "h", "q", "kv"], place, strict=True))
        out[place] = value_at(predicate, at)
    return out


def evaluated(predicate: Any) -> Tensor:
    grid = index_grid(SIZES, torch.device("cpu"))
    result = predicate_to_torch(predicate, grid, INPUTS)
    assert result.dtype == torch.bool
    return result.expand(SIZES)  # type: ignore[no-any-return]


@given(predicate=predicates())
def test_torch_evaluates_a_predicate_as_python_does(predicate: Any) -> None:
    assert torch.equal(evaluated(predicate), everywhere(predicate)), predicate


@given(predicate=predicates())
def test_what_is_printed_is_read_back(predicate: Any) -> None:
    text = print_predicate(predicate)
    again = parse_predicate(text)
    assert torch.equal(evaluated(again), everywhere(predicate)), text
    assert print_predicate(again) == text, "the text is stable: it is part of cache keys"


class Truncating:
    """An integer tensor whose // and % are those of Triton: towards zero, as in C."""

    def __init__(self, value: Any) -> None:
        self.value = torch.as_tensor(value)

    def _of(self, other: Any) -> Tensor:
        return other.value if isinstance(other, Truncating) else torch.as_tensor(other)

    def __add__(self, o: Any) -> Truncating:
        return Truncating(self.value + self._of(o))

    def __mul__(self, o: Any) -> Truncating:
        return Truncating(self.value * self._of(o))

    def __sub__(self, o: Any) -> Truncating:
        return Truncating(self.value - self._of(o))

    def __mod__(self, o: Any) -> Truncating:
        return Truncating(torch.fmod(self.value, self._of(o)))

    def __floordiv__(self, o: Any) -> Truncating:
        return Truncating(torch.div(self.value, self._of(o), rounding_mode="trunc"))

    def __rmod__(self, o: Any) -> Truncating:
        return Truncating(o) % self

    def __rsub__(self, o: Any) -> Truncating:
        return Truncating(o) - self

    __radd__, __rmul__ = __add__, __mul__

    def __neg__(self) -> Truncating:
        return Truncating(-self.value)

    def __le__(self, o: Any) -> Truncating:
        return Truncating(self.value <= self._of(o))

    def __lt__(self, o: Any) -> Truncating:
        return Truncating(self.value < self._of(o))

    def __ge__(self, o: Any) -> Truncating:
        return Truncating(self.value >= self._of(o))

    def __gt__(self, o: Any) -> Truncating:
        return Truncating(self.value > self._of(o))

    def __eq__(self, o: object) -> Truncating:  # type: ignore[override]
        return Truncating(self.value == self._of(o))

    def __ne__(self, o: object) -> Truncating:  # type: ignore[override]
        return Truncating(self.value != self._of(o))

    def __and__(self, o: Any) -> Truncating:
        return Truncating(self.value & self._of(o))

    def __or__(self, o: Any) -> Truncating:
        return Truncating(self.value | self._of(o))

    __rand__, __ror__ = __and__, __or__
    __hash__ = None  # type: ignore[assignment]


class FakeLanguage:
    """The few functions of triton.language that a predicate may call."""

    @staticmethod
    def abs(x: Any) -> Truncating:
        return Truncating(_raw(x).abs())

    @staticmethod
    def minimum(a: Any, b: Any) -> Truncating:
        return Truncating(torch.minimum(*torch.broadcast_tensors(_raw(a), _raw(b))))

    @staticmethod
    def maximum(a: Any, b: Any) -> Truncating:
        return Truncating(torch.maximum(*torch.broadcast_tensors(_raw(a), _raw(b))))


def _raw(x: Any) -> Tensor:
    return x.value if isinstance(x, Truncating) else torch.as_tensor(x)


@given(predicate=predicates())
def test_the_triton_text_means_the_same(predicate: Any) -> None:
    def read(slot: int, args: list[str]) -> str:
        return f"read({slot}, {', '.join(args)})"

    def at(slot: int, *args: Any) -> Truncating:
        index = tuple(_raw(a).long() for a in args)
        return Truncating(INPUTS[slot][index] if index else INPUTS[slot])

    text = predicate_to_triton(predicate, read)
    grid = {k: Truncating(v) for k, v in index_grid(SIZES, torch.device("cpu")).items()}
    result = eval(text, {"tl": FakeLanguage, "read": at, **grid})
    assert torch.equal(_raw(result).bool().expand(SIZES), everywhere(predicate)), text


def test_everything_allowed_is_the_empty_text() -> None:
    assert print_predicate(TRUE) == ""
    assert parse_predicate("") == TRUE
    assert print_predicate(sympy.false) != ""
    assert parse_predicate(print_predicate(sympy.false)) == sympy.false


def test_conjuncts_are_the_conditions_that_must_hold_together() -> None:
    a, b = sympy.Le(KV_, Q_), sympy.Ne(load(0)(B_, KV_), 0)
    assert conjuncts(TRUE) == ()
    assert conjuncts(a) == (a,)
    assert set(conjuncts(sympy.And(a, b))) == {a, b}
    assert conjuncts(sympy.Or(a, b)) == (sympy.Or(a, b),)


@pytest.mark.parametrize(
    "text",
    [
        "kv +",
        "kv <= position",
        "__import__('os').getcwd()",
        "kv.__class__",
        "(lambda: 1)()",
        "[kv][0]",
        "kv if q else b",
        "print(kv)",
        "exec('1')",
        "kv",
        "kv + 1",
        "'kv'",
        "Symbol('kv') <= 1",
    ],
)
def test_texts_that_are_no_predicates_are_errors(text: str) -> None:
    with pytest.raises(ExpressionError):
        parse_predicate(text)


def test_functions_that_a_predicate_may_not_use_are_errors() -> None:
    strange = sympy.Le(sympy.Function("strange")(KV_), Q_)
    with pytest.raises(ExpressionError, match="strange"):
        predicate_to_torch(strange, index_grid(SIZES, torch.device("cpu")), [])
    with pytest.raises(ExpressionError, match="strange"):
        predicate_to_triton(strange, lambda slot, args: "")


def test_load_names_are_told_from_others() -> None:
    assert [slot_of(n) for n in ("in0", "in12", "in", "index", "floordiv")] == [0, 12, None, None, None]


def test_grids_broadcast_and_stay_wide_enough_for_long_sequences() -> None:
    grid = index_grid((2, 3, 4, 5), torch.device("cpu"))
    assert [tuple(grid[s.name].shape) for s in (B_, H_, Q_, KV_)] == [
        (2, 1, 1, 1), (1, 3, 1, 1), (1, 1, 4, 1), (1, 1, 1, 5),
    ]  # fmt: skip
    assert {g.dtype for g in grid.values()} == {torch.int64}


def inside(predicate: Any) -> Tensor:
    """What an interval allows, elementwise: bound by bound, in Python."""
    ends = interval(predicate)
    assert ends is not None
    out = torch.zeros(SIZES, dtype=torch.bool)
    for place in itertools.product(*map(range, SIZES)):
        at = dict(zip(["b", "h", "q", "kv"], place, strict=True))
        lows, highs = ([value_at(e, at) for e in side] for side in ends)
        out[place] = all(low <= at["kv"] for low in lows) and all(at["kv"] < high for high in highs)
    return out


@st.composite
def ends_of_keys(draw: Draw) -> Any:
    relation = draw(st.sampled_from([sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt]))
    end = draw(st.sampled_from([Q_, B_ + 1, load(1)(Q_), load(2)() - Q_, sympy.Min(Q_, 2), sympy.Integer(3)]))
    return relation(KV_, end) if draw(st.booleans()) else relation(end - KV_, draw(st.integers(-2, 2)))


@given(conditions=st.lists(ends_of_keys(), max_size=3))
def test_ends_of_keys_are_an_interval(conditions: list[Any]) -> None:
    predicate = sympy.And(*conditions)
    assume(predicate != sympy.false)
    assert torch.equal(inside(predicate), everywhere(predicate))


@given(predicate=predicates())
def test_what_is_taken_for_an_interval_is_one(predicate: Any) -> None:
    assume(interval(predicate) is not None)
    assert torch.equal(inside(predicate), everywhere(predicate))


@pytest.mark.parametrize(
    "text",
    ["Ne(in0(b, kv), 0)", "(kv <= q) | (kv < 2)", "kv <= h", "2*kv <= q", "Eq(kv, q)", "in0(b, kv) <= q"],
)
def test_what_is_no_interval_of_keys_is_told(text: str) -> None:
    assert interval(parse_predicate(text)) is None


def test_only_the_plain_triangle_is_one() -> None:
    assert is_triangle("kv <= q", 8, 8)
    assert is_triangle("q >= kv", 8, 8)
    for predicate, rows, keys in (("kv < q", 8, 8), ("kv <= q", 8, 9), ("", 8, 8), ("kv <= q + 1", 8, 8)):
        assert not is_triangle(predicate, rows, keys)
    unknown = object()
    assert not is_triangle("kv <= q", unknown, unknown)
