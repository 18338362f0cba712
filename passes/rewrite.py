"""Rewrites: carries a plan out, attention by attention, with contract ops."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

import clsa_compile.ir.ops  # noqa: F401 (registers the contract ops)
from clsa_compile.ir.captured import Captured
from clsa_compile.ir.masks import print_predicate
from clsa_compile.ir.plan import Plan
from clsa_compile.ir.sites import AttentionSite, IndexerSite, MaskSpec, Sites
from clsa_compile.passes.emit import Emitter
from clsa_compile.passes.patterns.indexer import canonical
from clsa_compile.passes.tidy import drop_dead

aten = torch.ops.aten


def rewrite(captured: Captured, sites: Sites, plan: Plan) -> Captured:
    """Replaces every planned attention by a contract op, and every selection by one index node."""
    actions = {entry.ordinal: entry.action for entry in plan.sites}
    indexers = {site.ordinal: site.indexer for site in sites.attention}
    read = {m: indexers[g.anchor] for g in plan.groups if g.kind == "index" for m in g.members}
    rewriter = _Rewriter(captured)
    for site in sites.attention:
        if actions[site.ordinal] != "left":
            rewriter.replace(site, read.get(site.ordinal))
    drop_dead(captured.graph)
    captured.module.recompile()
    return captured


class _Rewriter:
    """What several sites share: one index node a selection, one bounds node a mask."""

    def __init__(self, captured: Captured) -> None:
        self._captured = captured
        self._indices: dict[Node, Node] = {}
        self._bounds: dict[Any, Node] = {}
        self._replaced: dict[Node, Node] = {}

    def replace(self, site: AttentionSite, indexer: IndexerSite | None) -> None:
        """Puts a contract op where the site's output was computed; `indexer` selects what it attends to."""
        emit = Emitter(self._captured, site.out, self._replaced)
        indices = None if indexer is None else self._index(indexer)
        with self._captured.graph.inserting_before(site.out):
            q, k, v = (emit.operand(o) for o in (site.q, site.k, site.v))
            mask = _needed_mask(site, indexer)
            tail = (
                *self._mask(emit, mask, q, k),
                None if site.sinks is None else emit.operand(site.sinks),
                site.scale,
                site.softcap,
                print_predicate(mask.predicate),
            )
            if indices is None:
                both = emit.call(torch.ops.clsa.attention.default, q, k, v, *tail)
                result = emit.call(operator.getitem, both, 0)
            else:
                result = emit.call(torch.ops.clsa.sparse_attention.default, q, k, v, indices, *tail)
            result = emit.like(_arrange(emit, result, site.out_roles), site.out)
        site.out.replace_all_uses_with(result)
        self._replaced[site.out] = result
        self._captured.graph.erase_node(site.out)

    def _index(self, indexer: IndexerSite) -> Node:
        if indexer.topk_node not in self._indices:
            emit = Emitter(self._captured, indexer.topk_node, self._replaced)
            with self._captured.graph.inserting_before(indexer.topk_node):
                q, k = emit.operand(indexer.q), emit.operand(indexer.k)
                self._indices[indexer.topk_node] = emit.call(
                    torch.ops.clsa.index_topk.default,
                    q,
                    k,
                    None if indexer.weight is None else emit.operand(indexer.weight),
                    None,
                    *self._mask(emit, indexer.mask, q, k, heads=1),
                    indexer.topk,
                    indexer.scale,
                    indexer.score.text,
                    print_predicate(indexer.mask.predicate),
                    False,
                )
        return self._indices[indexer.topk_node]

    def _mask(
        self, emit: Emitter, mask: MaskSpec, q: Node, k: Node, heads: int | None = None
    ) -> tuple[Node | None, Node | None, list[Node]]:
        """Returns (mask, bounds, mask_inputs) for a contract op."""
        tensor = None if mask.tensor is None else emit.operand(mask.tensor)
        if mask.forbids:
            tensor = emit.call(aten.bitwise_not.default, tensor)
        inputs = [emit.current(node) for node in mask.inputs]
        # Bounds are a hint to kernels; the CPU's reference does not read them.
        if mask.is_open or q.meta["val"].device.type == "cpu":
            return tensor, None, inputs
        key = (canonical(mask), _shape_key(q), _shape_key(k))
        if key not in self._bounds:
            heads = q.meta["val"].shape[1] if heads is None else heads
            self._bounds[key] = emit.call(
                torch.ops.clsa.mask_bounds.default,
                q,
                tensor,
                inputs,
                heads if _reads_heads(mask) else 1,
                _size(emit, k, 2),
                print_predicate(mask.predicate),
            )
        return tensor, self._bounds[key], inputs


def _size(emit: Emitter, node: Node, axis: int) -> Any:
    size = node.meta["val"].shape[axis]
    return size if isinstance(size, int) else emit.call(aten.sym_size.int, node, axis)


def _shape_key(node: Node) -> tuple[str, str]:
    value = node.meta["val"]
    return str(value.shape[0]), str(value.shape[2])


def _reads_heads(mask: MaskSpec) -> bool:
    per_head = mask.tensor is not None and mask.tensor.dims[1] is not None
    return per_head or any(str(s) == "h" for s in getattr(mask.predicate, "free_symbols", ()))


def _needed_mask(site: AttentionSite, indexer: IndexerSite | None) -> MaskSpec:
    """Returns what attention must check by itself: nothing where the index was chosen under that mask."""
    if indexer is None or canonical(site.mask) != canonical(indexer.mask):
        return site.mask
    tensor = site.mask.tensor
    if tensor is not None and tensor.root.meta["val"].dtype != torch.bool:
        return site.mask  # the values are biases too
    return MaskSpec()


def _arrange(emit: Emitter, result: Node, roles: tuple[int, ...]) -> Node:
    """Turns [B, H, S, Dv] into the dimensions that the original output had."""
    if roles == (0, 1, 2, 3):
        return result
    missing = [r for r in range(4) if r not in roles]
    for role in reversed(missing):
        result = emit.call(aten.select.int, result, role, 0)
    kept = sorted(roles)
    order = [kept.index(r) for r in roles]
    return result if order == sorted(order) else emit.call(aten.permute.default, result, order)
