"""`torch.nn.functional.scaled_dot_product_attention`, in one node."""

from __future__ import annotations

import math
from typing import Any

import sympy
import torch
from torch.fx import Node

from clsa_compile.ir.masks import B_, H_, KV_, Q_, floordiv
from clsa_compile.ir.sites import Reason, Refused
from clsa_compile.passes.indexing import argument, is_tensor, same, shape
from clsa_compile.passes.patterns.pattern import (
    C_,
    E_,
    Candidate,
    Context,
    Part,
    Pattern,
    number,
    refuse_unless,
    roles_of,
)

aten = torch.ops.aten


def _match(context: Context, node: Node) -> Candidate | None:
    q, k, v = node.args[:3]
    # 1. Nothing random.
    dropout = argument(node, 4, "dropout_p", 0.0)
    refuse_unless(dropout == 0, Reason.DROPOUT, f"dropout_p is {dropout}")
    # 2. All operands have the same rank, 4 or 3.
    rank = q.meta["val"].dim()
    roles = roles_of(rank)
    refuse_unless(
        roles is not None and k.meta["val"].dim() == rank and v.meta["val"].dim() == rank,
        Reason.SHAPE,
        f"operands of ranks {rank}, {k.meta['val'].dim()}, {v.meta['val'].dim()}; 4 is understood",
    )
    assert roles is not None
    # 3. The scale is a constant.
    scale = argument(node, 6, "scale")
    width = shape(q)[-1]
    if scale is None:
        refuse_unless(width.is_Integer, Reason.SCALE, "the head width is not static")
        scale = 1.0 / math.sqrt(int(width))
    refuse_unless(number(scale) is not None, Reason.SCALE, f"the scale {scale} is not a constant")
    # 4. Heads, with or without grouping.
    sizes = _sizes(q, k, v, rank)
    group = 1
    if rank == 4:
        heads, kv_heads = sizes[H_], shape(k)[1]
        refuse_unless(
            isinstance(heads, int) and bool(kv_heads.is_Integer),
            Reason.SHAPE,
            "the number of heads is not static",
        )
        if argument(node, 7, "enable_gqa", False):
            refuse_unless(
                heads % int(kv_heads) == 0 and same(shape(v)[1], kv_heads),
                Reason.SHAPE,
                f"{heads} query heads over {kv_heads} key heads",
            )
            group = heads // int(kv_heads)
    b, h, q_, kv = (sympy.S.Zero if sizes[s] == 1 else s for s in (B_, H_, Q_, KV_))
    head = _grouped(h, group, sizes)
    inner = sympy.S.Zero if sizes[C_] == 1 else C_
    outer = sympy.S.Zero if sizes[E_] == 1 else E_
    middle = (h,) if rank == 4 else ()
    grouped = (head,) if rank == 4 else ()
    # 5. The mask is boolean or additive; `is_causal` is aligned to the top left corner.
    mask = argument(node, 3, "attn_mask")
    masks: list[Node] = []
    if mask is not None:
        refuse_unless(is_tensor(mask), Reason.MASK, "the mask is not a tensor")
        masks = [mask]
    causal = bool(argument(node, 5, "is_causal", False))
    refuse_unless(not (causal and masks), Reason.MASK, "is_causal together with a mask")
    return Candidate(
        out=node,
        first_read=node,
        q=Part(q, _broadcast(q, (b, *middle, q_, inner))),
        k=Part(k, _broadcast(k, (b, *grouped, kv, inner))),
        v=Part(v, _broadcast(v, (b, *grouped, kv, outer))),
        sizes=sizes,
        scale=float(scale),
        masks=masks,
        roles=roles,
        extra_predicate=sympy.Le(KV_, Q_) if causal else sympy.true,
    )


def _grouped(h: Any, group: int, sizes: dict[Any, Any]) -> Any:
    if group == 1:
        return h
    return sympy.S.Zero if sizes[H_] == group else floordiv(H_, group)


def _sizes(q: Node, k: Node, v: Node, rank: int) -> dict[Any, Any]:
    own, keys = shape(q), shape(k)
    heads = own[1] if rank == 4 else sympy.S.One
    if not all(s.is_Integer for s in (own[-1], shape(v)[-1])):
        raise Refused(Reason.SHAPE, "the head width is not static")
    return {
        B_: own[0],
        H_: int(heads) if heads.is_Integer else heads,
        Q_: own[-2],
        KV_: keys[-2],
        C_: own[-1],
        E_: shape(v)[-1],
    }


def _broadcast(node: Node, index: tuple[Any, ...]) -> tuple[Any, ...]:
    """Reads dimensions of size 1 at 0."""
    return tuple(sympy.S.Zero if size == 1 else e for e, size in zip(index, shape(node), strict=True))


SDPA = Pattern("sdpa", (aten.scaled_dot_product_attention.default,), _match)
