"""Attention written out: product, scale, softcap, masks, softmax, product."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch.fx import Node

from clsa_compile.ir.masks import INDEX_SYMBOLS, KV_, Q_
from clsa_compile.ir.sites import Reason, Refused
from clsa_compile.passes.indexing import (
    argument,
    dim,
    is_cast,
    is_tensor,
    same,
    shape,
    step,
    substitute,
)
from clsa_compile.passes.patterns.pattern import (
    E_,
    Candidate,
    Context,
    Part,
    Pattern,
    constant,
    readers,
    refuse_unless,
    role_index,
    roles_of,
    score_sizes,
    sole_user,
)
from clsa_compile.passes.patterns.product import SUM, Product, product
from clsa_compile.passes.recover import Forbids, is_lowest

aten = torch.ops.aten

SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
_MULTIPLY = (aten.mul.Tensor, aten.mul.Scalar)
_DIVIDE = (aten.div.Tensor, aten.div.Scalar)
# How far a probability may be from the product that consumes it.
_REACH = 8


@dataclass(slots=True)
class Scores:
    """What was read walking back from the softmax to the product of query and key."""

    product: Product
    index: tuple[Any, ...]
    scale: float = 1.0
    softcap: float = 0.0
    masks: list[Node | Forbids] = field(default_factory=list)
    sinks: Part | None = None


def _match(context: Context, node: Node) -> Candidate | None:
    values = _value_product(node)
    if values is None:
        return None
    # 1. The softmax runs over the keys, in a tensor of rank 4 or 3.
    scores = node.args[0]
    rank = scores.meta["val"].dim()
    axis = argument(node, 1, "dim", -1)
    roles = roles_of(rank)
    refuse_unless(
        roles is not None,
        Reason.SHAPE,
        f"scores of rank {rank}; [batch, heads, queries, keys] is understood",
    )
    assert roles is not None
    refuse_unless(axis in (-1, rank - 1), Reason.LAYOUT, "the softmax does not run over the keys")
    # 2. The probabilities go nowhere else, and nothing random happens to them.
    sizes = _sizes(node, scores, roles)
    trimmed = _check_probabilities(node, values)
    # 3. The scores are a product, scaled, capped and masked in this order.
    walk = _walk_back(scores, roles, sizes)
    refuse_unless(
        trimmed == (walk.sinks is not None),
        Reason.SHAPE,
        "the columns of the probabilities are not those of the keys",
    )
    sizes[SUM], sizes[E_] = walk.product.summed, shape(values.right)[_value_axis(values)]
    left, right = _sides(walk, sizes)
    v_index, out_roles = _value_indices(values, roles, sizes)
    return Candidate(
        out=values.out,
        first_read=walk.product.out,
        q=left,
        k=right,
        v=Part(values.right, v_index),
        sizes=sizes,
        scale=walk.scale,
        masks=walk.masks,
        roles=roles,
        softcap=walk.softcap,
        sinks=walk.sinks,
        out_roles=out_roles,
    )


# -- forward: from the softmax to the values -----------------------------------------------------


def _value_product(node: Node) -> Product | None:
    """Returns the product of these probabilities with values, or None: then it is no attention."""
    frontier, seen = [(node, 0)], {node}
    while frontier:
        current, depth = frontier.pop(0)
        for user in current.users:
            found = product(user)
            if found is not None and _sums_keys(found, current):
                return found
            if depth < _REACH and user not in seen and _carries(user):
                seen.add(user)
                frontier.append((user, depth + 1))
    return None


def _sums_keys(found: Product, probabilities: Node) -> bool:
    rank = probabilities.meta["val"].dim()
    if found.left is probabilities and len(found.left_index) == rank:
        return bool(found.left_index[-1] == SUM or found.summed == 1)
    return False


def _carries(node: Node) -> bool:
    """Tells whether a node may stand between the softmax and the values."""
    return node.op == "call_function" and (
        is_cast(node)
        or step(node) is not None
        or node.target in (aten.dropout.default, aten.native_dropout.default, operator.getitem)
        or node.target in _MULTIPLY
    )


def _check_probabilities(node: Node, values: Product) -> bool:
    """Checks the way from the softmax to the values; returns True when the last column was cut off."""
    trimmed = False
    current = node
    while current is not values.out:
        sole_user(current)
        (current,) = readers(current)
        if current is values.out:
            break
        if is_cast(current):
            continue
        if current.target is aten.dropout.default:
            p, training = current.args[1], current.args[2]
            refuse_unless(not training or p == 0, Reason.DROPOUT, f"probabilities are dropped with p = {p}")
            continue
        if current.target is aten.native_dropout.default:
            raise Refused(Reason.DROPOUT, "probabilities are dropped at random")
        if current.target is aten.slice.Tensor and not trimmed:
            trimmed = _cuts_last_column(current)
            refuse_unless(trimmed, Reason.LAYOUT, f"the probabilities are sliced by {current.name}")
            continue
        if current.target in (aten.contiguous.default, aten.clone.default, aten.alias.default):
            continue
        raise Refused(Reason.LAYOUT, f"the probabilities go through {current.target}")
    return trimmed


def _cuts_last_column(node: Node) -> bool:
    source = node.args[0]
    rank = source.meta["val"].dim()
    axis = argument(node, 1, "dim", 0) % rank
    start, pace = argument(node, 2, "start", 0), argument(node, 4, "step", 1)
    return (
        axis == rank - 1 and start in (0, None) and pace == 1 and same(shape(node)[-1], shape(source)[-1] - 1)
    )


def _value_axis(values: Product) -> int:
    """Returns the dimension of the values that is the width of a row."""
    own = set(values.left_index)
    free = [i for i, e in enumerate(values.right_index) if e not in own and e != SUM and e != 0]
    return free[0] if len(free) == 1 else len(values.right_index) - 1


def _value_indices(
    values: Product, roles: tuple[int | None, ...], sizes: dict[Any, Any]
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Returns the values' index over (b, h, kv, e), and the roles of the output's dimensions."""
    table: dict[Any, Any] = {SUM: KV_ if sizes[KV_] != 1 else sympy.S.Zero}
    rank = values.out.meta["val"].dim()
    out_roles: list[Any] = [None] * rank
    for role, e in zip(roles[:-1], values.left_index[:-1], strict=True):
        assert role is not None
        symbol = INDEX_SYMBOLS[role]
        if e == 0 and sizes[symbol] == 1:
            continue
        refuse_unless(e in [dim(i) for i in range(rank)], Reason.LAYOUT, "an output of unknown layout")
        out_roles[[dim(i) for i in range(rank)].index(e)] = symbol
        table[e] = symbol
    width = values.right_index[_value_axis(values)]
    if width != 0:
        out_roles[[dim(i) for i in range(rank)].index(width)] = E_
        table[width] = E_
    # Dimensions of size 1 take what is left, in order.
    wanted = [INDEX_SYMBOLS[r] for r in roles[:-1] if r is not None] + [E_]
    missing = [s for s in wanted if s not in out_roles]
    for position, role in enumerate(out_roles):
        if role is None:
            refuse_unless(bool(missing), Reason.SHAPE, "an output of unknown rank")
            out_roles[position] = missing.pop(0)
            table[dim(position)] = sympy.S.Zero
    refuse_unless(not missing, Reason.SHAPE, "an output of unknown rank")
    return tuple(e.xreplace(table) for e in values.right_index), tuple(out_roles)


# -- backward: from the softmax to query and key -----------------------------------------------


def _sizes(node: Node, scores: Node, roles: tuple[int | None, ...]) -> dict[Any, Any]:
    sizes = score_sizes(scores, roles)
    if _joins_sinks(scores):
        sizes[KV_] = sizes[KV_] - 1
    return sizes


def _joins_sinks(scores: Node) -> bool:
    return _sink_parts(_less_maximum(scores)) is not None


def _less_maximum(node: Node) -> Node:
    """Looks through `x - max(x)`, which the softmax undoes."""
    if node.target is not aten.sub.Tensor:
        return node
    x, peak = node.args[:2]
    if not isinstance(x, Node) or not isinstance(peak, Node):
        return node
    if peak.target is operator.getitem and peak.args[1] == 0 and isinstance(peak.args[0], Node):
        peak = peak.args[0]
    if peak.target not in (aten.max.dim, aten.amax.default) or peak.args[0] is not x:
        return node
    axis = argument(peak, 1, "dim")
    axis = axis[0] if isinstance(axis, list | tuple) and len(axis) == 1 else axis
    rank = x.meta["val"].dim()
    return x if axis in (-1, rank - 1) else node


def _sink_parts(node: Node) -> tuple[Node, Node] | None:
    if node.target is not aten.cat.default or argument(node, 1, "dim", 0) not in (
        -1,
        node.meta["val"].dim() - 1,
    ):
        return None
    parts = node.args[0]
    if not isinstance(parts, list | tuple) or len(parts) != 2:
        return None
    scores, sinks = parts
    if not isinstance(scores, Node) or not isinstance(sinks, Node) or shape(sinks)[-1] != 1:
        return None
    return scores, sinks


def _walk_back(node: Node, roles: tuple[int | None, ...], sizes: dict[Any, Any]) -> Scores:
    index = role_index(roles, sizes)
    masks: list[Node | Forbids] = []
    scale, softcap, sinks = 1.0, 0.0, None
    stage = 0  # 0 masks, 1 softcap, 2 scale: a mask further in than the scale would be scaled too
    x = _less_maximum(node)
    if x is not node:
        _only_used_for_maximum(x, node)
    else:
        sole_user(node)
    split = _sink_parts(x)
    if split is not None:
        x, sink = split
        sole_user(x)
        sinks = Part(sink, (*role_index(roles, sizes)[:-1], sympy.S.Zero))
        sinks = Part(
            sink,
            tuple(sympy.S.Zero if s == 1 else e for e, s in zip(sinks.index, shape(sink), strict=True)),
        )
    for _ in range(32):
        found = product(x)
        if found is not None:
            return Scores(found, index, scale, softcap, masks, sinks)
        target = x.target
        if is_cast(x):
            source = x.args[0]
            refuse_unless(
                source.meta["val"].dtype.is_floating_point,
                Reason.DTYPE,
                f"scores from {source.meta['val'].dtype}",
            )
            x = source
        elif (view := step(x)) is not None:
            index = substitute(view, index, sizes)
            x = view.root
        elif (masked := read_mask(x)) is not None:
            refuse_unless(stage == 0, Reason.ORDER, f"the mask in {x.name} comes before the scale")
            refuse_unless(index == role_index(roles, sizes), Reason.LAYOUT, "a mask on reshaped scores")
            x, mask = masked
            masks.append(mask)
        elif (capped := _softcap(x)) is not None:
            refuse_unless(stage == 0, Reason.ORDER, f"the softcap in {x.name} comes before the scale")
            stage = 1
            x, softcap = capped
        elif (scaled := read_scale(x)) is not None:
            stage = 2
            x, factor = scaled
            scale *= factor
        elif target in (*_MULTIPLY, *_DIVIDE):
            raise Refused(Reason.SCALE, f"the scores are scaled by a tensor in {x.name}")
        else:
            raise Refused(Reason.LAYOUT, f"the scores go through {target}")
        sole_user(x)
    raise Refused(Reason.LAYOUT, "the scores are too far from their product")


def _only_used_for_maximum(x: Node, difference: Node) -> None:
    peaks = [u for u in x.users if u is not difference]
    sole_user(difference)
    refuse_unless(
        all(p.target in (aten.max.dim, aten.amax.default) for p in peaks),
        Reason.USERS,
        f"{x.name} is also used by {', '.join(p.name for p in peaks)}",
    )


def read_mask(node: Node) -> tuple[Node, Node | Forbids] | None:
    """Reads `scores + mask`, `where(mask, scores, lowest)`: returns scores and mask."""
    if node.target in (aten.add.Tensor, aten.add_.Tensor):
        if argument(node, 2, "alpha", 1) != 1:
            return None
        a, b = node.args[:2]
        if not is_tensor(a) or not is_tensor(b):
            return None
        x, mask = (a, b) if _is_whole(a, node) and (not _is_whole(b, node) or _plain_score(a)) else (b, a)
        kind = mask.meta["val"].dtype
        # Added booleans or integers are numbers, not conditions.
        refuse_unless(kind.is_floating_point, Reason.MASK, f"a mask of dtype {kind} is added to the scores")
        return (x, mask)
    if node.target in (aten.where.self, aten.where.ScalarOther):
        condition, x, other = node.args
        value = constant(other)
        if value is None or not is_lowest(value) or not is_tensor(x) or not is_tensor(condition):
            return None
        return (x, condition)
    if node.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        x, condition, other = node.args
        value = constant(other)
        if value is None or not is_lowest(value) or not isinstance(condition, Node):
            return None
        return (x, Forbids(condition))
    return None


def _is_whole(part: Node, node: Node) -> bool:
    """Tells whether an operand has the shape of the result, so that it may be the scores."""
    return len(shape(part)) == len(shape(node)) and all(map(same, shape(part), shape(node)))


def _plain_score(node: Node, depth: int = 16) -> bool:
    while depth:
        if product(node) is not None:
            return True
        if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
            return False
        node, depth = node.args[0], depth - 1
    return False


def _softcap(node: Node) -> tuple[Node, float] | None:
    """Reads `tanh(x / cap) * cap`."""
    if node.target not in _MULTIPLY or not isinstance(node.args[0], Node):
        return None
    inner, cap = node.args[0], constant(node.args[1])
    if inner.target is not aten.tanh.default or cap is None or cap <= 0:
        return None
    sole_user(inner)
    ratio = inner.args[0]
    scaled = read_scale(ratio)
    if scaled is None or abs(scaled[1] * cap - 1) > 1e-6:
        return None
    sole_user(ratio)
    return scaled[0], cap


def read_scale(node: Node) -> tuple[Node, float] | None:
    """Reads `x * constant` or `x / constant`."""
    if node.target not in (*_MULTIPLY, *_DIVIDE):
        return None
    x, factor = node.args[0], node.args[1]
    if not isinstance(x, Node):
        x, factor = factor, x
        if node.target in _DIVIDE:
            return None  # a constant over the scores
    if not is_tensor(x) or not isinstance(x, Node):
        return None
    value = constant(factor)
    if value is None and isinstance(factor, Node) and not isinstance(factor.meta.get("val"), torch.Tensor):
        raise Refused(Reason.SCALE, f"the scale {factor.name} is not a constant")
    if value is None or value == 0:
        return None
    return x, (value if node.target in _MULTIPLY else 1.0 / value)


def _sides(walk: Scores, sizes: dict[Any, Any]) -> tuple[Part, Part]:
    """Returns query and key of the score product."""
    found = walk.product
    table = {dim(i): e for i, e in enumerate(walk.index)}
    left = Part(found.left, tuple(e.xreplace(table) for e in found.left_index))
    right = Part(found.right, tuple(e.xreplace(table) for e in found.right_index))
    if any(e.has(KV_) for e in left.index) or any(e.has(Q_) for e in right.index):
        left, right = right, left
    return left, right


EAGER = Pattern("eager", SOFTMAX, _match)
