"""Reclaims: writes of key caches that only indexers read which no longer run."""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Graph, Node

from clsa_compile.ir.captured import Captured
from clsa_compile.ir.plan import Plan
from clsa_compile.ir.sites import AttentionSite, IndexerSite, Sites
from clsa_compile.passes.analyze import storages, written
from clsa_compile.passes.tidy import drop_dead, is_pure


def reclaimable(captured: Captured, sites: Sites, plan: Plan) -> dict[int, list[Node]]:
    """Returns, by ordinal, the writes that nothing reads once a plan is carried out; changes nothing.

    Asked of each layer that reads another one's index: its own index keys, where they are written in place.
    What a cache hands back at the end of a graph is not a reading, but a copy of it would be.
    """
    idle = {site.ordinal: site.indexer for site in sites.attention if site.ordinal in plan.shares}
    dying = Dying(replaced(sites, plan), operands(sites, plan))
    found = {ordinal: _writes(indexer.k.root) for ordinal, indexer in idle.items() if indexer is not None}
    return {
        ordinal: writes
        for ordinal, writes in found.items()
        if writes and _only_dying_read(captured.graph, writes, dying)
    }


def replaced(sites: Sites, plan: Plan) -> list[Node]:
    """Returns the outputs of attentions whose selections nothing reads any more."""
    idle = [site.indexer for site in sites.attention if site.ordinal in plan.shares]
    selections = {indexer.topk_node for indexer in idle if indexer is not None}
    return [
        site.out
        for site in sites.attention
        if site.indexer is not None and site.indexer.topk_node in selections
    ]


def operands(sites: Sites, plan: Plan) -> set[Node]:
    """Returns what attentions, and the indexers that run, read once they are contract ops."""
    running = {group.anchor for group in plan.groups if group.kind == "index"}
    found: set[Node] = set()
    for site in sites.attention:
        readers: list[AttentionSite | IndexerSite] = [site]
        operands = [site.q, site.k, site.v, site.sinks]
        if site.indexer is not None and site.ordinal in running:
            readers.append(site.indexer)
            operands += [site.indexer.q, site.indexer.k, site.indexer.weight]
        for reader in readers:
            operands.append(reader.mask.tensor)
            found.update(reader.mask.inputs)
        found.update(operand.root for operand in operands if operand is not None)
    return found


def reclaim(captured: Captured, writes: Iterable[Node]) -> None:
    """Removes writes; whoever took the written buffer gets the buffer as it is."""
    for write in writes:
        (buffer,) = written(write)
        write.replace_all_uses_with(buffer)
        captured.graph.erase_node(write)
    drop_dead(captured.graph)
    captured.module.recompile()


class Dying:
    """Tells which nodes nothing needs any more, given replaced attentions and what those still read."""

    def __init__(self, replaced: Iterable[Node], needed: Iterable[Node]) -> None:
        self.needed = frozenset(needed)
        self._known = dict.fromkeys(replaced, True) | dict.fromkeys(self.needed, False)

    def __call__(self, node: Node) -> bool:
        """Tells whether a node will go. No recursion: chains of views are long."""
        stack = [node]
        while stack:
            top = stack[-1]
            waiting = [user for user in top.users if user not in self._known]
            if top in self._known:
                stack.pop()
            elif not is_pure(top):
                self._known[top] = False
            elif waiting:
                stack += waiting
            else:
                self._known[top] = all(self._known[user] for user in top.users)
        return self._known[node]


def _writes(node: Node) -> list[Node]:
    """Returns the writes that a node is the result of, the first one first; none if it was not written."""
    found: list[Node] = []
    while len(buffers := written(node)) == 1 and node.args and node.args[0] is buffers[0]:
        found.insert(0, node)
        node = buffers[0]
    return found


def _only_dying_read(graph: Graph, writes: list[Node], dying: Dying) -> bool:
    (buffer,) = written(writes[0])
    own = set(storages(buffer.meta.get("val")))
    inside = {buffer, *writes}
    if not dying.needed.isdisjoint(inside):
        return False
    for node in graph.nodes:
        if node in inside or own.isdisjoint(storages(node.meta.get("val"))):
            continue
        # Another name for the same memory: a view.
        if node.op == "placeholder" or not dying(node):
            return False
    return all(user in inside or user.op == "output" or dying(user) for node in inside for user in node.users)
