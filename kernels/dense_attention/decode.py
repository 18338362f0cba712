"""Dense attention of a few query rows: the keys are split over programs, K and V are read once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clsa_compile.ir.ops import DECODE_ROWS
from clsa_compile.ir.pages import key_slots
from clsa_compile.ir.variants import SUPPORTED, Facts, Support, Variant
from clsa_compile.kernels.choice import choose, modelled
from clsa_compile.kernels.cost import Sizes
from clsa_compile.kernels.device import Device
from clsa_compile.kernels.launch import (
    ASSUMED_KEYS,
    Ending,
    Wrap,
    bounds_arguments,
    ceil_div,
    floor_power_of_two,
    heads_at_once,
    is_latent,
    mask_arguments,
    mask_context,
    output,
    padded_width,
    page_arguments,
    parts,
    power_of_two,
    query_rows,
    static,
    strides,
    tile_plan,
    unsupported_tile,
)
from clsa_compile.kernels.render import kernel


def supports(facts: Facts) -> Support:
    """Takes any S <= DECODE_ROWS, G * S rows a kv head in blocks."""
    if facts.S is None or facts.S > DECODE_ROWS:
        return Support(False, f"more than {DECODE_ROWS} query rows, or a number not known")
    reason = unsupported_tile(facts, 1)
    return Support(False, reason) if reason else SUPPORTED


def plan(q: Tensor, k: Tensor, v: Tensor, pages: Tensor | None = None) -> tuple[int, int, int, int, int]:
    """Returns (NSPLIT, BLOCK_M, BLOCK_N, num_warps, num_stages) from the sizes that are known."""
    b, hkv, t = q.shape[0], k.shape[1], key_slots(k, pages)
    rows = q.shape[1] // hkv * q.shape[2]
    device = Device.of(q.device)
    if is_latent(k, v):
        return latent_plan(q, k, v, rows, t, device, pages is not None)
    d, dv = padded_width(k.shape[3]), padded_width(v.shape[3])
    block_m = heads_at_once(rows, max(d, dv))
    batch, keys = (b if static(b) else 1), (t if static(t) else ASSUMED_KEYS)
    if modelled(q.dtype, block_m, d + dv):
        sizes = Sizes(batch, hkv, rows, keys, d, dv, k.element_size())
        if shape := choose("attention_decode", sizes, device):
            return shape.splits, block_m, shape.block_n, shape.warps, shape.stages
    # Many heads over one row, float32, wide heads: two programs an SM, or 4 splits where heads alone make as
    # many. The model has no data for them.
    programs = batch * hkv * -(-rows // block_m)
    block_n, warps, stages = tile_plan(q, k, v, block_m, 128 if d <= 64 else 64, 4 if block_m <= 32 else 2)
    few = programs < device.sms
    splits = (
        floor_power_of_two(2 * device.sms // programs) if few else (4 if programs < 4 * device.sms else 1)
    )
    splits = min(splits, power_of_two(-(-keys // block_n)))
    return min(splits, 128), block_m, block_n, max(warps, 8), stages


def latent_plan(
    q: Tensor, k: Tensor, v: Tensor, rows: int, t: Any, device: Device, paged: bool
) -> tuple[int, int, int, int, int]:
    """Returns `plan` for MLA's latent rows: one program a multiprocessor. The model has no data for them.

    Measured on an H100 with 128 heads over 32768 keys: 71 us for one sequence (128 Tflop/s), 16 heads a
    program (32 are faster by 10% and spill); 1064 us for 32 sequences (275 Tflop/s), 64 heads a program.

    In a paged cache each row has a pointer of its own, and 4 warps spill.
    """
    b = q.shape[0]
    heads = (b if static(b) else 1) * k.shape[1]
    few = heads * -(-rows // 16) <= device.sms // 4
    block_m = min(query_rows(rows), 16 if few else 64)
    block_n, warps, stages = tile_plan(q, k, v, block_m, 64, 2)
    programs = heads * -(-rows // block_m)
    splits = max(floor_power_of_two(device.sms // programs), 4 if programs < device.sms else 1)
    if static(t):
        splits = min(splits, power_of_two(-(-t // block_n)))
    if few and not paged and q.dtype != torch.float32:
        warps = 4
    return splits, block_m, block_n, warps, stages


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
    logits: Tensor | None = None,
    wrap: Wrap,
) -> tuple[Tensor, Tensor]:
    """Runs `clsa::attention`: out [B, H, S, Dv] in memory order [B, S, H, Dv], lse fp32 [B, H, S].

    `logits` fp32 [B, H, S, Tpad] takes the scores in units of log2, -inf where a key may not be read; keys
    outside of `bounds` are not written.
    """
    q = q.contiguous()
    b, h, s, d = q.shape
    hkv, t, dv = k.shape[1], key_slots(k, pages), v.shape[3]
    splits, block_m, block_n, warps, stages = plan(q, k, v, pages)
    rows = h // hkv * s
    blocks = b * hkv * ceil_div(rows, block_m)
    out = output(q, dv)
    lse = q.new_empty((b, h, s), dtype=torch.float32)
    ending = Ending(splits, min(rows, block_m), blocks, q, out, lse, sinks)
    jit = kernel(
        "attention_decode",
        d_parts=parts(d),
        dv_parts=parts(dv),
        bounds=bounds is not None,
        softcap=bool(softcap),
        with_lse=True,
        logits=logits is not None,
        latent=is_latent(k, v),
        paged=pages is not None,
        **ending.context,
        **mask_context(mask, mask_inputs, predicate, (1, 2)),
    )
    args = ending.arguments()
    if logits is not None:
        args |= {"logits_ptr": logits, "TPAD": logits.shape[3]}
    cap = {"SOFTCAP": softcap} if softcap else {}
    wrap(jit)[(blocks, splits)](
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        T=t,
        **args,
        **cap,
        **bounds_arguments(bounds),
        **strides("k", "bhtd", k),
        **strides("v", "bhtd", v),
        **page_arguments(k, pages),
        **mask_arguments(mask, mask_inputs),
        SCALE=scale,
        H=h,
        HKV=hkv,
        S=s,
        D=d,
        DV=dv,
        NSPLIT=splits,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_S=power_of_two(s),
        num_warps=warps,
        num_stages=stages,
    )
    ending.finish(args, wrap)
    return out.transpose(1, 2), lse


DECODE = Variant("attention", "decode", supports, launch)
