"""passes/borrow.py: the product that makes queries is found, whatever follows it, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clsa_compile.ir.captured import Captured
from clsa_compile.passes.borrow import Product, product
from clsa_compile.passes.pipeline import decide

Trace = Callable[..., Captured]
sdpa = F.scaled_dot_product_attention
B, S, H, D, E = 2, 5, 4, 8, 16


def inputs() -> tuple[Tensor, ...]:
    """x [B, S, E], weight [H * D, E], k and v [B, H, S, D], table [S, D]."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, S, E), (H * D, E), (B, H, S, D), (B, H, S, D), (S, D))
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def heads(q: Tensor) -> Tensor:
    return q.view(B, S, -1, D).transpose(1, 2)


def rotated(x: Tensor, w: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    q = F.rms_norm(heads(F.linear(x, w)), (D,))
    q = q * table.cos() + torch.cat((-q[..., 4:], q[..., :4]), -1) * table.sin()
    return sdpa(q, k, v)


def transposed(x: Tensor, w: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    q = torch.addmm(table.new_zeros(H * D), x.reshape(-1, E), w.t())
    return sdpa(heads(q), k, v)


def spelled(x: Tensor, w: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    return sdpa(heads(x @ w.T), k, v)


def swapped(x: Tensor, w: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    return sdpa(heads(torch.matmul(x, w.mT)), k, v)


def packed(x: Tensor, w: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    return sdpa(heads(F.linear(x, w)[..., : H // 2 * D]), k[:, :2], v[:, :2])


def chunked(x: Tensor, w: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    return sdpa(heads(F.linear(x, w).chunk(2, -1)[0]), k[:, :2], v[:, :2])


@pytest.mark.parametrize(
    ("attend", "rows"),
    [
        (rotated, (B, S, E)),
        (transposed, (B * S, E)),
        (spelled, (B, S, E)),
        (swapped, (B, S, E)),
        (packed, (B, S, E)),
        (chunked, (B, S, E)),
    ],
)
def test_the_product_is_found(attend: Any, rows: tuple[int, ...], trace: Trace) -> None:
    captured = trace(attend, *inputs())
    (site,) = decide(captured).sites.attention
    found = product(site)
    assert isinstance(found, Product)
    assert tuple(found.rows.meta["val"].shape) == rows
    assert site.q.root in (found.node, *found.after)
    reads = {n for node in found.after for n in node.all_input_nodes}
    assert found.node in reads
    assert not any(n.name == "k" for n in found.after)


def two(x: Tensor, w: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    return sdpa(heads(F.linear(x, w) + F.linear(x * 2, w)), k, v)


def none(x: Tensor, w: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    return sdpa(k * table, k, v)


def computed(x: Tensor, w: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    return sdpa(heads(F.linear(x, w * 2)), k, v)


def written(x: Tensor, w: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    q = heads(F.linear(x, w)).clone()
    q[..., :4].mul_(2)
    return sdpa(q, k, v)


def overwritten(x: Tensor, w: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    x = x * 1
    q = heads(F.linear(x, w))
    x.mul_(2)
    return sdpa(q, k, v) + x.sum()


def rows_first(x: Tensor, w: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """[S, B, E], as some models have it."""
    q = F.linear(x.transpose(0, 1), w).view(S, B, H, D).permute(1, 2, 0, 3)
    return sdpa(q, k, v)


def rows_first_flat(x: Tensor, w: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    q = torch.mm(x.transpose(0, 1).reshape(S * B, E), w.t()).view(S, B, H, D).permute(1, 2, 0, 3)
    return sdpa(q, k, v)


def sliced(x: Tensor, w: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    q = F.linear(x, w)[:, -2:].view(B, 2, H, D).transpose(1, 2)
    return sdpa(q, k, v)


@pytest.mark.parametrize(
    ("attend", "reason"),
    [
        (rows_first, "in another order than sequence by sequence"),
        (rows_first_flat, "in another order than sequence by sequence"),
        (sliced, "in another order than sequence by sequence"),
        (overwritten, "are written in place"),
        (two, "2 products with weights make the queries"),
        (none, "no product with a weight makes the queries"),
        (computed, "no product with a weight makes the queries"),
        (written, "are written in place"),
    ],
)
def test_what_is_not_one_product_is_refused(attend: Any, reason: str, trace: Trace) -> None:
    (site,) = decide(trace(attend, *inputs())).sites.attention
    found = product(site)
    assert isinstance(found, str)
    assert reason in found
