"""Exact top-k of fp32 score rows in two launches, the same on every run.

`select_pick` guesses a key below the k-th largest from a sample of the row, and lists the keys that reach
it: a few thousand. `select_emit` finds the k-th among those, which one program holds in registers. The
guess only saves time: where it was wrong, or where ties make too many candidates, `select_emit` reads
again what it cannot hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from clsa_compile.ir.variants import Facts
from clsa_compile.kernels.launch import (
    ASSUMED_KEYS,
    Wrap,
    bounds_arguments,
    ceil_div,
    floor_power_of_two,
    power_of_two,
    static,
)
from clsa_compile.kernels.render import kernel

# Scores that a program of select_pick reads at a time where a row has the most programs; else twice as many.
# Rows of scores are padded to a multiple of the latter.
CHUNK = 2048
MAX_SEGMENTS = 64
# Keys that a program of select_emit holds, a power of two. Rows no longer than this take one launch. For
# 2048 of 131072 keys the guess gives about 4000 candidates.
CAP = 8192
# Scores that the guess is made from, powers of two; one of KEYS_PER_SAMPLE at least where rows are long. With
# fewer than 16 of them above the k-th (2048 of a million keys) candidates often exceed CAP.
SAMPLE = 2048
MAX_SAMPLE = 16384
KEYS_PER_SAMPLE = 128
WARPS = 8
# The scores of a chunk of query rows, and the candidates listed of them, take at most this much.
SCORE_BYTES = 256 * 1024 * 1024


def padded(t: Any) -> Any:
    """Returns the length that a row of scores of t keys is stored with."""
    return ceil_div(t, 2 * CHUNK) * 2 * CHUNK


def chunk(nt: int) -> int:
    """Returns how many scores a program reads at a time, where nt share a row."""
    return CHUNK if nt == MAX_SEGMENTS else 2 * CHUNK


def segments(rows: int, t: Any, sms: int) -> int:
    """Returns NT, the number of programs that share one of `rows` rows, a power of two.

    Two programs for each of `sms` multiprocessors at most: each of them reads the whole sample.
    """
    wanted = floor_power_of_two(2 * sms // rows)
    longest = power_of_two(-(-t // CHUNK)) if static(t) else MAX_SEGMENTS
    return max(1, min(wanted, longest, MAX_SEGMENTS))


def sampled(t: Any) -> int:
    """Returns how many scores of a row of t keys the guess is made from."""
    return max(SAMPLE, min(MAX_SAMPLE, floor_power_of_two(t // KEYS_PER_SAMPLE))) if static(t) else SAMPLE


def listed_keys(t: Any, nt: int) -> Any:
    """Returns how many candidates one of the nt segments of a row may list; 0 where there is no list.

    All segments of a row together have room for twice what is held: a guess that gives a few more costs some
    reading of the list, and not of the row.
    """
    if static(t) and t <= CAP:
        return 0
    return torch.sym_min(ceil_div(ceil_div(t, chunk(nt)), nt) * chunk(nt), 2 * CAP if nt == 1 else CAP)


def row_bytes(t: int) -> int:
    """Returns what a row takes in scores and candidates where rows are many, so that each is one segment."""
    return padded(t) * 4 + listed_keys(t, 1) * 8


def chunks(b: Any, heads: int, s: Any, t: Any) -> Iterator[tuple[Any, Any]]:
    """Yields (first, rows) of the query rows that share one buffer of scores after the other.

    All of them at once when S is not known, which is so in exported programs: a loop over an unknown number
    cannot be traced, and the buffer is still smaller than what the same model needs without clsa.
    """
    if not static(s):
        yield 0, s
        return
    step = rows_at_once(b, heads, s, t)
    for first in range(0, s, step):
        yield first, min(step, s - first)


def rows_at_once(b: Any, heads: int, s: int, t: Any) -> int:
    """Returns how many of s query rows share one buffer of scores."""
    line = (b if static(b) else 1) * heads * row_bytes(t if static(t) else ASSUMED_KEYS)
    fitting = max(SCORE_BYTES // line, 1)
    if fitting >= s:
        return s
    return fitting // 64 * 64 if fitting >= 64 else fitting


def rows_unknown(facts: Facts) -> bool:
    """Tells whether a trace would need scores of all rows at once, where a call needs those of a chunk."""
    return facts.S is None


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
        "num_warps": WARPS,
        "num_stages": 1,
    }
    capacity = listed_keys(t, nt)
    if static(capacity) and capacity == 0:
        jit = kernel("select_emit", bounds=bounds is not None, listed=False)
        wrap(jit)[(lines,)](**shared, out_ptr=out, CAP=max(power_of_two(t), CHUNK))
        return
    shared |= {
        "list_ptr": scores.new_empty((lines, nt, capacity), dtype=torch.int64),
        "info_ptr": scores.new_empty((lines, nt, 3), dtype=torch.int32),
        "CAPACITY": capacity,
        "NT": nt,
        "CAP": CAP,
    }
    jit = kernel("select_pick", bounds=bounds is not None)
    wrap(jit)[(lines, nt)](**shared, SAMPLE=sampled(t), BLOCK_N=chunk(nt))
    jit = kernel("select_emit", bounds=bounds is not None, listed=True)
    wrap(jit)[(lines,)](**shared, out_ptr=out, LEVELS=nt.bit_length() - 1)
