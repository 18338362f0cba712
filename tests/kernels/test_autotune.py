"""kernels/autotune.py with a clock of paper: what is timed, kept, read again and refused."""

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from clsa_compile.ir.scores import DOT_PRODUCT
from clsa_compile.kernels import autotune
from clsa_compile.kernels.autotune import TIMED, random_operands, tuned
from clsa_compile.kernels.catalog import VARIANTS
from clsa_compile.kernels.choice import choose, ranked
from clsa_compile.kernels.cost import Shape, Sizes
from clsa_compile.kernels.device import H100
from clsa_compile.kernels.offline import Recorder

DECODE = next(v for v in VARIANTS if (v.op, v.name) == ("attention", "decode"))
SIZES = Sizes(1, 2, 2, 4096, 32, 32, 2)


class Clock:
    """Gives the times it was made with, one after another; never runs anything."""

    def __init__(self, *times: float | Exception) -> None:
        self.times = list(times)
        self.asked = 0

    def __call__(self, call: Callable[[], object]) -> float:
        self.asked += 1
        took = self.times[self.asked - 1]
        if isinstance(took, Exception):
            raise took
        return took


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "clsa" / "kernels"


def attention(t: int = 4096, **changes: Any) -> list[Any]:
    q = torch.randn(1, 4, 1, 32, dtype=torch.bfloat16)
    k = torch.randn(1, 2, t, 32, dtype=torch.bfloat16)
    return [q, k, k.clone(), changes.get("mask"), None, [], None, 0.2, 0.0, ""]


def launched(arguments: list[Any], clock: Clock) -> Shape:
    """Returns the shape that a tuned launch chose."""
    recorder = Recorder()
    (variant,) = tuned((DECODE,), clock)
    variant.launch(*arguments, wrap=recorder)
    given = next(one for one in recorder.launches if one.kernel.__name__ == "attention_decode").arguments
    return Shape(given["BLOCK_N"], given["num_warps"], given["num_stages"], given["NSPLIT"])


def candidates() -> list[Shape]:
    return [shape for _, shape in ranked("attention_decode", SIZES, H100)[:TIMED]]


def kept(folder: Path) -> Path:
    (path,) = folder.glob("autotune_*.json")
    return path


def test_the_fastest_is_taken_kept_and_not_timed_again(folder: Path) -> None:
    first = Clock(9.0, 8.0, 3.0, 4.0)
    assert launched(attention(), first) == candidates()[2]
    assert first.asked == TIMED
    stored = json.loads(kept(folder).read_text())
    assert stored["key"]["device"] == H100.name
    assert stored["key"]["triton"] == triton.__version__
    assert [entry["took"] for entry in stored["microseconds"]] == [9.0, 8.0, 3.0, 4.0]
    again = Clock()
    assert launched(attention(), again) == candidates()[2]
    assert again.asked == 0


def test_another_launch_has_a_file_of_its_own(folder: Path) -> None:
    launched(attention(), Clock(1.0, 2.0, 3.0, 4.0))
    launched(attention(4160), Clock(1.0, 2.0, 3.0, 4.0))
    launched(attention(mask=torch.ones(1, 1, 1, 4096, dtype=torch.bool)), Clock(1.0, 2.0, 3.0, 4.0))
    assert len(list(folder.glob("autotune_*.json"))) == 3


@pytest.mark.parametrize("what", ["sources_hash", "device", "triton"])
def test_what_a_choice_depends_on_is_in_its_key(
    folder: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    launched(attention(), Clock(1.0, 2.0, 3.0, 4.0))
    if what == "sources_hash":
        monkeypatch.setattr(autotune, "sources_hash", lambda: "other")
    elif what == "triton":
        monkeypatch.setattr(triton, "__version__", "0.0")
    else:
        real = autotune.identity
        monkeypatch.setattr(autotune, "identity", lambda *args: {**real(*args), "device": "other"})
    clock = Clock(1.0, 2.0, 3.0, 4.0)
    launched(attention(), clock)
    assert clock.asked == TIMED
    assert len(list(folder.glob("autotune_*.json"))) == 2


BROKEN = {
    "not JSON": lambda text: text[: len(text) // 2],
    "another kind of JSON": lambda text: "[1, 2]",
    "no shape": lambda text: json.dumps({"key": json.loads(text)["key"]}),
    "another launch": lambda text: json.dumps({**json.loads(text), "key": {}}),
    "not a candidate": lambda text: text.replace('"block_n": 64', '"block_n": 63', 1),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_is_not_one_is_named_and_replaced(folder: Path, name: str) -> None:
    launched(attention(), Clock(9.0, 8.0, 3.0, 4.0))
    path = kept(folder)
    path.write_text(BROKEN[name](path.read_text()))
    clock = Clock(1.0, 2.0, 3.0, 4.0)
    with pytest.warns(UserWarning, match=path.name):
        assert launched(attention(), clock) == candidates()[0]
    assert clock.asked == TIMED
    assert launched(attention(), Clock()) == candidates()[0]


def test_a_shape_that_does_not_run_is_left_out(folder: Path) -> None:
    clock = Clock(9.0, triton.TritonError("no"), RuntimeError("no"), 4.0)
    assert launched(attention(), clock) == candidates()[3]
    assert len(json.loads(kept(folder).read_text())["microseconds"]) == 2


def test_where_nothing_runs_the_prediction_stays(folder: Path) -> None:
    assert launched(attention(), Clock(*[RuntimeError("no")] * TIMED)) == candidates()[0]
    assert not list(folder.glob("autotune_*.json"))


def test_without_room_for_operands_the_prediction_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(autotune, "random_operands", full)
    with pytest.warns(UserWarning, match="no room"):
        assert launched(attention(), Clock()) == candidates()[0]


def test_a_folder_that_cannot_be_written_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: str, target: Path) -> None:
        raise OSError("the disk is full")

    launched(attention(64), Clock(1.0, 2.0, 3.0, 4.0))  # the kernels themselves are written before
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.warns(UserWarning, match="the disk is full"):
            assert launched(attention(), Clock(9.0, 8.0, 3.0, 4.0)) == candidates()[2]


def test_plans_without_candidates_are_not_timed() -> None:
    arguments = [x.float() if isinstance(x, torch.Tensor) else x for x in attention()]
    clock = Clock()
    launched(arguments, clock)
    assert clock.asked == 0


def test_nothing_is_timed_outside_of_a_tuned_launch() -> None:
    DECODE.launch(*attention(), wrap=Recorder())
    assert choose("attention_decode", SIZES, H100) == candidates()[0]


@pytest.mark.parametrize("dynamic", [False, True])
def test_timing_in_the_middle_of_a_trace_leaves_no_trace(dynamic: bool) -> None:
    """Lowering traces over fake operands; timing needs real ones, of the hinted sizes."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    real = attention()

    def fake(x: torch.Tensor) -> torch.Tensor:
        kinds = [DimDynamic.DYNAMIC if dynamic and size == 4096 else DimDynamic.STATIC for size in x.shape]
        return mode.from_tensor(x, symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds))

    inputs = [fake(x) for x in real[:3]]
    seen = []

    def clock(call: Callable[[], object]) -> float:
        x = torch.ones(2) + 1
        assert type(x) is torch.Tensor
        seen.append(call)
        return float(len(seen))

    (variant,) = tuned((DECODE,), clock)

    def function(q: Any, k: Any, v: Any) -> Any:
        return variant.launch(q, k, v, *real[3:], wrap=torch.library.wrap_triton)

    with mode, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        graph = make_fx(function, pre_dispatch=True, tracing_mode="real")(*inputs).graph
    assert len(seen) == TIMED
    assert not [n for n in graph.nodes if "ones" in str(n.target) or "normal" in str(n.target)]
    assert sum("triton_kernel_wrapper" in str(n.target) for n in graph.nodes) == 2
    assert not mode.shape_env.guards


def test_operands_are_real_and_may_be_read_everywhere() -> None:
    k = torch.zeros(2, 50, 2, 64, dtype=torch.bfloat16)[..., :16].transpose(1, 2)
    q = torch.zeros(1, 4, 1, 16, dtype=torch.bfloat16).expand(2, 4, 1, 16)
    indices = torch.full((2, 1, 1, 8), -1, dtype=torch.int32)
    mask = torch.full((1, 1, 1, 50), -torch.inf)
    bounds = torch.zeros(2, 1, 2, dtype=torch.int32)
    inputs = [torch.zeros(1, dtype=torch.int64), torch.zeros(2, 50, dtype=torch.bool)]
    args = [q, k, k, indices, mask, bounds, inputs, None, 0.1, 0.0, "kv <= in0(q)"]
    made = random_operands("sparse_attention", args)
    for old, new in zip(args[:6], made[:6], strict=True):
        assert (new.shape, new.stride(), new.dtype) == (old.shape, old.stride(), old.dtype)
    assert made[1].float().std() > 0.5
    assert ((made[3] >= 0) & (made[3] < 50)).all()
    assert (made[4] == 0).all()
    assert made[5].tolist() == [[[0, 50]], [[0, 50]]]
    assert made[6][0].tolist() == [49]
    assert made[6][1].all()
    assert made[7:] == args[7:]


def test_an_index_is_timed_too(folder: Path) -> None:
    variant = next(v for v in VARIANTS if (v.op, v.name) == ("index_topk", "decode"))
    q, k = torch.randn(1, 1, 1, 32).bfloat16(), torch.randn(1, 1, 4096, 32).bfloat16()
    arguments = (q, k, None, None, None, None, [], 16, 1.0, DOT_PRODUCT.text, "", False)
    clock = Clock(4.0, 3.0, 2.0, 1.0)
    tuned((variant,), clock)[0].launch(*arguments, wrap=Recorder())
    assert clock.asked == TIMED
    assert json.loads(kept(folder).read_text())["key"]["kernel"] == "index_scan_single"


@pytest.mark.gpu
def test_a_real_clock(folder: Path) -> None:
    arguments = [x.cuda() if isinstance(x, torch.Tensor) else x for x in attention()]
    (variant,) = tuned((DECODE,))
    out, _ = variant.launch(*arguments, wrap=lambda kernel: kernel)
    expected, _ = DECODE.launch(*arguments, wrap=lambda kernel: kernel)
    torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)
    times = json.loads(kept(folder).read_text())["microseconds"]
    assert len(times) == TIMED
    assert all(0 < entry["took"] < 1e5 for entry in times)
