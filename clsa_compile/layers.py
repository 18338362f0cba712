"""Layers: what each attention of a graph is, and what will run in its place, as facts for people."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch.fx import Node

from clsa_compile.dispatch import kernels
from clsa_compile.errors import MissingTritonError
from clsa_compile.ir.captured import Captured
from clsa_compile.ir.masks import conjuncts, interval, is_triangle, print_predicate
from clsa_compile.ir.plan import Plan, SitePlan
from clsa_compile.ir.sites import AttentionSite, IndexerSite, Operand
from clsa_compile.ir.variants import Facts, select
from clsa_compile.passes.analyze import written
from clsa_compile.passes.group import describe_mask
from clsa_compile.passes.indexing import root, step
from clsa_compile.passes.pipeline import Decision, without
from clsa_compile.passes.savings import sizes_of

__all__ = ["Index", "Layer", "layers_of", "variant_of", "window_of"]

aten = torch.ops.aten
_ROLLS = (aten.roll.default,)


@dataclass(frozen=True, slots=True)
class Index:
    """An indexer: `topk` tokens by `score`, over `heads` dots of `width` columns scaled by `scale`."""

    score: str
    heads: int
    width: int
    scale: float
    topk: int
    mask: str
    source: str


@dataclass(frozen=True, slots=True)
class Layer:
    """One attention: what it is, and what will run.

    Sizes are those of the call that was captured: `keys` slots, `queries` rows. `width` and `value_width` are
    Dk and Dv. `window`: tokens that a query reads at most, 0 where all. `cache`: "static", "growing", "ring"
    (a buffer of the window's last tokens) or "none". `source` is the line that the attention comes from,
    `caller` the model's own where that is a helper's. `runs` says what will, `kernels` by which variants on
    CUDA, in order. Of an attention that is left only the place and `reason` are known.
    """

    ordinal: int
    layer: int
    path: str
    kind: str
    action: str
    runs: str
    reason: str = ""
    source: str = ""
    caller: str = ""
    group: str = ""
    kernels: tuple[str, ...] = ()
    batch: int = 0
    queries: int = 0
    keys: int = 0
    heads: int = 0
    kv_heads: int = 0
    width: int = 0
    value_width: int = 0
    dtype: str = ""
    scale: float = 0.0
    softcap: float = 0.0
    sinks: bool = False
    mask: str = ""
    window: int = 0
    cache: str = ""
    index: Index | None = None


def layers_of(captured: Captured, decision: Decision) -> tuple[Layer, ...]:
    """Returns every attention of a graph that was decided on, in execution order."""
    nodes = {node.name: node for node in captured.graph.nodes}
    sites = {site.ordinal: site for site in decision.sites.attention}
    rejects = {reject.ordinal: nodes.get(reject.node) for reject in decision.sites.rejects}
    longest = max((sizes_of(site.k)[2] for site in sites.values()), default=0)
    return tuple(
        _layer(sites[entry.ordinal], entry, decision, longest)
        if entry.ordinal in sites
        else _left(entry, rejects.get(entry.ordinal))
        for entry in decision.plan.sites
    )


def _places(node: Node | None) -> tuple[str, str]:
    """Returns the line that a node comes from, and the model's own where that is a helper's."""
    # Whoever compiles imports this module, and need not wait for what writes dumps.
    from clsa_compile.dump.source import caller_of, line_of

    return ("", "") if node is None else (line_of(node), caller_of(node))


def _left(entry: SitePlan, node: Node | None) -> Layer:
    """Returns what is known of any layer, as of one that stays as it was."""
    source, caller = _places(node)
    return Layer(
        ordinal=entry.ordinal,
        layer=entry.layer,
        path=entry.path,
        source=source,
        caller=caller,
        kind=entry.kind,
        action=entry.action,
        runs="left as it was",
        reason=entry.reason,
    )


def _layer(site: AttentionSite, entry: SitePlan, decision: Decision, longest: int) -> Layer:
    b, _, s, width = sizes_of(site.q)
    keys, value_width = sizes_of(site.k)[2], sizes_of(site.v)[3]
    return replace(
        _left(entry, site.out),
        runs=_runs(entry, decision.plan),
        group=_group(entry, decision.plan),
        kernels=_kernels(site, entry, decision),
        batch=b,
        queries=s,
        keys=keys,
        heads=site.heads,
        kv_heads=site.kv_heads,
        width=width,
        value_width=value_width,
        dtype=str(site.k.root.meta["val"].dtype).removeprefix("torch."),
        scale=site.scale,
        softcap=site.softcap,
        sinks=site.sinks is not None,
        mask=entry.mask,
        window=window_of(site) or 0,
        cache=_cache(site.k.root, keys < longest),
        index=None if site.indexer is None else _index(site.indexer),
    )


def _index(indexer: IndexerSite) -> Index:
    _, heads, _, width = sizes_of(indexer.q)
    return Index(
        score=indexer.score.text,
        heads=heads,
        width=width,
        scale=indexer.scale,
        topk=indexer.topk,
        mask=describe_mask(indexer.mask),
        source=_places(indexer.topk_node)[0],
    )


def window_of(site: AttentionSite) -> int | None:
    """Returns how many tokens a query reads at most by its mask's formula; None where that is no number."""
    # Conditions of another kind, as on packed sequences, only take more away.
    bounds = [found for part in conjuncts(site.mask.predicate) if (found := interval(part)) is not None]
    lows = [low for found in bounds for low in found[0]]
    highs = [high for found in bounds for high in found[1]]
    spans = [sympy.expand(high - low) for low in lows for high in highs]
    return min((int(span) for span in spans if span.is_Integer), default=None)


def _cache(keys: Node, is_short: bool) -> str:
    """Returns what holds the keys: walks back through views and writes to a graph's input, or to none."""
    node, kind = keys, "ring" if is_short else "static"
    for _ in range(64):
        if node.op == "placeholder":
            return kind
        if node.op != "call_function":
            return "none"
        targets = written(node)
        if targets and targets[0] is node.args[0]:
            if node.target is aten.copy_.default and _rolled(node.args[1]):
                kind = "ring"
            node = targets[0]
        elif node.target is aten.cat.default:
            parts: Any = node.args[0]
            return "growing" if isinstance(parts, list | tuple) and _held(parts[0]) else "none"
        elif (view := step(node)) is not None:
            node = view.root
        else:
            return "none"
    return "none"


def _held(node: Any) -> bool:
    """Tells whether a tensor is a graph's input, seen through views."""
    return isinstance(node, Node) and root(node).op == "placeholder"


def _rolled(node: Any) -> bool:
    """Tells whether what is written into a cache is the cache, moved by a token."""
    return any(
        n.target in _ROLLS or n.target is aten.cat.default for n in _behind(node, 6) if n.op != "placeholder"
    )


def _behind(node: Any, depth: int) -> Iterator[Node]:
    if isinstance(node, Node):
        yield node
        if depth and node.args:
            yield from _behind(node.args[0], depth - 1)


def _runs(entry: SitePlan, plan: Plan) -> str:
    layers = {site.ordinal: site.layer for site in plan.sites}
    if entry.action == "left":
        return "left as it was"
    if entry.action == "sparse":
        group = next(g for g in plan.groups if g.kind != "kv" and entry.ordinal in g.members)
        if group.kind == "mass":
            return f"{entry.topk} tokens that layer {layers[group.anchor]} looked at most"
        if group.kind == "distilled" and group.anchor == entry.ordinal:
            members = _numbers([layers[m] for m in group.members])
            return f"{entry.topk} tokens by an index trained for layers {members}"
        whose = (
            "its own index" if group.anchor == entry.ordinal else f"the index of layer {layers[group.anchor]}"
        )
        return f"{entry.topk} tokens by {whose}"
    chooses = [pool for pool in plan.pools if pool.anchor == entry.ordinal]
    return "dense, each key read once" + (", and chooses tokens" if chooses else "")


def _group(entry: SitePlan, plan: Plan) -> str:
    """Returns the groups that a layer is in, as `index 0-3` or `kv 1, 3`, with layers' numbers."""
    layers = {site.ordinal: site.layer for site in plan.sites}
    found = [g for g in plan.groups if entry.ordinal in g.members and len(g.members) > 1]
    return "; ".join(f"{g.kind} {_numbers([layers[m] for m in g.members])}" for g in found)


def _numbers(numbers: list[int]) -> str:
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}-{numbers[-1]}"
    return ", ".join(map(str, numbers))


def _kernels(site: AttentionSite, entry: SitePlan, decision: Decision) -> tuple[str, ...]:
    """Returns the variants that a CUDA device would run; nothing where Triton is missing."""
    plan = decision.plan
    ops = ["sparse_attention" if entry.action == "sparse" else "attention"]
    if entry.action == "sparse" and any(g.runs_index and g.anchor == entry.ordinal for g in plan.groups):
        ops.insert(0, "index_topk")
    if any(entry.ordinal in pool.sources for pool in plan.pools):
        ops[-1] = "attention_mass"
    if any(entry.ordinal == pool.anchor and pool.index is None for pool in plan.pools):
        ops.append("select_topk")
    chosen = [(op, variant_of(op, site, entry, decision)) for op in ops]
    return tuple(f"{op}.{name}" for op, name in chosen if name)


def variant_of(op: str, site: AttentionSite, entry: SitePlan, decision: Decision) -> str:
    """Returns the name of what a CUDA device would run for a contract op; "" where Triton is missing."""
    try:
        variants = without(kernels(), decision.skips)
    except MissingTritonError:
        return ""
    variant = select(variants, _facts(op, site, entry))[0]
    return variant.name if variant else "reference"


def _facts(op: str, site: AttentionSite, entry: SitePlan) -> Facts:
    of_index = op == "index_topk" and site.indexer is not None
    q: Operand = site.indexer.q if of_index and site.indexer else site.q
    k: Operand = site.indexer.k if of_index and site.indexer else site.k
    mask = site.mask.tensor
    b, heads, s, width = sizes_of(q)
    predicate = print_predicate(site.mask.predicate)
    return Facts(
        op=op,
        device="cuda",
        dtype=q.root.meta["val"].dtype,
        B=b,
        H=heads,
        Hkv=sizes_of(k)[1],
        S=s,
        T=sizes_of(k)[2],
        D=width,
        Dv=0 if of_index else sizes_of(site.v)[3],
        topk=0 if op == "attention" else entry.topk,
        softcap=bool(site.softcap),
        sinks=site.sinks is not None,
        additive=mask is not None and mask.root.meta["val"].dtype != torch.bool,
        lse_used=False,
        formula=mask is None and bool(predicate) and not is_triangle(predicate, s, sizes_of(k)[2]),
    )
