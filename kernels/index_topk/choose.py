"""Tokens of the largest attention mass, with the ends of a sequence always among them."""

from __future__ import annotations

import torch
from torch import Tensor

from clsa_compile.ir.ops import DECODE_ROWS
from clsa_compile.ir.variants import SUPPORTED, Facts, Support, Variant
from clsa_compile.kernels.device import Device
from clsa_compile.kernels.index_topk.decode import ASSUMED_BATCH
from clsa_compile.kernels.index_topk.select import padded, segments, select
from clsa_compile.kernels.launch import Wrap, bounds_arguments, ceil_div, static
from clsa_compile.kernels.render import kernel

BLOCK_T = 2048


def supports(facts: Facts) -> Support:
    """Takes any S <= DECODE_ROWS."""
    if facts.S is None or facts.S > DECODE_ROWS:
        return Support(False, f"more than {DECODE_ROWS} query rows, or a number not known")
    if 0 in (facts.B, facts.T):
        return Support(False, "no sequence or no key")
    return Support(False, "a cache of pages") if facts.paged else SUPPORTED


def launch(
    mass: Tensor, bounds: Tensor | None, topk: int, keep_first: int, keep_last: int, *, wrap: Wrap
) -> Tensor:
    """Runs `clsa::select_topk` for S <= DECODE_ROWS: int32 [B, N, S, topk]."""
    b, sets, s, t = mass.shape
    scores = mass.new_empty((b, sets, s, padded(t)))
    wrap(kernel("select_keep", bounds=bounds is not None))[(ceil_div(t, BLOCK_T), b * sets * s)](
        mass_ptr=mass.contiguous(),
        scores_ptr=scores,
        T=t,
        TPAD=scores.shape[3],
        S=s,
        **bounds_arguments(bounds),
        FIRST=keep_first,
        LAST=keep_last,
        N=sets,
        BLOCK_T=BLOCK_T,
        num_warps=4,
        num_stages=1,
    )
    out = mass.new_empty((b, sets, s, topk), dtype=torch.int32)
    lines = (b if static(b) else ASSUMED_BATCH) * sets * s
    select(scores, bounds, out, 0, t, segments(lines, t, Device.of(mass.device).sms), wrap)
    return out


CHOOSE = Variant("select_topk", "radix", supports, launch)
