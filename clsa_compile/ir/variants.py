"""Variant: one way of running a contract op, and the facts by which it is chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a contract op when it is lowered. Unknown sizes (SymInt) are None.

    B, H, Hkv, S, T, D, Dv as in `ir/ops.py`; for `index_topk` H counts index heads and D is the width of
    the index. `topk` is K, 0 for dense attention.
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
    the identity in eager code, `torch.library.wrap_triton` while a graph is traced.
    """

    op: str
    name: str
    supports: Callable[[Facts], Support]
    launch: Callable[..., Any]


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
