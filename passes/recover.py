"""Recovers masks: from the nodes that build one to a predicate over (b, h, q, kv).

A mask value is read symbolically, element by element: a boolean or integer expression in the
dimensions of the node, whose leaves are loads of small tensors (positions, padding masks). What is
not understood is a leaf itself. A leaf that depends on both q and kv is a materialised mask: it
stays a tensor operand. An additive mask is a condition (0 where it holds, -inf or the lowest finite
value elsewhere) plus at most one bias tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch.fx import Node

from clsa_compile.ir.masks import INDEX_SYMBOLS, TRUE, conjuncts, floordiv, mod
from clsa_compile.ir.sites import MaskSpec, Operand
from clsa_compile.passes.analyze import Order
from clsa_compile.passes.indexing import (
    argument,
    dim,
    divide,
    identity,
    is_cast,
    is_tensor,
    remainder,
    same,
    shape,
    step,
)

aten = torch.ops.aten

# More loads or a longer condition than this is cheaper as a tensor.
MAX_INPUTS = 6
MAX_TERMS = 48

# Holds everywhere: stands in a condition for a selection that takes every token.
_EVERY_TOKEN = sympy.Symbol("every_token")


@dataclass(frozen=True, slots=True)
class Condition:
    """A boolean element."""

    expr: Any


@dataclass(frozen=True, slots=True)
class Integer:
    """An integer element."""

    expr: Any


@dataclass(frozen=True, slots=True)
class Additive:
    """A float element: 0 where `allowed` holds and minus infinity elsewhere, plus the biases."""

    allowed: Any
    biases: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Constant:
    """A float constant."""

    value: float


Element = Condition | Integer | Additive | Constant


class Unreadable(Exception):
    """A value that cannot be read symbolically; its consumer becomes the leaf."""


@dataclass(frozen=True, slots=True)
class Selection:
    """`topk_node`'s indices, seen as a mask of shape [B, S, T] or [B, Hkv, S, T]."""

    topk_node: Node
    rank: int


@dataclass(slots=True)
class Leaves:
    """The tensors that loads stand for, and the selections, each with a function of its own."""

    nodes: list[Node] = field(default_factory=list)
    selections: list[Selection] = field(default_factory=list)

    def load(self, node: Node) -> Any:
        """Returns the function that stands for a tensor."""
        if node not in self.nodes:
            self.nodes.append(node)
        return sympy.Function(f"leaf{self.nodes.index(node)}", integer=True)

    def select(self, selection: Selection) -> Any:
        """Returns the function that stands for a selection."""
        if selection not in self.selections:
            self.selections.append(selection)
        return sympy.Function(f"sel{self.selections.index(selection)}", integer=True)


@dataclass(frozen=True, slots=True)
class Forbids:
    """A boolean mask that says which keys may not be read."""

    node: Node


@dataclass(frozen=True, slots=True)
class Recovered:
    """A mask in terms of b, h, q, kv. `selection` is the top-k that the mask ANDs in, if any.

    takes_all: there is a top-k, and it takes every token, so that the mask does not depend on it.
    """

    spec: MaskSpec
    selection: Selection | None
    takes_all: bool = False


def is_lowest(value: float) -> bool:
    """Tells whether a constant stands for "forbidden": -inf or a dtype's lowest finite value."""
    lowest = [torch.finfo(d).min for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64)]
    return value == -math.inf or any(value == low for low in lowest)


class Reader:
    """Reads mask values of one graph."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.leaves = Leaves()
        self._known: dict[Node, Element] = {}

    # -- reading ------------------------------------------------------------------------------

    def read(self, node: Node) -> Element:
        """Returns the element of a node at (d0, ..., dn)."""
        if node not in self._known:
            try:
                self._known[node] = self._leaf(node) if self._is_written(node) else self._read(node)
            except Unreadable:
                self._known[node] = self._leaf(node)
        return self._known[node]

    def _is_written(self, node: Node) -> bool:
        """Tells whether a value is written in place, so that what made it does not say what it holds."""
        writes = self.order.writes(node)
        return bool(writes) and not (node.target is aten.scatter_.value and writes == [node])

    def _leaf(self, node: Node) -> Element:
        if not is_tensor(node) or self.order.written_after(node):
            # Its value later differs from what was read here.
            raise Unreadable
        value = node.meta["val"]
        load = self.leaves.load(node)(*identity(node).index)
        if value.dtype == torch.bool:
            return Condition(sympy.Ne(load, 0))
        if value.dtype.is_floating_point:
            return Additive(TRUE, (load,))
        if value.dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
            return Integer(load)
        raise Unreadable

    def _read(self, node: Node) -> Element:
        if node.op != "call_function" or not is_tensor(node):
            raise Unreadable
        selected = self._selection(node)
        if selected is not None:
            return selected
        one = step(node)
        if one is not None:
            return self._through(self.read(one.root), one.index)
        if is_cast(node):
            return self._cast(node)
        rule = _RULES.get(node.target)
        if rule is None:
            raise Unreadable
        return rule(self, node)

    def _through(self, element: Element, index: tuple[Any, ...]) -> Element:
        table = {dim(i): e for i, e in enumerate(index)}
        return _map(element, _substitution(table))

    def _cast(self, node: Node) -> Element:
        source, dtype = node.args[0], node.meta["val"].dtype
        if source.meta["val"].device != node.meta["val"].device:
            raise Unreadable
        element = self.read(source)
        if dtype == torch.bool:
            if isinstance(element, Condition):
                return element
            if isinstance(element, Integer):
                return Condition(sympy.Ne(element.expr, 0))
        if dtype in (torch.int64, torch.int32) and isinstance(element, Integer):
            return element
        if dtype.is_floating_point and isinstance(element, Additive) and not element.biases:
            return element
        raise Unreadable

    def operand(self, value: Any, node: Node) -> Element:
        """Reads an argument of a pointwise node, aligned to the node's dimensions."""
        if isinstance(value, bool):
            return Condition(sympy.true if value else sympy.false)
        if isinstance(value, int):
            return Integer(sympy.Integer(value))
        if isinstance(value, float):
            return Constant(value)
        if not is_tensor(value):
            raise Unreadable
        rank, own = node.meta["val"].dim(), shape(value)
        shift = rank - len(own)
        index = tuple(sympy.S.Zero if own[i] == 1 else dim(i + shift) for i in range(len(own)))
        return self._through(self.read(value), index)

    def _selection(self, node: Node) -> Element | None:
        """A constant mask with the top-k's positions scattered into it."""
        if node.target not in (aten.scatter.value, aten.scatter_.value):
            return None
        base, axis, index, value = node.args[:4]
        rank = node.meta["val"].dim()
        if axis not in (-1, rank - 1) or not isinstance(value, bool | int | float):
            return None
        if not isinstance(base, Node) or not isinstance(index, Node):
            return None
        if node.target is aten.scatter_.value and len(base.users) > 1:
            return None
        topk = top_indices(index)
        if topk is None or index.meta["val"].dim() != rank or rank not in (3, 4):
            return None
        wide, narrow = shape(node), shape(index)
        if not all(same(a, b) for a, b in zip(wide[:-1], narrow[:-1], strict=True)):
            return None
        chosen = self.leaves.select(Selection(topk, rank))(*identity(node).index)
        hit: Any = sympy.Ne(chosen, 0)
        scores = topk.args[0]
        if not same(shape(scores)[-1], wide[-1]):
            return None
        if same(narrow[-1], wide[-1]):
            hit = _EVERY_TOKEN
        alone = self.order.writes(base) == [node]  # in place, into a mask that nothing else writes
        before = self._read(base) if alone else self.read(base)
        if isinstance(before, Condition) and before.expr in (sympy.true, sympy.false):
            if bool(before.expr) == bool(value):
                return None
            return Condition(hit if value else sympy.Not(hit))
        if isinstance(before, Additive) and not before.biases:
            if before.allowed == sympy.false and value == 0:
                return Additive(hit)
            if before.allowed == sympy.true and is_lowest(float(value)):
                return Additive(sympy.Not(hit))
        if isinstance(before, Constant):
            if is_lowest(before.value) and value == 0:
                return Additive(hit)
            if before.value == 0 and is_lowest(float(value)):
                return Additive(sympy.Not(hit))
        return None

    # -- finishing ----------------------------------------------------------------------------

    def recover(self, masks: Sequence[Node | Forbids], roles: tuple[int | None, ...]) -> Recovered | None:
        """Returns several masks (all must allow) as one, or None when they cannot be carried.

        `roles[i]` says which of b, h, q, kv dimension i of the score tensor is; masks broadcast to it.
        """
        allowed: list[Any] = []
        biases: list[Any] = []
        sizes: dict[Any, Any] = {}
        for given in masks:
            mask = given.node if isinstance(given, Forbids) else given
            try:
                element = self.read(mask)
            except Unreadable:
                return None
            if isinstance(given, Forbids):
                if not isinstance(element, Condition):
                    return None
                element = Condition(sympy.Not(element.expr))
            rank = mask.meta["val"].dim()
            if rank > len(roles):
                return None
            table = {
                dim(i): INDEX_SYMBOLS[role]
                if (role := roles[i + len(roles) - rank]) is not None
                else sympy.S.Zero
                for i in range(rank)
            }
            sizes.update({table[dim(i)]: size for i, size in enumerate(shape(mask)) if size != 1})
            element = _map(element, _substitution(table))
            if isinstance(element, Condition):
                allowed.append(element.expr)
            elif isinstance(element, Additive):
                allowed.append(element.allowed)
                biases.extend(element.biases)
            elif not (isinstance(element, Constant) and element.value == 0):
                return None
        condition = sympy.And(*allowed)
        found = self._finish(condition.xreplace({_EVERY_TOKEN: sympy.true}), biases, sizes)
        return None if found is None else replace(found, takes_all=condition.has(_EVERY_TOKEN))

    def _finish(self, allowed: Any, biases: list[Any], sizes: dict[Any, Any]) -> Recovered | None:
        selection, tensor, kept, forbids = None, None, [], False
        for part in conjuncts(allowed):
            name = _single_load(part)
            if name is not None and name.startswith("sel") and isinstance(part, sympy.Ne):
                if selection is not None:
                    return None
                selection = self.leaves.selections[int(name[3:])]
                if not _selects_in_place(part, selection):
                    return None
                continue
            if _has_selection(part):
                return None
            if name is not None and _is_materialised(part):
                if tensor is not None:
                    return None
                tensor = self._tensor(part, sizes)
                forbids = isinstance(part, sympy.Eq)
                if tensor is None:
                    return None
                continue
            kept.append(part)
        if len(biases) > 1 or (biases and tensor is not None):
            return None
        if biases:
            tensor = self._tensor(biases[0], sizes)
            if tensor is None:
                return None
        predicate = sympy.And(*kept)
        names = sorted(
            {f.func.__name__ for f in predicate.atoms(sympy.core.function.AppliedUndef)} - {"floordiv", "mod"}
        )
        if any(_is_materialised(load) for load in predicate.atoms(sympy.core.function.AppliedUndef)):
            return None
        if len(names) > MAX_INPUTS or predicate.count_ops() > MAX_TERMS:
            return None
        table = {}
        inputs = []
        for slot, name in enumerate(names):
            inputs.append(self.leaves.nodes[int(name[4:])])
            table[name] = sympy.Function(f"in{slot}", integer=True)
        for load in predicate.atoms(sympy.core.function.AppliedUndef):
            if load.func.__name__ in table:
                predicate = predicate.subs(load, table[load.func.__name__](*load.args))
        return Recovered(MaskSpec(predicate, tuple(inputs), tensor, forbids), selection)

    def _tensor(self, part: Any, sizes: dict[Any, Any]) -> Operand | None:
        """Returns a materialised mask's load as an operand [B, H, S, T], if it is read whole."""
        load = next(
            f for f in part.atoms(sympy.core.function.AppliedUndef) if f.func.__name__.startswith("leaf")
        )
        node = self.leaves.nodes[int(load.func.__name__[4:])]
        is_condition = isinstance(part, sympy.Ne | sympy.Eq)
        if is_condition != (node.meta["val"].dtype == torch.bool):
            return None  # an integer mask is neither a condition nor a bias
        operand = as_operand(node, load.args, INDEX_SYMBOLS)
        if operand is None:
            return None
        own = shape(node)
        for symbol, position in zip(INDEX_SYMBOLS, operand.dims, strict=True):
            if position is None or own[position] == 1 or symbol not in load.args:
                continue
            if not same(own[position], sizes.get(symbol, sympy.S.One)):
                return None
        return operand


def as_operand(node: Node, index: Sequence[Any], roles: Sequence[Any]) -> Operand | None:
    """Returns `node[index]` as an operand whose dimensions play `roles`, if it is a permutation."""
    sizes = shape(node)
    dims: list[int | None] = [None] * len(roles)
    for position, e in enumerate(index):
        if e == 0 and sizes[position] == 1:
            continue
        if e not in roles or dims[roles.index(e)] is not None:
            return None
        dims[roles.index(e)] = position
    # Unread dimensions of size 1 fill the roles that are still free, so that ranks fit.
    free = [p for p, e in enumerate(index) if e == 0]
    for role in range(len(roles)):
        if dims[role] is None and free:
            dims[role] = free.pop(0)
    return None if free else Operand(node, tuple(dims))


def top_indices(node: Node) -> Node | None:
    """Returns the top-k whose indices a node is, through integer casts."""
    while is_cast(node) and not node.meta["val"].dtype.is_floating_point:
        source = node.args[0]
        node = source
    if node.op != "call_function" or len(node.args) != 2 or node.args[1] != 1:
        return None
    source = node.args[0]
    if not isinstance(source, Node) or source.target is not aten.topk.default:
        return None
    rank = source.args[0].meta["val"].dim()
    axis = argument(source, 2, "dim", -1)
    largest = argument(source, 3, "largest", True)
    return source if axis in (-1, rank - 1) and largest else None


def _map(element: Element, change: Callable[[Any], Any]) -> Element:
    if isinstance(element, Condition):
        return Condition(change(element.expr))
    if isinstance(element, Integer):
        return Integer(change(element.expr))
    if isinstance(element, Additive):
        return Additive(change(element.allowed), tuple(change(b) for b in element.biases))
    return element


def _substitution(table: dict[Any, Any]) -> Callable[[Any], Any]:
    return lambda e: e.xreplace(table) if hasattr(e, "xreplace") else e


def _single_load(part: Any) -> str | None:
    """Returns the name of the load f when a condition is exactly `f(...) != 0` or `f(...) == 0`."""
    if not isinstance(part, sympy.Ne | sympy.Eq) or part.args[1] != 0:
        return None
    left = part.args[0]
    if not isinstance(left, sympy.core.function.AppliedUndef) or left.func in (floordiv, mod):
        return None
    return str(left.func.__name__)


def _is_materialised(part: Any) -> bool:
    """Tells whether a load depends on both q and kv."""
    return {INDEX_SYMBOLS[2], INDEX_SYMBOLS[3]} <= part.free_symbols


def _has_selection(part: Any) -> bool:
    return any(f.func.__name__.startswith("sel") for f in part.atoms(sympy.core.function.AppliedUndef))


def _selects_in_place(part: Any, selection: Selection) -> bool:
    """Tells whether a selection is read at (b, q, kv), or at (b, h, q, kv): no shift, no transpose."""
    b, h, q, kv = INDEX_SYMBOLS
    wanted = (b, q, kv) if selection.rank == 3 else (b, h, q, kv)
    return all(e in (w, sympy.S.Zero) for e, w in zip(part.args[0].args, wanted, strict=True))


# -- the pointwise rules ----------------------------------------------------------------------

Rule = Callable[[Reader, Node], Element]


def _arange(reader: Reader, node: Node) -> Element:
    arguments = [a for a in node.args if not isinstance(a, torch.dtype)]
    start, pace = 0, 1
    if node.target is not aten.arange.default:
        start = arguments[0]
        pace = arguments[2] if len(arguments) > 2 else 1
    if not isinstance(start, int) or not isinstance(pace, int) or node.meta["val"].dtype.is_floating_point:
        raise Unreadable
    return Integer(identity(node).index[0] * pace + start)


def _constant(value_of: Callable[[Node], Any]) -> Rule:
    def rule(reader: Reader, node: Node) -> Element:
        value = value_of(node)
        dtype = node.meta["val"].dtype
        if not isinstance(value, bool | int | float):
            raise Unreadable
        if dtype == torch.bool:
            return Condition(sympy.true if value else sympy.false)
        return Constant(float(value)) if dtype.is_floating_point else Integer(sympy.Integer(int(value)))

    return rule


def _logic(combine: Callable[..., Any]) -> Rule:
    def rule(reader: Reader, node: Node) -> Element:
        parts = [reader.operand(a, node) for a in node.args]
        if not all(isinstance(p, Condition) for p in parts):
            raise Unreadable
        return Condition(combine(*(p.expr for p in parts if isinstance(p, Condition))))

    return rule


def _compare(relation: Any) -> Rule:
    def rule(reader: Reader, node: Node) -> Element:
        left, right = (reader.operand(a, node) for a in node.args[:2])
        if isinstance(left, Integer) and isinstance(right, Integer):
            return Condition(relation(left.expr, right.expr))
        if isinstance(left, Condition) and isinstance(right, Condition) and relation in (sympy.Eq, sympy.Ne):
            both = sympy.Equivalent(left.expr, right.expr)
            return Condition(sympy.to_dnf(both if relation is sympy.Eq else sympy.Not(both)))
        raise Unreadable

    return rule


def _arithmetic(combine: Callable[..., Any]) -> Rule:
    def rule(reader: Reader, node: Node) -> Element:
        if argument(node, 2, "alpha", 1) != 1:
            raise Unreadable
        left, right = (reader.operand(a, node) for a in node.args[:2])
        if isinstance(left, Integer) and isinstance(right, Integer):
            return Integer(combine(left.expr, right.expr))
        if node.target is aten.add.Tensor and node.meta["val"].dtype.is_floating_point:
            return _sum(left, right)
        raise Unreadable

    return rule


def _sum(left: Element, right: Element) -> Element:
    """The sum of two additive masks."""
    parts = [_additive(p) for p in (left, right)]
    return Additive(sympy.And(*(p.allowed for p in parts)), parts[0].biases + parts[1].biases)


def _additive(element: Element) -> Additive:
    if isinstance(element, Additive):
        return element
    if isinstance(element, Constant) and element.value == 0:
        return Additive(sympy.true)
    if isinstance(element, Constant) and is_lowest(element.value):
        return Additive(sympy.false)
    raise Unreadable


def _divide(reader: Reader, node: Node) -> Element:
    rounding = node.kwargs.get("rounding_mode", "floor")
    left, right = (reader.operand(a, node) for a in node.args[:2])
    if rounding != "floor" or not isinstance(left, Integer) or not isinstance(right, Integer):
        raise Unreadable
    return Integer(divide(left.expr, right.expr, {}))


def _remainder(reader: Reader, node: Node) -> Element:
    left, right = (reader.operand(a, node) for a in node.args[:2])
    if not isinstance(left, Integer) or not isinstance(right, Integer):
        raise Unreadable
    return Integer(remainder(left.expr, right.expr, {}))


def _absolute(reader: Reader, node: Node) -> Element:
    value = reader.operand(node.args[0], node)
    if not isinstance(value, Integer):
        raise Unreadable
    return Integer(sympy.Abs(value.expr))


def _where(reader: Reader, node: Node) -> Element:
    condition, yes, no = (reader.operand(a, node) for a in node.args)
    if not isinstance(condition, Condition):
        raise Unreadable
    return _choose(condition.expr, yes, no)


def _choose(condition: Any, yes: Element, no: Element) -> Element:
    if isinstance(yes, Condition) and isinstance(no, Condition):
        return Condition(sympy.Or(sympy.And(condition, yes.expr), sympy.And(sympy.Not(condition), no.expr)))
    a, b = _additive(yes), _additive(no)
    if a.allowed == sympy.false and not a.biases:
        return Additive(sympy.And(sympy.Not(condition), b.allowed), b.biases)
    if b.allowed == sympy.false and not b.biases:
        return Additive(sympy.And(condition, a.allowed), a.biases)
    raise Unreadable


def _masked_fill(reader: Reader, node: Node) -> Element:
    base, condition, fill = (reader.operand(a, node) for a in node.args)
    if not isinstance(condition, Condition):
        raise Unreadable
    return _choose(condition.expr, fill, base)


def _index(reader: Reader, node: Node) -> Element:
    """`source[i0, i1, ...]` with one integer tensor a dimension."""
    source, indices = node.args
    if not is_tensor(source) or not isinstance(indices, list | tuple) or None in indices:
        raise Unreadable
    if len(indices) != source.meta["val"].dim():
        raise Unreadable
    places = [reader.operand(i, node) for i in indices]
    if not all(isinstance(p, Integer) for p in places):
        raise Unreadable
    table = {dim(i): p.expr for i, p in enumerate(places) if isinstance(p, Integer)}
    sizes = shape(source)
    table.update({dim(i): sympy.S.Zero for i in range(len(sizes)) if sizes[i] == 1})
    if any(_may_be_negative(e) for e in table.values()):
        raise Unreadable  # negative places wrap around
    return _map(reader.read(source), _substitution(table))


def _may_be_negative(e: Any) -> bool:
    return not bool(sympy.sympify(e).is_nonnegative)


_RULES: dict[Any, Rule] = {
    aten.arange.default: _arange,
    aten.arange.start: _arange,
    aten.arange.start_step: _arange,
    aten.full.default: _constant(lambda n: n.args[1]),
    aten.full_like.default: _constant(lambda n: n.args[1]),
    aten.new_full.default: _constant(lambda n: n.args[2]),
    aten.scalar_tensor.default: _constant(lambda n: n.args[0]),
    aten.ones.default: _constant(lambda n: 1),
    aten.new_ones.default: _constant(lambda n: 1),
    aten.ones_like.default: _constant(lambda n: 1),
    aten.zeros.default: _constant(lambda n: 0),
    aten.new_zeros.default: _constant(lambda n: 0),
    aten.zeros_like.default: _constant(lambda n: 0),
    aten.bitwise_and.Tensor: _logic(sympy.And),
    aten.__and__.Tensor: _logic(sympy.And),
    aten.__or__.Tensor: _logic(sympy.Or),
    aten.logical_and.default: _logic(sympy.And),
    aten.bitwise_or.Tensor: _logic(sympy.Or),
    aten.logical_or.default: _logic(sympy.Or),
    aten.bitwise_not.default: _logic(sympy.Not),
    aten.logical_not.default: _logic(sympy.Not),
    aten.add.Tensor: _arithmetic(lambda a, b: a + b),
    aten.add.Scalar: _arithmetic(lambda a, b: a + b),
    aten.sub.Tensor: _arithmetic(lambda a, b: a - b),
    aten.sub.Scalar: _arithmetic(lambda a, b: a - b),
    aten.rsub.Scalar: _arithmetic(lambda a, b: b - a),
    aten.mul.Tensor: _arithmetic(lambda a, b: a * b),
    aten.mul.Scalar: _arithmetic(lambda a, b: a * b),
    aten.minimum.default: _arithmetic(sympy.Min),
    aten.maximum.default: _arithmetic(sympy.Max),
    aten.floor_divide.default: _divide,
    aten.floor_divide.Scalar: _divide,
    aten.div.Tensor_mode: _divide,
    aten.div.Scalar_mode: _divide,
    aten.remainder.Scalar: _remainder,
    aten.remainder.Tensor: _remainder,
    aten.abs.default: _absolute,
    aten.where.self: _where,
    aten.where.ScalarOther: _where,
    aten.where.ScalarSelf: _where,
    aten.where.Scalar: _where,
    aten.masked_fill.Scalar: _masked_fill,
    aten.masked_fill.Tensor: _masked_fill,
    aten.index.Tensor: _index,
}
for _target, _relation in (
    ("le", sympy.Le),
    ("lt", sympy.Lt),
    ("ge", sympy.Ge),
    ("gt", sympy.Gt),
    ("eq", sympy.Eq),
    ("ne", sympy.Ne),
):
    _packet = getattr(aten, _target)
    _RULES[_packet.Tensor] = _compare(_relation)
    _RULES[_packet.Scalar] = _compare(_relation)
