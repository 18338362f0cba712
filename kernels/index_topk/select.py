"""Exact top-k of fp32 score rows: a radix select in five launches, the same on every run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clsa_compile.kernels.launch import (
    CHIP,
    Wrap,
    bounds_arguments,
    ceil_div,
    floor_power_of_two,
    power_of_two,
    static,
)
from clsa_compile.kernels.render import kernel

# Scores a program reads at a time; rows of scores are padded to a multiple of it.
CHUNK = 2048
MAX_SEGMENTS = 64


def padded(t: Any) -> Any:
    """Returns the length that a row of scores of t keys is stored with."""
    return ceil_div(t, CHUNK) * CHUNK


def segments(rows: int, t: Any) -> int:
    """Returns NT, the number of programs that share one of `rows` rows, a power of two."""
    wanted = floor_power_of_two(2 * CHIP // rows)
    longest = power_of_two(-(-t // CHUNK)) if static(t) else MAX_SEGMENTS
    return max(1, min(wanted, longest, MAX_SEGMENTS))


def select(
    scores: Tensor, bounds: Tensor | None, out: Tensor, first: Any, t: Any, nt: int, wrap: Wrap
) -> None:
    """Writes the selected positions of scores [B, HOUT, ROWS, TPAD] into rows of out [B, HOUT, S, K].

    `scores` are those of query rows `first` to `first` + ROWS. Only keys inside `bounds` and below `t` count;
    the rest of `scores` may be uninitialised. `nt` comes from `segments`; the result does not depend on it.
    """
    b, heads, rows, tpad = scores.shape
    s, topk = out.shape[2], out.shape[3]
    lines = b * heads * rows
    shared = {
        "scores_ptr": scores,
        **bounds_arguments(bounds),
        "counts_ptr": scores.new_empty((lines, 4, nt, 256), dtype=torch.int32),
        "above_ptr": scores.new_empty((lines, 4, nt), dtype=torch.int32),
        "state_ptr": scores.new_empty((lines, 4, 2), dtype=torch.int64),
        "T": t,
        "TPAD": tpad,
        "TOPK": topk,
        "S": s,
        "FIRST": first,
        "ROWS": rows,
        "HOUT": heads,
        "NT": nt,
        "BLOCK_N": CHUNK,
        # The counts of all segments of a row are held at once, 256 each.
        "num_warps": 16 if nt > 16 else 8,
        "num_stages": 1,
    }
    for level in range(4):
        jit = kernel("select_count", bounds=bounds is not None, level=level)
        wrap(jit)[(lines, nt)](**shared, LEVEL=level)
    jit = kernel("select_emit", bounds=bounds is not None)
    wrap(jit)[(lines, nt)](**shared, out_ptr=out, BLOCK_K=256)
