"""Routes: which dense attentions attend to tokens that an earlier one chose, and why others do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import Tensor

from clsa_compile.errors import PlanError
from clsa_compile.ir.masks import B_, KV_, Q_, interval, slot_of
from clsa_compile.ir.ops import DECODE_ROWS
from clsa_compile.ir.routing import Layer, Pool, Request
from clsa_compile.ir.sites import AttentionSite, MaskSpec, Operand
from clsa_compile.passes.borrow import product
from clsa_compile.passes.indexing import same, shape, sym
from clsa_compile.passes.patterns.indexer import canonical

PROMPT = "a prompt: stays dense"
# How reasons begin for which a group whose index was trained has none.
UNMADE = "stays dense, for its index cannot be made:"
OTHERS = "stays dense, for its tokens are not those of"
KEEPS = "keeps its own index:"
# What reasons hold where sharing was asked for and is refused. Prompts, and caches that hold no more tokens
# than are selected, are no refusals.
REFUSED = (UNMADE, OTHERS, KEEPS)


def shareable(sites: Sequence[AttentionSite]) -> list[AttentionSite]:
    """Returns the layers that attend densely to all tokens before them: not to a window, nor to a selection.

    A cache that holds a window only is seen by its length: it is shorter than others.
    """
    able = [site for site in sites if not site.has_selection and not is_window(site.mask.predicate)]
    lengths = [_example(_size_of(site.k)) for site in able]
    return [site for site, length in zip(able, lengths, strict=True) if length == max(lengths)]


def layer(site: AttentionSite) -> Layer:
    """Returns what a route is told of a layer."""
    return Layer(
        ordinal=site.ordinal,
        heads=site.heads,
        kv_heads=site.kv_heads,
        path=site.path,
        width=_example(_size_of(site.k, 3)),
        value_width=_example(_size_of(site.v, 3)),
        scale=site.scale,
        softcap=site.softcap,
    )


def _example(size: Any) -> int:
    """Returns a size's example value; reading a hint adds no guard."""
    return size if isinstance(size, int) else int(size.node.hint or 0)


def is_window(condition: Any) -> bool:
    """Tells whether the first key that may be read moves with the query: a window, or chunks.

    Prefixes and packed sequences are no windows: all tokens of a sequence before the query may be read.
    """
    if isinstance(condition, sympy.And | sympy.Or):
        return any(map(is_window, condition.args))
    ends = interval(condition)
    if ends is None:
        loads = [e for e in condition.atoms(AppliedUndef) if slot_of(e.func.__name__) is not None]
        direct = condition.xreplace({load: sympy.Dummy() for load in loads})
        return bool(direct.has(KV_) and direct.has(Q_))
    # One query's position may be read from a tensor without the index q; what a sequence has is read by b.
    loads = [load for low in ends[0] for load in low.atoms(AppliedUndef)]
    return any(low.has(Q_) for low in ends[0]) or any(not load.has(B_) for load in loads)


def routed(sites: Sequence[AttentionSite], request: Request) -> tuple[tuple[Pool, ...], dict[int, str]]:
    """Returns the pools of a graph, in order of their anchors, and why other members stay dense."""
    able = shareable(sites)
    asked = request.route([layer(site) for site in able])
    by_ordinal = {site.ordinal: site for site in able}
    kept: dict[int, str] = {}
    pools = []
    for pool in asked:
        anchor = by_ordinal[pool.anchor]
        unmade = _unmade(anchor, pool, request.tensors) or _uncounted(by_ordinal, anchor, pool)
        reasons = {m: unmade or _stays_dense(by_ordinal[m], anchor, pool, request) for m in pool.members}
        kept.update({m: why for m, why in reasons.items() if why})
        members = tuple(m for m in pool.members if not reasons[m])
        if members:
            # A selection of as many tokens takes all of them anyway.
            below = request.dense_below if request.dense_below > pool.topk else 0
            pools.append(replace(pool, members=members, dense_below=below))
    return tuple(sorted(pools, key=lambda pool: pool.anchor)), kept


def _unmade(anchor: AttentionSite, pool: Pool, tensors: Mapping[str, Tensor]) -> str:
    """Returns why an index cannot be put before an anchor, or "".

    Raises PlanError for the weights of another model.
    """
    if pool.index is None:
        return ""
    if reads_heads(anchor.mask):
        return f"{UNMADE} the mask of {anchor.path} differs by head, and an index has one for all"
    if has_values(anchor.mask):
        return f"{UNMADE} the mask of {anchor.path} is added to scores, which an index does not learn"
    found = product(anchor)
    if isinstance(found, str):
        return f"{UNMADE} {found}"
    query, head, _ = (tensors[name] for name in pool.index.tensor_names())
    needed = found.weight.meta["val"].shape, found.rows.meta["val"].shape[-1]
    if (query.shape, head.shape[-1]) != needed:
        raise PlanError(
            f"the plan is for another model: the index {pool.index.name!r} has weights of shape "
            f"{list(query.shape)}, the queries of {anchor.path} are made by {list(needed[0])}"
        )
    return ""


def _uncounted(sites: Mapping[int, AttentionSite], anchor: AttentionSite, pool: Pool) -> str:
    """Returns why what some layer looked at cannot be added to what an anchor looks at, or ""."""
    for source in pool.sources:
        if why := _differs(sites[source], anchor):
            return f"{OTHERS} {sites[source].path}, which chooses too: {why}"
    return ""


def reads_heads(mask: MaskSpec) -> bool:
    """Tells whether a mask may differ from head to head."""
    axis = None if mask.tensor is None else mask.tensor.dims[1]
    per_head = axis is not None and mask.tensor is not None and shape(mask.tensor.root)[axis] != 1
    return per_head or any(str(s) == "h" for s in getattr(mask.predicate, "free_symbols", ()))


def has_values(mask: MaskSpec) -> bool:
    """Tells whether a mask is added to scores, so that it says more than what may be read."""
    return mask.tensor is not None and mask.tensor.root.meta["val"].dtype != torch.bool


def _stays_dense(site: AttentionSite, anchor: AttentionSite, pool: Pool, request: Request) -> str:
    """Returns why a layer cannot attend to what an anchor chose, or ""."""
    queries, keys, below = _size(site, "q"), _size(site, "k"), request.dense_below
    if not request.prompts and not (queries.is_Integer and queries <= DECODE_ROWS):
        return PROMPT
    if keys.is_Integer and keys <= max(pool.topk, below):
        return f"stays dense: it has {keys} keys, and {max(pool.topk, below)} would be selected"
    if why := _differs(site, anchor):
        return f"{OTHERS} {anchor.path}: {why}"
    return ""


def _differs(site: AttentionSite, anchor: AttentionSite) -> str:
    """Returns what keeps the positions of two layers from meaning the same tokens, or ""."""
    if canonical(site.mask) != canonical(anchor.mask):
        return "it has another mask"
    if not same(_size(site, "q"), _size(anchor, "q")):
        return "it has other queries"
    return "" if same(_size(site, "k"), _size(anchor, "k")) else "it has other keys"


def _size(site: AttentionSite, name: str) -> Any:
    return sym(_size_of(getattr(site, name)))


def _size_of(operand: Operand, role: int = 2) -> Any:
    axis = operand.dims[role]
    return 1 if axis is None else operand.root.meta["val"].shape[axis]
