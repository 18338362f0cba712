"""The pipeline, in order: canonicalize, number, match, plan, rewrite, stop early, keep tables, lower.

What a graph must satisfy is verified between passes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

from torch import Tensor
from torch.fx import Node

from clsa_compile.errors import ClsaError, PassError
from clsa_compile.ir.captured import Captured
from clsa_compile.ir.plan import Plan
from clsa_compile.ir.references import REFERENCES
from clsa_compile.ir.routing import Request, Sharing
from clsa_compile.ir.sites import Sites
from clsa_compile.ir.skips import Skips
from clsa_compile.ir.variants import Support, Variant
from clsa_compile.passes.canonicalize import canonicalize
from clsa_compile.passes.early import stop_early
from clsa_compile.passes.families import FAMILIES
from clsa_compile.passes.group import plan
from clsa_compile.passes.lower import Choice, lower
from clsa_compile.passes.match import NO_SKIPS, match
from clsa_compile.passes.number import Merged, merge
from clsa_compile.passes.owned import make_values
from clsa_compile.passes.reclaim import reclaim, reclaimable
from clsa_compile.passes.rewrite import rewrite
from clsa_compile.passes.savings import savings
from clsa_compile.passes.tables import keep_tables
from clsa_compile.passes.verify import mutations, verify

# Told of each stage that a graph has reached: canonical, matched, plan, rewritten, lowered. What it raises
# ends the pipeline there.
Observer = Callable[[str, Captured], None]


@dataclass(frozen=True, slots=True)
class Decision:
    """All that is known before the first node changes."""

    sites: Sites
    plan: Plan
    reclaimed: tuple[Node, ...] = ()
    skips: Skips = NO_SKIPS
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


def decide(
    captured: Captured,
    sharing: Sharing | None = None,
    *,
    reclaims: bool = False,
    request: Request | None = None,
    skips: Skips = NO_SKIPS,
    observe: Observer | None = None,
) -> Decision:
    """Canonicalizes a graph, finds its attentions and plans what becomes of them.

    Raises OptionError where `skips` has a name that is unlike anything.
    """
    observe = observe or _unobserved
    if "canonicalize" not in skips:
        with _named("canonicalize"):
            canonicalize(captured)
    merged = Merged()
    if "number" not in skips:
        with _named("number"):
            merged = merge(captured)
    observe("canonical", captured)
    with _named("match"):
        sites = match(captured, FAMILIES, skips)
    observe("matched", captured)
    with _named("plan"):
        decided = plan(sites, sharing, request, merged.repeats)
        writes = reclaimable(captured, sites, decided) if reclaims and "reclaim" not in skips else {}
        every = tuple(dict.fromkeys(node for nodes in writes.values() for node in nodes))
        saved = savings(captured, sites, decided, every)
        decided = replace(decided, invalid=tuple(writes), savings=saved, skipped=skips.passes(_others(skips)))
    return Decision(sites, decided, every, skips, {} if request is None else request.tensors)


def missing(decision: Decision) -> tuple[str, ...]:
    """Returns names that were to be left out and that nothing in a graph bears, though others' layers may.

    Raises OptionError for a name that is unlike anything.
    """
    return decision.skips.unknown(_others(decision.skips), [site.path for site in decision.plan.sites])


def _others(skips: Skips) -> list[str]:
    """Returns what may be left out besides passes: families, and variants of kernels that `skips` names."""
    variants = [name for name in skips.names if name.partition(".")[0] in REFERENCES]
    return [*(family.family for family in FAMILIES), *variants]


def carry_out(
    captured: Captured,
    decision: Decision,
    variants: tuple[Variant, ...],
    wrap: Callable[[Any], Any],
    observe: Observer | None = None,
    may_wait: bool = False,
) -> tuple[Captured, tuple[Choice, ...]]:
    """Rewrites and lowers a graph as decided. `observe(stage, captured)` is called after each pass.

    `may_wait` is as in `lower`.
    """
    observe = observe or _unobserved
    skips = decision.skips
    kept = [node for node in mutations(captured.graph) if node not in decision.reclaimed]
    with _named("rewrite"):
        rewrite(captured, decision.sites, decision.plan, decision.tensors)
        if decision.reclaimed:
            reclaim(captured, decision.reclaimed)
        if "early" not in skips:
            gone = set(make_values(captured))
            kept = [node for node in kept if node not in gone]
            stop_early(captured)
        if "tables" not in skips:
            keep_tables(captured)
        verify(captured, "rewrite", kept)
    observe("rewritten", captured)
    with _named("lower"):
        # What is called later knows of no skips.
        captured, choices = lower(captured, without(variants, skips), wrap, may_wait and not skips.names)
        verify(captured, "lower", kept, [choice.node for choice in choices if choice.waits])
    observe("lowered", captured)
    return captured, choices


def without(variants: tuple[Variant, ...], skips: Skips) -> tuple[Variant, ...]:
    """Returns variants of which those that `skips` names, as "attention.decode", support nothing."""
    if not skips.names:
        return variants
    no = Support(False, "the option 'skip' names it")
    return tuple(replace(v, supports=lambda _: no) if f"{v.op}.{v.name}" in skips else v for v in variants)


def _unobserved(stage: str, captured: Captured) -> None:
    return None


class _named:
    """Names the pass that failed; what clsa raises on purpose goes through as it is."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, ClsaError):
            raise PassError(f"the pass {self.name!r} failed: {type(error).__name__}: {error}") from error


@cache
def uuid() -> str:
    """Returns the identity of the pipeline: a hash of everything that decides what a graph becomes."""
    digest = hashlib.sha256()
    root = files("clsa_compile")
    for folder in ("ir", "policies", "passes", "kernels", "capture"):
        for path in _sources(root / folder):
            digest.update(path.name.encode())
            digest.update(path.read_bytes())
    digest.update((root / "backend.py").read_bytes())
    return digest.hexdigest()[:16]


def _sources(folder: Traversable) -> list[Traversable]:
    found = []
    for entry in sorted(folder.iterdir(), key=lambda e: e.name):
        if entry.is_dir() and entry.name != "__pycache__":
            found += _sources(entry)
        elif entry.name.endswith((".py", ".jinja")):
            found.append(entry)
    return found
