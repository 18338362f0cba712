"""Watch: the log, torch's trace as tlparse lists it, Inductor's provenance; and nothing of it when off."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import depyf
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

import clsa_compile.backend
import clsa_compile.watch
from clsa_compile.backend import clsa
from clsa_compile.config import Options
from clsa_compile.testing import tiny
from clsa_compile.watch import Stopped, Watch

ROOT = Path(__file__).resolve().parents[2]
MODEL = """\
import torch
import torch.nn.functional as F


class Toy(torch.nn.Module):
    def forward(self, x):
        y = F.scaled_dot_product_attention(x, x, x, is_causal=True)
        weights = (y @ y.mT).softmax(-1)
        return weights @ y, weights
"""
SCRIPT = """\
import warnings
warnings.filterwarnings("ignore")
import torch
from toy import Toy
with torch.no_grad():
    torch.compile(Toy(), backend="clsa")(torch.randn(2, 4, 6, 8))
"""


@dataclass
class Run:
    """What a process left that compiled a model with all of torch's channels on."""

    folder: Path
    log: list[str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    (folder / "toy.py").write_text(MODEL)
    channels = {
        "TORCH_TRACE": str(folder / "trace"),
        "TORCH_LOGS": "+clsa_compile",
        "TORCH_COMPILE_DEBUG": "1",
        "INDUCTOR_PROVENANCE": "1",
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=folder,
        env=os.environ | channels | {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Run(folder, [line for line in done.stderr.splitlines() if "] clsa" in line])


@pytest.mark.slow
def test_the_log_has_a_line_a_graph_and_reasons_below(run: Run) -> None:
    info = [line for line in run.log if line.startswith("I")]
    debug = [line for line in run.log if line.startswith("V")]
    (line,) = info
    assert "clsa: 2 attentions: 0 sparse, 1 read once, 1 left; 0 index nodes;" in line
    assert [line.partition("] clsa: ")[2] for line in debug] == [
        "layer 0 (scaled_dot_product_attention): attention",
        "layer 1 (softmax): left: users: softmax is also used by matmul_1, output",
        "attention -> sdpa ",
    ]


@pytest.fixture(scope="module")
def parsed(run: Run) -> Path:
    (trace,) = (run.folder / "trace").glob("*.log")
    tool = Path(sys.executable).with_name("tlparse")
    out = run.folder / "parsed"
    subprocess.run([tool, trace, "-o", out, "--no-browser"], capture_output=True, check=True)
    return out


def artifact(parsed: Path, name: str) -> str:
    (file,) = parsed.glob(f"*/{name}_*")
    assert file.relative_to(parsed).as_posix() in (parsed / "index.html").read_text(), "it is listed"
    return file.read_text()


@pytest.mark.slow
def test_tlparse_lists_what_became_of_the_graph(parsed: Path) -> None:
    assert "aten.scaled_dot_product_attention" in artifact(parsed, "clsa_captured")
    assert "clsa.attention" in artifact(parsed, "clsa_rewritten")
    assert "clsa.attention" not in artifact(parsed, "clsa_lowered")
    assert [site["action"] for site in json.loads(artifact(parsed, "clsa_plan"))["sites"]] == [
        "attention", "left",
    ]  # fmt: skip
    assert json.loads(artifact(parsed, "clsa_choices"))[0]["variant"] == "sdpa"


@pytest.mark.slow
def test_inductors_kernels_point_at_the_models_lines(parsed: Path) -> None:
    kernels = json.loads(
        next(parsed.glob("*/inductor_provenance_tracking_kernel_stack_traces_*.json")).read_text()
    )
    attention = [lines for name, lines in kernels.items() if "scaled_dot_product" in name]
    assert attention, kernels
    assert any('toy.py", line 7, in forward' in line for lines in attention for line in lines)
    everywhere = [line for lines in kernels.values() for line in lines]
    assert not [line for line in everywhere if "clsa_compile" in line], "not at our own code"


def test_torchs_debug_folder_holds_the_lowered_graph(run: Run) -> None:
    (graph,) = run.folder.glob("torch_compile_debug/run_*/torchinductor/*/fx_graph_readable.py")
    assert "scaled_dot_product" in graph.read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*You are trying to debug:UserWarning")
def test_depyf_shows_the_lowered_graph(tmp_path: Path) -> None:
    # What comes from a cache is not shown.
    without_caches = torch.compiler.config.patch(force_disable_caches=True)  # type: ignore[attr-defined]
    with without_caches, depyf.prepare_debug(str(tmp_path)), torch.no_grad():
        torch.compile(attend, backend=clsa)(torch.randn(2, 4, 6, 8))
    (graph,) = tmp_path.glob("*BEFORE_PRE_GRAD*.py")
    assert "torch.ops.aten.scaled_dot_product_attention" in graph.read_text(), "not Dynamo's own"
    assert list(tmp_path.glob("full_code_for_*.py"))


def test_the_short_name_is_registered() -> None:
    registry: Any = torch._logging._internal.log_registry  # type: ignore[attr-defined]
    assert registry.is_log("clsa")
    assert registry.log_alias_to_log_qnames["clsa"] == ["clsa_compile"]


# -- in this process -----------------------------------------------------------------------------------


@pytest.fixture
def lowered(monkeypatch: pytest.MonkeyPatch) -> list[GraphModule]:
    """The graphs that would go to Inductor."""
    graphs: list[GraphModule] = []

    def keep(gm: GraphModule, inputs: Any, options: Any) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    monkeypatch.setattr(clsa_compile.backend, "_inductor", keep)
    return graphs


def attend(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x)


def compile_one(**options: Any) -> None:
    with torch.no_grad():
        torch.compile(attend, backend=clsa, options=options)(torch.randn(2, 4, 6, 8))


SHARING = {"topk": 4, "share": 2, "prefill": "sparse", "keep_first": 1, "keep_last": 1}


@pytest.mark.parametrize(("name", "options"), [("llama", {}), ("llama", SHARING), ("glm_moe_dsa", {})])
def test_every_node_keeps_the_models_line_and_module(
    name: str, options: dict[str, Any], lowered: list[GraphModule]
) -> None:
    model = tiny(name)
    with torch.no_grad():
        torch.compile(model, backend=clsa, options=options or None)(
            torch.randint(0, 128, (2, 16)), use_cache=False
        )
    (graph,) = lowered
    calls = [n for n in graph.graph.nodes if n.op == "call_function"]
    assert len(calls) > 100
    lost = [n.name for n in calls if "transformers" not in n.meta.get("stack_trace", "")]
    assert lost == []
    ours = [
        n.name
        for n in calls
        if "clsa_compile" in n.meta["stack_trace"] or "/passes/" in n.meta["stack_trace"]
    ]
    assert ours == []
    # What stands outside of all modules is an alias of the result.
    inside = [n for n in calls if n.target is not torch.ops.aten.alias.default]
    assert [n.name for n in inside if not n.meta.get("nn_module_stack")] == []


def test_without_a_listener_nothing_is_made(
    lowered: list[GraphModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(*_: Any) -> str:
        raise AssertionError("a text was made that nobody reads")

    monkeypatch.setattr(torch._logging._internal.trace_log, "handlers", [])  # type: ignore[attr-defined]
    monkeypatch.setattr(clsa_compile.watch, "_code", made)
    # Importing what writes dumps fails.
    monkeypatch.setitem(sys.modules, "clsa_compile.dump", None)
    compile_one()
    assert len(lowered) == 1


def test_a_graph_that_cannot_be_written_compiles_nevertheless(
    lowered: list[GraphModule],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(*_: Any) -> str:
        raise KeyError("unheard of")

    monkeypatch.setattr("clsa_compile.dump.code_of", broken)
    monkeypatch.setattr("clsa_compile.dump.code.code_of", broken)
    compile_one(dump=str(tmp_path))
    assert len(lowered) == 1
    assert "the dump is not whole: KeyError: 'unheard of'" in caplog.text
    assert (tmp_path / "graph_000" / "04_plan.json").exists()


def test_what_is_left_whole_is_logged(lowered: list[GraphModule], caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.INFO, "clsa_compile"),
        torch.autocast("cpu", torch.bfloat16),
        pytest.warns(clsa_compile.ClsaWarning),
    ):
        compile_one()
    (record,) = caplog.records
    assert "clsa left a graph to Inductor (autocast)" in record.getMessage()


def test_a_stage_after_which_it_stops_is_logged(
    lowered: list[GraphModule], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "clsa_compile"), pytest.warns(clsa_compile.ClsaWarning):
        compile_one(stop_after="plan")
    (record,) = caplog.records
    assert "stopped after plan" in record.getMessage()


def test_the_watch_stops_after_the_stage_that_was_named() -> None:
    watch = Watch(Options(stop_after="rewritten"))
    empty: Any = None
    watch.stage("matched", empty)
    with pytest.raises(Stopped, match="rewritten"):
        watch._stop_after("rewritten")
