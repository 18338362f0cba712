"""Rows of a cache that a few query rows may read, copied side by side.

A layer that chooses among what an earlier one has chosen reads that pool only. Its rows are gathered into a
buffer, once, and what runs on all keys runs on the buffer: the pool is small, so the copy costs less than a
second kernel that gathers for itself would save.
"""

from __future__ import annotations

from torch import Tensor


def gathered(x: Tensor, indices: Tensor) -> Tensor:
    """Returns the rows [B * S, Hkv, P, D] of x [B, Hkv, T, D] that indices [B, 1, S, P] name; any for -1."""
    b, heads, _, width = x.shape
    s, pool = indices.shape[2:]
    places = indices.clamp(min=0).long().view(b, 1, s * pool, 1).expand(b, heads, s * pool, width)
    rows = x.gather(2, places).view(b, heads, s, pool, width)
    return rows.transpose(1, 2).reshape(b * s, heads, pool, width)
