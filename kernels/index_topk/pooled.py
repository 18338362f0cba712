"""Index of a few query rows among offered tokens: their keys are copied, then scanned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from clsa_compile.ir.references import index_topk_reference
from clsa_compile.ir.variants import Facts, Support, Variant
from clsa_compile.kernels.gathered import gathered
from clsa_compile.kernels.index_topk import decode
from clsa_compile.kernels.launch import Wrap


def supports(facts: Facts) -> Support:
    """Takes what the scan of a few rows takes, with candidates, but no pages."""
    if not facts.pooled:
        return Support(False, "all tokens may be selected")
    if facts.paged:
        return Support(False, "a cache of pages")
    return decode.supports(replace(facts, pooled=False))


def launch(
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
    pages: None,
    candidates: Tensor,
    *,
    wrap: Wrap,
) -> Tensor:
    """Runs `clsa::index_topk` with candidates: int32 [B, 1, S, topk]."""
    if mask is not None or predicate or per_kv_head:
        # Tokens were not offered under the layer's own mask, which no pass asks for at present.
        rest = (mask, bounds, mask_inputs, topk, scale, score, predicate, per_kv_head, None, candidates)
        return index_topk_reference(q, k, weight, lse, *rest)
    b, h, s, d = q.shape
    pool = candidates.shape[3]
    # Every query row has keys of its own here, and so is a sequence.
    rows = q.transpose(1, 2).reshape(b * s, h, 1, d)
    weights, sums = (None if x is None else x.transpose(1, 2).reshape(b * s, h, 1) for x in (weight, lse))
    allowed = (candidates >= 0).view(b * s, 1, 1, pool)
    keys = gathered(k, candidates)
    picked = decode.launch(
        rows, keys, weights, sums, allowed, None, [], topk, scale, score, "", False, wrap=wrap
    ).view(b, 1, s, topk)
    # Positions among candidates ascend as the candidates do.
    found = candidates.gather(3, picked.clamp(min=0).long())
    return torch.where(picked < 0, -1, found)


POOLED = Variant("index_topk", "pooled", supports, launch)
