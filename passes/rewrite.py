"""Rewrites: carries a plan out, attention by attention, with contract ops."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

import clsa_compile.ir.ops  # noqa: F401 (registers the contract ops)
from clsa_compile.ir.captured import Captured
from clsa_compile.ir.masks import print_predicate
from clsa_compile.ir.plan import Plan
from clsa_compile.ir.routing import Pool, is_reindex
from clsa_compile.ir.sites import AttentionSite, IndexerSite, MaskSpec, Sites
from clsa_compile.passes.borrow import Constants, index_operands
from clsa_compile.passes.emit import Emitter
from clsa_compile.passes.patterns.indexer import canonical
from clsa_compile.passes.route import has_values, reads_heads
from clsa_compile.passes.tidy import drop_dead

aten = torch.ops.aten

# In a node's meta: the ordinal of the attention whose output it is now.
SITE = "clsa_site"


def rewrite(
    captured: Captured, sites: Sites, plan: Plan, tensors: Mapping[str, Tensor] | None = None
) -> Captured:
    """Replaces every planned attention by a contract op, and every selection by one index node.

    `tensors` are the weights of indices that were trained for the model.
    """
    actions = {entry.ordinal: entry.action for entry in plan.sites}
    indexers = {site.ordinal: site.indexer for site in sites.attention}
    index = [group for group in plan.groups if group.kind == "index"]
    read = {m: indexers[g.anchor] for g in index for m in g.members}
    constants = Constants(captured, tensors or {})
    rewriter = _Rewriter(captured, plan.pools, constants, bounds="mask_bounds" not in plan.skipped)
    for group in index:
        rewriter.offer(
            indexers[group.anchor], None if group.among is None else indexers[group.among], group.pool
        )
    for site in sites.attention:
        if actions[site.ordinal] != "left":
            rewriter.replace(site, read.get(site.ordinal))
    drop_dead(captured.graph)
    captured.module.recompile()
    return captured


class _Rewriter:
    """What several sites share: one index node a selection, one bounds node a mask, the mass of anchors."""

    def __init__(
        self, captured: Captured, pools: tuple[Pool, ...], constants: Constants, bounds: bool
    ) -> None:
        self._captured = captured
        self._constants = constants
        self._bounded = bounds
        self._indices: dict[Node, Node] = {}
        self._offers: dict[Node, tuple[IndexerSite, int]] = {}
        self._pooled: dict[tuple[Node, int], Node] = {}
        self._bounds: dict[Any, Node] = {}
        self._replaced: dict[Node, Node] = {}
        self._pools = pools
        self._mass: dict[int, Node] = {}
        self._chosen: dict[int, tuple[Node, MaskSpec]] = {}

    def offer(self, indexer: IndexerSite | None, full: IndexerSite | None, pool: int) -> None:
        """Has an indexer select among the `pool` best tokens of another one, and that one among them too.

        What is best of all is best of those that are offered, so the other one's selection stays what it was.
        """
        if indexer is not None and full is not None:
            self._offers[indexer.topk_node] = self._offers[full.topk_node] = full, pool

    def replace(self, site: AttentionSite, indexer: IndexerSite | None) -> None:
        """Puts a contract op where the site's output was computed; `indexer` selects what it attends to."""
        emit = Emitter(self._captured, site.out, self._replaced)
        indices = None if indexer is None else self._index(indexer)
        with self._captured.graph.inserting_before(site.out):
            q, k, v = (emit.operand(o) for o in (site.q, site.k, site.v))
            sinks = None if site.sinks is None else emit.operand(site.sinks)

            def tail(mask: MaskSpec) -> tuple[Any, ...]:
                text = print_predicate(mask.predicate)
                return *self._mask(emit, mask, q, k), sinks, site.scale, site.softcap, text

            mask = MaskSpec() if indexer is None else indexer.mask
            pool = self._pool_of(site)
            self._learned(emit, site)
            # A layer that chooses among what an earlier one has chosen reads no more than that.
            among = None if pool is None or not is_reindex(self._pools, site.ordinal) else pool
            if among is not None:
                indices, mask = self._sets(emit, site, among)
                result = self._anchored(emit, site, (q, k, v), tail(_needed_mask(site, mask)), indices)
            else:
                result = self._anchored(emit, site, (q, k, v), tail(site.mask))
            self._select(emit, site, (q, k))
            if pool is not None and among is None:
                indices, mask = self._sets(emit, site, pool)
            if indices is not None and among is None:
                below = 0 if pool is None else self._pools[pool].dense_below
                # What is read without having been chosen needs the mask.
                needed = tail(site.mask if below else _needed_mask(site, mask))
                rest = (None, below) if below else ()
                result = emit.call(torch.ops.clsa.sparse_attention.default, q, k, v, indices, *needed, *rest)
            elif result is None:
                both = emit.call(torch.ops.clsa.attention.default, q, k, v, *tail(site.mask))
                result = emit.call(operator.getitem, both, 0)
            result = emit.like(_arrange(emit, result, site.out_roles), site.out)
        result.meta[SITE] = site.ordinal
        site.out.replace_all_uses_with(result)
        self._replaced[site.out] = result
        self._captured.graph.erase_node(site.out)

    def _learned(self, emit: Emitter, site: AttentionSite) -> None:
        """Adds the selections of indices that were trained for the group that a layer begins."""
        for i, pool in enumerate(self._pools):
            if pool.index is None or pool.anchor != site.ordinal:
                continue
            q, k, weight = index_operands(emit, site, pool.index, self._constants)
            indices = emit.call(
                torch.ops.clsa.index_topk.default,
                q,
                k,
                weight,
                None,
                *self._mask(emit, site.mask, q, k, heads=1),
                pool.topk,
                site.scale,
                pool.index.score,
                print_predicate(site.mask.predicate),
                False,
            )
            self._chosen[i] = indices, site.mask

    def _pool_of(self, site: AttentionSite) -> int | None:
        return next((i for i, pool in enumerate(self._pools) if site.ordinal in pool.members), None)

    def _anchored(
        self,
        emit: Emitter,
        site: AttentionSite,
        qkv: tuple[Node, Node, Node],
        rest: tuple[Any, ...],
        indices: Node | None = None,
    ) -> Node | None:
        """Adds an anchor's attention, and the selections that are made after it; returns its output.

        `rest` are the arguments from the mask on; `indices` the only tokens that it reads.
        """
        fed = [i for i, pool in enumerate(self._pools) if site.ordinal in pool.sources]
        result = None
        if fed:
            # Selections of different sizes may be made of one mass.
            tables = dict.fromkeys(self._pools[i].sources[site.ordinal] for i in fed)
            weight = [row for table in tables for row in table]
            both = emit.call(
                torch.ops.clsa.attention_mass.default,
                *qkv,
                self._constant(emit, weight, qkv[0]),
                *rest,
                self._pools[fed[0]].power,
                *(() if indices is None else (indices,)),
            )
            result, mass = (emit.call(operator.getitem, both, i) for i in (0, 1))
            parts, start = {}, 0
            for table in tables:
                end = start + len(table)
                whole = len(table) == len(weight)
                parts[table] = mass if whole else emit.call(aten.slice.Tensor, mass, 1, start, end)
                start = end
            # Added up as it comes: a pool holds one sum until its own anchor, however many come before that.
            for i in fed:
                part = parts[self._pools[i].sources[site.ordinal]]
                total = self._mass.get(i)
                self._mass[i] = part if total is None else emit.call(aten.add.Tensor, total, part)
        return result

    def _select(self, emit: Emitter, site: AttentionSite, qk: tuple[Node, Node]) -> None:
        """Adds the selections that a layer makes; `site` is the anchor."""
        made = [i for i, p in enumerate(self._pools) if p.anchor == site.ordinal and p.index is None]
        bounds = self._mask(emit, site.mask, *qk)[1] if made else None
        for i in made:
            pool = self._pools[i]
            total, ends = self._mass.pop(i), (pool.keep_first, pool.keep_last)
            indices = emit.call(torch.ops.clsa.select_topk.default, total, bounds, pool.topk, *ends)
            self._chosen[i] = indices, site.mask

    def _sets(self, emit: Emitter, site: AttentionSite, i: int) -> tuple[Node, MaskSpec]:
        """Returns the indices [B, 1|Hkv, S, K] that a member attends to, and the mask of their choice."""
        indices, mask = self._chosen[i]
        sets = self._pools[i].sets
        rows = self._pools[i].rows.get(site.ordinal, (0,) * site.kv_heads)
        if rows == tuple(range(sets)):
            return indices, mask
        if len(set(rows)) == 1:
            return emit.call(
                aten.slice.Tensor, indices, 1, rows[0], rows[0] + 1
            ) if sets > 1 else indices, mask
        heads = [emit.call(aten.slice.Tensor, indices, 1, row, row + 1) for row in rows]
        return emit.call(aten.cat.default, heads, 1), mask

    def _constant(self, emit: Emitter, rows: list[tuple[float, ...]], like: Node) -> Node:
        """Adds a table of numbers as a buffer of the graph's module."""
        module = self._captured.module
        name = f"clsa_weight_{sum(1 for _ in module.buffers(recurse=False))}"
        table = torch.tensor(rows, dtype=torch.float32, device=like.meta["val"].device)
        module.register_buffer(name, table)
        node = self._captured.graph.get_attr(name)
        node.meta["val"] = self._captured.fake_mode.from_tensor(table, static_shapes=True)
        return node

    def _index(self, indexer: IndexerSite) -> Node:
        """Returns the tokens that an indexer selects: of all, or of those that it is offered."""
        node = indexer.topk_node
        if node not in self._indices:
            candidates = self._offered(*self._offers[node]) if node in self._offers else None
            self._indices[node] = self._selected(indexer, indexer.topk, candidates)
        return self._indices[node]

    def _offered(self, full: IndexerSite, pool: int) -> Node:
        key = full.topk_node, pool
        if key not in self._pooled:
            self._pooled[key] = self._selected(full, pool, None)
        return self._pooled[key]

    def _selected(self, indexer: IndexerSite, topk: int, candidates: Node | None) -> Node:
        """Adds a selection where the indexer's own stood in the model."""
        emit = Emitter(self._captured, indexer.topk_node, self._replaced)
        with self._captured.graph.inserting_before(indexer.topk_node):
            q, k = emit.operand(indexer.q), emit.operand(indexer.k)
            # What is offered was selected under the same mask; the values of a mask are still needed.
            mask = indexer.mask if candidates is None or has_values(indexer.mask) else MaskSpec()
            return emit.call(
                torch.ops.clsa.index_topk.default,
                q,
                k,
                None if indexer.weight is None else emit.operand(indexer.weight),
                None,
                *self._mask(emit, mask, q, k, heads=1),
                topk,
                indexer.scale,
                indexer.score.text,
                print_predicate(mask.predicate),
                False,
                *(() if candidates is None else (None, candidates)),
            )

    def _mask(
        self, emit: Emitter, mask: MaskSpec, q: Node, k: Node, heads: int | None = None
    ) -> tuple[Node | None, Node | None, list[Node]]:
        """Returns (mask, bounds, mask_inputs) for a contract op."""
        tensor = None if mask.tensor is None else emit.operand(mask.tensor)
        if mask.forbids:
            tensor = emit.call(aten.bitwise_not.default, tensor)
        inputs = [emit.current(node) for node in mask.inputs]
        # Bounds are a hint to kernels; the CPU's reference does not read them.
        if not self._bounded or mask.is_open or q.meta["val"].device.type == "cpu":
            return tensor, None, inputs
        key = (canonical(mask), _shape_key(q), _shape_key(k))
        if key not in self._bounds:
            heads = q.meta["val"].shape[1] if heads is None else heads
            self._bounds[key] = emit.call(
                torch.ops.clsa.mask_bounds.default,
                q,
                tensor,
                inputs,
                heads if reads_heads(mask) else 1,
                emit.size(k, 2),
                print_predicate(mask.predicate),
            )
        return tensor, self._bounds[key], inputs


def _shape_key(node: Node) -> tuple[str, str]:
    value = node.meta["val"]
    return str(value.shape[0]), str(value.shape[2])


def _needed_mask(site: AttentionSite, chosen: MaskSpec) -> MaskSpec:
    """Returns what attention must check by itself: nothing where its tokens were chosen under that mask."""
    if canonical(site.mask) != canonical(chosen) or reads_heads(site.mask):
        return site.mask
    return site.mask if has_values(site.mask) else MaskSpec()


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
