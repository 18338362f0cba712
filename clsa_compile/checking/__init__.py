"""Checking: eager, Inductor and clsa on the same call, and which rewrite makes a difference."""

from __future__ import annotations

from clsa_compile.checking.compare import check
from clsa_compile.checking.differences import Check, Difference

__all__ = ["Check", "Difference", "check"]
