"""Dense attention of a prompt that also says how much its heads looked at each token.

Attention leaves its denominators behind; a second kernel computes the scores again, one head after the other,
and adds up their probabilities. No more than the result, fp32 [B, N, S, T], is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clsa_compile.ir.references import selected
from clsa_compile.ir.variants import Facts, Support, Variant
from clsa_compile.kernels.dense_attention import rows
from clsa_compile.kernels.dense_attention.mass import denominators, in_parts
from clsa_compile.kernels.launch import (
    Wrap,
    bounds_arguments,
    ceil_div,
    mask_arguments,
    mask_context,
    parts,
    strides,
)
from clsa_compile.kernels.render import kernel

# Sets of tokens that a program sums for: each takes the registers of a tile.
MOST_SETS = 2


def supports(facts: Facts) -> Support:
    """Takes any number of query rows, and tokens that alone may be read, but no pages."""
    return Support(False, "a cache of pages") if facts.paged else rows.supports(facts)


def plan(d: int, dtype: torch.dtype, masked: bool) -> tuple[int, int, int]:
    """Returns (BLOCK_M, BLOCK_N, num_warps) of the second pass; `masked` where a mask tensor is read.

    Chosen by what compiles without spills; not measured.
    """
    if dtype == torch.float32:
        return (32, 32, 4) if d <= 256 else (16, 16, 4)
    if d > 256:
        return 32, 32, 8
    if masked:
        return 64, 64 if d <= 128 else 32, 8
    return 64, 64, 4 if d <= 128 else 8


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
    indices: Tensor | None = None,
    *,
    wrap: Wrap,
) -> tuple[Tensor, Tensor]:
    """Runs `clsa::attention_mass`: out [B, H, S, Dv] in memory order [B, S, H, Dv], mass [B, N, S, T]."""
    q = q.contiguous()
    b, h, s, d = q.shape
    t = k.shape[2]
    if indices is not None:
        mask = _among(selected(indices, t), mask)
    rest = (mask, bounds, mask_inputs, sinks, scale, softcap, predicate)
    out, lse = rows.launch(q, k, v, *rest, wrap=wrap)
    norm = denominators(lse, sinks)
    block_m, block_n, warps = plan(d, q.dtype, mask is not None)
    args: dict[str, Any] = {"SOFTCAP": softcap} if softcap else {}

    def run(part: Tensor, target: Tensor) -> None:
        jit = kernel(
            "attention_mass_rows",
            sets=part.shape[0],
            d_parts=parts(d),
            bounds=bounds is not None,
            softcap=bool(softcap),
            power=power != 1,
            paged=False,
            **mask_context(mask, mask_inputs, predicate, (2,)),
        )
        wrap(jit)[(ceil_div(t, block_n), ceil_div(s, block_m), b)](
            q_ptr=q,
            k_ptr=k,
            norm_ptr=norm,
            weight_ptr=part,
            mass_ptr=target,
            S=s,
            T=t,
            **args,
            **bounds_arguments(bounds),
            **strides("k", "bhtd", k),
            **mask_arguments(mask, mask_inputs),
            SCALE=scale,
            POWER=power,
            H=h,
            HKV=k.shape[1],
            D=d,
            N=part.shape[0],
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=warps,
            num_stages=2,
        )

    mass = norm.new_empty((b, weight.shape[0], s, t))
    in_parts(weight, mass, MOST_SETS, run)
    return out, mass


def _among(chosen: Tensor, mask: Tensor | None) -> Tensor:
    """Returns a mask that lets through what `mask` does, of the tokens `chosen` [B, 1, S, T]."""
    if mask is None:
        return chosen
    if mask.dtype == torch.bool:
        return chosen & mask
    return torch.where(chosen, mask, float("-inf"))


ROWS = Variant("attention_mass", "rows", supports, launch)
