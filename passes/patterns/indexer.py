"""The indexer behind a selection: a score over all keys, and the top-k of it.

    score[b, q, kv] = reduce_h f(scale * q[b, q, h] . k[b, kv], weight[b, q, h])   then masked, then top-k

The arithmetic before q, k and weight (projections, norms, RoPE) is captured as it is; only the
pointwise form and the reduction are read, because the kernel is generated from them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch.fx import Node

from clsa_compile.ir.masks import B_, H_, KV_, Q_, conjuncts
from clsa_compile.ir.scores import DOT, DOT_PRODUCT, SCORES, WEIGHT, Score
from clsa_compile.ir.sites import IndexerSite, MaskSpec, Reason, Refused
from clsa_compile.passes.indexing import argument, dim, is_cast, same, shape, step, substitute, sym
from clsa_compile.passes.patterns.eager import read_mask, read_scale
from clsa_compile.passes.patterns.pattern import (
    C_,
    Candidate,
    Context,
    Part,
    plain_operand,
    readers,
    refuse_unless,
    role_index,
    score_sizes,
    sole_user,
)
from clsa_compile.passes.patterns.product import SUM, Product, product
from clsa_compile.passes.recover import Forbids, Recovered, Selection, top_indices

aten = torch.ops.aten

_ROLES = (0, 2, 3)
# The one key head that all index heads read.
_ONE = sympy.Symbol("one", integer=True, nonnegative=True)


@dataclass(slots=True)
class Reading:
    """What was read walking back from the top-k to the product of index query and key."""

    product: Product
    index: tuple[Any, ...]
    scale: float
    pointwise: Any
    weight: Part | None
    reduce: str
    heads: Any
    masks: list[Node | Forbids] = field(default_factory=list)


def read_indexer(context: Context, selection: Selection, attention: Recovered) -> IndexerSite:
    """Returns the indexer of a selection. Raises Refused with what does not fit."""
    node = selection.topk_node
    scores, wanted = node.args[0], node.args[1]
    # 1. One set per query row, of a constant size.
    refuse_unless(
        selection.rank == 3 and scores.meta["val"].dim() == 3,
        Reason.TOPK,
        "only one selected set per query row is understood",
    )
    topk = _constant_k(wanted, shape(scores)[-1])
    refuse_unless(topk is not None, Reason.TOPK, f"k is {wanted}, not a constant")
    assert topk is not None
    # 2. The top-k's values are not used, its indices only select.
    _check_users(node)
    # 3. The scores are those of an indexer, read by the top-k alone.
    sizes = score_sizes(scores, _ROLES)
    reading = _walk(scores, sizes)
    sizes[H_], sizes[C_], sizes[_ONE] = reading.heads, reading.product.summed, sympy.S.One
    refuse_unless(
        all(sympy.sympify(s).is_Integer for s in (sizes[H_], sizes[C_])),
        Reason.SHAPE,
        "the number or the width of index heads is not static",
    )
    sizes[H_] = int(sizes[H_])
    candidate = Candidate(
        out=node,
        first_read=reading.product.out,
        q=Part(reading.product.left, ()),
        k=Part(reading.product.right, ()),
        v=Part(reading.product.right, ()),
        sizes=sizes,
        scale=reading.scale,
        masks=reading.masks,
        roles=_ROLES,
    )
    left, right = _sides(reading)
    q = plain_operand(context, left, (B_, H_, Q_, C_), candidate, "the index query", casts=True)
    k = plain_operand(context, right, (B_, _ONE, KV_, C_), candidate, "the index key", casts=True)
    if q.root.meta["val"].dtype != k.root.meta["val"].dtype:
        q = plain_operand(context, left, (B_, H_, Q_, C_), candidate, "the index query")
        k = plain_operand(context, right, (B_, _ONE, KV_, C_), candidate, "the index key")
    refuse_unless(
        q.root.meta["val"].dtype == k.root.meta["val"].dtype,
        Reason.DTYPE,
        "index query and key differ in dtype",
    )
    weight = None
    if reading.weight is not None:
        weight = plain_operand(context, reading.weight, (B_, H_, Q_), candidate, "the head weights")
    # 4. A token that the indexer may not see, attention may not see either: then a row with fewer
    #    than k valid tokens attends to the same tokens whatever fills up its set.
    mask = context.reader.recover(reading.masks, _ROLES)
    refuse_unless(
        mask is not None and mask.selection is None,
        Reason.MASK,
        "the indexer's mask cannot be read",
    )
    assert mask is not None
    refuse_unless(
        implies(attention.spec, mask.spec),
        Reason.MASK,
        "attention may see tokens that the indexer masks: the selection of short rows is arbitrary",
    )
    return IndexerSite(
        topk_node=node,
        q=q,
        k=k,
        weight=weight,
        scale=reading.scale,
        score=_score(reading),
        mask=mask.spec,
        topk=topk,
    )


def _constant_k(wanted: Any, keys: Any) -> int | None:
    """Returns k of `k` or of `min(k, T)`; a shorter row's set is padded anyway."""
    if isinstance(wanted, int):
        return wanted
    value = wanted.meta.get("val") if isinstance(wanted, Node) else None
    if not isinstance(value, torch.SymInt):
        return None
    expr = sym(value)
    if type(expr).__name__ != "Min" or len(expr.args) != 2:
        return None
    constants = [int(a) for a in expr.args if a.is_Integer]
    others = [a for a in expr.args if not a.is_Integer]
    return constants[0] if len(constants) == 1 and same(others[0], keys) else None


def canonical(spec: MaskSpec) -> tuple[frozenset[Any], Any]:
    """Returns a mask as conditions over named tensors, comparable between masks of one graph."""
    parts = set()
    for part in conjuncts(spec.predicate):
        for load in part.atoms(sympy.core.function.AppliedUndef):
            name = load.func.__name__
            if name.startswith("in"):
                node = spec.inputs[int(name[2:])]
                part = part.subs(load, sympy.Function(f"node_{node.name}", integer=True)(*load.args))
        parts.add(part)
    tensor = None
    if spec.tensor is not None:
        _, _, q, kv = spec.tensor.dims
        tensor = (spec.tensor.root, q, kv, spec.forbids)
    return frozenset(parts), tensor


def implies(strict: MaskSpec, loose: MaskSpec) -> bool:
    """Tells whether every key that `strict` allows is allowed by `loose`, for sure."""
    ours, theirs = canonical(strict), canonical(loose)
    return theirs[0] <= ours[0] and theirs[1] in (None, ours[1])


def _check_users(node: Node) -> None:
    for user in node.users:
        if user.target.__name__ == "getitem" and user.args[1] == 1:
            _check_index_users(user)
        elif user.users:
            raise Refused(Reason.USERS, f"the selected scores are used by {next(iter(user.users)).name}")


def _check_index_users(node: Node) -> None:
    for user in readers(node):
        if is_cast(user) and top_indices(user) is not None:
            _check_index_users(user)
        elif user.target not in (aten.scatter.value, aten.scatter_.value):
            raise Refused(Reason.USERS, f"the selected indices are also used by {user.name}")


def _walk(scores: Node, sizes: dict[Any, Any]) -> Reading:
    index = role_index(_ROLES, sizes)
    masks: list[Node | Forbids] = []
    x = scores
    for _ in range(24):
        sole_user(x)
        reading = _reduction(x, index, sizes)
        if reading is not None:
            reading.masks = masks
            return reading
        if (masked := read_mask(x)) is not None:
            refuse_unless(index == role_index(_ROLES, sizes), Reason.LAYOUT, "a mask on reshaped scores")
            x, mask = masked
            masks.append(mask)
        elif is_cast(x):
            x = x.args[0]
        elif (view := step(x)) is not None:
            index = substitute(view, index, sizes)
            x = view.root
        else:
            raise Refused(Reason.SCORE, f"the index scores go through {x.target}")
    raise Refused(Reason.SCORE, "the index scores are too far from their product")


def _reduction(x: Node, index: tuple[Any, ...], sizes: dict[Any, Any]) -> Reading | None:
    """Reads a sum over heads (a product with weights, or `sum`, `mean`, `amax`), or a single head."""
    table = {dim(i): e for i, e in enumerate(index)}
    found = product(x)
    if found is not None:
        left = Part(found.left, tuple(e.xreplace(table) for e in found.left_index))
        right = Part(found.right, tuple(e.xreplace(table) for e in found.right_index))
        if any(e.has(KV_) for e in left.index) and not any(e.has(KV_) for e in right.index):
            left, right = right, left
        points = _points(right, sizes, found)
        if points is None:
            return Reading(found, index, 1.0, DOT, None, "sum", sympy.S.One)
        weight = Part(left.node, tuple(e.xreplace({SUM: H_}) for e in left.index))
        points.weight = weight
        points.pointwise = WEIGHT * points.pointwise
        points.heads = found.summed
        return points
    reduce = {aten.sum.dim_IntList: "sum", aten.mean.dim: "mean", aten.amax.default: "max"}.get(x.target)
    if reduce is None:
        return None
    return _summed(x, index, sizes, reduce)


def _points(part: Part, sizes: dict[Any, Any], outer: Product) -> Reading | None:
    """Reads f(scale * q . k) per head; None when the part is a plain tensor, not made by a product."""
    start = part.node
    index = tuple(e.xreplace({SUM: H_}) for e in part.index)
    if not _comes_from_product(start):
        return None
    return _pointwise(start, index, sizes, outer.out)


def _comes_from_product(node: Node) -> bool:
    for _ in range(16):
        if product(node) is not None:
            return True
        known = (
            node.target in (aten.relu.default, aten.clamp_min.default)
            or is_cast(node)
            or step(node) is not None
        )
        if not known and read_scale(node) is None:
            return False
        node = node.args[0]
    return False


def _pointwise(x: Node, index: tuple[Any, ...], sizes: dict[Any, Any], user: Node) -> Reading:
    outer: list[Any] = []  # functions from the outside in
    scale = 1.0
    for _ in range(16):
        sole_user(x)
        found = product(x)
        if found is not None:
            expr: Any = DOT
            for function in reversed(outer):
                expr = function(expr)
            return Reading(found, index, scale, expr, None, "sum", sympy.S.One)
        if x.target is aten.relu.default or (x.target is aten.clamp_min.default and x.args[1] == 0):
            # What was a scale so far stands outside of the relu.
            outer.append(lambda e, s=scale: sympy.Max(e, 0) * (s if s != 1.0 else 1))
            scale = 1.0
            x = x.args[0]
        elif is_cast(x):
            x = x.args[0]
        elif (view := step(x)) is not None:
            index = substitute(view, index, sizes)
            x = view.root
        elif (scaled := read_scale(x)) is not None:
            x, factor = scaled
            scale *= factor
        else:
            raise Refused(Reason.SCORE, f"a head's scores go through {x.target}")
    raise Refused(Reason.SCORE, "a head's scores are too far from their product")


def _summed(x: Node, index: tuple[Any, ...], sizes: dict[Any, Any], reduce: str) -> Reading:
    source = x.args[0]
    rank = source.meta["val"].dim()
    axes = argument(x, 1, "dim")
    axes = [axes] if isinstance(axes, int) else list(axes or [])
    refuse_unless(len(axes) == 1, Reason.SCORE, "the index scores are reduced over several dimensions")
    axis = axes[0] % rank
    inner = list(index)
    if argument(x, 2, "keepdim", False):
        inner[axis] = H_
    else:
        inner.insert(axis, H_)
    heads = shape(source)[axis]
    weight = None
    if source.target is aten.mul.Tensor and read_scale(source) is None:
        sole_user(source)
        a, b = source.args[:2]
        a_has = _comes_from_product(a)
        source, other = (a, b) if a_has else (b, a)
        own = shape(other)
        shift = rank - len(own)
        weight = Part(
            other,
            tuple(sympy.S.Zero if s == 1 else inner[i + shift] for i, s in enumerate(own)),
        )
        refuse_unless(
            not any(e.has(KV_) for e in weight.index),
            Reason.SCORE,
            "the head weights depend on the key",
        )
    refuse_unless(_comes_from_product(source), Reason.SCORE, "what is reduced over heads is not a product")
    reading = _pointwise(source, tuple(inner), sizes, x)
    reading.heads, reading.reduce, reading.weight = heads, reduce, weight
    if weight is not None:
        reading.pointwise = WEIGHT * reading.pointwise
    return reading


def _sides(reading: Reading) -> tuple[Part, Part]:
    found = reading.product
    table = {dim(i): e for i, e in enumerate(reading.index)}
    left = Part(found.left, tuple(e.xreplace(table) for e in found.left_index))
    right = Part(found.right, tuple(e.xreplace(table) for e in found.right_index))
    if any(e.has(KV_) for e in left.index) or any(e.has(Q_) or e.has(H_) for e in right.index):
        left, right = right, left
    return left, right


def _score(reading: Reading) -> Score:
    for score in SCORES:
        if score.pointwise == reading.pointwise and score.reduce == reading.reduce:
            return score
    if reading.pointwise == DOT:
        return DOT_PRODUCT
    return Score("custom", reading.pointwise, reading.reduce)  # type: ignore[arg-type]
