"""Index of many query rows: scores a chunk of rows at a time, each chunk selected at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clsa_compile.ir.pages import key_slots
from clsa_compile.ir.scores import parse_score
from clsa_compile.ir.variants import Facts, Support, Variant
from clsa_compile.kernels.device import Device
from clsa_compile.kernels.index_topk.scan import score_arguments, supports_index
from clsa_compile.kernels.index_topk.select import chunks, padded, rows_unknown, segments, select
from clsa_compile.kernels.launch import (
    Wrap,
    bounds_arguments,
    ceil_div,
    mask_arguments,
    mask_context,
    padded_width,
    page_arguments,
    parts,
    static,
    strides,
)
from clsa_compile.kernels.render import kernel


def supports(facts: Facts) -> Support:
    """Takes any number of query rows."""
    return supports_index(facts)


def plan(d: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Returns (BLOCK_M, BLOCK_N, num_warps) of the scan."""
    if dtype == torch.float32:
        return 32, 32, 4
    # Measured on an H100 with 16 heads of 128: 65% of the rate of a large matmul, 8 warps 55%.
    wide = padded_width(d)
    return (64, 128, 4 if wide <= 128 else 8) if wide <= 256 else (64, 64, 8)


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
    pages: Tensor | None = None,
    *,
    wrap: Wrap,
) -> Tensor:
    """Runs `clsa::index_topk` for any S: int32 [B, 1|Hkv, S, topk]."""
    q = q.contiguous()
    b, h, s, d = q.shape
    hkv, t = k.shape[1], key_slots(k, pages)
    block_m, block_n, warps = plan(d, q.dtype)
    heads = hkv if per_kv_head else 1
    jit = kernel(
        "index_scan_rows",
        score=score,
        d_parts=parts(d),
        bounds=bounds is not None,
        per_kv_head=per_kv_head,
        paged=pages is not None,
        **mask_context(mask, mask_inputs, predicate, (2,)),
    )
    args: dict[str, Any] = score_arguments(parse_score(score), weight, lse)
    args |= bounds_arguments(bounds) | mask_arguments(mask, mask_inputs) | strides("k", "bhtd", k)
    args |= page_arguments(k, pages)
    out = q.new_empty((b, heads, s, topk), dtype=torch.int32)
    for first, rows in chunks(b, heads, s, t):
        tpad = padded(t)
        scores = q.new_empty((b, heads, rows, tpad), dtype=torch.float32)
        wrap(jit)[(ceil_div(t, block_n), ceil_div(rows, block_m), b * heads)](
            q_ptr=q,
            k_ptr=k,
            scores_ptr=scores,
            S=s,
            FIRST=first,
            ROWS=rows,
            T=t,
            TPAD=tpad,
            **args,
            SCALE=scale,
            H=h,
            HKV=hkv,
            D=d,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=warps,
            num_stages=2,
        )
        # A prompt of unknown length has rows enough to fill the chip.
        sms = Device.of(q.device).sms
        lines = b * heads * rows if static(b) and static(rows) else sms
        select(scores, bounds, out, first, t, segments(lines, t, sms), wrap)
    return out


ROWS = Variant("index_topk", "rows", supports, launch, waits=rows_unknown)
