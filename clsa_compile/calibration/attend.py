"""Attention a few rows at a time, in torch: what contract ops compute, without a T x T tensor a head.

It runs on every device, has gradients, and lets a caller see the probabilities of any rows. Selections are
positions, as those of contract ops, and become masks a few rows at a time. Mass is held whole up to `HELD`
elements, of which three are there at once where anchors are added up; above that a selection computes it
again, a few rows at a time, from the queries and keys of all its anchors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, reduce
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from clsa_compile.ir.masks import index_grid, parse_predicate, predicate_to_torch
from clsa_compile.ir.references import index_scores_reference, selected
from clsa_compile.ir.scores import Score

__all__ = [
    "AllBelow",
    "Chosen",
    "Masks",
    "Mass",
    "Operands",
    "Readable",
    "Tokens",
    "best",
    "dense",
    "index_scores",
    "indexed",
    "massed",
    "positions",
    "selection",
    "sparse",
]

# Elements of the scores of one block of rows, over all heads.
BLOCK = 1 << 23
# Elements of the mass of one layer, over all sets of tokens that it is for, up to which it is held whole.
HELD = 1 << 28


@dataclass(frozen=True, slots=True)
class Operands:
    """What a contract attention reads; see `ir/ops.py`. `causal` says that its mask is kv <= q, no more."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    mask_inputs: tuple[Tensor, ...]
    sinks: Tensor | None
    scale: float
    softcap: float
    predicate: str
    causal: bool = False

    @property
    def plain(self) -> bool:
        """True where torch's own fused attention computes it, given the rows' mask."""
        return self.mask is None and self.sinks is None and not self.softcap

    def blocks(self, heads: int | None = None) -> Iterator[tuple[Tensor, int]]:
        """Yields blocks of rows, and one past the last key that they may read; `heads` are held at once."""
        queries, keys = self.q.shape[2], self.k.shape[2]
        held = self.q.shape[0] * (self.q.shape[1] if heads is None else heads)
        step = max(1, BLOCK // (held * keys))
        for start in range(0, queries, step):
            end = min(start + step, queries)
            yield torch.arange(start, end, device=self.q.device), end if self.causal else keys

    def scores(self, rows: Tensor, end: int) -> Tensor:
        """Returns fp32 scores [B, H, len(rows), end], -inf where a key may not be read."""
        q, k = self.q[:, :, rows], self.k[:, :, :end]
        b, h, s, d = q.shape
        hkv = k.shape[1]
        grouped = q.reshape(b, hkv, h // hkv * s, d)
        scores = (grouped @ k.transpose(-1, -2)).float().mul(self.scale).view(b, h, s, end)
        if self.softcap:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if self.mask is not None and self.mask.dtype != torch.bool:
            bias = _rows_of(self.mask, rows, end)
            # What a caller writes instead of -inf means the same.
            forbidden = bias <= torch.finfo(bias.dtype).min
            scores = (scores + bias.float()).masked_fill(forbidden, -math.inf)
        allowed = self.allowed(rows, end)
        return scores if allowed is None else scores.masked_fill_(~allowed, -math.inf)

    def allowed(self, rows: Tensor, end: int) -> Tensor | None:
        """Returns which keys may be read, broadcastable to [B, H, len(rows), end], or None for all."""
        if self.causal:
            return torch.arange(end, device=rows.device) <= rows.view(1, 1, -1, 1)
        boolean = self.mask is not None and self.mask.dtype == torch.bool
        valid = _rows_of(self.mask, rows, end) if boolean and self.mask is not None else None
        if not self.predicate:
            return valid
        sizes = (self.q.shape[0], self.q.shape[1], 1, end)
        grid = {**index_grid(sizes, self.q.device), "q": rows.view(1, 1, -1, 1)}
        met = predicate_to_torch(_parsed(self.predicate), grid, self.mask_inputs)
        return met if valid is None else met & valid

    def probabilities(self, rows: Tensor, end: int) -> Tensor:
        """Returns the fp32 softmax [B, H, len(rows), end]; a sink takes its share, empty rows are 0."""
        return self.softmax(self.scores(rows, end))

    def softmax(self, scores: Tensor, picked: bool = False) -> Tensor:
        """Returns the probabilities of scores [B, H, n, keys], as `probabilities` does.

        `picked`: of some keys only, so that a row may have none, even where the mask is causal.
        """
        if self.sinks is not None:
            sink = self.sinks.to(scores).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            return torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
        if self.causal and not picked:
            return scores.softmax(-1)
        # A row without a key to read is padding: zeros, not NaN.
        empty = (scores == -math.inf).all(-1, keepdim=True)
        return scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)

    def weigh(self, probabilities: Tensor) -> Tensor:
        """Returns the values' sum [B, H, rows, Dv] by probabilities [B, H, rows, keys]."""
        b, h, s, keys = probabilities.shape
        v = self.v[:, :, :keys]
        grouped = probabilities.to(v.dtype).reshape(b, v.shape[1], -1, keys)
        return (grouped @ v).view(b, h, s, v.shape[-1])


class Masks:
    """Knows which masks of a run are causal; each is looked at once."""

    def __init__(self) -> None:
        self._seen: list[tuple[str, tuple[Tensor, ...], tuple[int, ...], bool]] = []

    def operands(self, args: Sequence[Any]) -> Operands:
        """Returns the operands of a contract attention from (q, k, v, mask, bounds, mask_inputs, ...)."""
        q, k, v, mask, _, inputs, sinks, scale, softcap, predicate = args[:10]
        found = Operands(q, k, v, mask, tuple(inputs), sinks, scale, softcap, predicate)
        if mask is not None or q.shape[2] != k.shape[2]:
            return found
        return replace(found, causal=self._causal(found))

    def _causal(self, call: Operands) -> bool:
        sizes = (call.q.shape[0], call.q.shape[2])
        for predicate, inputs, known, answer in self._seen:
            same = len(inputs) == len(call.mask_inputs) and all(map(_is, inputs, call.mask_inputs))
            if same and (predicate, known) == (call.predicate, sizes):
                return answer
        answer = all(_is_causal(call.allowed(rows, end), rows, end) for rows, end in call.blocks())
        self._seen.append((call.predicate, call.mask_inputs, sizes, answer))
        return answer


def dense(call: Operands) -> Tensor:
    """Returns dense attention [B, H, S, Dv]; with gradients it is computed again for them."""
    if call.plain and call.causal:
        return _laid_out(_fused(call, call.q, call.k, call.v, None))
    parts = []
    for rows, end in call.blocks():

        def block(q: Tensor, k: Tensor, v: Tensor, rows: Tensor = rows, end: int = end) -> Tensor:
            ours = replace(call, q=q, k=k, v=v)
            return ours.weigh(ours.probabilities(rows, end))

        given = (call.q, call.k, call.v)
        tracked = torch.is_grad_enabled() and any(x.requires_grad for x in given)
        parts.append(checkpoint(block, *given, use_reentrant=False) if tracked else block(*given))
    return _laid_out(torch.cat(parts, 2))


class Tokens(Protocol):
    """The tokens that each row reads, in one set for all heads or one a kv head."""

    @property
    def sets(self) -> int:
        """1, or the number of kv heads."""

    def of(self, rows: Tensor) -> Tensor:
        """Returns those of some rows [n], as a boolean mask [B, sets, n, T]."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """Tokens by position: int32 [B, sets, S, K], -1 where there are no more; `keys` is T."""

    indices: Tensor
    keys: int

    @property
    def sets(self) -> int:
        """See `Tokens`."""
        return self.indices.shape[1]

    def of(self, rows: Tensor) -> Tensor:
        """See `Tokens`."""
        # Kernels want masks whose rows are aligned.
        return selected(self.indices[:, :, rows], self.keys).contiguous()


@dataclass(frozen=True, slots=True)
class Readable:
    """All tokens that an index may select; `call` has the index's mask, and its queries and keys."""

    call: Operands

    @property
    def sets(self) -> int:
        """See `Tokens`."""
        return 1

    def of(self, rows: Tensor) -> Tensor:
        """See `Tokens`."""
        b, keys = self.call.q.shape[0], self.call.k.shape[2]
        none = torch.zeros((b, 1, len(rows), keys), device=self.call.q.device)
        return _masked(self.call, none, rows, keys) > -math.inf


@dataclass(frozen=True, slots=True)
class AllBelow:
    """Chosen tokens, but all of them for rows whose readable ones lie within `dense_below` positions."""

    chosen: Tokens
    call: Operands
    dense_below: int

    @property
    def sets(self) -> int:
        """See `Tokens`."""
        return self.chosen.sets

    def of(self, rows: Tensor) -> Tensor:
        """See `Tokens`."""
        keys = self.call.k.shape[2]
        allowed = self.call.allowed(rows, keys)
        if allowed is None:
            allowed = torch.ones((1, 1, len(rows), keys), dtype=torch.bool, device=rows.device)
        start, stop = _reach(allowed.any(1))
        return self.chosen.of(rows) | (stop - start <= self.dense_below)[:, None]


@dataclass(frozen=True, slots=True)
class _Source:
    """What the mass of one layer is made of. weight [N, H]; `among` the only tokens that it may read."""

    call: Operands
    weight: Tensor
    power: float
    among: Tokens | None

    def probabilities(self, rows: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """Returns those [B, H, n, end] of some rows, and which keys [B, 1, n, end] no head may read."""
        scores = self.call.scores(rows, end)
        if self.among is not None:
            scores = scores.masked_fill_(~self.among.of(rows)[..., :end], -math.inf)
        unread = (scores == -math.inf).all(1, keepdim=True)
        return self.call.softmax(scores, picked=self.among is not None), unread

    def mass(self, probabilities: Tensor, unread: Tensor) -> Tensor:
        """Returns the mass [B, N, n, end]; `probabilities` are of no use afterwards."""
        b, h, n, end = probabilities.shape
        # Square roots in place: the usual power.
        seen = probabilities.sqrt_() if self.power == 0.5 else probabilities**self.power
        pooled = (self.weight.to(seen) @ seen.reshape(b, h, -1)).view(b, -1, n, end)
        return pooled.masked_fill(unread, -math.inf)


@dataclass(frozen=True, slots=True)
class Mass:
    """Mass fp32 [B, N, S, T], summed over layers, -inf where none may read.

    held: all of it, where it is small for all of the layers; otherwise `blocks` computes it again.
    """

    sources: tuple[_Source, ...]
    held: Tensor | None

    def __add__(self, other: Mass) -> Mass:
        whole = None if self.held is None or other.held is None else self.held + other.held
        return Mass(self.sources + other.sources, whole)

    def sets(self, start: int, end: int) -> Mass:
        """Returns the mass of some of the N sets."""
        sources = tuple(replace(source, weight=source.weight[start:end]) for source in self.sources)
        return Mass(sources, None if self.held is None else self.held[:, start:end])

    def blocks(self) -> Iterator[Tensor]:
        """Yields blocks [B, N, n, T] of rows, from the first to the last."""
        first = self.sources[0].call
        keys, causal = first.k.shape[2], all(source.call.causal for source in self.sources)
        for rows, end in first.blocks():
            if self.held is not None:
                yield self.held[:, :, rows]
                continue
            end = end if causal else keys
            # One after the other, as sums of what is held.
            parts = (source.mass(*source.probabilities(rows, end)) for source in self.sources)
            total = reduce(torch.add, parts)
            yield torch.nn.functional.pad(total, (0, keys - end), value=-math.inf)


def massed(call: Operands, weight: Tensor, power: float, among: Tokens | None = None) -> tuple[Tensor, Mass]:
    """Returns attention and the mass of weight [N, H]; `among` are the only tokens that may be read."""
    b, _, s, _ = call.q.shape
    keys, sets = call.k.shape[2], weight.shape[0]
    # Mass needs no values: what is kept until tokens are chosen is less without.
    source = _Source(replace(call, v=call.k), weight, power, among)
    held = None
    if b * sets * s * keys <= HELD:
        held = call.q.new_full((b, sets, s, keys), -math.inf, dtype=torch.float32)
    parts = []
    for rows, end in call.blocks():
        probabilities, unread = source.probabilities(rows, end)
        parts.append(call.weigh(probabilities))
        if held is not None:
            held[:, :, rows, :end] = source.mass(probabilities, unread)
    return _laid_out(torch.cat(parts, 2)), Mass((source,), held)


def selection(mass: Mass, topk: int, keep_first: int, keep_last: int) -> Tensor:
    """Returns int32 [B, N, S, min(topk, T)]: the tokens that `clsa::select_topk` names."""
    blocks = (best(block, topk, keep_first, keep_last) for block in mass.blocks())
    return torch.cat([positions(block, topk) for block in blocks], 2)


def positions(chosen: Tensor, most: int) -> Tensor:
    """Returns int32 [..., min(most, T)] of a mask [..., T] with no more tokens: ascending, then -1."""
    keys = chosen.shape[-1]
    count = min(most, keys)
    # One slot more than there are tokens takes what is not chosen.
    slots = torch.where(chosen, chosen.cumsum(-1) - 1, count)
    found = torch.full((*chosen.shape[:-1], count + 1), -1, dtype=torch.int32, device=chosen.device)
    tokens = torch.arange(keys, dtype=torch.int32, device=chosen.device).expand(chosen.shape)
    return found.scatter_(-1, slots, tokens)[..., :count].contiguous()


def best(mass: Tensor, topk: int, keep_first: int, keep_last: int) -> Tensor:
    """Returns the boolean mask [B, N, S, T] of the tokens that `clsa::select_topk` names."""
    chosen = torch.empty_like(mass, dtype=torch.bool)
    keys = mass.shape[-1]
    step = max(1, BLOCK // (mass.shape[0] * mass.shape[1] * keys))
    for start in range(0, mass.shape[2], step):
        block = mass[:, :, start : start + step]
        readable = block > -math.inf
        block = torch.where(ends(readable, keep_first, keep_last), math.inf, block)
        if topk >= keys:
            chosen[:, :, start : start + step] = readable
            continue
        least = block.topk(topk, -1, sorted=False).values.amin(-1, keepdim=True)
        above, ties = block > least, (block == least) & readable
        room = topk - above.sum(-1, keepdim=True)
        if bool((ties.sum(-1, keepdim=True) > room).any()):
            ties &= ties.cumsum(-1) <= room
        chosen[:, :, start : start + step] = above | ties
    return chosen


def ends(readable: Tensor, keep_first: int, keep_last: int) -> Tensor:
    """Returns which of the readable tokens [..., T] are always selected: those at both ends."""
    positions = torch.arange(readable.shape[-1], device=readable.device)
    start, stop = _reach(readable)
    return readable & ((positions < start + keep_first) | (positions >= stop - keep_last))


def _reach(readable: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the position [..., 1] of the first readable token [..., T], and the one after the last."""
    keys = readable.shape[-1]
    positions = torch.arange(keys, device=readable.device)
    start = torch.where(readable, positions, keys).amin(-1, keepdim=True)
    return start, torch.where(readable, positions + 1, 0).amax(-1, keepdim=True)


def indexed(call: Operands, weight: Tensor | None, lse: Tensor | None, score: Score, topk: int) -> Tensor:
    """Returns int32 [B, 1, S, min(topk, T)]: the tokens that `clsa::index_topk` names; k is q's keys."""
    count = min(topk, call.k.shape[2])
    parts = []
    for rows, end in call.blocks():
        found = positions(best(index_scores(call, weight, lse, score, rows, end), topk, 0, 0), count)
        parts.append(torch.nn.functional.pad(found, (0, count - found.shape[-1]), value=-1))
    return torch.cat(parts, 2)


def index_scores(
    call: Operands, weight: Tensor | None, lse: Tensor | None, score: Score, rows: Tensor, end: int
) -> Tensor:
    """Returns the scores fp32 [B, 1, n, end] of an index in some rows [n]; -inf where none may be read."""
    weights, sums = (None if x is None else x[:, :, rows] for x in (weight, lse))
    q, k = call.q[:, :, rows], call.k[:, :, :end]
    scores = index_scores_reference(q, k, weights, sums, None, [], call.scale, score, "", False)
    return _masked(call, scores, rows, end)


def _masked(call: Operands, scores: Tensor, rows: Tensor, end: int) -> Tensor:
    """Returns the scores [B, 1, n, end] of an index with the bias of its mask, -inf where it forbids."""
    if call.mask is not None and call.mask.dtype != torch.bool:
        bias = _rows_of(call.mask, rows, end)
        # What a caller writes instead of -inf means the same: never selected.
        scores = (scores + bias).masked_fill(bias <= torch.finfo(bias.dtype).min, -math.inf)
    allowed = call.allowed(rows, end)
    return scores if allowed is None else scores.masked_fill(~allowed, -math.inf)


def sparse(call: Operands, chosen: Tokens) -> Tensor:
    """Returns attention [B, H, S, Dv] over chosen tokens."""
    keys = call.k.shape[2]
    heads = 1 if chosen.sets == 1 else call.q.shape[1]
    parts = []
    for rows, _ in call.blocks(heads if call.plain else None):
        picked = chosen.of(rows).repeat_interleave(heads // chosen.sets, 1)
        allowed = call.allowed(rows, keys)
        picked = picked if allowed is None else picked & allowed
        if call.plain and bool(picked.any(-1).all()):
            parts.append(_fused(call, call.q[:, :, rows], call.k, call.v, picked))
            continue
        scores = call.scores(rows, keys).masked_fill(~picked, -math.inf)
        parts.append(call.weigh(call.softmax(scores, picked=True)))
    return _laid_out(torch.cat(parts, 2))


def _fused(call: Operands, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    groups, width = q.shape[1] // k.shape[1], v.shape[-1]
    # Where there is no kernel, torch keeps all probabilities: on CUDA for grouped heads in float32, on others
    # for values that are not as wide as keys.
    if groups > 1 and q.is_cuda:
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    elif not q.is_cuda:
        most = max(k.shape[-1], width)
        q, k, v = (torch.nn.functional.pad(x, (0, most - x.shape[-1])) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=call.scale, enable_gqa=q.shape[1] != k.shape[1]
    )[..., :width]


def _rows_of(mask: Tensor, rows: Tensor, end: int) -> Tensor:
    part = mask if mask.shape[-2] == 1 else mask[..., rows, :]
    return part if mask.shape[-1] == 1 else part[..., :end]


def _is_causal(allowed: Tensor | None, rows: Tensor, end: int) -> bool:
    positions = torch.arange(end, device=rows.device)
    return allowed is not None and bool((allowed == (positions <= rows.view(-1, 1))).all())


def _laid_out(out: Tensor) -> Tensor:
    """Returns [B, H, S, Dv] in memory order [B, S, H, Dv], as contract ops give it."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _is(a: Any, b: Any) -> bool:
    return a is b


@cache
def _parsed(predicate: str) -> Any:
    return parse_predicate(predicate)
