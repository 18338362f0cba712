"""Attention over selected tokens: keys and values are gathered by index, row by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clsa_compile.ir.masks import interval, parse_predicate
from clsa_compile.ir.pages import key_slots
from clsa_compile.ir.references import mask_bounds_reference
from clsa_compile.ir.variants import SUPPORTED, Facts, Support, Variant
from clsa_compile.kernels.choice import choose, modelled
from clsa_compile.kernels.cost import Sizes
from clsa_compile.kernels.device import Device
from clsa_compile.kernels.launch import (
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
    sinks_arguments,
    split_scratch,
    static,
    strides,
    tile_plan,
    unsupported_tile,
)
from clsa_compile.kernels.render import kernel

# Tokens assumed where their number is not known while tracing.
ASSUMED_TOKENS = 2048


def supports(facts: Facts) -> Support:
    """Takes any number of query rows; each is a program of its own, or one for each block of heads."""
    reason = unsupported_tile(facts, 1)
    return Support(False, reason) if reason else SUPPORTED


def plan(
    q: Tensor, k: Tensor, v: Tensor, topk: Any, pages: Tensor | None = None
) -> tuple[int, int, int, int, int]:
    """Returns (NSPLIT, BLOCK_M, BLOCK_N, num_warps, num_stages) from the sizes that are known."""
    b, s, hkv = q.shape[0], q.shape[2], k.shape[1]
    group = q.shape[1] // hkv
    device = Device.of(q.device)
    # An unknown number of query rows is a prompt: rows enough to fill the chip.
    rows = (b if static(b) else 1) * s * hkv if static(s) else 4 * device.sms
    if is_latent(k, v):
        return latent_plan(q, k, v, rows, device, pages is not None)
    d, dv = padded_width(k.shape[3]), padded_width(v.shape[3])
    block_m = heads_at_once(group, max(d, dv))
    tokens = topk if static(topk) else ASSUMED_TOKENS
    if modelled(q.dtype, block_m, d + dv):
        sizes = Sizes(max(1, rows // hkv), hkv, group, tokens, d, dv, k.element_size())
        if shape := choose("sparse_attention", sizes, device):
            return shape.splits, block_m, shape.block_n, shape.warps, shape.stages
    # Many heads over one row, float32, wide heads. The model has no data for them.
    programs = rows * -(-group // block_m)
    block_n, warps, stages = tile_plan(q, k, v, block_m, 64, 3 if programs <= 16 else 2)
    splits = min(16 if programs <= 32 else 8, floor_power_of_two(16 * device.sms // programs))
    return max(1, min(splits, floor_power_of_two(tokens // 128))), block_m, block_n, warps, stages


def latent_plan(
    q: Tensor, k: Tensor, v: Tensor, rows: int, device: Device, paged: bool
) -> tuple[int, int, int, int, int]:
    """Returns `plan` for MLA's latent rows: 16 heads a program, one program a multiprocessor.

    Measured on an H100 with 128 heads, k = 2048: 12 us for one row of queries, 120 us for 32 (150 Tflop/s).
    The model has no data for them. With the page of each token to look up, 4 warps spill.
    """
    group = q.shape[1] // k.shape[1]
    block_n, warps, stages = tile_plan(q, k, v, 16, 64, 2)
    splits = floor_power_of_two(device.sms // (rows * -(-group // 16)))
    if not paged and q.dtype != torch.float32:
        warps = 4
    return splits, 16, block_n, warps, stages


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    mask: Tensor | None,
    bounds: Tensor | None,
    mask_inputs: Sequence[Tensor],
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    predicate: str,
    pages: Tensor | None = None,
    dense_below: int = 0,
    *,
    wrap: Wrap,
) -> Tensor:
    """Runs `clsa::sparse_attention`: out [B, H, S, Dv] in memory order [B, S, H, Dv].

    `bounds` is a hint that a gather does not need. With `dense_below`, whoever gives it vouches that it is
    what `mask_bounds` says and that indices name no token that may not be read.
    """
    q = q.contiguous()
    b, h, s, d = q.shape
    hkv, dv, topk = k.shape[1], v.shape[3], indices.shape[3]
    whole = dense_below > 0
    if whole:
        bounds, predicate = _reach(q, k, mask, bounds, mask_inputs, predicate, pages)
    splits, block_m, block_n, warps, stages = plan(q, k, v, topk, pages)
    direct = splits == 1
    out = output(q, dv)
    jit = kernel(
        "sparse_attention",
        d_parts=parts(d),
        dv_parts=parts(dv),
        bounds=False,
        whole=whole,
        softcap=bool(softcap),
        sinks=sinks is not None,
        direct=direct,
        with_lse=False,
        latent=is_latent(k, v),
        paged=pages is not None,
        **mask_context(mask, mask_inputs, predicate, (1,)),
    )
    args: dict[str, Any] = {} if direct else dict(split_scratch(q, dv, splits))
    scratch = dict(args)
    if direct:
        args.update(out_ptr=out, **sinks_arguments(sinks))
    if softcap:
        args["SOFTCAP"] = softcap
    if whole:
        args |= {**bounds_arguments(bounds), "DENSE_BELOW": dense_below}
    index_strides = strides("indices", "bhsk", indices)
    if indices.shape[1] == 1:
        index_strides["indices_sh"] = 0
    wrap(jit)[(b * s * hkv * ceil_div(h // hkv, block_m), splits)](
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        indices_ptr=indices,
        S=s,
        TOPK=topk,
        **args,
        **strides("k", "bhtd", k),
        **strides("v", "bhtd", v),
        **page_arguments(k, pages),
        **index_strides,
        **mask_arguments(mask, mask_inputs),
        SCALE=scale,
        H=h,
        HKV=hkv,
        D=d,
        DV=dv,
        NSPLIT=splits,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=warps,
        num_stages=stages,
    )
    if not direct:
        combine(scratch, sinks, out, None, wrap)
    return out.transpose(1, 2)


def _reach(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    bounds: Tensor | None,
    mask_inputs: Sequence[Tensor],
    predicate: str,
    pages: Tensor | None,
) -> tuple[Tensor, str]:
    """Returns the exact bounds of all rows, and what of the predicate must still be asked.

    Bounds that are given are those of an interval or a mask, as `mask_bounds` says them, and the tokens that
    were chosen lie within: see `launch`.
    """
    keys = key_slots(k, pages)
    if bounds is None and mask is None and not predicate:
        bounds = q.new_zeros((q.shape[0], q.shape[2], 2), dtype=torch.int32)
        bounds[..., 1] = keys
        return bounds, ""
    if bounds is None:
        return mask_bounds_reference(q, mask, mask_inputs, q.shape[1], keys, predicate), predicate
    exact = mask is None and interval(parse_predicate(predicate)) is not None
    return bounds, "" if exact else predicate


GATHER = Variant("sparse_attention", "gather", supports, launch)
