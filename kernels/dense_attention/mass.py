"""Dense attention of a few query rows that also says how much its heads looked at each token.

The pass over K and V that attention makes anyway leaves its scores behind, fp16 [B, H, S, T]: for 24 heads
over 8 kv heads of 128 in bfloat16 that is 1% of what it reads. A second kernel turns them into mass; K is
not read again, which would be half of the pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clsa_compile.ir.variants import Facts, Support, Variant
from clsa_compile.kernels.dense_attention import decode
from clsa_compile.kernels.index_topk.select import padded
from clsa_compile.kernels.launch import Wrap, bounds_arguments, ceil_div
from clsa_compile.kernels.render import kernel

LOG2E = 1.4426950408889634
# A program's keys and warps (a thread holds 8 keys), heads in flight, and sets of tokens that it sums for.
BLOCK_T = 1024
WARPS = 4
MOST_HEADS = 8
MOST_SETS = 8


def supports(facts: Facts) -> Support:
    """Takes what dense decode takes, but no pages, and no tokens that alone may be read."""
    if facts.pooled:
        return Support(False, "only some tokens may be read")
    return Support(False, "a cache of pages") if facts.paged else decode.supports(facts)


def launch(
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
    indices: None = None,
    *,
    wrap: Wrap,
) -> tuple[Tensor, Tensor]:
    """Runs `clsa::attention_mass`: out [B, H, S, Dv] in memory order [B, S, H, Dv], mass [B, N, S, T]."""
    h, t = q.shape[1], k.shape[2]
    scores = decode.Scores.empty(q, k, v, padded(t))
    rest = (mask, bounds, mask_inputs, sinks, scale, softcap, predicate)
    out, lse = decode.launch(q, k, v, *rest, scores=scores, wrap=wrap)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(torch.float32).view(1, h, 1))
    return out, mass(scores, lse * LOG2E, weight, bounds, t, power, wrap)


def mass(
    scores: decode.Scores,
    norm: Tensor,
    weight: Tensor,
    bounds: Tensor | None,
    t: Any,
    power: float,
    wrap: Wrap,
) -> Tensor:
    """Returns mass fp32 [B, N, S, T] of a pass and its denominators [B, H, S], in units of log2."""
    b, h, s, tpad = scores.below.shape
    sets = weight.shape[0]
    out = norm.new_empty((b, sets, s, t))
    for first in range(0, sets, MOST_SETS):
        part = weight[first : first + MOST_SETS]
        whole = sets <= MOST_SETS
        target = out if whole else norm.new_empty((b, part.shape[0], s, t))
        jit = kernel("attention_mass", sets=part.shape[0], bounds=bounds is not None, power=power != 1)
        wrap(jit)[(ceil_div(t, BLOCK_T), b * s)](
            below_ptr=scores.below,
            tops_ptr=scores.tops,
            norm_ptr=norm.contiguous(),
            weight_ptr=part.contiguous(),
            mass_ptr=target,
            T=t,
            TPAD=tpad,
            S=s,
            **bounds_arguments(bounds),
            POWER=power,
            H=h,
            N=part.shape[0],
            HEADS=min(h, MOST_HEADS),
            BLOCK_T=BLOCK_T,
            TILE=scores.plan[2],
            SUB=min(scores.plan[2], BLOCK_T),
            num_warps=WARPS,
            num_stages=1,
        )
        if not whole:
            out[:, first : first + MOST_SETS] = target
    return out


MASS = Variant("attention_mass", "decode", supports, launch)
