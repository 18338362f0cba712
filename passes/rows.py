"""Rows: which rows of an op's operands its wanted rows need, if those are all that is wanted.

`reduced(node, axis, want)` is the call that computes the wanted rows of a node's result, in terms of the same
rows of its operands: `Take` stands for them. It is None where a row depends on other rows, or where that
cannot be seen. Rows are positions along one dimension of a tensor; `axis` says which.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch.fx import Node

from clsa_compile.ir.masks import Q_, load, parse_predicate, print_predicate, slot_of
from clsa_compile.passes.indexing import argument, is_tensor, same, shape
from clsa_compile.passes.tidy import is_idle_dropout

aten = torch.ops.aten
clsa = torch.ops.clsa


@dataclass(frozen=True, slots=True)
class Want:
    """Some rows of `size`: `count` of them, from `start` on where they are consecutive and start is known."""

    size: Any
    count: int
    start: int | None


@dataclass(frozen=True, slots=True)
class Take:
    """An operand of which the wanted rows along `axis` are needed, and no others."""

    node: Node
    axis: int


@dataclass(frozen=True, slots=True)
class RowNumbers:
    """An operand that holds the numbers of the wanted rows, int64 [count]."""


@dataclass(frozen=True, slots=True)
class Call:
    """A call with Take and RowNumbers among its arguments."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


Rule = Callable[[Node, int, Want], Call | None]


def reduced(node: Node, axis: int, want: Want) -> Call | None:
    """Returns the call that computes the wanted rows of a node's result, or None."""
    if node.op != "call_function":
        return None
    rule = _RULES.get(node.target)
    if rule is not None:
        return rule(node, axis, want)
    if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags:
        return _pointwise(node, axis, want)
    return None


def rank(node: Node) -> int:
    """Returns how many dimensions a node's tensor has; those of a tuple are alike."""
    value = node.meta["val"]
    return int((value[0] if isinstance(value, list | tuple) else value).dim())


def _like(node: Node, *args: Any) -> Call:
    """The same call with other first arguments."""
    return Call(node.target, (*args, *node.args[len(args) :]), dict(node.kwargs))


# -- each row by itself --------------------------------------------------------------------------


def _pointwise(node: Node, axis: int, want: Want) -> Call | None:
    """Operands broadcast; one that is the same for all rows is needed whole."""
    if any(isinstance(v, Node) for v in node.kwargs.values()) or node.target._schema.is_mutable:
        return None
    args = [_broadcast(a, axis, rank(node)) for a in node.args]
    return Call(node.target, tuple(args), dict(node.kwargs)) if Take in map(type, args) else None


def _broadcast(value: Any, axis: int, out_rank: int) -> Any:
    if not is_tensor(value):
        return value
    own = axis - (out_rank - rank(value))
    return value if own < 0 or shape(value)[own] == 1 else Take(value, own)


def _first_only(node: Node, axis: int, want: Want) -> Call | None:
    return _like(node, Take(node.args[0], axis))


def _type_as(node: Node, axis: int, want: Want) -> Call | None:
    """The other tensor only says which dtype."""
    source, other = node.args[:2]
    if source.meta["val"].device != other.meta["val"].device:
        return None
    return Call(aten.to.dtype, (Take(source, axis), node.meta["val"].dtype), {})


def _unless_random(node: Node, axis: int, want: Want) -> Call | None:
    return _first_only(node, axis, want) if is_idle_dropout(node) else None


def _over_last(node: Node, axis: int, want: Want) -> Call | None:
    """Norms over the last dimensions."""
    inner = rank(node) - len(node.args[1])
    return _like(node, Take(node.args[0], axis)) if axis < inner else None


def _along(position: int, default: Any = None) -> Rule:
    """An op along one other dimension, which is argument number `position`."""

    def rule(node: Node, axis: int, want: Want) -> Call | None:
        along = argument(node, position, "dim", default)
        if not isinstance(along, int) or along % rank(node) == axis:
            return None
        return _like(node, Take(node.args[0], axis))

    return rule


def _reduction(node: Node, axis: int, want: Want) -> Call | None:
    """Sums and their kin over other dimensions."""
    source = node.args[0]
    dims = argument(node, 1, "dim")
    dims = [dims] if isinstance(dims, int) else dims
    if not dims:
        return None
    gone = {d % rank(source) for d in dims}
    kept = list(range(rank(source)))
    if rank(node) != rank(source):
        kept = [d for d in kept if d not in gone]
    own = kept[axis]
    return None if own in gone else _like(node, Take(source, own))


def _linear(node: Node, axis: int, want: Want) -> Call | None:
    return _like(node, Take(node.args[0], axis)) if axis < rank(node) - 1 else None


def _matmul(node: Node, axis: int, want: Want) -> Call | None:
    left, right = node.args[:2]
    if rank(left) < 2 or rank(right) < 2 or axis == rank(node) - 1:
        return None
    if axis == rank(node) - 2:
        return _like(node, Take(left, rank(left) - 2), right)
    return _like(node, *(_broadcast(a, axis, rank(node)) for a in (left, right)))


# -- views -----------------------------------------------------------------------------------------


def _kept_axis(old: tuple[Any, ...], new: tuple[Any, ...], axis: int) -> int | None:
    """Returns which dimension of `old` is `axis` of its reshape to `new`, when it is one of its own."""
    before, after = _volume(new[:axis]), _volume(new[axis + 1 :])
    for position, size in enumerate(old):
        if (
            same(size, new[axis])
            and same(_volume(old[:position]), before)
            and same(_volume(old[position + 1 :]), after)
        ):
            return position
    return None


def _volume(sizes: tuple[Any, ...]) -> Any:
    return sympy.Mul(*sizes)


def _reshape(node: Node, axis: int, want: Want) -> Call | None:
    source = node.args[0]
    own = _kept_axis(shape(source), shape(node), axis)
    sizes = argument(node, 1, "shape", argument(node, 1, "size"))
    if own is None or not isinstance(sizes, list | tuple) or len(sizes) != rank(node):
        return None
    # The rows of a view need not be a view.
    return Call(aten.reshape.default, (Take(source, own), _with_count(sizes, axis, want)), {})


def _with_count(sizes: Any, axis: int, want: Want) -> list[Any]:
    return [want.count if i == axis else size for i, size in enumerate(sizes)]


def _flatten(node: Node, axis: int, want: Want) -> Call | None:
    own = _kept_axis(shape(node.args[0]), shape(node), axis)
    first, last = (int(argument(node, i, n, d)) for i, n, d in ((1, "start_dim", 0), (2, "end_dim", -1)))
    size = rank(node.args[0])
    if own is None or first % size <= own <= last % size:
        return None
    return _like(node, Take(node.args[0], own))


def _unflatten(node: Node, axis: int, want: Want) -> Call | None:
    own = _kept_axis(shape(node.args[0]), shape(node), axis)
    if own is None or int(node.args[1]) % rank(node.args[0]) == own:
        return None
    return _like(node, Take(node.args[0], own))


def _expand(node: Node, axis: int, want: Want) -> Call | None:
    source, sizes = node.args[:2]
    taken = _broadcast(source, axis, rank(node))
    return Call(node.target, (taken, _with_count(sizes, axis, want)), dict(node.kwargs))


def _transpose(node: Node, axis: int, want: Want) -> Call | None:
    a, b = (int(d) % rank(node) for d in node.args[1:3])
    return _like(node, Take(node.args[0], {a: b, b: a}.get(axis, axis)))


def _t(node: Node, axis: int, want: Want) -> Call | None:
    return _like(node, Take(node.args[0], rank(node) - 1 - axis))


def _permute(node: Node, axis: int, want: Want) -> Call | None:
    return _like(node, Take(node.args[0], int(node.args[1][axis]) % rank(node)))


def _unsqueeze(node: Node, axis: int, want: Want) -> Call | None:
    new = int(node.args[1]) % rank(node)
    return None if axis == new else _like(node, Take(node.args[0], axis - (axis > new)))


def _squeeze(node: Node, axis: int, want: Want) -> Call | None:
    source = node.args[0]
    if rank(source) == rank(node):
        return _like(node, Take(source, axis))
    gone = int(node.args[1]) % rank(source)
    return _like(node, Take(source, axis + (axis >= gone)))


def _slice(node: Node, axis: int, want: Want) -> Call | None:
    """A slice of another dimension, or of all rows."""
    source = node.args[0]
    along = argument(node, 1, "dim", 0) % rank(node)
    if along != axis:
        return _like(node, Take(source, axis))
    whole = not argument(node, 2, "start") and argument(node, 4, "step", 1) == 1
    if not whole or not same(shape(source)[axis], shape(node)[axis]):
        return None
    # Already all rows, so the wanted ones are the operand's own.
    return Call(aten.alias.default, (Take(source, axis),), {})


def _slice_scatter(node: Node, axis: int, want: Want) -> Call | None:
    whole, part = node.args[:2]
    along = argument(node, 2, "dim", 0) % rank(node)
    return None if along == axis else _like(node, Take(whole, axis), Take(part, axis))


def _select_scatter(node: Node, axis: int, want: Want) -> Call | None:
    whole, part = node.args[:2]
    along = int(node.args[2]) % rank(node)
    return None if along == axis else _like(node, Take(whole, axis), Take(part, axis - (axis > along)))


def _repeat(node: Node, axis: int, want: Want) -> Call | None:
    """Copies along other dimensions."""
    source, repeats = node.args
    own = axis - (rank(node) - rank(source))
    return None if own < 0 or repeats[axis] != 1 else _like(node, Take(source, own))


def _select(node: Node, axis: int, want: Want) -> Call | None:
    along = int(node.args[1]) % (rank(node) + 1)
    return _like(node, Take(node.args[0], axis + (axis >= along)))


def _cat(node: Node, axis: int, want: Want) -> Call | None:
    parts = node.args[0]
    if argument(node, 1, "dim", 0) % rank(node) == axis or any(rank(p) != rank(node) for p in parts):
        return None
    return _like(node, [Take(part, axis) for part in parts])


def _stack(node: Node, axis: int, want: Want) -> Call | None:
    new = argument(node, 1, "dim", 0) % rank(node)
    if axis == new:
        return None
    return _like(node, [Take(part, axis - (axis > new)) for part in node.args[0]])


def _split(node: Node, axis: int, want: Want) -> Call | None:
    if argument(node, 2, "dim", 0) % rank(node) == axis:
        return None
    return _like(node, Take(node.args[0], axis))


def _unbind(node: Node, axis: int, want: Want) -> Call | None:
    along = argument(node, 1, "dim", 0) % (rank(node) + 1)
    return _like(node, Take(node.args[0], axis + (axis >= along)))


def _embedding(node: Node, axis: int, want: Want) -> Call | None:
    weight, indices = node.args[:2]
    return _like(node, weight, Take(indices, axis)) if axis < rank(indices) else None


# -- attention: its query side -----------------------------------------------------------------------


def _attention(node: Node, axis: int, want: Want) -> Call | None:
    """Rows of queries; all keys and values."""
    names = [a.name for a in node.target._schema.arguments]
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    is_bounds = node.target is clsa.mask_bounds.default
    if axis != (1 if is_bounds else 2) or given.get("pages") is not None:
        return None
    masked = _of_rows(given["predicate"], given["mask_inputs"], want)
    if masked is None:
        return None
    given["predicate"], given["mask_inputs"] = masked
    if given["mask"] is not None:
        given["mask"] = _broadcast(given["mask"], 2, 4)
    for name, own in _ROWS_OF.items():
        if given.get(name) is not None:
            given[name] = Take(given[name], own)
    return Call(node.target, tuple(given[name] for name in names if name in given), {})


# Which dimension of an operand of a contract op is rows of queries.
_ROWS_OF = {"q": 2, "like": 2, "indices": 2, "candidates": 2, "weight": 2, "lse": 2, "bounds": 1}


def _of_rows(text: str, inputs: list[Node], want: Want) -> tuple[str, list[Any]] | None:
    """Returns a predicate about the wanted rows: its q counts them, and its inputs hold their values.

    A load at row q itself reads the wanted rows of its tensor. Any other q is the number of a row.
    """
    predicate = parse_predicate(text)
    if not getattr(predicate, "free_symbols", None):
        return text, list(inputs)
    table: dict[Any, Any] = {}
    found: list[Any] = []

    def slot(value: Any) -> int:
        if value not in found:
            found.append(value)
        return found.index(value)

    for read in sorted(predicate.atoms(AppliedUndef), key=str):
        number = slot_of(read.func.__name__)
        if number is None:
            continue  # floordiv and mod
        rows = [i for i, e in enumerate(read.args) if e == Q_]
        others = [e for e in read.args if e != Q_]
        if len(rows) > 1 or any(e.has(Q_) or e.atoms(AppliedUndef) for e in others):
            return None
        source = inputs[number]
        value = Take(source, rows[0]) if rows else source
        table[read] = load(slot(value))(*read.args)
    stand_ins = {read: sympy.Dummy(integer=True) for read in table}
    rest = predicate.xreplace(stand_ins)
    if rest.has(Q_):
        place = load(slot(RowNumbers()))(Q_) if want.start is None else Q_ + want.start
        rest = rest.xreplace({Q_: place})
    changed = rest.xreplace({stand_ins[read]: new for read, new in table.items()})
    return print_predicate(changed), found


_RULES: dict[Any, Rule] = {
    aten.linear.default: _linear,
    aten.matmul.default: _matmul,
    aten.bmm.default: _matmul,
    aten.layer_norm.default: _over_last,
    aten.rms_norm.default: _over_last,
    aten.softmax.int: _along(1),
    aten.log_softmax.int: _along(1),
    aten._softmax.default: _along(1),
    aten.cumsum.default: _along(1),
    aten.glu.default: _along(1, -1),
    aten.dropout.default: _unless_random,
    aten.type_as.default: _type_as,
    aten.view.default: _reshape,
    aten._unsafe_view.default: _reshape,
    aten.reshape.default: _reshape,
    aten.flatten.using_ints: _flatten,
    aten.unflatten.int: _unflatten,
    aten.expand.default: _expand,
    aten.transpose.int: _transpose,
    aten.swapaxes.default: _transpose,
    aten.t.default: _t,
    aten.permute.default: _permute,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.dim: _squeeze,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.slice_scatter.default: _slice_scatter,
    aten.select_scatter.default: _select_scatter,
    aten.repeat.default: _repeat,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.chunk.default: _split,
    aten.unbind.int: _unbind,
    aten.embedding.default: _embedding,
    aten.floor_divide.default: _pointwise,
    aten.multiply.Tensor: _pointwise,
    aten.__and__.Tensor: _pointwise,
    aten.__or__.Tensor: _pointwise,
    operator.getitem: _first_only,
    clsa.attention.default: _attention,
    clsa.sparse_attention.default: _attention,
    clsa.index_topk.default: _attention,
    clsa.mask_bounds.default: _attention,
}
_RULES |= dict.fromkeys(
    (
        aten.to.device,
        aten.to.dtype,
        aten.to.dtype_layout,
        aten._to_copy.default,
        aten.contiguous.default,
        aten.clone.default,
        aten.alias.default,
        aten.detach.default,
        aten.ones_like.default,
        aten.zeros_like.default,
    ),
    _first_only,
)
_RULES |= dict.fromkeys(
    (
        aten.mean.dim,
        aten.sum.dim_IntList,
        aten.amax.default,
        aten.amin.default,
        aten.var.correction,
        aten.std.correction,
    ),
    _reduction,
)
