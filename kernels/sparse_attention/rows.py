"""Attention of a prompt over selected tokens: blocks of query rows read what any of them selected once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clsa_compile.ir.variants import SUPPORTED, Facts, Support, Variant
from clsa_compile.kernels.launch import (
    Wrap,
    ceil_div,
    mask_arguments,
    mask_context,
    output,
    page_arguments,
    parts,
    power_of_two,
    sinks_arguments,
    static,
    strides,
    tile_plan,
    unsupported_tile,
)
from clsa_compile.kernels.render import kernel
from clsa_compile.kernels.sparse_attention import gather

# Query rows by heads of a program: what a dot of tensor cores takes anyway. A byte has a bit for each row.
TILE_ROWS = 16
MOST_ROWS = 8
# Fewer rows do not fill the chip in blocks; a gather may split what each of them reads.
LEAST_ROWS = 64


def supports(facts: Facts) -> Support:
    """Takes prompts of heads that share their keys with few others."""
    if facts.S is not None and facts.S < LEAST_ROWS:
        return Support(False, f"{facts.S} query rows are too few for blocks of them")
    if rows_of(facts.H // facts.Hkv) < 2:
        return Support(False, f"{facts.H // facts.Hkv} heads of one kv head fill a block by themselves")
    reason = unsupported_tile(facts, TILE_ROWS)
    return Support(False, reason) if reason else SUPPORTED


def rows_of(group: int) -> int:
    """Returns how many query rows of `group` heads a block has, a power of two."""
    return min(TILE_ROWS // power_of_two(group), MOST_ROWS)


def merged(indices: Tensor, rows: int, wrap: Wrap) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what blocks of `rows` query rows select: tokens and their readers, and how many there are.

    indices int32 [B, N, S, K]. Tokens int32 and readers uint8 [B * N * ceil(S / rows), rows * K]: each token
    of a block once, with a bit for every row that selects it; counts int32.
    """
    b, sets, s, topk = indices.shape
    blocks = ceil_div(s, rows)
    lines = b * sets * blocks
    tile = power_of_two(topk)
    tokens = indices.new_empty((lines, rows * topk))
    readers = indices.new_empty((lines, rows * topk), dtype=torch.uint8)
    counts = indices.new_empty((lines,))
    wrap(kernel("merge_rows"))[(lines,)](
        indices_ptr=indices,
        tokens_ptr=tokens,
        readers_ptr=readers,
        count_ptr=counts,
        S=s,
        TOPK=topk,
        BLOCKS=blocks,
        **strides("indices", "bhsk", indices),
        SETS=sets,
        ROWS=rows,
        TILE=tile,
        LEVELS=topk.bit_length(),
        num_warps=max(1, min(tile // 128, 16)),  # four tokens a thread: with two of them ptxas spills
        num_stages=1,
    )
    return tokens, readers, counts


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

    What blocks select takes five bytes for every index, beside the indices. With `dense_below` a row may read
    what it did not select: it is gathered by itself, as where K is unknown.
    """
    if dense_below > 0 or not static(indices.shape[3]):
        given = (mask, bounds, mask_inputs, sinks, scale, softcap, predicate, pages, dense_below)
        return gather.launch(q, k, v, indices, *given, wrap=wrap)
    q = q.contiguous()
    b, h, s, d = q.shape
    hkv, dv, topk = k.shape[1], v.shape[3], indices.shape[3]
    rows, heads = rows_of(h // hkv), power_of_two(h // hkv)
    tokens, readers, counts = merged(indices, rows, wrap)
    block_n, warps, stages = tile_plan(q, k, v, TILE_ROWS, 64, 2)
    out = output(q, dv)
    jit = kernel(
        "sparse_attention_rows",
        d_parts=parts(d),
        dv_parts=parts(dv),
        bounds=False,
        softcap=bool(softcap),
        sinks=sinks is not None,
        direct=True,
        with_lse=False,
        latent=False,
        paged=pages is not None,
        **mask_context(mask, mask_inputs, predicate, (1, 2)),
    )
    args: dict[str, Any] = sinks_arguments(sinks)
    if softcap:
        args["SOFTCAP"] = softcap
    wrap(jit)[(ceil_div(s, rows), hkv, b)](
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        tokens_ptr=tokens,
        readers_ptr=readers,
        count_ptr=counts,
        out_ptr=out,
        S=s,
        TOPK=topk,
        **args,
        **strides("k", "bhtd", k),
        **strides("v", "bhtd", v),
        **page_arguments(k, pages),
        **mask_arguments(mask, mask_inputs),
        SCALE=scale,
        H=h,
        HKV=hkv,
        D=d,
        DV=dv,
        SETS=indices.shape[1],
        ROWS=rows,
        HEADS=heads,
        BLOCK_M=TILE_ROWS,
        BLOCK_N=block_n,
        num_warps=warps,
        num_stages=stages,
    )
    return out.transpose(1, 2)


ROWS = Variant("sparse_attention", "rows", supports, launch)
