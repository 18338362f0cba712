"""Findings: what was read of each attention, as formulas over names that `01_canonical.py` has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.fx import Node

from clsa_compile.dump.code import describe
from clsa_compile.dump.source import line_of
from clsa_compile.ir.captured import Captured
from clsa_compile.ir.sites import AttentionSite, IndexerSite, Operand, Reject, Sites
from clsa_compile.passes.group import describe_mask
from clsa_compile.passes.match import layer_of

__all__ = ["element", "findings", "in_words"]


def findings(captured: Captured, sites: Sites) -> list[dict[str, Any]]:
    """Returns what was found, in execution order, ready for JSON."""
    nodes = {node.name: node for node in captured.graph.nodes}
    found = [_attention(site) for site in sites.attention]
    found += [_reject(reject, nodes.get(reject.node)) for reject in sites.rejects]
    return sorted(found, key=lambda entry: entry["ordinal"])


def in_words(found: list[dict[str, Any]]) -> str:
    """Returns findings as text, one paragraph an attention."""
    return "\n".join(line for entry in found for line in _paragraph(entry))


def element(operand: Operand, roles: tuple[str, ...]) -> str:
    """Returns which element of its root an operand is: `view[b, kv, h // 2, c]`."""
    places = {place: role for place, role in zip(operand.dims, roles, strict=True) if place is not None}
    return f"{operand.root.name}[{', '.join(places[i] for i in sorted(places))}]"


def _attention(site: AttentionSite) -> dict[str, Any]:
    shared = _shared_head(site.heads, site.kv_heads)
    operands = {
        "q": (site.q, ("b", "h", "q", "c")),
        "k": (site.k, ("b", shared, "kv", "c")),
        "v": (site.v, ("b", shared, "kv", "e")),
    }
    out = ("b", "h", "q", "e")
    return {
        **_place(site.ordinal, site.path, site.out),
        "kind": site.kind,
        "family": site.family,
        "out": f"{site.out.name}[{', '.join(out[role] for role in site.out_roles)}]",
        **{name: _operand(*given) for name, given in operands.items()},
        "sinks": None if site.sinks is None else _operand(site.sinks, ("h",)),
        "heads": site.heads,
        "kv_heads": site.kv_heads,
        "scores": _scores(site),
        "mask": describe_mask(site.mask),
        "indexer": None if site.indexer is None else _indexer(site.indexer),
        "note": site.note,
    }


def _reject(reject: Reject, node: Node | None) -> dict[str, Any]:
    return {**_place(reject.ordinal, reject.path, node), "node": reject.node, "left": str(reject)}


def _place(ordinal: int, path: str, node: Node | None) -> dict[str, Any]:
    source = "" if node is None else line_of(node)
    return {"ordinal": ordinal, "layer": layer_of(path, ordinal), "path": path, "source": source}


def _shared_head(heads: int, kv_heads: int) -> str:
    if kv_heads == 1:
        return "0"
    return "h" if heads == kv_heads else f"h // {heads // kv_heads}"


def _operand(operand: Operand, roles: tuple[str, ...]) -> str:
    return f"{element(operand, roles)}: {describe(operand.root.meta['val'])}"


def _scores(site: AttentionSite) -> str:
    scores = f"{site.scale:.6g} * sum(q * k, c)"
    return f"{site.softcap:g} * tanh({scores} / {site.softcap:g})" if site.softcap else scores


def _indexer(indexer: IndexerSite) -> dict[str, Any]:
    weight = indexer.weight
    return {
        "node": indexer.topk_node.name,
        "source": line_of(indexer.topk_node),
        "topk": indexer.topk,
        "score": indexer.score.text,
        "dot": f"{indexer.scale:.6g} * sum(q * k, c)",
        "q": _operand(indexer.q, ("b", "h", "q", "c")),
        "k": _operand(indexer.k, ("b", "0", "kv", "c")),
        "weight": None if weight is None else _operand(weight, ("b", "h", "q")),
        "mask": describe_mask(indexer.mask),
    }


_WORDS = ("out", "q", "k", "v", "sinks", "scores", "mask", "note")
_INDEXER_WORDS = ("dot", "q", "k", "weight", "mask", "source")


def _paragraph(entry: dict[str, Any]) -> Iterator[str]:
    kind = "left" if "left" in entry else f"{entry['kind']}, {entry['family']}"
    yield f"layer {entry['layer']}  {entry['path']}  ({kind})"
    yield from _lines(entry, ("source", "node", "left") if "left" in entry else ("source", *_WORDS), 4)
    indexer = entry.get("indexer")
    if indexer is not None:
        yield f"    index   {indexer['node']}: the {indexer['topk']} best of {indexer['score']}"
        yield from _lines(indexer, _INDEXER_WORDS, 8)
    yield ""


def _lines(entry: dict[str, Any], names: tuple[str, ...], indent: int) -> Iterator[str]:
    return (f"{'':{indent}}{name:<7} {entry[name]}" for name in names if entry[name])
