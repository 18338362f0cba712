"""Groups: turns sites into a plan; which layers share an index or a pair of K and V."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import sympy
from torch.fx import Node

from clsa_compile.ir.masks import B_, H_, KV_, print_predicate
from clsa_compile.ir.ops import DECODE_ROWS
from clsa_compile.ir.plan import Group, Plan, SitePlan
from clsa_compile.ir.routing import Pool, Request, Shares, Sharing, offered, role
from clsa_compile.ir.sites import AttentionSite, IndexerSite, MaskSpec, Operand, Reject, Sites
from clsa_compile.passes.indexing import chain, same, shape
from clsa_compile.passes.match import layer_of
from clsa_compile.passes.patterns.indexer import canonical
from clsa_compile.passes.patterns.pattern import C_
from clsa_compile.passes.route import KEEPS, layer, routed, shareable


def plan(
    sites: Sites,
    sharing: Sharing | None = None,
    request: Request | None = None,
    repeats: Mapping[Node, int] | None = None,
) -> Plan:
    """Returns the decisions for one graph, in execution order. Nothing is changed yet.

    `sharing` is for layers with indexers, `request` for dense ones. `repeats` says how many equal nodes were
    merged into a node.
    """
    able = [site for site in sites.attention if site.indexer is not None]
    owners = index_owners(able)
    shares = Shares(tuple(owners)) if sharing is None else sharing(owners, [layer(site) for site in able])
    wanted = shares.anchors
    refused = {
        able[i].ordinal: why
        for i, anchor in enumerate(wanted)
        if anchor != owners[i] and (why := _cannot_read(able[i], able[anchor]))
    }
    among = {}
    for i, full in shares.among.items():
        pool = offered(_indexer(able[i]).topk, shares.pool)
        if why := _cannot_choose(able[i], able[full], pool):
            refused[able[i].ordinal] = why
        else:
            among[i] = (able[full].ordinal, pool)
    # Layers of one selection stay together.
    kept = {owners[i] for i, site in enumerate(able) if site.ordinal in refused}
    read = [owner if owner in kept else anchor for owner, anchor in zip(owners, wanted, strict=True)]
    pools, dense = routed(sites.attention, request) if request is not None else ((), {})
    entries = [_entry(s, refused.get(s.ordinal, "") or dense.get(s.ordinal, "")) for s in sites.attention]
    entries += [_left(r) for r in sites.rejects]
    members = {m: pool.topk for pool in pools for m in pool.members}
    chosen = [
        replace(e, action="sparse", topk=members[e.ordinal]) if e.ordinal in members else e for e in entries
    ]
    schedule = "".join("S" if anchor != i else "R" if i in among else "F" for i, anchor in enumerate(read))
    if request is not None:
        schedule = "".join(role(pools, s.ordinal) for s in shareable(sites.attention))
    return Plan(
        tuple(sorted(chosen, key=lambda e: e.ordinal)),
        (
            *_index_groups(able, read, among, repeats or {}),
            *_kv_groups(sites.attention),
            *map(_pool_group, pools),
        ),
        schedule,
        tuple(able[i].ordinal for i, anchor in enumerate(read) if anchor != i and owners[i] == i),
        pools=pools,
    )


def index_owners(able: Sequence[AttentionSite]) -> list[int]:
    """Returns for each layer the first one that reads the same selection."""
    first: dict[Node, int] = {}
    return [first.setdefault(_indexer(site).topk_node, i) for i, site in enumerate(able)]


def _indexer(site: AttentionSite) -> IndexerSite:
    assert site.indexer is not None
    return site.indexer


def _cannot_read(site: AttentionSite, anchor: AttentionSite) -> str:
    """Returns why a layer cannot read another one's index, or ""."""
    ours, theirs = _indexer(site), _indexer(anchor)
    if ours.topk != theirs.topk:
        return f"{KEEPS} it selects {ours.topk} tokens, layer {anchor.path} {theirs.topk}"
    if canonical(ours.mask) != canonical(theirs.mask):
        return f"{KEEPS} its mask is not that of {anchor.path}"
    for name, one, other in (("queries", ours.q, theirs.q), ("keys", ours.k, theirs.k)):
        if not all(same(_size(one, role), _size(other, role)) for role in (0, 2)):
            return f"{KEEPS} it has other {name} than {anchor.path}"
    return ""


def _cannot_choose(site: AttentionSite, anchor: AttentionSite, pool: int) -> str:
    """Returns why a layer's indexer cannot run over what an anchor offers, or ""."""
    queries, keys = _size(_indexer(site).q, 2), _size(_indexer(site).k, 2)
    if not (queries.is_Integer and queries <= DECODE_ROWS):
        return "a prompt: its indexer reads all keys"
    if keys.is_Integer and keys <= pool:
        return f"its indexer reads all {keys} keys, and {pool} would be offered"
    return _cannot_read(site, anchor)


def _size(operand: Operand, role: int) -> Any:
    axis = operand.dims[role]
    return sympy.Integer(1) if axis is None else sympy.sympify(shape(operand.root)[axis])


def _entry(site: AttentionSite, refused: str) -> SitePlan:
    return SitePlan(
        ordinal=site.ordinal,
        layer=layer_of(site.path, site.ordinal),
        path=site.path,
        kind="topk" if site.has_selection else "dense",
        action="sparse" if site.indexer is not None else "attention",
        reason="; ".join(filter(None, (site.note, refused))),
        family=site.family,
        heads=site.heads,
        kv_heads=site.kv_heads,
        scale=site.scale,
        softcap=site.softcap,
        mask=describe_mask(site.mask),
        score=site.indexer.score.text if site.indexer else "",
        topk=site.indexer.topk if site.indexer else 0,
        takes_all=site.takes_all,
    )


def _left(reject: Reject) -> SitePlan:
    return SitePlan(
        ordinal=reject.ordinal,
        layer=layer_of(reject.path, reject.ordinal),
        path=reject.path,
        kind="dense",
        action="left",
        reason=str(reject),
    )


def describe_mask(mask: MaskSpec) -> str:
    """Returns a mask as a formula for people, with the names of the tensors that it reads."""
    text = print_predicate(mask.predicate)
    for slot, node in reversed(list(enumerate(mask.inputs))):
        text = text.replace(f"in{slot}(", f"{node.name}(")
    if mask.tensor is None:
        return text or "none"
    negation = "not " if mask.forbids else ""
    dtype = negation + str(mask.tensor.root.meta["val"].dtype).removeprefix("torch.")
    return " & ".join(p for p in (text, f"{dtype} tensor {mask.tensor.root.name}") if p)


def _index_groups(
    able: Sequence[AttentionSite],
    read: Sequence[int],
    among: Mapping[int, tuple[int, int]],
    repeats: Mapping[Node, int],
) -> list[Group]:
    members: dict[int, list[int]] = {}
    for site, anchor in zip(able, read, strict=True):
        members.setdefault(anchor, []).append(site.ordinal)
    return [
        Group(
            kind="index",
            anchor=able[i].ordinal,
            members=tuple(m),
            topk=_indexer(able[i]).topk,
            score=_indexer(able[i]).score.text,
            among=among[i][0] if i in among else None,
            pool=among[i][1] if i in among else 0,
            repeats=repeats.get(_indexer(able[i]).topk_node, 0),
        )
        for i, m in members.items()
    ]


def _pool_group(pool: Pool) -> Group:
    if pool.index is not None:
        return Group("distilled", pool.anchor, pool.members, pool.topk, pool.index.score)
    return Group("mass", pool.anchor, pool.members, pool.topk)


def _memory(operand: Operand) -> tuple[object, ...]:
    """Returns the tensor that an operand is a view of, where its elements lie in it, and its sizes.

    Layers that read the same keys may each make views of their own.
    """
    own = shape(operand.root)
    index: list[Any] = [sympy.S.Zero] * len(own)
    sizes = {}
    for symbol, axis in zip((B_, H_, KV_, C_), operand.dims, strict=True):
        if axis is not None and own[axis] != 1:
            index[axis], sizes[symbol] = symbol, own[axis]
    deepest = [view for view in chain(operand.root, tuple(index), sizes) if not view.copies][-1]
    return deepest.root, deepest.index, frozenset(sizes.items())


def _kv_groups(sites: Iterable[AttentionSite]) -> list[Group]:
    members: dict[object, list[AttentionSite]] = {}
    for site in sites:
        members.setdefault((_memory(site.k), _memory(site.v)), []).append(site)
    return [Group("kv", g[0].ordinal, tuple(s.ordinal for s in g)) for g in members.values() if len(g) > 1]
