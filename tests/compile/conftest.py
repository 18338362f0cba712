"""A backend that stops before Inductor, and fresh state for every test."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.fx.experimental.proxy_tensor import make_fx
from triton.backends.compiler import GPUTarget

import clsa_compile.backend
from clsa_compile.backend import decided
from clsa_compile.calibration.given import Model
from clsa_compile.calibration.stages import Stages
from clsa_compile.capture.dynamo import capture
from clsa_compile.config import Options
from clsa_compile.ir.captured import Captured
from clsa_compile.ir.ops import contract_op
from clsa_compile.ir.plan import Plan
from clsa_compile.ir.routing import Index, Pool
from clsa_compile.ir.sharing import SharingPlan
from clsa_compile.ir.variants import SUPPORTED
from clsa_compile.kernels.catalog import VARIANTS
from clsa_compile.passes.pipeline import carry_out, decide


@dataclass
class Passes:
    """Backend for torch.compile: runs the rewritten graph as it is, and keeps plans and counts of targets.

    `calls` holds the contract ops of each rewritten graph, in order, with their arguments.
    """

    plans: list[Plan] = field(default_factory=list)
    modules: list[GraphModule] = field(default_factory=list)
    rewritten: list[Counter[Any]] = field(default_factory=list)
    calls: list[list[tuple[str, tuple[Any, ...]]]] = field(default_factory=list)
    options: Options = field(default_factory=Options)

    def __call__(self, gm: GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        captured = capture(gm)
        decision = decided(captured, self.options)
        carry_out(captured, decision, (), lambda kernel: kernel, self._observe)
        self.plans.append(decision.plan)
        self.modules.append(captured.module)
        return captured.module.forward

    def _observe(self, stage: str, captured: Captured) -> None:
        if stage == "rewritten":
            self.rewritten.append(Counter(node.target for node in captured.graph.nodes))
            ops = [(contract_op(node.target), node.args) for node in captured.graph.nodes]
            self.calls.append([(name, arguments) for name, arguments in ops if name is not None])

    @property
    def reasons(self) -> list[str]:
        """Why sites were left, or taken without their selection."""
        return [site.reason for plan in self.plans for site in plan.sites if site.reason]

    def count(self, action: Any) -> int:
        return sum(plan.count(action) for plan in self.plans)


@pytest.fixture
def passes() -> Passes:
    return Passes()


class Traced:
    """Models that Dynamo traces once, for tests that differ in nothing but options.

    What `Passes` do with a graph is theirs; the graph itself is the same for all of them.
    """

    def __init__(self) -> None:
        self._models: dict[nn.Module, Any] = {}
        self._passes = Passes()

    def __call__(self, model: nn.Module, passes: Passes) -> Any:
        """Returns `model`, compiled with `passes`, until it is called with others."""
        self._passes = passes
        if model not in self._models:
            self._models[model] = torch.compile(model, backend=self._compile)
        return self._models[model]

    def _compile(self, gm: GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        made: dict[int, tuple[Passes, Callable[..., Any]]] = {}

        def run(*args: Any) -> Any:
            passes = self._passes
            if id(passes) not in made:
                # As where Dynamo compiles: code is made of a graph that is called, not after each pass.
                with _use_lazy_graph_module(True):
                    made[id(passes)] = passes, passes(gm, inputs)
            return made[id(passes)][1](*args)

        return run


@pytest.fixture(scope="module")
def traced() -> Iterator[Traced]:
    """Compiles a model for one test after the other; what Dynamo has found stays until the module ends."""
    with torch._dynamo.config.patch(recompile_limit=64):
        yield Traced()
    torch._dynamo.reset()


def random_indices(
    model: nn.Module, score: str = "sum: exp(dot + weight)", kv_heads: int = 2, first: int = 0
) -> SharingPlan:
    """A plan for 8 tokens whose two indices, for layers from 0 and from 2 on, have random weights."""
    known = Model(model, torch.arange(40)[None] % 50, Stages(None))
    generator = torch.Generator().manual_seed(0)
    forward = known.forward(torch.arange(40)[None] % 50)
    tensors: dict[str, Tensor] = {}
    pools = []
    for number, members in enumerate(((0, 1), tuple(range(2, len(known.layers))))):
        weight, width = forward.product(members[0])
        layer = known.layers[members[0]]
        heads = kv_heads * (layer.heads // layer.kv_heads)
        index = Index(str(number), score, first, kv_heads)
        shapes = (tuple(weight.shape), (heads, width), (heads,))
        made = (torch.randn(shape, generator=generator) * 0.3 for shape in shapes)
        tensors |= dict(zip(index.tensor_names(), made, strict=True))
        pools.append(Pool(members[0], 8, {}, members, index=index))
    return SharingPlan(
        8, known.layers, tuple(pools), 0, 0, kind="distilled", model=known.fingerprint, tensors=tensors
    )


@pytest.fixture
def index_plan() -> Callable[..., SharingPlan]:
    """Makes a plan of trained indices for a model."""
    return random_indices


class H100:
    """Just enough of a driver for Triton to write its first intermediate code."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def for_cuda(monkeypatch: pytest.MonkeyPatch) -> Captured:
    """One decode step as it is lowered for CUDA, with no GPU: kernels are told to take anything."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(type(triton.runtime.driver), "active", H100())
    mode = FakeTensorMode()
    with mode:
        q, k = (torch.empty(1, 4, n, 64, dtype=torch.bfloat16) for n in (1, 64))
        module = make_fx(lambda q, k: F.scaled_dot_product_attention(q, k, k), pre_dispatch=True)(q, k)
    captured = Captured(module, mode, "dynamo")
    variants = tuple(replace(v, supports=lambda _: SUPPORTED) for v in VARIANTS)
    return carry_out(captured, decide(captured), variants, torch.library.wrap_triton)[0]


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs what Inductor would be given as it is, where what Inductor makes of it is not the question.

    The backend is whole but for that, and a graph takes a tenth of the time.
    """
    monkeypatch.setattr(clsa_compile.backend, "_inductor", lambda gm, inputs, options: gm.forward)


@pytest.fixture(scope="session")
def make_passes() -> type[Passes]:
    """For fixtures that outlive a test."""
    return Passes


@pytest.fixture(autouse=True)
def fresh(request: pytest.FixtureRequest) -> Iterator[None]:
    """Forgets compiled code, counters and warnings, so that tests do not see each other."""
    forget = torch._dynamo.reset if "traced" not in request.fixturenames else lambda: None
    forget()
    counters.clear()
    clsa_compile.backend._warn_once.cache_clear()
    yield
    forget()
