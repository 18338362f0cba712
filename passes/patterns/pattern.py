"""What patterns share: the context they read, and how a candidate becomes a site."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch.fx import Node

from clsa_compile.ir.masks import B_, H_, INDEX_SYMBOLS, KV_, Q_, floordiv
from clsa_compile.ir.sites import (
    AttentionSite,
    IndexerSite,
    MaskSpec,
    Operand,
    Reason,
    Refused,
)
from clsa_compile.passes.analyze import Order
from clsa_compile.passes.indexing import View, argument, chain, dim, is_cast, same, shape
from clsa_compile.passes.patterns.product import SUM
from clsa_compile.passes.recover import Forbids, Reader, Recovered, Selection, as_operand

aten = torch.ops.aten

# The summed dimension of a product, and the width of a value row.
C_ = SUM
E_ = sympy.Symbol("e", integer=True, nonnegative=True)
# What reads a tensor's size, dtype and device and nothing else: it needs no value.
READS_NO_VALUE = frozenset(
    (
        aten.sym_size.int,
        *(getattr(aten, f"{name}_like").default for name in ("zeros", "ones", "full", "empty")),
        *(getattr(aten, f"new_{name}").default for name in ("zeros", "ones", "full", "empty")),
    )
)
# Of a selection that is as long as the keys are many.
TAKES_ALL = "every key is selected: the same as dense"


@dataclass(slots=True)
class Context:
    """What a pattern reads: order and memory, masks, and how selections are understood."""

    order: Order
    reader: Reader
    indexer: Callable[[Context, Selection, Recovered], IndexerSite]


@dataclass(frozen=True, slots=True)
class Pattern:
    """One family of attention: the targets that cannot be missing, and how to read one.

    `match(context, anchor)` returns the candidate, raises Refused with a reason, or returns None when the
    anchor is not attention at all.
    """

    family: str
    anchors: tuple[Any, ...]
    match: Callable[[Context, Node], Candidate | None]


@dataclass(frozen=True, slots=True)
class Part:
    """A node seen at `index`, an expression per dimension over b, h, q, kv, c, e."""

    node: Node
    index: tuple[Any, ...]


@dataclass(slots=True)
class Candidate:
    """One attention as read from the graph, before its operands and masks are checked."""

    out: Node
    first_read: Node
    q: Part
    k: Part
    v: Part
    sizes: dict[Any, Any]
    scale: float
    masks: list[Node | Forbids]
    roles: tuple[int | None, ...]
    softcap: float = 0.0
    sinks: Part | None = None
    extra_predicate: Any = sympy.true
    out_roles: tuple[Any, ...] | None = None


def refuse_unless(condition: bool, reason: Reason, detail: str) -> None:
    """Raises Refused when a numbered condition of a pattern does not hold."""
    if not condition:
        raise Refused(reason, detail)


def readers(node: Node) -> list[Node]:
    """Returns the users of a node that need its value."""
    return [user for user in node.users if user.target not in READS_NO_VALUE]


def sole_user(node: Node, allowed: Sequence[Node] = ()) -> None:
    """Refuses a node whose value is needed outside of the pattern."""
    others = [u for u in readers(node) if u not in allowed]
    if len(others) > (0 if allowed else 1):
        names = ", ".join(u.name for u in readers(node)[:4])
        raise Refused(Reason.USERS, f"{node.name} is also used by {names}")


def number(value: Any) -> float | None:
    """Returns a constant argument as a float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)


def constant(node: Any) -> float | None:
    """Returns the value of a number or of a node that holds one (a 0-d `full` or `scalar_tensor`)."""
    if not isinstance(node, Node):
        return number(node)
    if node.target is aten.scalar_tensor.default:
        return number(node.args[0])
    if node.target is aten.full.default and node.meta["val"].dim() == 0:
        return number(node.args[1])
    return None


def kv_operand(
    context: Context, part: Part, row: Any, candidate: Candidate, name: str
) -> tuple[Operand, int]:
    """Returns K or V as an operand [B, Hkv, T, D] below its head repeats, and Hkv.

    `row` is the symbol of the last role: c for K, e for V.
    """
    heads = candidate.sizes[H_]
    sizes = dict(candidate.sizes)
    if KV_ in part.index:
        # Its own length: the product makes it that of the scores, whatever symbol it has.
        sizes[KV_] = shape(part.node)[part.index.index(KV_)]
    best: tuple[Operand, Any, View] | None = None
    for view in chain(part.node, part.index, sizes):
        found = _as_kv(view, row, sizes)
        if found is not None:
            best = (*found, view)
    if best is None:
        raise Refused(
            Reason.LAYOUT,
            f"{name} ({part.node.name}) is not laid out as [batch, heads, tokens, width]",
        )
    operand, kv_heads, view = best
    refuse_unless(
        isinstance(kv_heads, int) and heads % kv_heads == 0,
        Reason.SHAPE,
        f"{name} has {kv_heads} heads where the query has {heads}",
    )
    check_writes(context, view, candidate.first_read, candidate.out, name)
    return operand, kv_heads


def _as_kv(view: View, row: Any, sizes: dict[Any, Any]) -> tuple[Operand, Any] | None:
    """Reads a view as [B, Hkv, T, D], grouped heads allowed; None when it is something else."""
    heads = sizes[H_]
    index = list(view.index)
    kv_heads: Any = heads
    for position, e in enumerate(index):
        if isinstance(e, floordiv) and e.args[0] == H_:
            group = int(e.args[1])
            if heads % group:
                return None
            kv_heads = heads // group
            index[position] = H_
    roles = (B_, H_, KV_, row)
    operand = as_operand(view.root, index, roles)
    if operand is None:
        return None
    root = shape(view.root)
    wanted = (sizes[B_], sympy.sympify(kv_heads), sizes[KV_], sizes[row])
    for role, where in enumerate(operand.dims):
        size = sympy.S.One if where is None else root[where]
        if role == 1 and size == 1:
            kv_heads = 1  # one head for all, by broadcasting
            continue
        if not same(size, wanted[role]):
            return None
    return operand, int(kv_heads)


def check_writes(context: Context, view: View, first_read: Node, out: Node, name: str) -> None:
    """Refuses an operand whose memory is written between its read and its use."""
    for read in (*view.copies, first_read):
        write = context.order.write_between(view.root, read, out)
        if write is not None:
            raise Refused(
                Reason.MUTATION,
                f"{name} ({view.root.name}) is written by {write.name} before it is used",
            )


def plain_operand(
    context: Context,
    part: Part,
    roles: Sequence[Any],
    candidate: Candidate,
    name: str,
    *,
    casts: bool = False,
) -> Operand:
    """Returns an operand whose dimensions are exactly `roles`, in any order, of the wanted sizes."""
    best: Operand | None = None
    for view in chain(part.node, part.index, candidate.sizes, casts=casts):
        found = as_operand(view.root, view.index, roles)
        if found is None or not _sizes_fit(view.root, found, roles, candidate.sizes):
            continue
        check_writes(context, view, candidate.first_read, candidate.out, name)
        best = found
        if not casts:
            break  # the node itself will do
    if best is None:
        raise Refused(Reason.LAYOUT, f"{name} ({part.node.name}) is not laid out as attention needs it")
    return best


def _sizes_fit(root: Node, operand: Operand, roles: Sequence[Any], sizes: dict[Any, Any]) -> bool:
    own = shape(root)
    return all(
        same(sympy.S.One if position is None else own[position], sizes[role])
        for role, position in zip(roles, operand.dims, strict=True)
    )


def build_site(context: Context, family: str, ordinal: int, path: str, candidate: Candidate) -> AttentionSite:
    """Checks a candidate's operands and masks, and returns the site. Raises Refused."""
    # 1. Head counts and widths are static.
    refuse_unless(isinstance(candidate.sizes[H_], int), Reason.SHAPE, "the number of heads is not static")
    # 2. Operands are permutations of [B, H, S, D] and [B, Hkv, T, D].
    q = plain_operand(context, candidate.q, (B_, H_, Q_, C_), candidate, "the query")
    k, k_heads = kv_operand(context, candidate.k, C_, candidate, "the key")
    v, v_heads = kv_operand(context, candidate.v, E_, candidate, "the value")
    if k_heads != v_heads:
        k, v, k_heads = _same_heads(candidate)
    # 3. One dtype.
    dtypes = {operand.root.meta["val"].dtype for operand in (q, k, v)}
    refuse_unless(len(dtypes) == 1, Reason.DTYPE, f"operands of dtypes {sorted(map(str, dtypes))}")
    sinks = None
    if candidate.sinks is not None:
        sinks = plain_operand(context, candidate.sinks, (H_,), candidate, "the sinks")
    # 4. Masks: a predicate where it can be recovered, the tensor where not.
    mask, indexer, has_selection, takes_all, note = _mask(context, candidate)
    return AttentionSite(
        ordinal=ordinal,
        path=path,
        family=family,
        out=candidate.out,
        q=q,
        k=k,
        v=v,
        heads=candidate.sizes[H_],
        kv_heads=k_heads,
        scale=candidate.scale,
        softcap=candidate.softcap,
        mask=mask,
        sinks=sinks,
        indexer=indexer,
        has_selection=has_selection,
        takes_all=takes_all,
        note=note,
        out_roles=_out_roles(candidate),
    )


def _out_roles(candidate: Candidate) -> tuple[int, ...]:
    """Returns which of (b, h, q, e) each dimension of the output is."""
    roles = (B_, H_, Q_, E_)
    if candidate.out_roles is not None:
        return tuple(roles.index(r) for r in candidate.out_roles)
    return (0, 1, 2, 3) if len(candidate.roles) == 4 else (0, 2, 3)


def _same_heads(candidate: Candidate) -> tuple[Operand, Operand, int]:
    """Falls back to the repeated heads when K and V have different numbers of their own."""
    k = as_operand(candidate.k.node, candidate.k.index, (B_, H_, KV_, C_))
    v = as_operand(candidate.v.node, candidate.v.index, (B_, H_, KV_, E_))
    if k is None or v is None:
        raise Refused(Reason.SHAPE, "key and value differ in heads")
    return k, v, candidate.sizes[H_]


def _mask(context: Context, candidate: Candidate) -> tuple[MaskSpec, IndexerSite | None, bool, bool, str]:
    """Returns the mask and the indexer; whether the model selects tokens, and all of them; why not taken."""
    recovered = context.reader.recover(candidate.masks, candidate.roles)
    if recovered is None or not _inputs_stay(context, recovered, candidate):
        selects = _reads_topk(candidate.masks)
        note = "the selection is applied as a mask: its form is not known" if selects else ""
        return _as_tensor(context, candidate), None, selects, False, note
    if recovered.selection is None:
        takes_all = recovered.takes_all
        note = TAKES_ALL if takes_all else ""
        return _with_causal(recovered.spec, candidate), None, takes_all, takes_all, note
    try:
        indexer = context.indexer(context, recovered.selection, recovered)
    except Refused as refusal:
        note = f"the selection is applied as a mask: {refusal.reason}: {refusal.detail}"
        return _as_tensor(context, candidate), None, True, False, note
    return _with_causal(recovered.spec, candidate), indexer, True, False, ""


def _with_causal(spec: MaskSpec, candidate: Candidate) -> MaskSpec:
    if candidate.extra_predicate == sympy.true:
        return spec
    return replace(spec, predicate=sympy.And(spec.predicate, candidate.extra_predicate))


def _inputs_stay(context: Context, recovered: Recovered, candidate: Candidate) -> bool:
    roots = [*recovered.spec.inputs]
    if recovered.spec.tensor is not None:
        roots.append(recovered.spec.tensor.root)
    return all(
        context.order.position(root) < context.order.position(candidate.out)
        and context.order.write_between(root, root, candidate.out) is None
        for root in roots
    )


def _as_tensor(context: Context, candidate: Candidate) -> MaskSpec:
    """Carries the mask as the tensor that the model made."""
    refuse_unless(
        len(candidate.masks) == 1,
        Reason.MASK,
        f"{len(candidate.masks)} masks that cannot be read as one",
    )
    mask = candidate.masks[0]
    if isinstance(mask, Forbids):
        raise Refused(Reason.MASK, f"the mask {mask.node.name} cannot be read")
    value = mask.meta["val"]
    refuse_unless(
        value.dtype == torch.bool or value.dtype.is_floating_point,
        Reason.MASK,
        f"a mask of dtype {value.dtype}",
    )
    write = context.order.write_between(mask, candidate.first_read, candidate.out)
    refuse_unless(write is None, Reason.MUTATION, f"the mask ({mask.name}) is written before it is used")
    roles = candidate.roles[len(candidate.roles) - value.dim() :]
    dims: list[int | None] = [None] * 4
    for position, role in enumerate(roles):
        if role is not None:
            dims[int(role)] = position
    spec = MaskSpec(sympy.true, (), Operand(mask, tuple(dims)))
    return _with_causal(spec, candidate)


def _reads_topk(masks: Sequence[Node | Forbids]) -> bool:
    """Tells whether a top-k's indices reach a mask within a short walk."""
    frontier = [m.node if isinstance(m, Forbids) else m for m in masks]
    seen = set(frontier)
    for _ in range(64):
        if not frontier:
            return False
        node = frontier.pop()
        if node.target is aten.topk.default:
            return True
        for source in node.all_input_nodes:
            value = source.meta.get("val")
            narrow = isinstance(value, torch.Tensor) and value.dtype.is_floating_point
            if source not in seen and (not narrow or source.target is aten.masked_fill.Scalar):
                seen.add(source)
                frontier.append(source)
    return False


def roles_of(rank: int) -> tuple[int | None, ...] | None:
    """Returns which of b, h, q, kv the dimensions of a score tensor are, by its rank."""
    return {4: (0, 1, 2, 3), 3: (0, 2, 3)}.get(rank)


def score_sizes(scores: Node, roles: tuple[int | None, ...]) -> dict[Any, Any]:
    """Returns the sizes of b, h, q, kv from a score tensor; heads as an int where static."""
    own = shape(scores)
    sizes: dict[Any, Any] = dict.fromkeys(INDEX_SYMBOLS, sympy.S.One)
    for position, role in enumerate(roles):
        assert role is not None
        sizes[INDEX_SYMBOLS[role]] = own[position]
    sizes[H_] = int(sizes[H_]) if sizes[H_].is_Integer else sizes[H_]
    return sizes


def role_index(roles: tuple[int | None, ...], sizes: dict[Any, Any]) -> tuple[Any, ...]:
    """Returns the element (b, h, q, kv) of a score tensor; dimensions of size 1 are read at 0."""
    found = []
    for role in roles:
        assert role is not None
        symbol = INDEX_SYMBOLS[role]
        found.append(sympy.S.Zero if sizes[symbol] == 1 else symbol)
    return tuple(found)


__all__ = [
    "B_", "C_", "E_", "H_", "KV_", "Q_",
    "Candidate", "Context", "Part", "Pattern",
    "argument", "build_site", "constant", "dim", "is_cast", "number", "plain_operand",
    "readers", "refuse_unless", "role_index", "roles_of", "score_sizes", "sole_user",
]  # fmt: skip
