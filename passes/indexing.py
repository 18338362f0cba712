"""Views as index arithmetic: which element of a root tensor an element of a view is.

The element (d0, ..., dn) of a node is the element `index` of its root, where each entry of `index` is
a sympy expression in d0..dn. Permutations, head repeats, slices and reshapes all become
substitutions, so one check on the final expressions replaces a list of spellings.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import SymInt
from torch.fx import Node

from clsa_compile.ir.masks import floordiv, mod

aten = torch.ops.aten
Expr = sympy.Expr


def dim(i: int) -> sympy.Symbol:
    """Returns the symbol of dimension i of the tensor under view."""
    return sympy.Symbol(f"d{i}", integer=True, nonnegative=True)


def sym(size: Any) -> Any:
    """Returns a size as a sympy expression, without adding a guard."""
    return size.node.expr if isinstance(size, SymInt) else sympy.Integer(size)


def shape(node: Node) -> tuple[Any, ...]:
    """Returns a node's shape as sympy expressions."""
    return tuple(sym(s) for s in node.meta["val"].shape)


def same(a: Any, b: Any) -> bool:
    """Tells whether two sizes are equal for sure; never adds a guard."""
    return bool(sympy.expand(a - b) == 0)


def is_tensor(node: Any) -> bool:
    """Tells whether an FX argument is a node that holds one tensor."""
    return isinstance(node, Node) and isinstance(node.meta.get("val"), torch.Tensor)


@dataclass(frozen=True, slots=True)
class View:
    """A node seen as `root[index]`. `copies` are the nodes on the way that read memory."""

    root: Node
    index: tuple[Any, ...]
    copies: tuple[Node, ...] = ()


def identity(node: Node) -> View:
    """Returns a node as a view of itself."""
    rank = node.meta["val"].dim()
    sizes = shape(node)
    return View(node, tuple(sympy.S.Zero if sizes[i] == 1 else dim(i) for i in range(rank)))


def divide(e: Any, by: Any, sizes: dict[Any, Any]) -> Any:
    """Returns floordiv(e, by), simplified where the sizes of the dimensions allow it."""
    if by == 1:
        return e
    if _are_integers(e, by):
        return sympy.Integer(int(e) // int(by))
    if not sympy.sympify(by).is_positive:
        return floordiv(e, by)
    quotient, rest = _split(e, by)
    if rest == 0:
        return quotient
    if _below(rest, by, sizes):
        return quotient
    return quotient + floordiv(rest, by) if quotient != 0 else floordiv(e, by)


def remainder(e: Any, by: Any, sizes: dict[Any, Any]) -> Any:
    """Returns mod(e, by), simplified where the sizes of the dimensions allow it."""
    if by == 1:
        return sympy.S.Zero
    if _are_integers(e, by):
        return sympy.Integer(int(e) % int(by))
    if not sympy.sympify(by).is_positive:
        return mod(e, by)
    _, rest = _split(e, by)
    if rest == 0 or _below(rest, by, sizes):
        return rest
    return mod(rest, by)


def _are_integers(e: Any, by: Any) -> bool:
    return bool(sympy.sympify(e).is_Integer and sympy.sympify(by).is_Integer and by != 0)


@functools.lru_cache(maxsize=4096)  # every layer asks the same
def _split(e: Any, by: Any) -> tuple[Any, Any]:
    """Splits e into quotient * by + rest, term by term."""
    quotient, rest = sympy.S.Zero, sympy.S.Zero
    for term in sympy.Add.make_args(sympy.expand(e)):
        ratio = sympy.cancel(term / by)
        if ratio.is_integer and not ratio.has(sympy.Pow):
            quotient += ratio
        else:
            rest += term
    return quotient, rest


def _below(e: Any, limit: Any, sizes: dict[Any, Any]) -> bool:
    """Tells whether 0 <= e < limit for sure; e must be a sum of dimensions with constant factors."""
    top = bottom = sympy.S.Zero
    for term in sympy.Add.make_args(sympy.expand(e)):
        factor, rest = term.as_coeff_Mul()
        if rest == 1:
            top, bottom = top + factor, bottom + factor
            continue
        if rest not in sizes:
            return False
        reach = factor * (sizes[rest] - 1)
        top, bottom = (top + reach, bottom) if factor > 0 else (top, bottom + reach)
    inside = sympy.expand(limit - 1 - top).is_nonnegative
    return bool(inside and sympy.expand(bottom).is_nonnegative)


def reshape_index(old: tuple[Any, ...], new: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Returns the index into a tensor of shape `old` for element (d0..dn) of its reshape to `new`."""
    sizes = {dim(j): s for j, s in enumerate(new)}
    index: list[Any] = [sympy.S.Zero] * len(old)
    i = j = 0
    while i < len(old) or j < len(new):
        if i < len(old) and old[i] == 1:
            i += 1
            continue
        if j < len(new) and new[j] == 1:
            j += 1
            continue
        if i >= len(old) or j >= len(new):
            return None
        olds, news = [i], [j]
        po, pn = old[i], new[j]
        i, j = i + 1, j + 1
        while not same(po, pn):
            # Grow the side that is smaller for sure; sizes that cannot be compared end the attempt.
            if _divides(po, pn) and i < len(old):
                po *= old[i]
                olds.append(i)
                i += 1
            elif _divides(pn, po) and j < len(new):
                pn *= new[j]
                news.append(j)
                j += 1
            elif i < len(old) and j < len(new):
                po *= old[i]
                olds.append(i)
                i += 1
            else:
                return None
            if len(olds) > 8 or len(news) > 8:
                return None
        flat: Any = sympy.S.Zero
        for jj in news:
            flat = flat * new[jj] + (sympy.S.Zero if new[jj] == 1 else dim(jj))
        after: Any = sympy.S.One
        for position, ii in reversed(list(enumerate(olds))):
            value = divide(flat, after, sizes)
            index[ii] = value if position == 0 else remainder(value, old[ii], sizes)
            after = after * old[ii]
    return tuple(index)


def _divides(small: Any, large: Any) -> bool:
    ratio = sympy.cancel(large / small)
    return bool(ratio.is_integer and ratio != 1 and not ratio.has(sympy.Pow))


_NOOP = {
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh.default,
    aten.view_as.default,
    aten.expand_as.default,
}
_COPY_NOOP = {
    aten.contiguous.default,
    aten.clone.default,
    aten.lift_fresh_copy.default,
    aten.detach_copy.default,
    aten.alias_copy.default,
}
_RESHAPES = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten._reshape_copy.default,
    aten.reshape_as.default,
}
_CASTS = {
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
}
_MAY_COPY = {aten.reshape.default, aten.flatten.using_ints, aten.reshape_as.default}


def is_cast(node: Node) -> bool:
    """Tells whether a node only changes dtype, device or layout."""
    return node.op == "call_function" and node.target in _CASTS


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """Returns a node's argument by position or name."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def root(node: Node) -> Node:
    """Returns what a node is a view of, through all of them; itself where it is none."""
    while (view := step(node)) is not None:
        node = view.root
    return node


def step(node: Node, *, casts: bool = False) -> View | None:
    """Returns a node as a view of its own input, or None when it is not one.

    With `casts`, a cast to a wider float counts as a view too.
    """
    if node.op != "call_function" or not is_tensor(node):
        return None
    if node.target is operator.getitem:
        return _piece(node)
    source: Any = node.args[0] if node.args else None
    if not is_tensor(source):
        return None
    old, new = shape(source), shape(node)
    own = identity(node).index
    target = node.target
    if is_cast(node):
        before, after = source.meta["val"], node.meta["val"]
        if before.device != after.device:
            return None
        if before.dtype == after.dtype:
            return View(source, own, () if _shares(source, node) else (node,))
        widens = (
            casts
            and before.dtype.is_floating_point
            and after.dtype.is_floating_point
            and torch.finfo(after.dtype).bits > torch.finfo(before.dtype).bits
        )
        return View(source, own, (node,)) if widens else None
    if target in _NOOP and len(old) == len(new) and all(map(same, old, new)):
        return View(source, own)
    if target in _COPY_NOOP:
        return View(source, own, (node,))
    if target in _RESHAPES:
        index = reshape_index(old, new)
        if index is None:
            return None
        return View(source, index, (node,) if target in _MAY_COPY else ())
    if target in (aten.expand.default, aten.expand_as.default):
        shift = len(new) - len(old)
        return View(
            source,
            tuple(sympy.S.Zero if old[i] == 1 else own[i + shift] for i in range(len(old))),
        )
    rule = _RULES.get(target)
    return rule(node, source, own) if rule is not None else None


def _shares(one: Node, other: Node) -> bool:
    """Tells whether two nodes hold the same memory."""
    a, b = (n.meta["val"].untyped_storage()._cdata for n in (one, other))
    return bool(a == b)


def _transpose(node: Node, source: Node, own: tuple[Any, ...]) -> View | None:
    rank = len(own)
    a, b = (int(x) % rank for x in node.args[1:3])
    index = list(own)
    index[a], index[b] = own[b], own[a]
    return View(source, tuple(index))


def _t(node: Node, source: Node, own: tuple[Any, ...]) -> View | None:
    return View(source, own[::-1])


def _permute(node: Node, source: Node, own: tuple[Any, ...]) -> View | None:
    order = [int(x) % len(own) for x in node.args[1]]
    index: list[Any] = [None] * len(own)
    for position, d in enumerate(order):
        index[d] = own[position]
    return View(source, tuple(index))


def _slice(node: Node, source: Node, own: tuple[Any, ...]) -> View | None:
    d = argument(node, 1, "dim", 0) % len(own)
    start = argument(node, 2, "start", 0) or 0
    stride = argument(node, 4, "step", 1)
    size = shape(source)[d]
    if not isinstance(stride, int) or not isinstance(start, int):
        return None
    first: Any = sympy.Integer(start)
    if start < 0:
        first = size + start
        if not first.is_nonnegative:
            if not size.is_Integer:
                return None  # may be cut off at the front
            first = sympy.S.Zero
    index = list(own)
    index[d] = own[d] * stride + first
    return View(source, tuple(index))


def _narrow(node: Node, source: Node, own: tuple[Any, ...]) -> View | None:
    d, start = int(node.args[1]) % len(own), node.args[2]
    if not isinstance(start, int) or start < 0:
        return None
    index = list(own)
    index[d] = own[d] + start
    return View(source, tuple(index))


def _swap_last(node: Node, source: Node, own: tuple[Any, ...]) -> View | None:
    return View(source, (*own[:-2], own[-1], own[-2])) if len(own) >= 2 else None


def _movedim(node: Node, source: Node, own: tuple[Any, ...]) -> View | None:
    rank = len(own)
    sources, targets = (
        [int(x) % rank for x in (a if isinstance(a, list | tuple) else [a])] for a in node.args[1:3]
    )
    order = [d for d in range(rank) if d not in sources]
    for target, moved in sorted(zip(targets, sources, strict=True)):
        order.insert(target, moved)
    index: list[Any] = [None] * rank
    for position, d in enumerate(order):
        index[d] = own[position]
    return View(source, tuple(index))


def _select(node: Node, source: Node, own: tuple[Any, ...]) -> View | None:
    rank = len(own) + 1
    d, at = node.args[1] % rank, node.args[2]
    if not isinstance(at, int):
        return None
    if at < 0:
        at = shape(source)[d] + at
    return View(source, (*own[:d], sympy.sympify(at), *own[d:]))


def _repeat_interleave(node: Node, source: Node, own: tuple[Any, ...]) -> View | None:
    times, d = node.args[1], argument(node, 2, "dim")
    if not isinstance(times, int) or d is None:
        return None
    d %= len(own)
    index = list(own)
    sizes = {dim(j): s for j, s in enumerate(shape(node))}
    index[d] = divide(own[d], sympy.Integer(times), sizes)
    return View(source, tuple(index), (node,))


def _piece(node: Node) -> View | None:
    """A piece of split, chunk or unbind: a slice of what was split."""
    parts, which = node.args
    if not isinstance(parts, Node) or parts.op != "call_function" or not isinstance(which, int):
        return None
    splits = (
        aten.split_with_sizes.default,
        aten.split.Tensor,
        aten.split.sizes,
        aten.chunk.default,
        aten.tensor_split.sections,
    )
    source = parts.args[0]
    if not is_tensor(source):
        return None
    pieces = parts.meta["val"]
    if parts.target in splits:
        rank = node.meta["val"].dim()
        d = argument(parts, 2, "dim", 0) % rank
        offset = sum((sym(p.shape[d]) for p in pieces[:which]), sympy.S.Zero)
        index = list(identity(node).index)
        index[d] = index[d] + offset
        return View(source, tuple(index))
    if parts.target is aten.unbind.int:
        rank = node.meta["val"].dim() + 1
        d = argument(parts, 1, "dim", 0) % rank
        own = identity(node).index
        return View(source, (*own[:d], sympy.Integer(which), *own[d:]))
    return None


_RULES: dict[Any, Callable[[Node, Node, tuple[Any, ...]], View | None]] = {
    aten.transpose.int: _transpose,
    aten.swapaxes.default: _transpose,
    aten.swapdims.default: _transpose,
    aten.t.default: _t,
    aten.numpy_T.default: _t,
    aten.permute.default: _permute,
    aten.slice.Tensor: _slice,
    aten.narrow.default: _narrow,
    aten.mT.default: _swap_last,
    aten.movedim.int: _movedim,
    aten.movedim.intlist: _movedim,
    aten.select.int: _select,
    aten.repeat_interleave.self_int: _repeat_interleave,
}


def substitute(inner: View, outer: tuple[Any, ...], sizes: dict[Any, Any]) -> tuple[Any, ...]:
    """Returns `inner.index` read at the element `outer` (expressions in other symbols)."""
    table = {dim(i): e for i, e in enumerate(outer)}
    return tuple(_simplify(e.xreplace(table), sizes) for e in inner.index)


def _simplify(e: Any, sizes: dict[Any, Any]) -> Any:
    """Re-applies the division rules after a substitution."""
    if not e.args:
        return e
    args = [_simplify(a, sizes) for a in e.args]
    if isinstance(e, floordiv):
        return divide(args[0], args[1], sizes)
    if isinstance(e, mod):
        return remainder(args[0], args[1], sizes)
    return e.func(*args)


def chain(node: Node, index: tuple[Any, ...], sizes: dict[Any, Any], *, casts: bool = False) -> list[View]:
    """Returns every view of ever deeper roots of `node[index]`, the node itself first."""
    views = [View(node, index)]
    while (one := step(views[-1].root, casts=casts)) is not None:
        last = views[-1]
        views.append(View(one.root, substitute(one, last.index, sizes), (*last.copies, *one.copies)))
    return views
