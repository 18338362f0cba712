"""Tracing without Dynamo, and one comparison that every graph-level test of the passes uses."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map

from clsa_compile.ir.captured import Captured
from clsa_compile.passes.pipeline import Decision, carry_out, decide

# "suite" draws the same examples each time; CLSA_EXAMPLES=search looks further.
settings.register_profile("suite", derandomize=True, max_examples=120, deadline=None, database=None)
settings.register_profile("search", max_examples=3000, deadline=None)
settings.load_profile(os.environ.get("CLSA_EXAMPLES", "suite"))


def trace(fn: Callable[..., Any], *args: torch.Tensor, symbolic: bool = False) -> Captured:
    """Traces `fn` into the dialect that passes read: pre-dispatch ATen with fake values."""
    with torch.no_grad():
        if symbolic:
            module = make_fx(fn, pre_dispatch=True, tracing_mode="symbolic")(*args)
            first = next(n for n in module.graph.nodes if isinstance(n.meta["val"], torch.Tensor))
            return Captured(module, first.meta["val"].fake_mode, "dynamo")
        mode = FakeTensorMode()
        fakes = [mode.from_tensor(a) for a in args]
        with mode:
            module = make_fx(fn, pre_dispatch=True, tracing_mode="real")(*fakes)
        return Captured(module, mode, "dynamo")


def copied(args: Any) -> Any:
    """Returns arguments of their own, so that in-place writes do not leak between two runs."""
    return tree_map(lambda a: a.clone() if isinstance(a, torch.Tensor) else a, args)


@dataclass
class Outcome:
    """What the passes decided for a function, and how far the rewritten graph is from it."""

    decision: Decision
    module: torch.fx.GraphModule
    expected: Any
    actual: Any
    inputs_after: tuple[Any, Any]

    @property
    def sites(self) -> Any:
        return self.decision.sites.attention

    @property
    def rejects(self) -> Any:
        return self.decision.sites.rejects

    @property
    def site(self) -> Any:
        """The only attention, which was taken."""
        assert not self.rejects, [str(r) for r in self.rejects]
        (site,) = self.sites
        return site

    @property
    def reject(self) -> Any:
        """The only attention, which was refused."""
        assert not self.sites, "the attention was taken"
        (reject,) = self.rejects
        return reject

    @property
    def ops(self) -> list[str]:
        return [str(n.target) for n in self.module.graph.nodes if n.op == "call_function"]

    def assert_equal(self, tolerance: float = 2e-5) -> None:
        """Checks results, and what was written into the inputs."""
        pairs = [(self.expected, self.actual), self.inputs_after]
        for expected, actual in pairs:
            torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance, equal_nan=True)


def rewritten(
    fn: Callable[..., Any], *args: torch.Tensor, symbolic: bool = False, others: Any = ()
) -> Outcome:
    """Runs `fn` as it is and after all passes, on equal inputs.

    `others` are inputs of other sizes, for graphs traced with symbolic sizes.
    """
    captured = trace(fn, *args, symbolic=symbolic)
    decision = decide(captured)
    carry_out(captured, decision, (), lambda kernel: kernel)
    mine, theirs = copied(args), copied(args)
    with torch.no_grad():
        torch.manual_seed(7)  # for what draws at random
        expected = fn(*mine)
        torch.manual_seed(7)
        actual = captured.module(*theirs)
        outcome = Outcome(decision, captured.module, expected, actual, (mine, theirs))
        for other in others:
            torch.testing.assert_close(
                captured.module(*copied(other)), fn(*copied(other)), atol=2e-5, rtol=2e-5
            )
    return outcome


@pytest.fixture(name="trace", scope="session")
def trace_fixture() -> Callable[..., Captured]:
    return trace


@pytest.fixture(name="rewritten", scope="session")
def rewritten_fixture() -> Callable[..., Outcome]:
    return rewritten
