"""Canonicalizes: what patterns need not look through."""

from __future__ import annotations

from clsa_compile.ir.captured import Captured
from clsa_compile.passes.tidy import drop_dead


def canonicalize(captured: Captured) -> Captured:
    """Drops dead nodes, so that every user of a node counts.

    The dialect itself (pre-dispatch ATen) already spells methods, functions and operators in one way.
    """
    drop_dead(captured.graph)
    captured.module.recompile()
    return captured
