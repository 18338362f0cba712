"""Attention a few rows at a time, in torch: what contract ops compute, without a T x T tensor a head.

It runs on every device, has gradients, and lets a caller see the probabilities of any rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from clsa_compile.ir.masks import index_grid, parse_predicate, predicate_to_torch
from clsa_compile.ir.references import index_scores_reference
from clsa_compile.ir.scores import Score

__all__ = [
    "Masks",
    "Operands",
    "all_below",
    "best",
    "dense",
    "index_scores",
    "indexed",
    "massed",
    "readable",
    "sparse",
]

# Elements of the scores of one block of rows, over all heads.
BLOCK = 1 << 23


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


def massed(
    call: Operands, weight: Tensor, power: float, chosen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns attention and the mass fp32 [B, N, S, T] of weight [N, H], -inf where none may read.

    The boolean mask `chosen` [B, 1, S, T] has the only tokens that may be read, where it is given.
    """
    b, h, s, _ = call.q.shape
    mass = call.q.new_full((b, weight.shape[0], s, call.k.shape[2]), -math.inf, dtype=torch.float32)
    parts = []
    for rows, end in call.blocks():
        scores = call.scores(rows, end)
        if chosen is not None:
            scores = scores.masked_fill_(~chosen[:, :, rows, :end], -math.inf)
        unread = (scores == -math.inf).all(1, keepdim=True)
        probabilities = call.softmax(scores, picked=chosen is not None)
        parts.append(call.weigh(probabilities))
        # Square roots in place: the usual power, and the values have been weighed already.
        seen = probabilities.sqrt_() if power == 0.5 else probabilities**power
        pooled = (weight.to(seen) @ seen.reshape(b, h, -1)).view(b, -1, len(rows), end)
        mass[:, :, rows, :end] = pooled.masked_fill(unread, -math.inf)
    return _laid_out(torch.cat(parts, 2)), mass


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


def all_below(call: Operands, chosen: Tensor, dense_below: int) -> Tensor:
    """Returns the mask with all keys in rows whose readable ones lie within `dense_below` positions."""
    whole = chosen.clone()
    for rows, end in call.blocks():
        allowed = call.allowed(rows, end)
        if allowed is None:
            allowed = torch.ones((1, 1, len(rows), end), dtype=torch.bool, device=chosen.device)
        start, stop = _reach(allowed.any(1))
        whole[:, :, rows] |= (stop - start <= dense_below)[:, None]
    return whole


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
    """Returns the boolean mask [B, 1, S, T] of the tokens that `clsa::index_topk` names; k is q's keys."""
    b, _, s, _ = call.q.shape
    chosen = torch.zeros((b, 1, s, call.k.shape[2]), dtype=torch.bool, device=call.q.device)
    for rows, end in call.blocks():
        scores = index_scores(call, weight, lse, score, rows, end)
        chosen[:, :, rows, :end] = best(scores, topk, 0, 0)
    return chosen


def index_scores(
    call: Operands, weight: Tensor | None, lse: Tensor | None, score: Score, rows: Tensor, end: int
) -> Tensor:
    """Returns the scores fp32 [B, 1, n, end] of an index in some rows [n]; -inf where none may be read."""
    weights, sums = (None if x is None else x[:, :, rows] for x in (weight, lse))
    q, k = call.q[:, :, rows], call.k[:, :, :end]
    scores = index_scores_reference(q, k, weights, sums, None, [], call.scale, score, "", False)
    return _masked(call, scores, rows, end)


def readable(call: Operands) -> Tensor:
    """Returns the boolean mask [B, 1, S, T] of the tokens that an index may select; k is q's keys."""
    b, _, s, _ = call.q.shape
    found = torch.zeros((b, 1, s, call.k.shape[2]), dtype=torch.bool, device=call.q.device)
    for rows, end in call.blocks(1):
        open_ = torch.zeros((b, 1, len(rows), end), device=call.q.device)
        found[:, :, rows, :end] = _masked(call, open_, rows, end) > -math.inf
    return found


def _masked(call: Operands, scores: Tensor, rows: Tensor, end: int) -> Tensor:
    """Returns the scores [B, 1, n, end] of an index with the bias of its mask, -inf where it forbids."""
    if call.mask is not None and call.mask.dtype != torch.bool:
        bias = _rows_of(call.mask, rows, end)
        # What a caller writes instead of -inf means the same: never selected.
        scores = (scores + bias).masked_fill(bias <= torch.finfo(bias.dtype).min, -math.inf)
    allowed = call.allowed(rows, end)
    return scores if allowed is None else scores.masked_fill(~allowed, -math.inf)


def sparse(call: Operands, chosen: Tensor) -> Tensor:
    """Returns attention [B, H, S, Dv] over the tokens of the boolean mask [B, 1|Hkv, S, T]."""
    keys = call.k.shape[2]
    heads = call.q.shape[1]
    whole = chosen if chosen.shape[1] == 1 else chosen.repeat_interleave(heads // chosen.shape[1], 1)
    parts = []
    for rows, _ in call.blocks(whole.shape[1] if call.plain else None):
        picked = whole[:, :, rows]
        allowed = call.allowed(rows, keys)
        picked = picked if allowed is None else picked & allowed
        if call.plain and bool(picked.any(-1).all()):
            parts.append(_fused(call, call.q[:, :, rows], call.k, call.v, picked))
            continue
        scores = call.scores(rows, keys).masked_fill(~picked, -math.inf)
        parts.append(call.weigh(call.softmax(scores, picked=True)))
    return _laid_out(torch.cat(parts, 2))


def _fused(call: Operands, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and q.is_cuda:
        # On CUDA grouped heads in float32 have no kernel but the one that keeps all probabilities.
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=call.scale, enable_gqa=q.shape[1] != k.shape[1]
    )


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
