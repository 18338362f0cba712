"""Tokens of the largest attention mass, with the ends of a sequence always among them."""

from __future__ import annotations

import torch
from torch import Tensor

from clsa_compile.ir.variants import SUPPORTED, Facts, Support, Variant
from clsa_compile.kernels.device import Device
from clsa_compile.kernels.index_topk.decode import ASSUMED_BATCH
from clsa_compile.kernels.index_topk.select import chunks, padded, rows_unknown, segments, select
from clsa_compile.kernels.launch import Wrap, bounds_arguments, ceil_div, static
from clsa_compile.kernels.render import kernel

BLOCK_T = 2048


def supports(facts: Facts) -> Support:
    """Takes any number of query rows."""
    if 0 in (facts.B, facts.T):
        return Support(False, "no sequence or no key")
    return Support(False, "a cache of pages") if facts.paged else SUPPORTED


def launch(
    mass: Tensor, bounds: Tensor | None, topk: int, keep_first: int, keep_last: int, *, wrap: Wrap
) -> Tensor:
    """Runs `clsa::select_topk`: int32 [B, N, S, topk]. Many rows are selected a chunk at a time."""
    b, sets, s, t = mass.shape
    mass = mass.contiguous()
    out = mass.new_empty((b, sets, s, topk), dtype=torch.int32)
    sms = Device.of(mass.device).sms
    batch = b if static(b) else ASSUMED_BATCH
    for first, rows in chunks(b, sets, s, t):
        scores = mass.new_empty((b, sets, rows, padded(t)))
        wrap(kernel("select_keep", bounds=bounds is not None))[(b * sets * rows, ceil_div(t, BLOCK_T))](
            mass_ptr=mass,
            scores_ptr=scores,
            S=s,
            FIRST=first,
            ROWS=rows,
            T=t,
            TPAD=scores.shape[3],
            **bounds_arguments(bounds),
            KEEP_FIRST=keep_first,
            KEEP_LAST=keep_last,
            N=sets,
            BLOCK_T=BLOCK_T,
            num_warps=4,
            num_stages=1,
        )
        # A prompt of unknown length has rows enough to fill the chip.
        lines = batch * sets * rows if static(rows) else sms
        select(scores, bounds, out, first, t, segments(lines, t, sms), wrap)
    return out


CHOOSE = Variant("select_topk", "radix", supports, launch, waits=rows_unknown)
