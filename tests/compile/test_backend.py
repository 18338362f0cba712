"""The backend: what it leaves alone and says so, what it compiles, and how it fails."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, distributed, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

import clsa_compile.backend
from clsa_compile import ClsaWarning, OptionError, StrictError
from clsa_compile.backend import clsa, variants_for
from clsa_compile.config import STAGES, Options
from clsa_compile.dispatch import torch_kernels
from clsa_compile.errors import CaptureError, MissingTritonError, PassError, VerifyError
from clsa_compile.ir.captured import Captured
from clsa_compile.ir.references import REFERENCES
from clsa_compile.ir.sites import Reason
from clsa_compile.ir.skips import PASSES
from clsa_compile.ir.variants import SUPPORTED, Facts, Support, Variant
from clsa_compile.passes import pipeline
from clsa_compile.testing import generate_steps, largest_difference, tiny

ROOT = Path(__file__).resolve().parents[2]
B, S, WIDTH, HEADS, KV_HEADS = 2, 6, 32, 4, 2


class Attention(nn.Module):
    """One causal attention with grouped heads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        head = WIDTH // HEADS
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, head * KV_HEADS), nn.Linear(WIDTH, head * KV_HEADS)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        head = WIDTH // HEADS
        q, k, v = (p(x).view(*x.shape[:2], -1, head).transpose(1, 2) for p in (self.q, self.k, self.v))
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(out.transpose(1, 2).flatten(2))


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Runs what would go to Inductor as it is; returns the graphs that went there."""
    graphs: list[Any] = []

    def run(gm: Any, inputs: Sequence[Any], options: Any) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward  # type: ignore[no-any-return]

    monkeypatch.setattr(clsa_compile.backend, "_inductor", run)
    return graphs


def compiled(model: Any, **options: Any) -> Any:
    return torch.compile(model, backend=clsa, options=options or None)


def names(gm: Any) -> list[str]:
    return [str(n.target) for n in gm.graph.nodes if n.op == "call_function"]


def caught(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    """Returns a call's result and the messages of clsa's warnings."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        result = call()
    return result, [str(w.message) for w in seen if issubclass(w.category, ClsaWarning)]


def equal(model: Any, *args: Any, **options: Any) -> list[str]:
    """Compares a compiled call under no_grad with eager, and returns clsa's warnings."""
    with torch.no_grad():
        expected = model(*args)
        actual, messages = caught(lambda: compiled(model, **options)(*args))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    return messages


# -- what is compiled ------------------------------------------------------------------------------


def test_an_attention_is_compiled_and_counted(without_inductor: list[Any]) -> None:
    messages = equal(Attention(), torch.randn(B, S, WIDTH))
    assert messages == []
    assert dict(counters["clsa"]) == {
        "sites": 1, "left": 0, "attention": 1, "sparse_attention": 0, "index_topk": 0,
    }  # fmt: skip
    (graph,) = without_inductor
    assert not any("clsa" in n for n in names(graph))
    (attention,) = [n for n in graph.graph.nodes if "scaled_dot_product" in str(n.target)]
    assert attention.kwargs["enable_gqa"], "torch's own kernel reads each key once"


def test_a_graph_without_attention_goes_to_inductor_as_it_came(
    without_inductor: list[Any],
) -> None:
    messages = equal(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(3, 4))
    assert messages == []
    (graph,) = without_inductor
    assert not any("aten" in n for n in names(graph)), "the graph is Dynamo's own"


class Int8Linear(nn.Module):
    """A weight-only quantised linear layer, dequantised in forward."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


class Lora(nn.Module):
    """A linear layer with a low-rank adapter beside it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.base = linear
        self.a = nn.Parameter(torch.randn(4, linear.in_features) * 0.1)
        self.b = nn.Parameter(torch.randn(linear.out_features, 4) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.a), self.b) * 2.0


@pytest.mark.parametrize("layer", [Int8Linear, Lora])
def test_quantised_weights_and_adapters_are_rewritten(layer: Any, without_inductor: list[Any]) -> None:
    model = Attention()
    for name in ("q", "k", "v", "o"):
        setattr(model, name, layer(getattr(model, name)))
    assert equal(model, torch.randn(B, S, WIDTH)) == []
    assert counters["clsa"]["attention"] == 1


def test_peft_adapters_are_rewritten(without_inductor: list[Any]) -> None:
    adapters = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False)
    model = get_peft_model(tiny("llama"), adapters).eval()
    ids = torch.randint(0, 128, (2, 9))
    with torch.no_grad():
        expected = model(ids).logits
        actual, messages = caught(lambda: compiled(model)(ids).logits)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    assert messages == []
    assert counters["clsa"]["attention"] == counters["clsa"]["sites"] == 2


def test_every_way_of_asking_for_the_backend(without_inductor: list[Any]) -> None:
    x = torch.randn(B, S, WIDTH)
    expected = Attention()(x)

    def check(call: Callable[..., Any]) -> None:
        torch._dynamo.reset()
        counters.clear()
        torch.testing.assert_close(call(x), expected, atol=1e-5, rtol=1e-5)
        assert counters["clsa"]["attention"] == 1

    with torch.no_grad():
        check(torch.compile(Attention(), backend=clsa, fullgraph=True))
        check(torch.compile(Attention(), backend=clsa, dynamic=True))
        check(torch.compile(Attention(), backend=clsa, dynamic=False))
        check(torch.compile(Attention(), backend=clsa, mode="reduce-overhead"))
        check(torch.compile(Attention(), backend=clsa, options={"mode": "max-autotune"}))
        model = Attention()
        model.compile(backend=clsa)
        check(model)
    with torch.inference_mode():
        check(torch.compile(Attention(), backend=clsa))


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_inductor_compiles_what_was_rewritten(mode: str) -> None:
    model, x = Attention(), torch.randn(B, S, WIDTH)
    with getattr(torch, mode)():
        expected = model(x)
        actual = torch.compile(model, backend=clsa, dynamic=mode == "no_grad")(x)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    assert counters["clsa"]["attention"] == 1
    assert counters["inductor"]["pattern_matcher_count"] >= 0


@pytest.mark.parametrize(
    ("name", "cache"),
    [
        pytest.param("llama", "dynamic", marks=pytest.mark.slow),
        ("llama", "static"),
        pytest.param("glm_moe_dsa", "dynamic", marks=pytest.mark.slow),
    ],
)
def test_no_more_graphs_than_with_another_backend_over_fifty_steps(
    name: str, cache: str, passes: Any
) -> None:
    model = tiny(name)
    plain: list[Any] = []

    def untouched(gm: Any, inputs: Any) -> Any:
        # Adds no guards at all: Inductor's graphs are at least as many.
        plain.append(gm)
        return gm.forward

    runs = []
    for backend in (untouched, passes):
        torch._dynamo.reset()
        run = torch.compile(model, backend=backend)
        runs.append(generate_steps(run, model.config, cache=cache, steps=50, length=64))
    assert largest_difference(*runs) < 1e-4
    assert len(passes.plans) <= len(plain)


# -- what is left alone as a whole -----------------------------------------------------------------


@pytest.mark.slow
def test_training_is_left_alone_with_one_warning_and_right_gradients() -> None:
    model, x = Attention().eval(), torch.randn(B, S, WIDTH)
    model(x).square().sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    run = compiled(model)
    out, messages = caught(lambda: [run(x), run(x[:, :4])][0])
    out.square().sum().backward()
    assert set(expected) == {n for n, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-4, rtol=1e-4)
    (message,) = messages
    assert "training" in message
    assert "torch.no_grad()" in message, "the message names the way out"
    assert counters["clsa"]["left_graphs_training"] >= 1
    assert counters["clsa"]["sites"] == 0


def test_a_model_without_gradients_needs_no_no_grad(without_inductor: list[Any]) -> None:
    model = Attention().requires_grad_(False)
    _, messages = caught(lambda: compiled(model)(torch.randn(B, S, WIDTH)))
    assert messages == []
    assert counters["clsa"]["attention"] == 1


@pytest.mark.parametrize("inside", [False, True])
def test_autocast_is_left_alone(inside: bool, without_inductor: list[Any]) -> None:
    model, x = Attention(), torch.randn(B, S, WIDTH)

    def call(y: Tensor) -> Tensor:
        if not inside:
            return model(y)  # type: ignore[no-any-return]
        with torch.autocast("cpu", torch.bfloat16):
            return model(y)  # type: ignore[no-any-return]

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        expected = call(x)
        actual, (message,) = caught(lambda: compiled(call)(x))
    assert actual.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected)
    assert "autocast" in message
    assert counters["clsa"]["left_graphs_autocast"] == 1


def test_tensor_subclasses_are_left_alone(without_inductor: list[Any]) -> None:
    model = Attention()
    x = torch.randn(B, S, WIDTH)
    two = TwoTensor(x, x + 1)
    with torch.no_grad():
        expected = model(two)
        actual, (message,) = caught(lambda: compiled(model)(two))
    torch.testing.assert_close(actual.a, expected.a, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(actual.b, expected.b, atol=1e-5, rtol=1e-5)
    assert "subclass" in message
    assert "TwoTensor" in message


@pytest.fixture
def one_rank() -> Iterator[Any]:
    """A device mesh of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_models_sharded_by_dtensor_are_left_alone(one_rank: Any, without_inductor: list[Any]) -> None:
    model = tiny("llama")
    ids = torch.randint(0, 128, (2, 9))
    with torch.no_grad():
        expected = model(ids).logits
    ways = {"q_proj": ColwiseParallel, "k_proj": ColwiseParallel, "v_proj": ColwiseParallel}
    ways |= {"o_proj": RowwiseParallel}
    plan = {f"model.layers.*.self_attn.{name}": way() for name, way in ways.items()}
    parallelize_module(model, one_rank, plan)
    with torch.no_grad():
        actual, (message,) = caught(lambda: compiled(model)(ids).logits)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    assert "q_proj" in message
    assert "is a DTensor" in message
    assert counters["clsa"]["left_graphs_subclass"] == 1


@pytest.mark.parametrize("left", ["training", "autocast", "subclass"])
def test_strict_turns_what_is_left_alone_into_an_error(left: str) -> None:
    model, x = Attention(), torch.randn(B, S, WIDTH)
    with ExitStack() as around:
        if left != "training":
            around.enter_context(torch.no_grad())
        if left == "autocast":
            around.enter_context(torch.autocast("cpu", torch.bfloat16))
        run = compiled(model, strict=True)
        with pytest.raises((StrictError, BackendCompilerFailed), match=left):
            run(TwoTensor(x, x) if left == "subclass" else x)


# -- attention that is left, in a graph that is compiled ---------------------------------------------


def two_users(x: Tensor) -> tuple[Tensor, Tensor]:
    weights = (x @ x.mT).softmax(-1)
    return weights @ x, weights


def test_an_attention_that_is_left_is_reported_once(without_inductor: list[Any]) -> None:
    x = torch.randn(B, HEADS, S, 8)
    messages = equal(two_users, x)
    (message,) = messages
    assert "left 1 of 1 attentions" in message
    assert "users" in message
    assert counters["clsa"]["left"] == 1
    torch._dynamo.reset()
    assert equal(two_users, x) == [], "once is enough"
    torch._dynamo.reset()
    with pytest.raises((StrictError, BackendCompilerFailed), match="users"):
        compiled(two_users, strict=True)(x)


def test_one_left_attention_does_not_keep_the_others(without_inductor: list[Any]) -> None:
    def both(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (*two_users(x), F.scaled_dot_product_attention(x, x, x))

    assert len(equal(both, torch.randn(B, HEADS, S, 8))) == 1
    assert counters["clsa"]["attention"] == 1
    assert counters["clsa"]["left"] == 1


# -- higher-order operators --------------------------------------------------------------------------


def _checkpointed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = checkpoint(F.scaled_dot_product_attention, q, k, v, use_reentrant=False)
    return out


def _inside_cond(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = torch.cond(
        q.sum() > 0,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v) * 2,
        (q, k, v),
    )
    return out


def _beside_cond(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    x = torch.cond(q.sum() > 0, lambda a: a + 1, lambda a: a - 1, (q,))
    return F.scaled_dot_product_attention(x, k, v)


def _flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    out: Tensor = flex_attention(q, k, v)  # type: ignore[assignment]
    return out


@pytest.mark.parametrize("fn", [_checkpointed, _inside_cond, _flex])
def test_attention_behind_a_higher_order_op_is_left_with_a_reason(
    fn: Any, without_inductor: list[Any]
) -> None:
    torch.manual_seed(0)
    (message,) = equal(fn, *(torch.randn(B, HEADS, 16, 16) for _ in range(3)))
    assert "left" in message
    assert Reason.HIGHER_ORDER in message or (fn is _checkpointed and Reason.CAPTURE in message)
    assert counters["clsa"]["attention"] == 0
    (graph,) = without_inductor
    assert not any("aten" in n for n in names(graph)), "the graph is Dynamo's own"


def test_attention_beside_a_higher_order_op_is_taken(without_inductor: list[Any]) -> None:
    messages = equal(_beside_cond, *(torch.randn(B, HEADS, 16, 16) for _ in range(3)))
    assert counters["clsa"]["attention"] == 1, messages


# -- failures in the middle --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["canonicalize", "match", "plan", "rewrite", "lower"])
def test_a_pass_that_fails_names_itself_and_inductor_takes_over(
    name: str, without_inductor: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("boom")

    monkeypatch.setattr(pipeline, name, broken)
    x = torch.randn(B, S, WIDTH)
    (message,) = equal(Attention(), x)
    assert f"the pass {name!r} failed" in message
    assert "ZeroDivisionError: boom" in message
    (graph,) = without_inductor
    assert any("scaled_dot_product_attention" in n for n in names(graph)), "the original"
    assert counters["clsa"]["attention"] == 0
    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises((PassError, BackendCompilerFailed), match="boom"):
        compiled(Attention(), strict=True)(x)


@pytest.mark.parametrize("error", [VerifyError("broken rule"), CaptureError("cannot be traced")])
def test_errors_raised_on_purpose_keep_their_words(
    error: Exception, without_inductor: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(clsa_compile.backend, "decide", broken)
    (message,) = equal(Attention(), torch.randn(B, S, WIDTH))
    assert str(error) in message
    assert Reason.CAPTURE in message


def test_a_tracing_failure_is_a_capture_error(
    without_inductor: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ValueError("no tracing today")

    monkeypatch.setattr("clsa_compile.capture.dynamo.make_fx", broken)
    (message,) = equal(Attention(), torch.randn(B, S, WIDTH))
    assert "could not be traced: ValueError: no tracing today" in message


def test_kernels_are_timed_only_when_asked_for_and_on_cuda() -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    graphs = {}
    for device in ("cpu", "cuda"):
        with mode:
            x = torch.empty(B, S, WIDTH, device=device)
            graphs[device] = Captured(make_fx(torch.neg)(x), mode, "dynamo")
    plain = variants_for(graphs["cuda"], Options())
    timed = variants_for(graphs["cuda"], Options(autotune=True))
    assert [(v.op, v.name) for v in timed] == [(v.op, v.name) for v in plain]
    assert all(a.launch is not b.launch for a, b in zip(plain, timed, strict=True))
    assert variants_for(graphs["cpu"], Options(autotune=True)) == torch_kernels()


def test_without_triton_a_cuda_graph_goes_to_inductor(
    without_inductor: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        x = torch.empty(B, S, WIDTH, device="cuda")
        captured = Captured(make_fx(torch.neg)(x), mode, "dynamo")

    def without_triton(_: Any, options: Options) -> Any:
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "triton", None)  # importing it fails; torch needs it elsewhere
            return variants_for(captured, options)

    with pytest.raises(MissingTritonError, match="pip install triton"):
        without_triton(captured, Options())
    monkeypatch.setattr(clsa_compile.backend, "variants_for", without_triton)
    (message,) = equal(Attention(), torch.randn(B, S, WIDTH))
    assert "clsa left a graph to Inductor (triton)" in message
    assert "pip install triton" in message
    assert counters["clsa"]["left_graphs_triton"] == 1
    (graph,) = without_inductor
    assert not any("aten" in n for n in names(graph)), "the graph is Dynamo's own"
    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises((MissingTritonError, BackendCompilerFailed), match="Triton"):
        compiled(Attention(), strict=True)(torch.randn(B, S, WIDTH))


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_left_as_it_was(
    enabled: bool, without_inductor: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    during: list[bool] = []

    def broken(*_: Any) -> Any:
        during.append(gc.isenabled())
        raise CaptureError("no tracing today, nor tomorrow")

    monkeypatch.setattr(clsa_compile.backend, "capture", broken)
    (gc.enable if enabled else gc.disable)()
    try:
        equal(Attention(), torch.randn(B, S, WIDTH))
        assert gc.isenabled() == enabled
    finally:
        gc.enable()
    assert during == [False]


# -- options -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"strickt": True}, {"share": 0}, {"topk": 0}])
def test_impossible_options_are_errors_even_where_everything_would_be_left(options: Any) -> None:
    run = torch.compile(Attention(), backend=clsa, options=options)
    with pytest.raises((OptionError, BackendCompilerFailed), match=next(iter(options))):
        run(torch.randn(B, S, WIDTH))


def test_a_dump_holds_every_stage(tmp_path: Path, without_inductor: list[Any]) -> None:
    equal(Attention(), torch.randn(B, S, WIDTH), dump=str(tmp_path / "dumps"))
    (folder,) = (tmp_path / "dumps").iterdir()
    assert [p.name for p in sorted(folder.iterdir())] == [
        "00_captured.py", "01_canonical.py", "02_sites.json", "02_sites.txt", "03_analysis.dot",
        "04_plan.json", "04_plan.txt", "05_rewritten.py", "06_lowered.py", "07_choices.json",
        "diff.patch", "repro.py", "timings.json",
    ]  # fmt: skip
    assert "scaled_dot_product_attention" in (folder / "00_captured.py").read_text()
    assert "clsa.attention" in (folder / "05_rewritten.py").read_text()
    assert "clsa" not in (folder / "06_lowered.py").read_text()
    assert json.loads((folder / "04_plan.json").read_text())["sites"][0]["action"] == "attention"


def test_a_graph_that_is_left_has_a_dump_that_says_why(tmp_path: Path, without_inductor: list[Any]) -> None:
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        caught(lambda: compiled(Attention(), dump=str(tmp_path))(torch.randn(B, S, WIDTH)))
    assert "autocast is on" in (tmp_path / "graph_000" / "left.txt").read_text()


def test_a_pass_that_fails_leaves_what_came_before_and_its_traceback(
    tmp_path: Path, without_inductor: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("boom")

    monkeypatch.setattr(pipeline, "rewrite", broken)
    equal(Attention(), torch.randn(B, S, WIDTH), dump=str(tmp_path))
    folder = tmp_path / "graph_000"
    text = (folder / "left.txt").read_text()
    assert "the pass 'rewrite' failed: ZeroDivisionError: boom" in text
    assert "in broken" in text
    assert (folder / "04_plan.json").exists()
    assert not (folder / "05_rewritten.py").exists()


def test_a_disk_that_is_full_is_an_error_and_leaves_no_half_file(
    tmp_path: Path, without_inductor: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str, **_: Any) -> int:
        with path.open("w") as file:
            file.write(text[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    run = compiled(Attention(), dump=str(tmp_path))
    with torch.no_grad(), pytest.raises((OptionError, BackendCompilerFailed), match="No space left") as error:
        run(torch.randn(B, S, WIDTH))
    assert "00_captured.py' cannot be written" in str(error.value)
    assert list((tmp_path / "graph_000").iterdir()) == []


# -- bisecting -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_at_which_it_stops_computes_the_same(stage: str) -> None:
    (message,) = equal(Attention(), torch.randn(B, S, WIDTH), stop_after=stage)
    assert f"stopped after the stage {stage}" in message
    assert counters["clsa"]["stopped"] == 1


@pytest.mark.parametrize(
    ("stage", "op"),
    [("captured", "scaled_dot_product"), ("plan", "scaled_dot_product"), ("rewritten", "clsa.attention")],
)
def test_the_graph_of_the_stage_goes_to_inductor(stage: str, op: str, without_inductor: list[Any]) -> None:
    equal(Attention(), torch.randn(B, S, WIDTH), stop_after=stage)
    (graph,) = without_inductor
    assert sum(op in name for name in names(graph)) == 1
    assert all("aten" in n or "clsa" in n or "getitem" in n for n in names(graph)), "what was captured"


def test_stages_after_the_one_at_which_it_stops_do_not_run(
    without_inductor: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("boom")

    for stage, name in (("captured", "canonicalize"), ("canonical", "match"), ("plan", "rewrite")):
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, name, broken)
            torch._dynamo.reset()
            (message,) = equal(Attention(), torch.randn(B, S, WIDTH), stop_after=stage)
            assert "stopped" in message


class Two(nn.Module):
    """Two layers of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Attention(), Attention()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("name", ["layers.1", "1"])
def test_a_layer_that_is_left_out_is_said_to_be_and_is_no_complaint(
    name: str, tmp_path: Path, without_inductor: list[Any]
) -> None:
    messages = equal(Two(), torch.randn(B, S, WIDTH), skip=name, strict=True, dump=str(tmp_path))
    assert messages == [], "it was asked for"
    assert (counters["clsa"]["attention"], counters["clsa"]["left"]) == (1, 1)
    report = (tmp_path / "graph_000" / "04_plan.txt").read_text()
    assert f"skipped: the option 'skip' names '{name}'" in report
    assert "'skip': ('1',)" in (tmp_path / "graph_000" / "repro.py").read_text()


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_that_is_left_out_is_said_to_be_and_changes_no_result(
    name: str, tmp_path: Path, without_inductor: list[Any]
) -> None:
    assert equal(Two(), torch.randn(B, S, WIDTH), skip=[name], dump=str(tmp_path)) == []
    assert counters["clsa"]["attention"] == 2
    assert f"left out on request: {name}" in (tmp_path / "graph_000" / "04_plan.txt").read_text()


def test_a_family_that_is_left_out_matches_nothing(without_inductor: list[Any]) -> None:
    equal(Two(), torch.randn(B, S, WIDTH), skip="sdpa")
    assert (counters["clsa"]["attention"], counters["clsa"]["left"]) == (0, 2)


def test_a_variant_that_is_left_out_says_so_in_the_choices(
    tmp_path: Path, without_inductor: list[Any]
) -> None:
    equal(Attention(), torch.randn(B, S, WIDTH), skip="attention.sdpa", dump=str(tmp_path))
    (choice,) = json.loads((tmp_path / "graph_000" / "07_choices.json").read_text())
    assert choice["variant"] == "reference"
    assert choice["passed_over"] == ["sdpa: the option 'skip' names it"]


def test_without_replay_every_call_is_traced(
    without_inductor: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("boom")

    monkeypatch.setattr("clsa_compile.capture.dynamo.Replaying", broken)
    assert equal(Two(), torch.randn(B, S, WIDTH), skip="replay") == []


def test_without_the_indexer_a_selection_is_a_mask(without_inductor: list[Any]) -> None:
    model = tiny("glm_moe_dsa")
    ids = torch.randint(0, 128, (2, 16))
    with torch.no_grad():
        expected = model(ids).logits
        actual, _ = caught(lambda: compiled(model, skip="indexer")(ids).logits)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    assert (counters["clsa"]["sparse_attention"], counters["clsa"]["attention"]) == (0, 2)


def test_a_name_that_is_unlike_all_is_an_error_with_a_hint(without_inductor: list[Any]) -> None:
    for name, near in (("layer.1", "layers.1"), ("table", "tables"), ("edger", "eager")):
        torch._dynamo.reset()
        with torch.no_grad(), pytest.raises((OptionError, BackendCompilerFailed), match=near) as error:
            compiled(Two(), skip=name)(torch.randn(B, S, WIDTH))
        assert f"names '{name}', which is no pass and no layer" in str(error.value)


def test_a_layer_that_another_graph_may_have_is_a_warning(without_inductor: list[Any]) -> None:
    (message,) = equal(Two(), torch.randn(B, S, WIDTH), skip="layers.7")
    assert "'layers.7'" in message
    assert counters["clsa"]["attention"] == 2


def test_a_dump_that_cannot_be_written_is_an_error(tmp_path: Path, without_inductor: list[Any]) -> None:
    (tmp_path / "file").write_text("")
    run = compiled(Attention(), dump=str(tmp_path / "file" / "inner"))
    with torch.no_grad(), pytest.raises((OptionError, BackendCompilerFailed), match="dump"):
        run(torch.randn(B, S, WIDTH))


@pytest.mark.parametrize("family", ["llama", "gemma2", "deepseek_v32"])
def test_graphs_that_return_a_growing_cache_are_no_cuda_graphs(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CUDA graph's next run would overwrite the cache that it returned: torch raises an error."""
    seen: list[Any] = []

    def compile_fx(gm: Any, inputs: Any, config_patches: Any = None) -> Any:
        seen.append(config_patches["triton.cudagraphs"])
        return gm.forward

    def settings(cache: str, **options: Any) -> tuple[set[bool], list[str]]:
        torch._dynamo.reset()
        clsa_compile.backend._warn_once.cache_clear()
        seen.clear()
        model = tiny(family)
        prime = model if cache == "static" else None
        run = compiled(model, mode="reduce-overhead", **options)
        _, messages = caught(lambda: generate_steps(run, model.config, cache=cache, steps=2, prime=prime))
        return set(seen), [message for message in messages if "growing cache" in message]

    monkeypatch.setattr(clsa_compile.backend, "compile_fx", compile_fx)
    grown, messages = settings("dynamic")
    assert grown == {False}
    assert len(messages) == 1
    assert "StaticCache" in messages[0]
    assert settings("static") == ({True}, [])
    assert settings("none") == ({True}, [])
    asked, messages = settings("dynamic", inductor={"triton.cudagraphs": True})
    assert (asked, messages) == ({True}, []), "who names it has it"


def test_a_graph_that_is_left_returns_a_growing_cache_too(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def compile_fx(gm: Any, inputs: Any, config_patches: Any = None) -> Any:
        seen.append(config_patches["triton.cudagraphs"])
        return gm.forward

    class Appends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Parameter(torch.randn(1, 4))

        def forward(self, held: Tensor, new: Tensor) -> tuple[Tensor, ...]:
            return (torch.cat([held, new]),) if held.shape[0] > 1 else (torch.cat([self.first, new]),)

    monkeypatch.setattr(clsa_compile.backend, "compile_fx", compile_fx)
    with torch.no_grad():
        run = compiled(Appends(), mode="reduce-overhead")
        run(torch.randn(3, 4), torch.randn(2, 4))
        run(torch.randn(1, 4), torch.randn(2, 4))
    assert seen == [False, True], "a weight with rows appended is no cache"


def test_options_for_inductor_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def compile_fx(gm: Any, inputs: Any, config_patches: Any = None) -> Any:
        seen.append((config_patches, torch.compiler.config.cache_key_tag))
        return gm.forward

    monkeypatch.setattr(clsa_compile.backend, "compile_fx", compile_fx)
    x = torch.randn(B, S, WIDTH)
    with torch.no_grad():
        compiled(Attention())(x)
        torch._dynamo.reset()
        compiled(Attention(), inductor={"max_autotune": True}, mode="reduce-overhead")(x)
    (plain, first), (patched, second) = seen
    assert not plain
    assert patched["max_autotune"] is True
    assert patched["triton.cudagraphs"] is True
    assert first.startswith("clsa:")
    assert first != second, "other options, another key"
    assert torch.compiler.config.cache_key_tag == ""


# -- caches --------------------------------------------------------------------------------------------

SCRIPT = """
    import json, sys, warnings
    warnings.filterwarnings("ignore")
    import torch, torch.nn.functional as F
    from torch._dynamo.utils import counters
    from clsa_compile.backend import clsa
    options = json.loads(sys.argv[1])
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, 8)
    with torch.no_grad():
        torch.compile(
            lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
            backend=clsa, options=options or None,
        )(x)
    inductor, autograd = counters["inductor"], counters["aot_autograd"]
    print(json.dumps({
        "hits": inductor["fxgraph_cache_hit"] + autograd["autograd_cache_hit"],
        "misses": inductor["fxgraph_cache_miss"] + autograd["autograd_cache_miss"],
    }))
"""


@pytest.mark.exhaustive
def test_a_second_process_finds_the_graph_and_other_options_do_not(tmp_path: Path) -> None:
    def run(options: dict[str, Any]) -> dict[str, int]:
        environment = os.environ | {
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
            "PYTHONPATH": str(ROOT),
        }
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(SCRIPT), json.dumps(options)],
            env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        result: dict[str, int] = json.loads(done.stdout.strip().splitlines()[-1])
        return result

    first, second = run({}), run({})
    assert first["hits"] == 0
    assert first["misses"] >= 1
    assert second["hits"] >= 1, second
    for options in (
        {"strict": True},
        {"inductor": {"max_autotune": False}},
        {"mode": "max-autotune-no-cudagraphs"},
    ):
        assert run(options)["hits"] == 0, options


# -- floats that are not known ---------------------------------------------------------------------


def _scaled_sdpa(x: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x, scale=scale)


def _scaled_scores(x: Tensor, scale: float) -> Tensor:
    return (x @ x.mT * scale).softmax(-1) @ x


def _ranked(x: Tensor) -> tuple[Tensor, Tensor]:
    heads = (x * 2)[:, None]
    chosen = torch.ops.clsa.index_topk(
        heads, heads, None, None, None, None, [], 3, 0.5, "sum: dot", "kv <= q", False
    )
    return F.scaled_dot_product_attention(heads, heads, heads, is_causal=True), chosen + 1


def test_an_index_of_unknown_rows_is_launched_when_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch of all rows at once would write S x T scores. Inductor calls the op, which knows the rows."""
    asked: list[int | None] = []

    def supports(facts: Facts) -> Support:
        asked.append(facts.S)
        return SUPPORTED

    def waits(facts: Facts) -> bool:
        return facts.S is None

    rows = Variant("index_topk", "rows", supports, REFERENCES["index_topk"], waits)
    monkeypatch.setattr(clsa_compile.backend, "variants_for", lambda *_: (rows,))
    run = torch.compile(_ranked, backend=clsa)
    for length in (12, 17, 40):
        x = torch.randn(B, length, 8)
        torch._dynamo.mark_dynamic(x, 1)
        with torch.no_grad():
            torch.testing.assert_close(run(x), _ranked(x), atol=1e-5, rtol=1e-5)
    assert asked == [None]


def _scaled_query(x: Tensor, scale: float) -> Tensor:
    return ((x * scale) @ x.mT).softmax(-1) @ x


def _capped(x: Tensor, scale: float) -> Tensor:
    return (torch.tanh(x @ x.mT / scale) * scale).softmax(-1) @ x


@pytest.mark.parametrize("fn", [_scaled_sdpa, _scaled_scores, _scaled_query, _capped])
@pytest.mark.parametrize("dynamic", [True, None])
def test_a_scale_that_changes_between_calls_is_right_and_stays_in_its_dtype(
    fn: Any, dynamic: bool | None, passes: Any
) -> None:
    run = torch.compile(fn, backend=passes, dynamic=dynamic)
    for scale in (0.3, 0.7, 1.9, 0.3):
        x = torch.randn(B, HEADS, S, 8)
        actual = run(x, scale)
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, fn(x, scale), atol=1e-5, rtol=1e-5)
    assert all(r.startswith(("scale", "layout", "order", "shape")) for r in passes.reasons), passes.reasons


def _scaled_by_length(x: Tensor) -> Tensor:
    return (x @ x.mT * x.shape[-2] ** -0.5).softmax(-1) @ x


def test_a_scale_made_of_a_length_is_right_for_every_length(passes: Any) -> None:
    run = torch.compile(_scaled_by_length, backend=passes, dynamic=True)
    for length in (6, 9, 12):
        x = torch.randn(B, HEADS, length, 8)
        torch.testing.assert_close(run(x), _scaled_by_length(x), atol=1e-5, rtol=1e-5)
    assert passes.reasons
    assert all(r.startswith("scale") for r in passes.reasons), passes.reasons
