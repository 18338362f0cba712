"""FAMILIES: the patterns, in the order in which they are tried. One line a family."""

from __future__ import annotations

from clsa_compile.passes.patterns.eager import EAGER
from clsa_compile.passes.patterns.pattern import Pattern
from clsa_compile.passes.patterns.sdpa import SDPA

FAMILIES: tuple[Pattern, ...] = (SDPA, EAGER)
