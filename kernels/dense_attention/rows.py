"""Dense attention of a prompt where torch's own cannot be used: softcap, sinks, pages, the lse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clsa_compile.ir.pages import key_slots
from clsa_compile.ir.variants import SUPPORTED, Facts, Support, Variant
from clsa_compile.kernels.launch import (
    MOST_WIDTH,
    Wrap,
    bounds_arguments,
    ceil_div,
    is_latent,
    keys_per_step,
    mask_arguments,
    mask_context,
    output,
    padded_width,
    page_arguments,
    parts,
    sinks_arguments,
    strides,
    unsupported_operands,
)
from clsa_compile.kernels.render import kernel


def supports(facts: Facts) -> Support:
    """Takes any number of query rows."""
    if reason := unsupported_operands(facts):
        return Support(False, reason)
    if max(facts.D, facts.Dv) > MOST_WIDTH:
        return Support(False, f"heads of {max(facts.D, facts.Dv)} do not fit into registers")
    return SUPPORTED


def plan(k: Tensor, v: Tensor, masked: bool = False) -> tuple[int, int, int, int]:
    """Returns (BLOCK_M, BLOCK_N, num_warps, num_stages); `masked` where a mask tensor is read."""
    d, dv = padded_width(k.shape[3]), padded_width(v.shape[3])
    if max(d, dv) > 256:
        return _wide_plan(k, v, masked)
    if k.dtype == torch.float32:
        return 32, 32, 8, 2
    # The queries of a tile and their weights lie in shared memory too; a mask takes registers.
    narrow = (64, 32, 3) if masked else (128, 64, 3)
    block_m, largest, stages = narrow if d + dv <= 320 else (64, 32, 2)
    return block_m, keys_per_step((d + dv) * k.element_size(), stages, largest), 8, stages


def _wide_plan(k: Tensor, v: Tensor, masked: bool) -> tuple[int, int, int, int]:
    """Returns `plan` for MLA's latent rows and other wide heads: sums of 64 rows fill half of the registers.

    Chosen by what compiles without spills; not measured.
    """
    if k.dtype == torch.float32:
        return 16, 16, 8, 2
    return (64 if is_latent(k, v) and not masked else 32), 32, 8, 2


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
    """Runs `clsa::attention`: out [B, H, S, Dv] in memory order [B, S, H, Dv], lse fp32 [B, H, S]."""
    q = q.contiguous()
    b, h, s, d = q.shape
    hkv, t, dv = k.shape[1], key_slots(k, pages), v.shape[3]
    block_m, block_n, warps, stages = plan(k, v, mask is not None)
    out = output(q, dv)
    lse = q.new_empty((b, h, s), dtype=torch.float32)
    jit = kernel(
        "attention_rows",
        d_parts=parts(d),
        dv_parts=parts(dv),
        bounds=bounds is not None,
        softcap=bool(softcap),
        sinks=sinks is not None,
        direct=True,
        with_lse=True,
        latent=is_latent(k, v),
        paged=pages is not None,
        **mask_context(mask, mask_inputs, predicate, (2,)),
    )
    args: dict[str, Any] = sinks_arguments(sinks)
    if softcap:
        args["SOFTCAP"] = softcap
    wrap(jit)[(ceil_div(s, block_m), h, b)](
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        out_ptr=out,
        lse_ptr=lse,
        S=s,
        T=t,
        **args,
        **bounds_arguments(bounds),
        **strides("k", "bhtd", k),
        **strides("v", "bhtd", v),
        **page_arguments(k, pages),
        **mask_arguments(mask, mask_inputs),
        SCALE=scale,
        H=h,
        HKV=hkv,
        D=d,
        DV=dv,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=warps,
        num_stages=stages,
    )
    return out.transpose(1, 2), lse


ROWS = Variant("attention", "rows", supports, launch)
