"""What the contract ops compute, in plain torch: the references, which are the specification.

`ir/ops.py` has the schemas, and the letters that dimensions go by. Sympy reads the texts of masks and scores;
importing it takes longer than loading a package, so an op asks for this module when it is called.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from clsa_compile.ir.masks import index_grid, interval, parse_predicate, predicate_to_torch
from clsa_compile.ir.ops import DECODE_ROWS
from clsa_compile.ir.pages import check_pages, gathered
from clsa_compile.ir.scores import Score, parse_score, pointwise_to_torch


def attend_mask(
    mask: Tensor | None,
    mask_inputs: Sequence[Tensor],
    predicate: str,
    sizes: tuple[int, int, int, int],
    device: torch.device,
) -> tuple[Tensor | None, Tensor | None]:
    """Returns (valid, bias), each broadcastable to [B, H, S, T] or None.

    `valid` is boolean: predicate AND the mask where the mask is boolean. `bias` is the additive mask;
    its -inf entries end up invalid by themselves.
    """
    valid = mask if mask is not None and mask.dtype == torch.bool else None
    bias = mask if mask is not None and mask.dtype != torch.bool else None
    if predicate:
        allowed = predicate_to_torch(parse_predicate(predicate), index_grid(sizes, device), mask_inputs)
        valid = allowed if valid is None else valid & allowed
    return valid, bias


def _grouped_scores(q: Tensor, k: Tensor, scale: float, softcap: float) -> Tensor:
    """Returns fp32 scores [B, H, S, T] without copying k to H heads."""
    b, h, s, d = q.shape
    hkv, t = k.shape[1], k.shape[2]
    rows = q.reshape(b, hkv, (h // hkv) * s, d)
    scores = torch.matmul(rows, k.transpose(-1, -2)).to(_acc(q)) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    return scores.reshape(b, h, s, t)


def _acc(x: Tensor) -> torch.dtype:
    """Returns the dtype that sums are kept in: fp32, or fp64 for the float64 oracle."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _softmax(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns (probabilities, lse) of scores [B, H, S, T]; rows of -inf give zeros and -inf."""
    peak = scores.amax(-1, keepdim=True)
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(1, -1, 1, 1)
        peak = torch.maximum(peak, sink)
    peak = torch.where(peak == -math.inf, 0.0, peak)
    weights = torch.exp(scores - peak)
    total = weights.sum(-1, keepdim=True)
    lse = (torch.log(total) + peak).squeeze(-1)
    if sinks is not None:
        total = total + torch.exp(sink - peak)
    return weights / torch.where(total == 0, 1.0, total), lse


def _weighted_values(probabilities: Tensor, v: Tensor) -> Tensor:
    b, h, s, t = probabilities.shape
    hkv = v.shape[1]
    rows = probabilities.to(v.dtype).reshape(b, hkv, (h // hkv) * s, t)
    return torch.matmul(rows, v).reshape(b, h, s, v.shape[-1])


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bounds: Tensor | None,
    mask_inputs: Sequence[Tensor],
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    predicate: str,
    pages: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Dense attention with grouped heads: out [B, H, S, Dv] in q's dtype, lse [B, H, S] in fp32.

    q [B, H, S, D], k [B, Hkv, T, D], v [B, Hkv, T, Dv]. `mask` is boolean or additive and broadcasts
    to [B, H, S, T]; `predicate` is AND-ed to it. Additive values at the dtype's lowest count as forbidden: a
    row that has no other is padding, and gives zeros or a mean of v. `bounds` int32 [B, S, 2] is a half-open
    hint that may be loose, and is not needed here. `sinks` [H] joins the softmax's denominator and no value;
    the lse is that of the scores without the sink. `softcap` 0 means none. `pages`: see `ir/pages.py`.
    """
    check_pages(q, k, v, pages)
    k, v = gathered(k, pages), gathered(v, pages)
    scores = _masked_scores(q, k, mask, mask_inputs, scale, softcap, predicate)
    probabilities, lse = _softmax(scores, sinks)
    return _weighted_values(probabilities, v), lse


def _masked_scores(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    mask_inputs: Sequence[Tensor],
    scale: float,
    softcap: float,
    predicate: str,
) -> Tensor:
    """Returns fp32 scores [B, H, S, T], -inf where a key may not be read."""
    sizes = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    scores = _grouped_scores(q, k, scale, softcap)
    valid, bias = attend_mask(mask, mask_inputs, predicate, sizes, q.device)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    if valid is not None:
        scores = torch.where(valid, scores, -math.inf)
    return scores


def attention_mass_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    bounds: Tensor | None,
    mask_inputs: Sequence[Tensor],
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    predicate: str,
    power: float,
    indices: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Dense attention that also says what it looked at: out [B, H, S, Dv], mass fp32 [B, N, S, T].

    mass[n] is the sum over heads of weight [N, H] times the probability after the softmax, raised to `power`;
    a sink takes its share of the softmax. It is -inf where no head may read a key, the lowest value of an
    additive mask being such a prohibition. `indices` int32 [B, 1, S, P] are the only tokens that may be read,
    where they are given. The rest is as in `attention_reference`.
    """
    scores = _masked_scores(q, k, mask, mask_inputs, scale, softcap, predicate)
    if indices is not None:
        scores = torch.where(selected(indices, k.shape[2]), scores, -math.inf)
    probabilities, _ = _softmax(scores, sinks)
    seen = probabilities if power == 1 else probabilities**power
    mass = torch.einsum("nh,bhst->bnst", weight.to(scores.dtype), seen)
    readable = scores > -math.inf
    if mask is not None and mask.dtype != torch.bool:
        readable = readable & (mask > torch.finfo(mask.dtype).min)
    readable = readable.any(1, keepdim=True)
    return _weighted_values(probabilities, v), torch.where(readable, mass, -math.inf)


def _best(scores: Tensor, topk: int) -> Tensor:
    """Returns int32 [..., topk]: positions of the best scores [..., T], ascending, -1 where they end."""
    keys = scores.shape[-1]
    # A number that is not known may be smaller than topk: no graph is to assume that it is not.
    missing = max(0, topk - keys) if isinstance(keys, int) else topk
    if missing:
        scores = torch.nn.functional.pad(scores, (0, missing), value=-math.inf)
    values, order = torch.sort(scores, dim=-1, descending=True, stable=True)
    values, order = values[..., :topk], order[..., :topk]
    order = torch.where(values == -math.inf, torch.iinfo(torch.int32).max, order)
    order = torch.sort(order, dim=-1).values
    return torch.where(order == torch.iinfo(torch.int32).max, -1, order).to(torch.int32)


def select_topk_reference(
    mass: Tensor,
    bounds: Tensor | None,
    topk: int,
    keep_first: int,
    keep_last: int,
    *,
    best: Callable[[Tensor, int], Tensor] = _best,
) -> Tensor:
    """Returns int32 [B, N, S, topk]: the tokens of largest mass [B, N, S, T], as `index_topk` orders them.

    The `keep_first` positions from the first token that may be read on, and the `keep_last` up to the last
    one, are always among them where they may be read. A token may be read where its mass is not -inf.
    `bounds` int32 [B, S, 2] is as `mask_bounds` gives it, and not needed here. `best` is another way to
    choose the same tokens, for whoever cannot sort.
    """
    return best(keep_ends(mass, keep_first, keep_last), topk)


def keep_ends(mass: Tensor, keep_first: int, keep_last: int) -> Tensor:
    """Returns mass [..., T] with +inf at the tokens that are always selected."""
    if not keep_first and not keep_last:
        return mass
    positions = torch.arange(mass.shape[-1], device=mass.device)
    readable = mass > -math.inf
    start = torch.where(readable, positions, mass.shape[-1]).amin(-1, keepdim=True)
    end = torch.where(readable, positions + 1, 0).amax(-1, keepdim=True)
    kept = (positions < start + keep_first) | (positions >= end - keep_last)
    return torch.where(kept & readable, math.inf, mass)


def selected(indices: Tensor, keys: int) -> Tensor:
    """Returns the boolean mask [B, 1|Hkv, S, T] of the tokens that `indices` [B, 1|Hkv, S, K] names."""
    # One slot more than there are keys takes the -1 entries.
    slots = torch.where(indices < 0, keys, indices).long()
    flags = torch.zeros((*indices.shape[:-1], keys + 1), dtype=torch.bool, device=indices.device)
    return flags.scatter(-1, slots, True)[..., :keys]


def _heads_like(x: Tensor, h: int) -> Tensor:
    """Repeats a per-kv-head tensor [B, Hkv, ...] to [B, H, ...]; one head broadcasts by itself."""
    return x if x.shape[1] == 1 else x.repeat_interleave(h // x.shape[1], dim=1)


def all_below(indices: Tensor, reach: Tensor, dense_below: int) -> Tensor:
    """Returns indices [B, 1|Hkv, S, max(K, dense_below)] that name all tokens of rows with few of them.

    `reach` int32 [B, S, 2] is what `mask_bounds` says: from the first to one past the last readable token.
    """
    missing = dense_below - indices.shape[-1]
    if missing > 0:
        indices = torch.nn.functional.pad(indices, (0, missing), value=-1)
    start, end = (x[:, None, :, None] for x in reach.unbind(-1))
    tokens = start + torch.arange(indices.shape[-1], device=indices.device, dtype=torch.int32)
    return torch.where(end - start <= dense_below, torch.where(tokens < end, tokens, -1), indices)


def sparse_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    mask: Tensor | None,
    bounds: Tensor | None,
    mask_inputs: Sequence[Tensor],
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    predicate: str,
    pages: Tensor | None = None,
    dense_below: int = 0,
) -> Tensor:
    """Attention over the tokens that `indices` int32 [B, 1|Hkv, S, K] names: out [B, H, S, Dv].

    Validity is mask AND predicate AND index. A row whose readable tokens lie within `dense_below` positions
    reads all of them, whatever its indices say. The rest is as in `attention_reference`. Decode gathers the K
    rows; more query rows than DECODE_ROWS mask a dense pass, which needs less memory.
    """
    check_pages(q, k, v, pages)
    k, v = gathered(k, pages), gathered(v, pages)
    b, h, s, d = q.shape
    hkv, t, dv = k.shape[1], k.shape[2], v.shape[3]
    few = isinstance(s, int) and s <= DECODE_ROWS
    if dense_below:
        reach = mask_bounds_reference(q, mask, mask_inputs, h, t, predicate)
        indices = all_below(indices, reach, dense_below)
    valid, bias = attend_mask(mask, mask_inputs, predicate, (b, h, s, t), q.device)
    if not few:
        chosen = _heads_like(selected(indices, t), h)
        valid = chosen if valid is None else valid & chosen
        scores = _grouped_scores(q, k, scale, softcap)
        if bias is not None:
            scores = scores + bias.to(scores.dtype)
        probabilities, _ = _softmax(torch.where(valid, scores, -math.inf), sinks)
        return _weighted_values(probabilities, v)

    kk = indices.shape[-1]
    rows = indices.clamp(min=0).long().expand(b, hkv, s, kk).reshape(b, hkv, s * kk, 1)
    keys = k.gather(2, rows.expand(b, hkv, s * kk, d)).view(b, hkv, s, kk, d)
    values = v.gather(2, rows.expand(b, hkv, s * kk, dv)).view(b, hkv, s, kk, dv)
    grouped = q.reshape(b, hkv, h // hkv, s, d).transpose(2, 3)
    scores = torch.matmul(grouped, keys.transpose(-1, -2)).to(_acc(q)) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.transpose(2, 3).reshape(b, h, s, kk)
    picked = _heads_like(indices.clamp(min=0).long(), h).expand(b, h, s, kk)
    if bias is not None:
        scores = scores + bias.expand(b, h, s, t).gather(3, picked).to(scores.dtype)
    allowed = _heads_like(indices, h) >= 0
    if valid is not None:
        allowed = allowed & valid.expand(b, h, s, t).gather(3, picked)
    probabilities, _ = _softmax(torch.where(allowed, scores, -math.inf), sinks)
    probabilities = probabilities.to(v.dtype).reshape(b, hkv, h // hkv, s, kk).transpose(2, 3)
    return torch.matmul(probabilities, values).transpose(2, 3).reshape(b, h, s, dv)


def index_scores_reference(
    q: Tensor,
    k: Tensor,
    weight: Tensor | None,
    lse: Tensor | None,
    mask: Tensor | None,
    mask_inputs: Sequence[Tensor],
    scale: float,
    score: Score,
    predicate: str,
    per_kv_head: bool,
) -> Tensor:
    """Returns the fp32 scores [B, 1|Hkv, S, T] that `index_topk` ranks; invalid keys are -inf."""
    b, h, s, d = q.shape
    hkv, t = k.shape[1], k.shape[2]
    acc = _acc(q)
    rows = q.to(acc).reshape(b, hkv, (h // hkv) * s, d)
    dot = (torch.matmul(rows, k.to(acc).transpose(-1, -2)) * scale).reshape(b, h, s, t)
    points = pointwise_to_torch(
        score,
        dot,
        None if weight is None else weight.to(acc).unsqueeze(-1),
        None if lse is None else lse.to(acc).unsqueeze(-1),
    )
    heads = points.reshape(b, hkv, h // hkv, s, t) if per_kv_head else points.unsqueeze(1)
    reduce: dict[str, Callable[..., Tensor]] = {"sum": torch.sum, "max": torch.amax, "mean": torch.mean}
    scores = reduce[score.reduce](heads, dim=2)
    valid, bias = attend_mask(mask, mask_inputs, predicate, (b, 1, s, t), q.device)
    if bias is not None:
        scores = scores + bias.to(acc)
        # What a caller writes instead of -inf means the same: never selected.
        valid_bias = bias > torch.finfo(bias.dtype).min
        valid = valid_bias if valid is None else valid & valid_bias
    return scores if valid is None else torch.where(valid, scores, -math.inf)


def index_topk_reference(
    q: Tensor,
    k: Tensor,
    weight: Tensor | None,
    lse: Tensor | None,
    mask: Tensor | None,
    bounds: Tensor | None,
    mask_inputs: Sequence[Tensor],
    topk: int,
    scale: float,
    score: str,
    predicate: str,
    per_kv_head: bool,
    pages: Tensor | None = None,
    candidates: Tensor | None = None,
    *,
    best: Callable[[Tensor, int], Tensor] = _best,
) -> Tensor:
    """Returns int32 [B, 1|Hkv, S, topk]: the best-scoring valid tokens, ascending, padded with -1.

    q [B, Hi, S, Di], k [B, 1|Hkv, T, Di], weight [B, Hi, S], lse [B, Hi, S]; `mask` as in attention with
    one head. Ties go to the lowest position, NaN ranks above everything (as in torch.topk), +0 equals -0,
    and a token that scores -inf is never selected. One set a row, or one a kv head. `pages`: see
    `ir/pages.py`; positions are those of tokens in their sequence. `candidates` int32 [B, 1, S, P],
    ascending, are the only tokens that may be selected, where they are given. `best`: see `select_topk`.
    """
    check_pages(q, k, None, pages)
    k = gathered(k, pages)
    scores = index_scores_reference(
        q, k, weight, lse, mask, mask_inputs, scale, parse_score(score), predicate, per_kv_head
    )
    if candidates is not None:
        scores = torch.where(selected(candidates, scores.shape[-1]), scores, -math.inf)
    return best(scores, topk)


def mask_bounds_reference(
    like: Tensor,
    mask: Tensor | None,
    mask_inputs: Sequence[Tensor],
    heads: int,
    keys: int,
    predicate: str,
) -> Tensor:
    """Returns int32 [B, S, 2]: from the first to one past the last key that any head of a row may read.

    `like` [B, *, S, *] gives B, S and the device. A row without valid keys gives (0, 0). An additive mask
    forbids -inf and its dtype's lowest finite value; any other value only biases.
    """
    b, s = like.shape[0], like.shape[2]
    ends = interval(parse_predicate(predicate)) if mask is None else None
    if ends is not None:
        return _interval_bounds(ends, mask_inputs, (b, 1, s, keys), like.device)
    valid, bias = attend_mask(mask, mask_inputs, predicate, (b, heads, s, keys), like.device)
    if bias is not None:
        lifted = bias > torch.finfo(bias.dtype).min
        valid = lifted if valid is None else valid & lifted
    # int64 until the end: a symbolic T is one, and Inductor wants one type throughout a reduction.
    positions = torch.arange(keys, device=like.device)
    assert valid is not None  # without a mask and with an empty predicate it is an interval
    valid = valid.expand(b, valid.shape[1], s, keys)
    end = torch.where(valid, positions + 1, 0).amax((1, 3))
    start = torch.where(valid, positions, keys).amin((1, 3))
    return torch.stack((torch.minimum(start, end), end), dim=-1).to(torch.int32)


def _interval_bounds(
    ends: tuple[tuple[Any, ...], tuple[Any, ...]],
    mask_inputs: Sequence[Tensor],
    sizes: tuple[int, int, int, int],
    device: torch.device,
) -> Tensor:
    """Returns `mask_bounds` of an interval [max(lows), min(highs)), without a look at any key."""
    grid = index_grid((*sizes[:3], 1), device)
    start = torch.zeros_like(grid["q"])
    end = start + sizes[3]
    for low in ends[0]:
        start = start.clamp(min=predicate_to_torch(low, grid, mask_inputs))
    for high in ends[1]:
        end = end.clamp(max=predicate_to_torch(high, grid, mask_inputs))
    start, end = torch.broadcast_tensors(start, end)
    both = torch.stack((start, end), dim=-1)
    both = torch.where((start < end).unsqueeze(-1), both, 0)
    return both.reshape(-1, sizes[2], 2).expand(sizes[0], sizes[2], 2).to(torch.int32).contiguous()


REFERENCES: dict[str, Callable[..., Any]] = {
    "attention": attention_reference,
    "attention_mass": attention_mass_reference,
    "select_topk": select_topk_reference,
    "sparse_attention": sparse_attention_reference,
    "index_topk": index_topk_reference,
    "mask_bounds": mask_bounds_reference,
}


def _laid_out(out: Tensor) -> Tensor:
    """Returns [B, H, S, Dv] in memory order [B, S, H, Dv], as the fakes declare it and kernels write it."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _attention(*args: Any) -> tuple[Tensor, Tensor]:
    out, lse = attention_reference(*args)
    return _laid_out(out), lse


def _attention_mass(*args: Any) -> tuple[Tensor, Tensor]:
    out, mass = attention_mass_reference(*args)
    return _laid_out(out), mass.contiguous()


def _sparse_attention(*args: Any) -> Tensor:
    return _laid_out(sparse_attention_reference(*args))


# What the ops do that are called by themselves: outputs lie in memory as the fakes say.
CALLABLE: dict[str, Callable[..., Any]] = {
    **REFERENCES,
    "attention": _attention,
    "attention_mass": _attention_mass,
    "sparse_attention": _sparse_attention,
}
