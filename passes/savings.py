"""Savings: what a step no longer reads and computes because of what layers share."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import SymInt
from torch.fx import Graph, Node

from clsa_compile.ir.captured import Captured
from clsa_compile.ir.plan import Plan, Savings
from clsa_compile.ir.routing import Index
from clsa_compile.ir.sites import AttentionSite, IndexerSite, Operand, Sites
from clsa_compile.ir.strip import is_stripped
from clsa_compile.passes.reclaim import Dying, operands, replaced

# A parameter's source as Dynamo writes it: L['self']._modules['a']._modules['0']._parameters['weight'].
_STEP = re.compile(r"\._(?:modules|parameters)\['([^']+)'\]")


def savings(captured: Captured, sites: Sites, plan: Plan, reclaimed: Iterable[Node] = ()) -> Savings | None:
    """Returns what a call of this graph no longer touches, with full caches; None where nothing is shared.

    Sizes that are not known count as they are in the call that was captured.
    """
    by_ordinal = {site.ordinal: site for site in sites.attention}
    shared = [by_ordinal[m] for m in plan.shares]
    sparse = [(by_ordinal[m], p) for p in plan.pools for m in p.members if m not in p.sources]
    again = [(by_ordinal[g.anchor].indexer, g.pool) for g in plan.groups if g.among is not None]
    if not shared and not sparse and not again:
        return None
    dying = Dying([*replaced(sites, plan), *reclaimed], operands(sites, plan))
    idle = {path: value for path, value in _parameters(captured.graph, dying)}
    indexers = [site.indexer for site in shared if site.indexer is not None]
    scanned = [_scan(indexer) for indexer in indexers]
    scanned += [_scan(indexer, pool) for indexer, pool in again if indexer is not None]
    skipped = [_skipped(site, pool.topk) for site, pool in sparse]
    added = [_borrowed(by_ordinal[p.anchor], p.index) for p in plan.pools if p.index is not None]
    # Each weight of a projection is multiplied and added once a row.
    rows = max((_rows(indexer.q) for indexer in indexers), default=0)
    projected = sum(2 * rows * value.numel() for value in idle.values() if value.dim() == 2)
    counts = [*scanned, *skipped]
    return Savings(
        idle=tuple(idle),
        weight_bytes=sum(value.numel() * value.itemsize for value in idle.values()),
        cache_bytes=sum(size for size, _ in counts) - sum(size for size, _ in added),
        flops=sum(flops for _, flops in counts) + projected - sum(flops for _, flops in added),
    )


def _parameters(graph: Graph, dying: Dying) -> Iterable[tuple[str, torch.Tensor]]:
    """Yields (path in the model, value) of parameters that only nodes read which will go."""
    for node in graph.nodes:
        if node.op != "placeholder" or not node.users:
            continue
        path = parameter(node)
        if path and all(dying(user) for user in node.users):
            yield path, node.meta["val"]


def stripped(graph: Graph) -> list[str]:
    """Returns the paths of a graph's parameters that were freed, for a plan that does not read them."""
    inputs = [n for n in graph.nodes if n.op == "placeholder" and n.users and parameter(n)]
    return [parameter(n) for n in inputs if is_stripped(n.meta["val"])]


def parameter(node: Node) -> str:
    """Returns a parameter's path in the model, "" for any other input."""
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", "")
    text = name() if callable(name) else str(name)
    return ".".join(_STEP.findall(text)) if "._parameters[" in text else ""


def _scan(indexer: IndexerSite, read: int = 0) -> tuple[int, int]:
    """Returns (bytes, flops) of scoring all index keys but those that are read."""
    b, heads, s, width = sizes_of(indexer.q)
    keys = max(sizes_of(indexer.k)[2] - read, 0)
    item = indexer.k.root.meta["val"].itemsize
    return b * keys * width * item, 2 * b * heads * s * keys * width


def _skipped(site: AttentionSite, topk: int) -> tuple[int, int]:
    """Returns (bytes, flops) of attending to all keys but `topk`."""
    b, heads, s, width = sizes_of(site.q)
    kv_heads, keys = sizes_of(site.k)[1:3]
    widths = width + sizes_of(site.v)[3]
    left = max(keys - topk, 0)
    item = site.k.root.meta["val"].itemsize
    return b * kv_heads * left * widths * item, 2 * b * heads * s * left * widths


def _borrowed(site: AttentionSite, index: Index) -> tuple[int, int]:
    """Returns (bytes, flops) of scoring the keys that a trained index borrows from a layer."""
    b, heads, s, width = sizes_of(site.q)
    kv_heads, keys = sizes_of(site.k)[1:3]
    item = site.k.root.meta["val"].itemsize
    used = index.kv_heads * heads // kv_heads
    return b * index.kv_heads * keys * width * item, 2 * b * used * s * keys * width


def _rows(operand: Operand) -> int:
    b, _, s, _ = sizes_of(operand)
    return b * s


def sizes_of(operand: Operand) -> tuple[int, ...]:
    """Returns the size of each role of an operand, as it is in the call that was captured."""
    shape = operand.root.meta["val"].shape
    return tuple(1 if d is None else _example(shape[d]) for d in operand.dims)


def _example(size: Any) -> int:
    """Returns a size's example value; reading a hint adds no guard."""
    return int(size.node.hint or 0) if isinstance(size, SymInt) else int(size)


def in_words(saved: Savings) -> str:
    """Returns one line for people."""
    parts = [f"{_short(saved.cache_bytes, 'B')} of caches", f"{_short(saved.weight_bytes, 'B')} of weights"]
    read = " and ".join(part for part in parts if not part.startswith("0 "))
    return f"a call no longer reads {read}, and computes {_short(saved.flops, 'flop')} less, with full caches"


def _short(count: int, unit: str) -> str:
    if count < 1000:
        return f"{count} {unit}"
    power = min(int(math.log10(count)) // 3, 5)
    return f"{count / 1000**power:.3g} {'kMGTP'[power - 1]}{unit}"
