"""Dense attention of a few query rows that also says how much its heads looked at each token.

The pass over K and V that attention makes anyway leaves its scores behind, fp16 [B, H, S, T]: for 24 heads
over 8 kv heads of 128 in bfloat16 that is 1% of what it reads. A second kernel turns them into mass; K is
not read again, which would be half of the pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
    t = k.shape[2]
    scores = decode.Scores.empty(q, k, v, padded(t))
    rest = (mask, bounds, mask_inputs, sinks, scale, softcap, predicate)
    out, lse = decode.launch(q, k, v, *rest, scores=scores, wrap=wrap)
    mass = lse.new_empty((q.shape[0], weight.shape[0], q.shape[2], t))
    norm = denominators(lse, sinks)

    def run(part: Tensor, target: Tensor) -> None:
        _sum(scores, norm, part, bounds, target, power, wrap)

    in_parts(weight, mass, MOST_SETS, run)
    return out, mass


def denominators(lse: Tensor, sinks: Tensor | None) -> Tensor:
    """Returns the softmax's denominators fp32 [B, H, S] in units of log2; `lse` knows of no sinks [H]."""
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(torch.float32).view(1, -1, 1))
    return (lse * LOG2E).contiguous()


def in_parts(weight: Tensor, mass: Tensor, most: int, run: Callable[[Tensor, Tensor], None]) -> None:
    """Fills mass [B, N, S, T] for weight [N, H]: `run` fills a contiguous part for `most` sets at a time."""
    sets = weight.shape[0]
    if sets <= most:
        run(weight.contiguous(), mass)
        return
    for first in range(0, sets, most):
        part = weight[first : first + most].contiguous()
        target = mass.new_empty((mass.shape[0], part.shape[0], *mass.shape[2:]))
        run(part, target)
        mass[:, first : first + most] = target


def _sum(
    scores: decode.Scores,
    norm: Tensor,
    weight: Tensor,
    bounds: Tensor | None,
    mass: Tensor,
    power: float,
    wrap: Wrap,
) -> None:
    """Writes mass of the scores that a pass left behind, and of its denominators [B, H, S]."""
    b, h, s, tpad = scores.below.shape
    sets, t = weight.shape[0], mass.shape[3]
    jit = kernel("attention_mass", sets=sets, bounds=bounds is not None, power=power != 1)
    wrap(jit)[(ceil_div(t, BLOCK_T), b * s)](
        below_ptr=scores.below,
        tops_ptr=scores.tops,
        norm_ptr=norm,
        weight_ptr=weight,
        mass_ptr=mass,
        T=t,
        TPAD=tpad,
        S=s,
        **bounds_arguments(bounds),
        POWER=power,
        H=h,
        N=sets,
        HEADS=min(h, MOST_HEADS),
        BLOCK_T=BLOCK_T,
        TILE=scores.plan[2],
        SUB=min(scores.plan[2], BLOCK_T),
        num_warps=WARPS,
        num_stages=1,
    )


MASS = Variant("attention_mass", "decode", supports, launch)
