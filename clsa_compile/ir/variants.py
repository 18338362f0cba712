"""Variant: one way of running a contract op, and the facts by which it is chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from clsa_compile.ir.masks import is_triangle
from clsa_compile.ir.pages import check_pages, key_slots


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a contract op when it is lowered. Unknown sizes (SymInt) are None.

    B, H, Hkv, S, T, D, Dv as in `ir/ops.py`; for `index_topk` H counts index heads and D is the width of
    the index. `topk` is K, 0 for dense attention. `paged`: the cache is a pool of pages, and T is M * P.
    `pooled`: only some tokens may be selected, or looked at. `formula`: a predicate alone says which keys a
    query may read, and it is not just `kv <= q` over as many queries as keys. `mixed`: q, k and v are not all
    of one dtype.
    """

    op: str
    device: str
    dtype: torch.dtype
    B: int | None
    H: int
    Hkv: int
    S: int | None
    T: int | None
    D: int
    Dv: int
    topk: int
    softcap: bool
    sinks: bool
    additive: bool
    lse_used: bool
    paged: bool = False
    pooled: bool = False
    formula: bool = False
    mixed: bool = False

    @classmethod
    def of(cls, op: str, values: Mapping[str, Any], lse_used: bool) -> Facts:
        """Returns the facts of a call; `values` are its arguments by name, tensors real or fake.

        Raises ValueError for a block table that does not belong to them.
        """
        if op == "mask_bounds":
            like = values["like"]
            return cls(op, like.device.type, like.dtype, None, 0, 0, None, None, 0, 0, 0, *[False] * 4)
        if op == "select_topk":
            mass = values["mass"]
            b, sets, s, t = map(_static, mass.shape)
            topk = _static(values["topk"]) or 0
            flags = [False] * 4
            return cls(op, mass.device.type, mass.dtype, b, sets or 0, sets or 0, s, t, 0, 0, topk, *flags)
        q, k, mask, pages = values["q"], values["k"], values["mask"], values.get("pages")
        check_pages(q, k, values.get("v"), pages)
        topk = values["indices"].shape[-1] if op == "sparse_attention" else values.get("topk", 0)
        predicate, s, t = values.get("predicate", ""), _static(q.shape[2]), _static(key_slots(k, pages))
        among = {"index_topk": "candidates", "attention_mass": "indices"}.get(op, "")
        return cls(
            op=op,
            device=q.device.type,
            dtype=q.dtype,
            B=_static(q.shape[0]),
            H=int(q.shape[1]),
            Hkv=int(k.shape[1]),
            S=s,
            T=t,
            D=int(q.shape[3]),
            Dv=int(values["v"].shape[3]) if "v" in values else 0,
            topk=_static(topk) or 0,
            softcap=bool(values.get("softcap", 0.0)),
            sinks=values.get("sinks") is not None,
            additive=mask is not None and mask.dtype != torch.bool,
            lse_used=lse_used,
            paged=pages is not None,
            pooled=values.get(among) is not None,
            formula=mask is None and bool(predicate) and not is_triangle(predicate, s, t),
            mixed=any(x.dtype != q.dtype for x in (k, values.get("v", k))),
        )


def _static(size: Any) -> int | None:
    return size if isinstance(size, int) else None


@dataclass(frozen=True, slots=True)
class Support:
    """Whether a variant can run given facts, and if not, why."""

    ok: bool
    reason: str = ""


SUPPORTED = Support(True)


@dataclass(frozen=True, slots=True)
class Variant:
    """One implementation of a contract op.

    `launch` takes the contract op's arguments, and `wrap`, through which every Triton kernel is called:
    the identity in eager code, `torch.library.wrap_triton` while a graph is traced. `waits` says where a
    trace would cost memory that a call does not, as a loop over an unknown size cannot be traced: the op then
    stays in a graph that Python runs, and is launched with the sizes that there are; no option reaches it.
    """

    op: str
    name: str
    supports: Callable[[Facts], Support]
    launch: Callable[..., Any]
    waits: Callable[[Facts], bool] = lambda facts: False


def select(variants: tuple[Variant, ...], facts: Facts) -> tuple[Variant | None, tuple[str, ...]]:
    """Returns the first variant that supports the facts, and the reasons of those before it."""
    reasons: list[str] = []
    for variant in variants:
        if variant.op != facts.op:
            continue
        support = variant.supports(facts)
        if support.ok:
            return variant, tuple(reasons)
        reasons.append(f"{variant.name}: {support.reason}")
    return None, tuple(reasons)
