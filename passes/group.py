"""Groups: turns sites into a plan; which layers share an index or a pair of K and V."""

from __future__ import annotations

from collections.abc import Iterable

from clsa_compile.ir.masks import print_predicate
from clsa_compile.ir.plan import Group, Plan, SitePlan
from clsa_compile.ir.sites import AttentionSite, MaskSpec, Reject, Sites
from clsa_compile.passes.match import layer_of


def plan(sites: Sites) -> Plan:
    """Returns the decisions for one graph, in execution order. Nothing is changed yet."""
    entries = [_entry(s) for s in sites.attention] + [_left(r) for r in sites.rejects]
    return Plan(
        tuple(sorted(entries, key=lambda e: e.ordinal)),
        (*_index_groups(sites.attention), *_kv_groups(sites.attention)),
    )


def _entry(site: AttentionSite) -> SitePlan:
    return SitePlan(
        ordinal=site.ordinal,
        layer=layer_of(site.path, site.ordinal),
        path=site.path,
        kind="topk" if site.has_selection else "dense",
        action="sparse" if site.indexer is not None else "attention",
        reason=site.note,
        family=site.family,
        heads=site.heads,
        kv_heads=site.kv_heads,
        scale=site.scale,
        softcap=site.softcap,
        mask=describe_mask(site.mask),
        score=site.indexer.score.text if site.indexer else "",
        topk=site.indexer.topk if site.indexer else 0,
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


def _index_groups(sites: Iterable[AttentionSite]) -> list[Group]:
    members: dict[object, list[AttentionSite]] = {}
    for site in sites:
        if site.indexer is not None:
            members.setdefault(site.indexer.topk_node, []).append(site)
    return [
        Group(
            "index",
            g[0].ordinal,
            tuple(s.ordinal for s in g),
            g[0].indexer.topk,
            g[0].indexer.score.text,
        )
        for g in members.values()
        if g[0].indexer is not None
    ]


def _kv_groups(sites: Iterable[AttentionSite]) -> list[Group]:
    members: dict[object, list[AttentionSite]] = {}
    for site in sites:
        members.setdefault((site.k.root, site.v.root), []).append(site)
    return [Group("kv", g[0].ordinal, tuple(s.ordinal for s in g)) for g in members.values() if len(g) > 1]
