"""Exact top-k of fp32 score rows in two launches, the same on every run.

`select_pick` guesses a key below the k-th largest from a sample of the row, and lists the keys that reach
it: a few thousand. `select_emit` finds the k-th among those, which one program holds in registers. The
guess only saves time: where it was wrong, or where ties make too many candidates, `select_emit` reads
again what it cannot hold.
"""

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
# Scores that the threshold is guessed from, a power of two.
SAMPLE = 4096
# Keys that one program holds, powers of two: the least, so that few rows have more candidates, and the most,
# for the registers. Two counts of that many keys are scanned as one int32.
CAP = 8192
MAX_CAP = 16384


def padded(t: Any) -> Any:
    """Returns the length that a row of scores of t keys is stored with."""
    return ceil_div(t, CHUNK) * CHUNK


def segments(rows: int, t: Any) -> int:
    """Returns NT, the number of programs that share one of `rows` rows, a power of two.

    One program a multiprocessor: each of them reads the whole sample.
    """
    wanted = floor_power_of_two(CHIP // rows)
    longest = power_of_two(-(-t // CHUNK)) if static(t) else MAX_SEGMENTS
    return max(1, min(wanted, longest, MAX_SEGMENTS))


def held(topk: Any) -> int:
    """Returns how many keys the program that finds the topk largest holds."""
    return min(max(CAP, power_of_two(2 * topk)), MAX_CAP) if static(topk) else CAP


def listed_keys(t: Any, nt: int, cap: int) -> Any:
    """Returns how many candidates one of the nt segments of a row may list; 0 where there is no list."""
    if static(t) and t <= cap:
        return 0
    longest = ceil_div(ceil_div(t, CHUNK), nt) * CHUNK
    if static(t):
        return min(longest, cap)
    # What is not known cannot be compared; of one segment, the list would be longer than the row.
    return cap if nt == 1 else longest


def row_bytes(t: int, topk: Any) -> int:
    """Returns what a row takes in scores and candidates, where rows are many and have one segment each."""
    return padded(t) * 4 + listed_keys(t, 1, held(topk)) * 8


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
    cap = held(topk)
    shared: dict[str, Any] = {
        "scores_ptr": scores,
        **bounds_arguments(bounds),
        "T": t,
        "TPAD": tpad,
        "TOPK": topk,
        "S": s,
        "FIRST": first,
        "ROWS": rows,
        "HOUT": heads,
        "num_stages": 1,
    }
    capacity = listed_keys(t, nt, cap)
    listed = not (static(capacity) and capacity == 0)
    if listed:
        shared |= {
            "list_ptr": scores.new_empty((lines, nt, capacity), dtype=torch.int64),
            "info_ptr": scores.new_empty((lines, nt, 3), dtype=torch.int32),
            "CAPACITY": capacity,
            "NT": nt,
        }
        jit = kernel("select_pick", bounds=bounds is not None)
        wrap(jit)[(lines, nt)](**shared, SAMPLE=SAMPLE, CAP=cap, BLOCK_N=CHUNK, num_warps=8)
        shared["LEVELS"] = nt.bit_length() - 1
    # A row that is held whole needs no list.
    width = cap if listed else power_of_two(padded(t))
    jit = kernel("select_emit", bounds=bounds is not None, listed=listed)
    wrap(jit)[(lines,)](**shared, out_ptr=out, CAP=width, num_warps=min(16, max(4, width // 512)))
