"""Analysis as a picture: layers, the keys, values and indices that they read, and groups, in DOT."""

from __future__ import annotations

from collections.abc import Iterator

from clsa_compile.ir.plan import Group, Plan, SitePlan
from clsa_compile.ir.sites import AttentionSite
from clsa_compile.passes.pipeline import Decision

__all__ = ["dot_of"]

_COLORS = {"sparse": "palegreen", "attention": "lightblue", "left": "lightgray"}


def dot_of(decision: Decision) -> str:
    """Returns a graph for `dot -Tsvg`: no tool is needed to write it."""
    return "\n".join(_lines(decision)) + "\n"


def _lines(decision: Decision) -> Iterator[str]:
    plan = decision.plan
    yield "digraph clsa {"
    yield "  rankdir=LR; node [shape=box, style=filled, fillcolor=white];"
    drawn: set[int] = set()
    # A layer is drawn in one cluster: what selects tokens comes before what only shares K and V.
    for number, group in enumerate(sorted(plan.groups, key=lambda g: g.kind == "kv")):
        own = [m for m in group.members if m not in drawn]
        drawn.update(own)
        if own:
            yield f"  subgraph cluster_{number} {{ label={_quoted(_label(group))};"
            yield from (f"    {_site(site)}" for site in plan.sites if site.ordinal in own)
            yield "  }"
    yield from (f"  {_site(site)}" for site in plan.sites if site.ordinal not in drawn)
    for site in decision.sites.attention:
        yield from (f"  {edge}" for edge in _reads(site))
    yield from (f"  {edge}" for edge in _chooses(plan))
    yield "}"


def _site(site: SitePlan) -> str:
    label = f"layer {site.layer}\\n{site.kind}, {site.action}"
    look = f'label="{label}", tooltip={_quoted(site.path)}, fillcolor={_COLORS[site.action]}'
    return f"site{site.ordinal} [{look}];"


def _reads(site: AttentionSite) -> Iterator[str]:
    """Yields an edge for K, V and the model's own index, each from the node that holds it."""
    for name, operand in (("k", site.k), ("v", site.v)):
        yield f'{_quoted(operand.root.name)} -> site{site.ordinal} [label="{name}"];'
    if site.indexer is not None:
        node = site.indexer.topk_node.name
        yield f'{_quoted(node)} -> site{site.ordinal} [label="index", style=dashed];'
        yield f'{_quoted(site.indexer.k.root.name)} -> {_quoted(node)} [label="index k"];'


def _chooses(plan: Plan) -> Iterator[str]:
    """Yields an edge from each layer that chooses tokens to those that read its choice."""
    for group in plan.groups:
        if group.kind == "kv":
            continue
        for member in group.members:
            if member != group.anchor:
                yield f'site{group.anchor} -> site{member} [label="tokens", color=red];'


def _label(group: Group) -> str:
    if group.kind == "kv":
        return "one K and V"
    return f"top {group.topk} by {group.score or 'attention mass'}"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
