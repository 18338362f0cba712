"""Selections without a sort: the k best of T scores in a number of steps that does not depend on T.

torch-mlir turns a sort into a loop over pairs, in a dialect that only torch-mlir reads. This is the order of
`ir/ops.py` (NaN first, ties to the lowest position, -inf never, ascending positions) in plain comparisons,
sums and gathers: linalg's own. The k-th best value is found by halving the numbers that it may be, 3 or 4
bits at a time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clsa_compile.errors import MlirError

__all__ = ["best", "ranked"]

# Scores are counted in blocks of so many: a running count is then one inside of blocks and one over blocks.
_BLOCK = 128
# fp32: the least and the largest exponent, and the parts that a range between two powers is cut into, to the
# last bit.
_LEAST, _LARGEST = -126, 127
_PARTS = (16, 16, 16, 16, 16, 8)
# Of the ranges, every so-manyth is asked first.
_FINE = 16
_MAX = torch.finfo(torch.float32).max


def best(scores: Tensor, topk: int) -> Tensor:
    """Returns int32 [..., topk]: positions of the best fp32 scores [..., T], ascending, -1 where they end.

    Raises MlirError for scores of another dtype: the search ends with the last bit of an fp32 number.
    """
    if scores.dtype != torch.float32:
        raise MlirError(f"scores are {scores.dtype}; MLIR selects by fp32 scores, so cast the model down")
    keys = scores.shape[-1]
    # One block more than are needed: of a length that is one block, torch would take it that it stays so.
    blocks = keys // _BLOCK + 2
    lanes = torch.arange(_BLOCK, device=scores.device)
    order = torch.arange(blocks, device=scores.device)
    positions = order[:, None] * _BLOCK + lanes
    inside = positions < keys
    values = torch.where(inside, scores[..., torch.where(inside, positions, 0)], -math.inf)
    chosen = _chosen(values, topk)

    within = _running(chosen)
    totals = within[..., -1]
    ends = torch.where(order <= order[:, None], totals[..., None, :], 0).sum(-1)
    # The j-th is in the first block that ends behind it, at the first lane that has counted so many.
    wanted = torch.arange(topk, device=scores.device)
    block = (ends[..., None, :] <= wanted[:, None]).sum(-1)
    found = block < blocks
    block = torch.where(found, block, 0)
    row = within.gather(-2, block[..., None].expand(*block.shape, _BLOCK))
    left = wanted - (ends - totals).gather(-1, block)
    lane = (row <= left[..., None]).sum(-1)
    return torch.where(found, block * _BLOCK + lane, -1).to(torch.int32)


def ranked(values: Tensor, topk: int) -> Tensor:
    """Returns int64 [..., topk]: positions of the largest values [..., T], the largest first.

    Ties and NaN are as in `best`. Compares each with each: for few values, such as the scores of experts.
    """
    positions = torch.arange(values.shape[-1], device=values.device)
    one, other = values[..., None, :], values[..., :, None]
    equal = one == other
    larger = one > other
    if values.dtype.is_floating_point:
        is_nan = torch.isnan(values)
        first, second = is_nan[..., None, :], is_nan[..., :, None]
        larger, equal = larger | (first & ~second), equal | (first & second)
    rank = (larger | (equal & (positions < positions[:, None]))).sum(-1)
    wanted = torch.arange(topk, device=values.device)
    return torch.where(rank[..., None, :] == wanted[:, None], positions, 0).sum(-1)


def _chosen(values: Tensor, topk: int) -> Tensor:
    """Tells of blocks of scores [..., n, 128] which are among the best."""
    kth = _kth(values, topk)[..., None, None]
    above = ~(values <= kth)  # so that NaN is above everything
    count = above.sum((-1, -2))[..., None, None]
    tied = values == kth
    # More NaN than are wanted: then the first of these are the best.
    crowded = count >= topk
    tied = torch.where(crowded, above, tied) & (values != -math.inf)
    above = above & ~crowded
    missing = topk - torch.where(crowded, 0, count)
    within = _running(tied)
    totals = within[..., -1]
    order = torch.arange(totals.shape[-1], device=values.device)
    before = torch.where(order < order[:, None], totals[..., None, :], 0).sum(-1)
    return above | (tied & (before[..., None] + within <= missing))


def _running(flags: Tensor) -> Tensor:
    """Returns how many flags are set up to each lane of a block, itself included."""
    lanes = torch.arange(_BLOCK, device=flags.device)
    return (flags[..., None, :] & (lanes <= lanes[:, None])).sum(-1)


def _kth(values: Tensor, topk: int) -> Tensor:
    """Returns [...]: the topk-th largest of [..., n, 128], the lowest finite number where there are fewer.

    It is the largest number that at least topk scores reach. NaN reaches every number.
    """
    begins, widths = _ranges(values)
    coarse = _last_reached(values, begins[::_FINE], topk) * _FINE
    fine = coarse[..., None] + torch.arange(_FINE, device=values.device)
    place = coarse + _last_reached(values, begins[fine], topk)
    low, width = begins[place], widths[place]
    for parts in _PARTS:
        width = width * (1 / parts)
        bounds = low[..., None] + width[..., None] * torch.arange(parts, device=values.device)
        low = low + width * _last_reached(values, bounds, topk)
    return low


def _last_reached(values: Tensor, bounds: Tensor, topk: int) -> Tensor:
    """Returns [...]: the last of ascending bounds [..., c] that topk values reach, 0 where none is."""
    reached = ~(values[..., None, :, :] < bounds[..., None, None])
    return ((reached.sum((-1, -2)) >= topk).sum(-1) - 1).clamp(min=0)


def _ranges(like: Tensor) -> tuple[Tensor, Tensor]:
    """Returns where 512 ranges of fp32 numbers begin, ascending, and how wide they are.

    They begin at -max, -2^127, ..., -2^-126, 0, 2^-126, ..., 2^127 and infinity. All are computed exactly: by
    doubling, since a table of constants would be a tensor that a program takes as input.
    """
    powers = like.new_full((1,), 2.0**_LEAST)
    for bit in range(8):
        # 2^128 is no fp32 number, its root is.
        factor = 2.0 ** min(2**bit, 64)
        powers = torch.cat((powers, powers * factor * (factor if bit == 7 else 1.0)))
    powers = powers[: _LARGEST - _LEAST + 1]
    first, zero = powers[:1], like.new_zeros(1)
    last = like.new_full((2,), math.inf)
    begins = torch.cat((like.new_full((1,), -_MAX), -powers.flip(0), zero, powers, last))
    # Below 0 a range ends at half of where it begins; those around 0 are as wide as the next ones.
    below = torch.cat((first, powers[:-1])).flip(0)
    return begins, torch.cat((powers[-1:], below, first, powers, zero, zero))
