"""Variants: the first that supports the facts runs, and those before it say why not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from clsa_compile.ir.variants import SUPPORTED, Facts, Support, Variant, select

FACTS = Facts(
    op="attention", device="cuda", dtype=torch.float16, B=2, H=8, Hkv=2, S=1, T=None, D=64, Dv=64,
    topk=0, softcap=False, sinks=False, additive=False, lse_used=False,
)  # fmt: skip


def variant(name: str, support: Any, op: str = "attention") -> Variant:
    return Variant(op, name, support, lambda *args: name)


DECODE = variant("decode", lambda f: SUPPORTED if f.S == 1 else Support(False, "more than one row"))
WIDE = variant("wide", lambda f: SUPPORTED if f.D >= 128 else Support(False, "narrow heads"))
ANY = variant("any", lambda f: SUPPORTED)
OTHER = variant("other", lambda f: SUPPORTED, op="index_topk")


def test_the_first_that_supports_the_facts_is_chosen() -> None:
    assert select((DECODE, ANY), FACTS) == (DECODE, ())
    assert select((ANY, DECODE), FACTS) == (ANY, ())


def test_those_passed_over_say_why_in_order() -> None:
    chosen, reasons = select((WIDE, DECODE, ANY), replace(FACTS, S=4))
    assert chosen is ANY
    assert reasons == ("wide: narrow heads", "decode: more than one row")


def test_variants_of_other_ops_are_no_candidates() -> None:
    assert select((OTHER, DECODE), FACTS) == (DECODE, ())
    assert select((OTHER,), FACTS) == (None, ())


def test_nothing_fits_is_said_with_every_reason() -> None:
    assert select((WIDE, DECODE), replace(FACTS, S=2)) == (
        None,
        ("wide: narrow heads", "decode: more than one row"),
    )
