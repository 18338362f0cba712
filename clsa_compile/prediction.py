"""Prediction: bytes, flops and microseconds of a step before and after, over T, the tokens in its cache.

What is counted, for B sequences and S query rows, over N = T keys (fewer where a mask has a window):

- *attention*, dense: K and V once, q and the output. Before, a model that repeats K and V for the heads of a
  group (G > 1) reads them once, writes G copies and reads those; written out, its scores move four times in
  float32. Windows are not known to it: it goes through all slots, and masks.
- *of a prompt*, by what a CUDA device runs (`layers.variant_of`): a formula goes to the kernel that skips
  blocks, and takes the keys in the blocks that are left; a plain triangle goes to flash attention; with any
  other mask torch goes through all keys, and the mask is written and read.
- *sparse attention*: K of T rows for each query row and kv head, K = min(T, topk), and their indices.
- *index*: keys once and fp32 scores; before, keys cast to float32 and the scores of each index head.
- *selection*: scores once, indices; *mass*: the scores of an anchor's heads in fp16, written and read.
- *outside*: weights once (`products.py`), the same on both sides but for indexers that no longer run.

Microseconds are straight lines over N (`kernels/estimate.py`), which hold for bfloat16 on the chip that was
measured and follow data sheets on others; products take their bytes or flops, whichever is more, and each
launch its time. Before is torch's attention as it was measured on Inductor's graphs: 70% of the bandwidth.
All tokens of a cache count as filled. Rows of a prompt see T - (S - 1) / 2 keys in the mean, or a window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch.fx import Node

from clsa_compile.ir.captured import Captured
from clsa_compile.ir.masks import is_triangle, print_predicate
from clsa_compile.ir.ops import DECODE_ROWS
from clsa_compile.ir.plan import SitePlan
from clsa_compile.ir.routing import Index, Pool
from clsa_compile.ir.sites import AttentionSite, IndexerSite
from clsa_compile.layers import variant_of, window_of
from clsa_compile.passes.borrow import Product, product
from clsa_compile.passes.pipeline import Decision
from clsa_compile.passes.reclaim import Dying, operands, replaced
from clsa_compile.passes.savings import sizes_of
from clsa_compile.products import Outside, outside

__all__ = ["LENGTHS", "Cost", "Operation", "Prediction", "T", "crossing", "device_of", "predict", "rounded"]

T = sympy.Symbol("T", integer=True, positive=True)
# Lengths that reports show where nothing is said.
LENGTHS = (4096, 131072)
# Longest cache at which a break-even is looked for.
LONGEST = 2**24
# kernels/device.py's, which only what predicts needs: drivers import kernels where they call them.
Device = Any

# Of Inductor's graphs: the share of the bandwidth that copies and products of K and V reach; how often scores
# in float32 move where attention is written out, and the kernels that do so.
BEFORE_REACHED, SCORE_MOVES, SCORE_KERNELS = 0.7, 4, 3
# torch.topk: microseconds for one row of 131072 scores, and for each further one.
TOPK_ROW, TOPK_ROWS = 52.8 / 131072, 1.7 / 131072
# An indexer as it is: kernels beside its products (scores, top-k, scatter, mask), and the share of the flops
# by the data sheet that its products reach.
INDEX_KERNELS, INDEX_RATE = 6, 0.45

Expr = Any


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes, flops and microseconds, as formulas in T."""

    bytes: Expr = sympy.S.Zero
    flops: Expr = sympy.S.Zero
    us: Expr = sympy.S.Zero

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops, self.us + other.us)

    def at(self, tokens: int) -> tuple[float, float, float]:
        """Returns (bytes, flops, microseconds) with so many tokens in the cache."""
        return tuple(float(e.subs(T, tokens)) for e in (self.bytes, self.flops, self.us))  # type: ignore[return-value]

    def to_dict(self) -> dict[str, str]:
        """Returns the formulas as text that sympy reads."""
        return {
            name: sympy.sstr(rounded(getattr(self, name)), full_prec=False)
            for name in ("bytes", "flops", "us")
        }


@dataclass(frozen=True, slots=True)
class Operation:
    """One kind of work, of the layers `ordinals` alike: what it costs each of them."""

    name: str
    ordinals: tuple[int, ...]
    cost: Cost


@dataclass(frozen=True, slots=True)
class Prediction:
    """A step before and after; `layers` has the attentions and indexers alone, by ordinal, the same way.

    break_even: from how many tokens on the whole step is faster than one that reads all keys in each layer;
    None where nothing is sparse, or where that is never so. break_evens: the same for a layer with its index.
    operations: what `layers` is the sum of, before and after. bandwidth, rate: bytes a second of the device,
    and flops a second of products in the dtype of the keys, by its data sheet.
    """

    device: str
    batch: int
    queries: int
    before: Cost
    after: Cost
    layers: Mapping[int, tuple[Cost, Cost]] = field(default_factory=dict)
    break_even: int | None = None
    break_evens: Mapping[int, int | None] = field(default_factory=dict)
    operations: tuple[tuple[Operation, ...], tuple[Operation, ...]] = ((), ())
    bandwidth: float = 0.0
    rate: float = 0.0

    def sensible(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """Returns the lengths that hold at least the queries themselves; those alone where none does."""
        return tuple(t for t in lengths if t >= self.queries) or (self.queries,)

    def to_dict(self, lengths: Sequence[int]) -> dict[str, Any]:
        """Returns formulas, and numbers at `lengths`, ready for JSON."""
        return {
            "device": self.device,
            "batch": self.batch,
            "queries": self.queries,
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "at": [_numbers(t, self.before, self.after) for t in self.sensible(lengths)],
            "break_even": self.break_even,
            "layers": [
                {
                    "ordinal": ordinal,
                    "before": before.to_dict(),
                    "after": after.to_dict(),
                    "at": [_numbers(t, before, after) for t in self.sensible(lengths)],
                    "break_even": self.break_evens.get(ordinal),
                }
                for ordinal, (before, after) in self.layers.items()
            ],
        }


def _numbers(tokens: int, before: Cost, after: Cost) -> dict[str, Any]:
    sides = {"before": before.at(tokens), "after": after.at(tokens)}
    return {"tokens": tokens} | {
        side: {"bytes": round(size), "flops": round(flops), "us": round(us, 2)}
        for side, (size, flops, us) in sides.items()
    }


def rounded(expression: Expr) -> Expr:
    """Returns a formula whose broken numbers have four digits."""
    return expression.xreplace({n: sympy.Float(n, 4) for n in expression.atoms(sympy.Float)})


def device_of(name: str | None) -> Device:
    """Returns the chip of that name, else the one at hand, else an H100. Raises OptionError."""
    from clsa_compile.kernels.device import Device

    return Device.of(torch.device("cuda")) if name is None else Device.named(name)


def predict(captured: Captured, decision: Decision, device: Device) -> Prediction | None:
    """Returns what a step of a graph costs; None where no attention was understood.

    Attentions that are left cost the same on both sides and are not counted.
    """
    from clsa_compile.kernels.estimate import rate

    sites = decision.sites.attention
    if not sites:
        return None
    entries = {entry.ordinal: entry for entry in decision.plan.sites}
    longest = max(sizes_of(site.k)[2] for site in sites)
    steps = [_Step(site, entries[site.ordinal], decision, longest, device) for site in sites]
    works = {step.site.ordinal: (step.before(), step.after()) for step in steps}
    layers = {
        ordinal: (_total(before.values()), _total(after.values()))
        for ordinal, (before, after) in works.items()
    }
    dense = {step.site.ordinal: step.dense() for step in steps}
    before, after = _outside(captured, decision, device)
    total = sum((cost for _, cost in layers.values()), after)
    selected = [entry.topk for entry in entries.values() if entry.action == "sparse"]
    b, _, s, _ = sizes_of(sites[0].q)
    return Prediction(
        device=device.name,
        batch=b,
        queries=s,
        before=sum((cost for cost, _ in layers.values()), before),
        after=total,
        layers=layers,
        # Without any index all weights stay, so those of indexers that go are no gain of being sparse.
        break_even=crossing(sum((c.us for c in dense.values()), after.us), total.us, min(selected))
        if selected
        else None,
        break_evens={
            ordinal: crossing(dense[ordinal].us, cost.us, entries[ordinal].topk)
            for ordinal, (_, cost) in layers.items()
            if entries[ordinal].action == "sparse"
        },
        operations=(
            _operations({ordinal: before for ordinal, (before, _) in works.items()}),
            _operations({ordinal: after for ordinal, (_, after) in works.items()}),
        ),
        bandwidth=device.bandwidth,
        rate=rate(_itemsize(sites[0]), device),
    )


def _total(costs: Iterable[Cost]) -> Cost:
    return sum(costs, Cost())


def _operations(works: Mapping[int, Mapping[str, Cost]]) -> tuple[Operation, ...]:
    """Returns the work of all layers, that which is named alike and costs the same once."""
    found: dict[tuple[str, Cost], list[int]] = {}
    for ordinal, work in works.items():
        for item in work.items():
            found.setdefault(item, []).append(ordinal)
    return tuple(Operation(name, tuple(ordinals), cost) for (name, cost), ordinals in found.items())


def crossing(dense: Expr, sparse: Expr, topk: int) -> int | None:
    """Returns the smallest T above `topk` from which on `sparse` is less than `dense`, or None.

    Up to `topk` all tokens are selected. Above, both are concave, and `sparse` grows no faster.
    """
    gain = sympy.lambdify(T, dense - sparse, "math")
    if gain(LONGEST) <= 0:
        return None
    low, high = topk, LONGEST  # nothing is gained at `low`
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if gain(middle) > 0 else (middle, high)
    return high


@dataclass(frozen=True, slots=True)
class _Step:
    """One attention with its index, before and after."""

    site: AttentionSite
    entry: SitePlan
    decision: Decision
    longest: int
    device: Device

    @property
    def slots(self) -> Expr:
        """Keys that are there: T, or fewer in a shorter buffer."""
        own = sizes_of(self.site.k)[2]
        return T if own == self.longest else sympy.Min(T, own)

    @property
    def span(self) -> Expr:
        """Keys that any row reads, where a kernel knows the mask's bounds."""
        window = window_of(self.site)
        return self.slots if window is None else sympy.Min(self.slots, window + sizes_of(self.site.q)[2] - 1)

    @property
    def keys(self) -> Expr:
        """Keys that a row reads in the mean, where a kernel knows the mask's bounds."""
        window, s = window_of(self.site), sizes_of(self.site.q)[2]
        if window is not None:
            return sympy.Min(self.slots, window)
        return self.slots - sympy.Rational(s - 1, 2) if _is_causal(self.site) else self.slots

    def before(self) -> dict[str, Cost]:
        """Returns the cost of each kind of work as Inductor runs the model's own graph."""
        from clsa_compile.kernels import estimate

        site, n = self.site, self.slots
        b, h, s, d = sizes_of(site.q)
        hkv, dv, item = sizes_of(site.k)[1], sizes_of(site.v)[3], _itemsize(site)
        is_copied = h > hkv and not _grouped(site)
        is_written, is_flash = site.family != "sdpa", _is_flash(site)
        size = (1 + 2 * (h // hkv) if is_copied else 1) * b * hkv * n * (d + dv) * item
        size += b * h * s * (d + dv) * item
        if is_written:
            size += SCORE_MOVES * 4 * b * h * s * n
        elif not is_flash and s > DECODE_ROWS:
            size += 2 * item * b * s * n  # the mask; that of a step is next to nothing
        seen = n - sympy.Rational(s - 1, 2) if is_flash and _is_causal(site) else n
        sizes = _sizes(b, hkv, h // hkv * s, 0, d, dv, item)
        if is_flash or is_written or s <= DECODE_ROWS:
            slope = estimate.flash(sizes, self.device).slope
        else:
            slope = estimate.masked(sizes, s, self.device).slope
        launches = (SCORE_KERNELS if is_written else 1) + is_copied
        work = {"attention": self._eager(size, 2 * b * h * s * seen * (d + dv), slope * seen, launches)}
        if site.indexer is not None and self._owner() == site.ordinal:
            work["index"] = self._index_before(site.indexer)
        return work

    def _index_before(self, indexer: IndexerSite) -> Cost:
        from clsa_compile.kernels.estimate import rate

        b, heads, s, width = sizes_of(indexer.q)
        item, n = indexer.k.root.meta["val"].itemsize, self.slots
        size = b * n * width * (item + 8) + 8 * b * s * heads * n + 16 * b * s * n
        flops = 2 * b * heads * s * n * width
        cost = self._eager(size, flops, 1e6 * flops / (INDEX_RATE * rate(4, self.device)), INDEX_KERNELS)
        choice = (TOPK_ROW + TOPK_ROWS * (b * s - 1)) * n * self._slower
        return cost + Cost(us=choice)

    def _eager(self, size: Expr, flops: Expr, computed: Expr, launches: int) -> Cost:
        """Returns the cost of what moves `size` bytes, and whose arithmetic takes `computed` microseconds."""
        from clsa_compile.kernels.estimate import NO_KEYS

        # Both grow with the keys alike, so which of them counts is the same for all lengths.
        read = 1e6 * size / (BEFORE_REACHED * self.device.bandwidth)
        is_read = float(read.subs(T, LENGTHS[-1])) >= float(computed.subs(T, LENGTHS[-1]))
        fixed = NO_KEYS + launches * self.device.launch_us
        return Cost(size, flops, (read if is_read else computed) + fixed)

    @property
    def _slower(self) -> float:
        from clsa_compile.kernels.device import H100

        return H100.bandwidth / self.device.bandwidth

    def _owner(self) -> int:
        """Returns the layer whose indexer the model runs for this one."""
        indexer = self.site.indexer
        return next(
            other.ordinal
            for other in self.decision.sites.attention
            if other.indexer is not None
            and indexer is not None
            and other.indexer.topk_node is indexer.topk_node
        )

    def after(self) -> dict[str, Cost]:
        """Returns the cost of each kind of work that was decided on."""
        ordinal, plan = self.site.ordinal, self.decision.plan
        begun = [pool for pool in plan.pools if pool.anchor == ordinal]
        chosen = [pool for pool in begun if pool.index is None]
        feeds = any(ordinal in pool.sources for pool in plan.pools)
        work = {}
        if self.entry.action != "sparse":
            work["dense attention"] = self.dense(stored=feeds)
        else:
            work["sparse attention"] = self._sparse(self.entry.topk)
            group = next((g for g in plan.groups if g.kind == "index" and g.anchor == ordinal), None)
            if group is not None and self.site.indexer is not None:
                pool = group.pool if group.among is not None else 0
                work["index scan"], work["selection"] = self._index(self.site.indexer, pool)
            borrowed = [pool for pool in begun if pool.index is not None]
            if borrowed:
                work["borrowed index"] = _total(self._borrowed(p.index, p.topk) for p in borrowed if p.index)
        if feeds:
            work["attention mass"] = self._mass(
                sum(pool.sets for pool in plan.pools if ordinal in pool.sources)
            )
        if chosen:
            work["selection"] = _total(self._choice(pool) for pool in chosen)
        return work

    def dense(self, stored: bool = False) -> Cost:
        """Returns the cost of reading each key once."""
        from clsa_compile.kernels import estimate

        b, h, s, d = sizes_of(self.site.q)
        hkv, dv, item = sizes_of(self.site.k)[1], sizes_of(self.site.v)[3], _itemsize(self.site)
        sizes = _sizes(b, hkv, h // hkv * s, 0, d, dv, item)
        if s > DECODE_ROWS:
            return self._prompt(sizes)
        n = self.span
        line = estimate.attention(sizes, self.device, stored)
        return self._dense(n, n, line.fixed + line.slope * n)

    def _prompt(self, sizes: Any) -> Cost:
        """Returns the cost of the dense attention of many rows, by the kernel that would run."""
        from clsa_compile.kernels import estimate

        s = sizes_of(self.site.q)[2]
        chosen = variant_of("attention", self.site, self.entry, self.decision)
        if not chosen:  # no Triton here to ask; what is predicted is a device that has it
            chosen = "rows" if self._needs_mask() and self.site.mask.tensor is None else "sdpa"
        if chosen == "rows":
            line, window = estimate.skipping(sizes, s, self.device), window_of(self.site)
            ends = int(_is_causal(self.site)) + (window is not None)
            seen = (self.keys if window is None else window) + ends * estimate.ROWS_EDGE
            return self._dense(self.span, self.keys, line.fixed + line.slope * sympy.Min(self.slots, seen))
        if self._needs_mask():
            line, n = estimate.masked(sizes, s, self.device), self.slots
            mask = 2 * sizes.E * sizes.B * s * n
            return self._dense(n, n, line.fixed + line.slope * n) + Cost(
                bytes=mask, us=1e6 * mask / self.device.bandwidth
            )
        line = estimate.flash(sizes, self.device)
        return self._dense(self.slots, self.keys, line.fixed + line.slope * self.keys)

    def _needs_mask(self) -> bool:
        """Tells whether torch's attention would be given a mask, which somebody has to write."""
        s, t = sizes_of(self.site.q)[2], sizes_of(self.site.k)[2]
        text = print_predicate(self.site.mask.predicate)
        return self.site.mask.tensor is not None or (bool(text) and not is_triangle(text, s, t))

    def _dense(self, read: Expr, seen: Expr, us: Expr) -> Cost:
        """Returns a cost: K and V of `read` tokens are read once, and a row attends to `seen` of them."""
        b, h, s, d = sizes_of(self.site.q)
        hkv, dv, item = sizes_of(self.site.k)[1], sizes_of(self.site.v)[3], _itemsize(self.site)
        size = b * hkv * read * (d + dv) * item + b * h * s * (d + dv) * item
        return Cost(size, 2 * b * h * s * seen * (d + dv), us)

    def _sparse(self, topk: int) -> Cost:
        from clsa_compile.kernels import estimate

        site = self.site
        n = sympy.Min(T, topk)
        b, h, s, d = sizes_of(site.q)
        hkv, dv, item = sizes_of(site.k)[1], sizes_of(site.v)[3], _itemsize(site)
        line = estimate.sparse(_sizes(b * s, hkv, h // hkv, topk, d, dv, item), self.device)
        return Cost(
            b * s * hkv * n * (d + dv) * item + b * h * s * (d + dv) * item + 4 * b * s * n,
            2 * b * h * s * n * (d + dv),
            line.fixed + line.slope * n,
        )

    def _index(self, indexer: IndexerSite, pool: int) -> tuple[Cost, Cost]:
        """Returns what scores and what the choice among them cost."""
        from clsa_compile.kernels import estimate

        b, heads, s, width = sizes_of(indexer.q)
        item = indexer.k.root.meta["val"].itemsize
        n = sympy.Min(T, pool) if pool else self.keys
        sizes = _sizes(b, 1, heads, 0, width, 0, item)
        if s <= DECODE_ROWS:
            line = estimate.scan(sizes, self.device)
            read = n
        else:
            line = estimate.prompt_scan(_sizes(b, 1, heads * s, 0, width, 0, item), self.device)
            read = self.slots
        scores = 4 * b * s * n
        size = b * read * width * item + b * heads * s * (width * item + 4) + scores
        scan = Cost(size, 2 * b * heads * s * n * width, line.fixed + line.slope * n)
        return scan, self._selection(b * s, n, indexer.topk)

    def _borrowed(self, index: Index, topk: int) -> Cost:
        """Returns the cost of an index over the layer's own keys, with the product that makes its queries."""
        from clsa_compile.kernels import estimate

        b, h, s, d = sizes_of(self.site.q)
        heads, item = index.kv_heads * (h // self.site.kv_heads), _itemsize(self.site)
        n = self.keys
        sizes = _sizes(b, index.kv_heads, heads // index.kv_heads * s, 0, d, 0, item)
        line = (estimate.scan if s <= DECODE_ROWS else estimate.prompt_scan)(sizes, self.device)
        made = product(self.site)
        assert isinstance(made, Product), made
        weight = made.weight.meta["val"]
        read, flops = weight.numel() * weight.itemsize, 2 * b * s * weight.numel()
        us = line.fixed + line.slope * n + estimate.product(read, flops, weight.itemsize, self.device)
        size = b * index.kv_heads * n * d * item + 4 * b * s * n + read
        scan = Cost(size, 2 * b * heads * s * n * d + flops, us)
        return scan + self._selection(b * s, n, topk)

    def _selection(self, rows: int, n: Expr, topk: int) -> Cost:
        from clsa_compile.kernels import estimate

        line = estimate.select(rows, self.device)
        size = 4 * rows * (n + sympy.Min(T, topk))
        return Cost(size, sympy.S.Zero, line.fixed + line.slope * n)

    def _mass(self, sets: int) -> Cost:
        from clsa_compile.kernels import estimate

        b, h, s, _ = sizes_of(self.site.q)
        n = self.keys
        line = estimate.mass(b * s, h, sets, self.device)
        # Scores in fp16, written by the pass and read again.
        return Cost(b * s * n * (4 * h + 4 * sets), 2 * b * h * s * n * sets, line.fixed + line.slope * n)

    def _choice(self, pool: Pool) -> Cost:
        b, _, s, _ = sizes_of(self.site.q)
        rows, n = b * s * pool.sets, self.keys
        # What is always kept is marked in a copy of the mass.
        return self._selection(rows, n, pool.topk) + Cost(8 * rows * n)


def _sizes(b: int, hkv: int, g: int, t: int, d: int, dv: int, item: int) -> Any:
    from clsa_compile.kernels.cost import Sizes

    return Sizes(b, hkv, g, t, d, dv, item)


def _outside(captured: Captured, decision: Decision, device: Device) -> tuple[Cost, Cost]:
    """Returns what products and the kernels around them cost, before and after."""
    sites, plan = decision.sites, decision.plan
    read = frozenset(s.q.root for s in sites.attention)
    attentions = frozenset(s.out for s in sites.attention)
    gone = Dying([*replaced(sites, plan), *decision.reclaimed], operands(sites, plan))

    def count(is_gone: Callable[[Node], bool]) -> Cost:
        return _cost(outside(captured.graph, is_gone, read, attentions), device)

    before = count(lambda _: False)
    return before, count(gone) if plan.shares else before


def _cost(found: Outside, device: Device) -> Cost:
    from clsa_compile.kernels import estimate

    products = sum(estimate.product(p.bytes, p.flops, p.itemsize, device) for p in found.products)
    us = products + found.others * device.launch_us + 1e6 * found.looked_up / device.bandwidth
    return Cost(sympy.Integer(found.bytes), sympy.Integer(found.flops), sympy.Float(us))


def _itemsize(site: AttentionSite) -> int:
    return int(site.k.root.meta["val"].itemsize)


def _is_causal(site: AttentionSite) -> bool:
    """Tells whether later rows see more: the mask's formula has a query row in it."""
    return any(str(symbol) == "q" for symbol in getattr(site.mask.predicate, "free_symbols", ()))


def _is_flash(site: AttentionSite) -> bool:
    """Tells whether a model gives torch's attention no mask: all keys, or a triangle that it knows of."""
    call = site.out
    mask = call.args[3] if len(call.args) > 3 else call.kwargs.get("attn_mask")
    return site.family == "sdpa" and mask is None


def _grouped(site: AttentionSite) -> bool:
    """Tells whether torch's attention is told of the groups, so that nobody repeats K and V."""
    return bool(site.out.kwargs.get("enable_gqa", len(site.out.args) > 7 and site.out.args[7]))
