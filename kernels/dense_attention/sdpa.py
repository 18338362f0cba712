"""Dense attention by torch's own kernel, with the mask as the contract op means it.

On CUDA for prompts; on a CPU wherever it can: unlike the reference, it writes no scores to memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from clsa_compile.ir.masks import is_triangle
from clsa_compile.ir.references import attend_mask
from clsa_compile.ir.variants import SUPPORTED, Facts, Support, Variant
from clsa_compile.kernels.dense_attention import rows
from clsa_compile.kernels.launch import Wrap


def supports(facts: Facts) -> Support:
    """Takes what torch's attention can express."""
    if facts.softcap:
        return Support(False, "torch's attention has no softcap")
    if facts.sinks:
        return Support(False, "torch's attention has no sinks")
    if facts.paged:
        return Support(False, "torch's attention reads no paged cache")
    if facts.lse_used:
        return Support(False, "torch's attention does not hand out the lse")
    if facts.formula and facts.device != "cpu" and rows.supports(facts).ok:
        return Support(
            False, "the mask is a formula: written out it has S x T elements, and no block is skipped"
        )
    return SUPPORTED


def launch(
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
    *,
    wrap: Wrap,
) -> tuple[Tensor, Tensor]:
    """Runs `clsa::attention` through SDPA; the lse is not filled in, no pages are read, see `supports`."""
    assert pages is None
    b, h, s, _ = q.shape
    hkv, t = k.shape[1], k.shape[2]
    lse = q.new_empty((b, h, s), dtype=torch.float32)
    grouped = h != hkv
    if mask is None and (not predicate or is_triangle(predicate, s, t)):
        out = scaled_dot_product_attention(
            q, k, v, is_causal=bool(predicate), scale=scale, enable_gqa=grouped
        )
        return _in_memory_order(out), lse

    valid, bias = attend_mask(mask, mask_inputs, predicate, (b, h, s, t), q.device)
    if bias is not None:
        lifted = bias > torch.finfo(bias.dtype).min
        valid = lifted if valid is None else valid & lifted
    assert valid is not None
    attn_mask = valid if bias is None else torch.where(valid, bias, float("-inf")).to(q.dtype)
    attn_mask = attn_mask.reshape((1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape))
    out = scaled_dot_product_attention(
        q, k, v, attn_mask=attn_mask.expand(b, -1, s, t), scale=scale, enable_gqa=grouped
    )
    if q.device.type != "cpu":
        # Some of torch's backends give NaN for a row without keys. NaN of valid rows stays NaN.
        out = torch.where(valid.any(-1, keepdim=True), out, 0.0)
    return _in_memory_order(out), lse


def _in_memory_order(out: Tensor) -> Tensor:
    """Returns [B, H, S, Dv] laid out as [B, S, H, Dv], which the contract promises."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)


SDPA = Variant("attention", "sdpa", supports, launch)
