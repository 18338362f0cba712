"""Published configurations, on the meta device: within a minute of one core a graph, and 8 GiB."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import clsa_compile.configurations
from clsa_compile.configurations import _cache, inspect_configuration
from clsa_compile.testing import tiny

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SETTINGS: dict[str, Any] = {"prompt": 8, "cache": 64, "lengths": (64,), "device": "h100"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny("glm_moe_dsa").config.save_pretrained(tmp_path)
    return tmp_path


def test_models_have_no_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models: list[Any] = []
    inspect = clsa_compile.configurations.inspect

    def noted(model: Any, *args: Any, **kwargs: Any) -> Any:
        models.append(model)
        return inspect(model, *args, **kwargs)

    monkeypatch.setattr(clsa_compile.configurations, "inspect", noted)
    found = inspect_configuration(folder, **SETTINGS)
    assert list(found.reports) == ["prefill", "decode"]
    assert all(p.is_meta for p in models[0].parameters())
    assert [r.counts()["sparse_attention"] for r in found.reports.values()] == [2, 2]


@pytest.mark.slow
def test_deep_models_are_inspected_in_two_processes_with_the_same_result(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = inspect_configuration(folder, **SETTINGS)
    monkeypatch.setattr(clsa_compile.configurations, "DEEP", 1)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert inspect_configuration(folder, **SETTINGS).to_dict() == one.to_dict()


def test_caches_have_their_tensors_and_prompts_start_at_nothing() -> None:
    model: Any = tiny("llama").to("meta")
    step = _cache(model, model.config, 2, 64, is_empty=False)
    assert [tuple(layer.keys.shape) for layer in step.layers] == [(2, 2, 64, 16)] * 2
    assert all(layer.keys.is_meta for layer in step.layers)
    assert _cache(model, model.config, 2, 64, is_empty=True).layers[0].is_initialized


def test_windows_of_a_step_are_full() -> None:
    model: Any = tiny("gemma2").to("meta")
    window, whole = _cache(model, model.config, 1, 64, is_empty=False).layers
    assert window.cumulative_length_int == 64
    assert not hasattr(whole, "cumulative_length_int")
    assert _cache(model, model.config, 1, 64, is_empty=True).layers[0].cumulative_length_int == 0


def test_a_model_that_does_not_run_on_the_meta_device_makes_its_cache_itself() -> None:
    model: Any = tiny("llama").to("meta")

    def broken(*_: Any, **__: Any) -> Any:
        raise NotImplementedError

    config = model.config
    cache = _cache(broken, config, 1, 64, is_empty=False)
    assert not cache.layers[0].is_initialized


def test_models_without_a_dtype_are_bfloat16(tmp_path: Path) -> None:
    data = tiny("llama").config.to_dict()
    data.pop("dtype", None)
    (tmp_path / "config.json").write_text(json.dumps(data))
    report = inspect_configuration(tmp_path, **SETTINGS, graphs=("decode",)).reports["decode"]
    assert {layer.dtype for layer in report.layers} == {"bfloat16"}
    assert torch.get_default_dtype() == torch.float32


def test_what_is_published_is_what_is_written_down() -> None:
    depths = {path.name: json.loads((path / "config.json").read_text())["num_hidden_layers"]
              for path in CONFIGS.iterdir()}  # fmt: skip
    assert depths == {
        "deepseek_v32": 61, "gemma3n_e4b": 35, "glm_moe_dsa": 78, "llama_70b": 80, "qwen3_32b": 64,
    }  # fmt: skip


# What is published of each: billions of weights, and layers by what will run in a step.
PUBLISHED = {
    "llama_70b": (70.6, {"attention": 80}),
    "qwen3_32b": (32.8, {"attention": 64}),
    "deepseek_v32": (671.9, {"sparse_attention": 61}),
    "glm_moe_dsa": (743.9, {"sparse_attention": 78}),
    "gemma3n_e4b": (6.84, {"attention": 35}),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_takes_a_minute_and_little_memory(name: str) -> None:
    """Processor time, so that the test says the same on a machine that has other work to do."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ran = subprocess.run(
        [sys.executable, "-m", "clsa_compile", "inspect", "--config", CONFIGS / name, "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    data = json.loads(ran.stdout)
    billions, actions = PUBLISHED[name]
    assert data["parameters"] / 1e9 == pytest.approx(billions, rel=0.01)
    for graph in ("prefill", "decode"):
        counts = data[graph]["counts"]
        assert counts["left"] == 0
        assert {k: counts[k] for k in actions} == actions
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds / 2 < 60, "each of the two graphs, in a process of its own"
    assert after.ru_maxrss < 4 * 2**20, "KiB; each of two processes"
