"""Index of a few query rows: one scan of the keys, then the selection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clsa_compile.ir.ops import DECODE_ROWS
from clsa_compile.ir.pages import key_slots
from clsa_compile.ir.scores import parse_score
from clsa_compile.ir.variants import Facts, Support, Variant
from clsa_compile.kernels.choice import choose
from clsa_compile.kernels.cost import Shape, Sizes, needs
from clsa_compile.kernels.device import Device
from clsa_compile.kernels.index_topk.scan import score_arguments, supports_index
from clsa_compile.kernels.index_topk.select import padded, segments, select
from clsa_compile.kernels.launch import (
    ASSUMED_KEYS,
    Wrap,
    bounds_arguments,
    ceil_div,
    mask_arguments,
    mask_context,
    padded_width,
    page_arguments,
    parts,
    power_of_two,
    static,
    strides,
)
from clsa_compile.kernels.render import kernel

# Where the batch is not known while tracing.
ASSUMED_BATCH = 4
# Query rows whose heads may stay on the chip while keys go by; and the heads of a dot where they do not:
# those of all rows are in flight with the keys of each step.
MOST_RESIDENT = 2
STREAMED_HEADS = 16
# Width up to which what was measured at 128 is extrapolated.
MODELLED_WIDTH = 256


def supports(facts: Facts) -> Support:
    """Takes any S <= DECODE_ROWS."""
    if facts.S is None or facts.S > DECODE_ROWS:
        return Support(False, f"more than {DECODE_ROWS} query rows, or a number not known")
    return supports_index(facts)


@dataclass(frozen=True)
class Plan:
    """Shape of the scan: BLOCK_N keys a step, BLOCK_H heads a dot, programs a row of scores.

    resident: queries are loaded once and stay, they do not come with each step of keys.
    """

    block_n: int
    block_h: int
    warps: int
    stages: int
    programs: int
    resident: bool


def plan(q: Tensor, k: Tensor, heads: int, t: Any) -> Plan:
    """Returns the shape of a scan of t keys that writes `heads` rows of scores a sequence and query row."""
    (b, h, s, _), hkv = q.shape, k.shape[1]
    group = h // hkv
    device = Device.of(q.device)
    batch, d = (b if static(b) else ASSUMED_BATCH), padded_width(k.shape[3])
    few = q.dtype == torch.float32 or s > MOST_RESIDENT
    block_h = STREAMED_HEADS if few else min(64, max(16, power_of_two(group)))
    resident = hkv == heads and group <= block_h and s <= MOST_RESIDENT
    streamed = 0 if resident or group == 1 else s * block_h
    keys = t if static(t) else ASSUMED_KEYS
    sizes = Sizes(batch, heads, group, keys, d, 0, k.element_size(), streamed)
    name = "index_scan_single" if group == 1 else "index_scan"
    if q.dtype == torch.float32:
        block_n, warps, stages, an_sm = 32, 8, 2, 4
    elif d <= MODELLED_WIDTH and (shape := choose(name, sizes, device)):
        return Plan(shape.block_n, block_h, shape.warps, shape.stages, shape.splits, resident)
    else:
        # Wide index heads. The model has no data for them.
        warps, stages, an_sm = (8, 2, 4) if group == 1 else (4, 4, 2)
        block_n = 64 if d <= 256 else 32
    if streamed:
        while stages > 1 and needs(name, sizes, Shape(block_n, warps, stages, 1))[0] > device.program_shared:
            stages -= 1
    programs = max(1, an_sm * device.sms // (batch * heads))
    return Plan(block_n, block_h, warps, stages, programs, resident)


def scan(
    q: Tensor,
    k: Tensor,
    weight: Tensor | None,
    lse: Tensor | None,
    mask: Tensor | None,
    bounds: Tensor | None,
    mask_inputs: Sequence[Tensor],
    scale: float,
    score: str,
    predicate: str,
    per_kv_head: bool,
    pages: Tensor | None = None,
    *,
    wrap: Wrap,
) -> Tensor:
    """Returns fp32 scores [B, 1|Hkv, S, Tpad]; keys outside `bounds` and beyond T hold anything."""
    q = q.contiguous()
    b, h, s, d = q.shape
    hkv, t = k.shape[1], key_slots(k, pages)
    heads = hkv if per_kv_head else 1
    group = h // hkv
    shape = plan(q, k, heads, t)
    tpad = padded(t)
    scores = q.new_empty((b, heads, s, tpad), dtype=torch.float32)
    jit = kernel(
        "index_scan_decode",
        score=score,
        d_parts=parts(d),
        bounds=bounds is not None,
        per_kv_head=per_kv_head,
        single=group == 1,
        resident=shape.resident,
        S=s,
        paged=pages is not None,
        # Elsewhere a thread loads several numbers of a key at once, or holds several heads.
        rounded=q.dtype == torch.float32 or any(padded for *_, padded in parts(d)),
        **mask_context(mask, mask_inputs, predicate, (2,)),
    )
    args: dict[str, Any] = score_arguments(parse_score(score), weight, lse)
    longest = ceil_div(t, shape.block_n)
    programs = min(shape.programs, longest) if static(t) else shape.programs
    wrap(jit)[(programs, b * heads)](
        q_ptr=q,
        k_ptr=k,
        scores_ptr=scores,
        T=t,
        TPAD=tpad,
        **args,
        **bounds_arguments(bounds),
        **strides("k", "bhtd", k),
        **page_arguments(k, pages),
        **mask_arguments(mask, mask_inputs),
        SCALE=scale,
        H=h,
        HKV=hkv,
        S=s,
        D=d,
        BLOCK_H=shape.block_h,
        BLOCK_N=shape.block_n,
        BLOCK_S=power_of_two(s),
        STAGES=shape.stages,
        num_warps=shape.warps,
        num_stages=shape.stages,
    )
    return scores


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
    """Runs `clsa::index_topk` for S <= DECODE_ROWS: int32 [B, 1|Hkv, S, topk]."""
    scores = scan(
        q, k, weight, lse, mask, bounds, mask_inputs, scale, score, predicate, per_kv_head, pages, wrap=wrap
    )
    b, heads, s, _ = scores.shape
    t = key_slots(k, pages)
    out = q.new_empty((b, heads, s, topk), dtype=torch.int32)
    lines = (b if static(b) else ASSUMED_BATCH) * heads * s
    select(scores, bounds, out, 0, t, segments(lines, t, Device.of(q.device).sms), wrap)
    return out


DECODE = Variant("index_topk", "decode", supports, launch)
