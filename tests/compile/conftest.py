"""A backend that stops before Inductor, and fresh state for every test."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.fx import GraphModule

import clsa_compile.backend
from clsa_compile.capture.dynamo import capture
from clsa_compile.ir.plan import Plan
from clsa_compile.passes.pipeline import carry_out, decide


@dataclass
class Passes:
    """Backend for torch.compile: runs the rewritten graph as it is, and keeps the plans."""

    plans: list[Plan] = field(default_factory=list)
    modules: list[GraphModule] = field(default_factory=list)

    def __call__(self, gm: GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        captured = capture(gm)
        decision = decide(captured)
        carry_out(captured, decision, (), lambda kernel: kernel)
        self.plans.append(decision.plan)
        self.modules.append(captured.module)
        return captured.module.forward

    @property
    def reasons(self) -> list[str]:
        """Why sites were left, or taken without their selection."""
        return [site.reason for plan in self.plans for site in plan.sites if site.reason]

    def count(self, action: Any) -> int:
        return sum(plan.count(action) for plan in self.plans)


@pytest.fixture
def passes() -> Passes:
    return Passes()


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Forgets compiled code, counters and warnings, so that tests do not see each other."""
    torch._dynamo.reset()
    counters.clear()
    clsa_compile.backend._warn_once.cache_clear()
    yield
    torch._dynamo.reset()
