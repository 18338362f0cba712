"""Dense attention of a few query rows: the keys are split over programs, K and V are read once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
    Wrap,
    bounds_arguments,
    ceil_div,
    combine,
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
    sinks_arguments,
    split_scratch,
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


@dataclass(frozen=True)
class Scores:
    """The scores of a pass, for whoever wants more of them than their softmax; in units of log2.

    below: fp16 (fp32 where q is) [B, H, S, Tpad], how far a score is below the largest that its program had
    seen by then; -inf where a key may not be read. tops: fp32 [B, H, S, Tpad / BLOCK_N], that largest score,
    a tile of keys. So fp16 loses at most 0.3% of a probability, down to 2**-16 of the largest one.
    """

    below: Tensor
    tops: Tensor
    plan: tuple[int, int, int, int, int]

    @classmethod
    def empty(cls, q: Tensor, k: Tensor, v: Tensor, tpad: Any) -> Scores:
        """Returns room for the scores of a call, with the shape of the launch that fills it best."""
        b, h, s, _ = q.shape
        shape = scores_plan(q, k, v)
        dtype = torch.float32 if q.dtype == torch.float32 else torch.float16
        below = q.new_empty((b, h, s, tpad), dtype=dtype)
        return cls(below, q.new_empty((b, h, s, tpad // shape[2]), dtype=torch.float32), shape)


def scores_plan(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, int, int, int, int]:
    """Returns `plan` for a pass that stores its scores.

    Measured on an H100 with 24/8 heads of 128 over 131072 keys, with scores in fp32: one program of 4 warps a
    multiprocessor takes 198 us for one sequence and 750 for four. The plan of a pass that stores none takes
    186 and 718 without them, and 210 and 777 with them.
    """
    splits, block_m, block_n, warps, stages = plan(q, k, v)
    d, dv = padded_width(k.shape[3]), padded_width(v.shape[3])
    if not modelled(q.dtype, block_m, d + dv) or d + dv > 256 or block_n < 64:
        return splits, block_m, block_n, warps, stages
    b, hkv = q.shape[0], k.shape[1]
    programs = (b if static(b) else 1) * hkv * ceil_div(q.shape[1] // hkv * q.shape[2], block_m)
    return min(splits, floor_power_of_two(Device.of(q.device).sms // programs)), block_m, 64, 4, 3


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
    scores: Scores | None = None,
    wrap: Wrap,
) -> tuple[Tensor, Tensor]:
    """Runs `clsa::attention`: out [B, H, S, Dv] in memory order [B, S, H, Dv], lse fp32 [B, H, S].

    `scores` takes what the pass over the keys sees; keys outside of `bounds` are not written.
    """
    q = q.contiguous()
    b, h, s, d = q.shape
    hkv, t, dv = k.shape[1], key_slots(k, pages), v.shape[3]
    splits, block_m, block_n, warps, stages = plan(q, k, v, pages) if scores is None else scores.plan
    direct = splits == 1
    out = output(q, dv)
    lse = q.new_empty((b, h, s), dtype=torch.float32)
    jit = kernel(
        "attention_decode",
        d_parts=parts(d),
        dv_parts=parts(dv),
        bounds=bounds is not None,
        softcap=bool(softcap),
        sinks=sinks is not None,
        direct=direct,
        with_lse=True,
        scores=scores is not None,
        latent=is_latent(k, v),
        paged=pages is not None,
        **mask_context(mask, mask_inputs, predicate, (1, 2)),
    )
    args: dict[str, Any] = {} if direct else dict(split_scratch(q, dv, splits))
    scratch = dict(args)
    if direct:
        args.update(out_ptr=out, lse_ptr=lse, **sinks_arguments(sinks))
    if softcap:
        args["SOFTCAP"] = softcap
    if scores is not None:
        args |= {"below_ptr": scores.below, "tops_ptr": scores.tops, "TPAD": scores.below.shape[3]}
    wrap(jit)[(b * hkv * ceil_div(h // hkv * s, block_m), splits)](
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
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
    if not direct:
        combine(scratch, sinks, out, lse, wrap)
    return out.transpose(1, 2), lse


DECODE = Variant("attention", "decode", supports, launch)
