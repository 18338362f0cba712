"""Paged caches: what `pages`, the last argument of the contract ops, means.

Engines keep the keys of many sequences in one pool of pages. With `pages` int32 [B, M], K is
[N, Hkv, P, D] and V [N, Hkv, P, Dv], any strides, for any page size P >= 1, and T is M * P: token t of
sequence b lies in slot t % P of page pages[b, t // P]. Everything else means what it means without.

Lengths are a mask's business, as always: a predicate like "kv < in0(b)", and `bounds`, which keep kernels
from walking over the rest of the table. Entries for tokens that the mask forbids may be anything, -1 and the
numbers of pages that are others' by now included. They are clamped to [0, N - 1] before anything is loaded
through them, so no address outside of the pool is formed, and what was loaded is masked. As in any cache,
masked means weighed with 0: a pool must hold finite numbers, also where nothing was written yet. (Kernels
load no values at or beyond the end of `bounds`; the reference gathers every page.)

An engine's pools [N, P, Hkv, D] go in as transposed views, without a copy. Decode, `lengths` int32 [B] with
the new token included:

    end = lengths.view(-1, 1)  # [B, S = 1]
    bounds = torch.stack((torch.zeros_like(end), end), dim=-1)
    out, lse = torch.ops.clsa.attention(
        q, k_pool.transpose(1, 2), v_pool.transpose(1, 2),
        None, bounds, [lengths], None, scale, 0.0, "kv < in0(b)", block_table,
    )

Several query rows of a sequence, those of a prompt or speculated ones, are causal too: "kv <= in0(b) + q",
where in0 is the position of the first. MLA's pool [N, P, 512 + 64] goes in as `k = pool.unsqueeze(1)`,
`v = k[..., :512]`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def check_pages(q: Tensor, k: Tensor, v: Tensor | None, pages: Tensor | None) -> None:
    """Raises ValueError for a block table that does not belong to q [B, ...], k and v.

    Sizes that are not known while a graph is traced are not compared.
    """
    if pages is None:
        return
    if pages.dtype != torch.int32 or pages.dim() != 2:
        raise ValueError(f"pages must be int32 [B, M], not {pages.dtype} of {pages.dim()} dimensions")
    if _differ(pages.shape[0], q.shape[0]):
        raise ValueError(f"pages has rows for {pages.shape[0]} sequences, q has {q.shape[0]}")
    if isinstance(k.shape[0], int) and k.shape[0] == 0:
        raise ValueError("the cache has no pages")
    if v is None:
        return
    if _differ(k.shape[2], v.shape[2]):
        raise ValueError(f"pages of K hold {k.shape[2]} tokens, those of V {v.shape[2]}")
    if _differ(k.shape[0], v.shape[0]):
        raise ValueError(f"K has {k.shape[0]} pages, V {v.shape[0]}")


def _differ(one: Any, other: Any) -> bool:
    return isinstance(one, int) and isinstance(other, int) and one != other


def key_slots(k: Tensor, pages: Tensor | None) -> Any:
    """Returns T, the number of key slots of a sequence."""
    return k.shape[2] if pages is None else pages.shape[1] * k.shape[2]


def gathered(x: Tensor, pages: Tensor | None) -> Tensor:
    """Returns a cache as [B, Hkv, T, D]: itself where it is not paged, else a copy of its pages in order."""
    if pages is None:
        return x
    rows = x[pages.clamp(0, x.shape[0] - 1).long()]  # [B, M, Hkv, P, D]
    return rows.transpose(1, 2).flatten(2, 3)
