"""Attention of a few query rows to a pool of tokens, which also says how much its heads looked at each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clsa_compile.ir.references import attention_mass_reference
from clsa_compile.ir.variants import Facts, Support, Variant
from clsa_compile.kernels.dense_attention import decode, mass
from clsa_compile.kernels.gathered import gathered
from clsa_compile.kernels.launch import Wrap


def supports(facts: Facts) -> Support:
    """Takes what dense decode takes, with tokens to read, but no pages."""
    if not facts.pooled:
        return Support(False, "all tokens may be read")
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
    indices: Tensor,
    *,
    wrap: Wrap,
) -> tuple[Tensor, Tensor]:
    """Runs `clsa::attention_mass` with indices: out [B, H, S, Dv] in memory order [B, S, H, Dv], mass."""
    if mask is not None or predicate:
        # Tokens were not chosen under the layer's own mask, which no pass asks for at present.
        rest = (mask, bounds, mask_inputs, sinks, scale, softcap, predicate, power, indices)
        return attention_mass_reference(q, k, v, weight, *rest)
    b, h, s, d = q.shape
    t, pool = k.shape[2], indices.shape[3]
    # Every query row has keys of its own here, and so is a sequence.
    rows = q.transpose(1, 2).reshape(b * s, h, 1, d)
    allowed = (indices >= 0).view(b * s, 1, 1, pool)
    keys, values = (gathered(x, indices) for x in (k, v))
    out, seen = mass.launch(
        rows, keys, values, weight, allowed, None, [], sinks, scale, softcap, "", power, wrap=wrap
    )
    # One slot more than there are keys takes what stands for no token.
    slots = torch.where(indices < 0, t, indices).long().expand(b, seen.shape[1], s, pool)
    wide = seen.new_full((b, seen.shape[1], s, t + 1), float("-inf"))
    wide = wide.scatter(3, slots, seen.view(b, s, -1, pool).transpose(1, 2))
    return out.reshape(b, s, h, -1).transpose(1, 2), wide[..., :t].contiguous()


POOLED = Variant("attention_mass", "pooled", supports, launch)
