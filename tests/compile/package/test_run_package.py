"""The runner in C++: built against this torch, it says the tokens that Python says."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import clsa_compile
from clsa_compile.testing import tiny

ROOT = Path(__file__).parents[3]
PROMPT, STEPS = [3, 14, 15, 92, 65], 8


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = importlib.util.spec_from_file_location("build", ROOT / "examples/cpp/build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    target = tmp_path_factory.mktemp("runner") / "run_package"
    module.build(target)
    return target


def run(runner: Path, *arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [str(runner), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def tokens(model: Any) -> list[int]:
    """Returns the likeliest tokens by the eager model."""
    ids = torch.tensor([PROMPT])
    for _ in range(STEPS):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids[0, len(PROMPT) :].tolist()


@pytest.mark.slow
def test_weights_from_a_checkpoint(runner: Path, decoder: Any, llama: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({n: v for n, v in llama.state_dict().items() if n != "lm_head.weight"}, file)
    done = run(runner, decoder.path, file, STEPS, *PROMPT)
    assert done.stderr == ""
    assert [int(token) for token in done.stdout.split()] == tokens(llama)


def test_running_without_weights_is_an_error(runner: Path, decoder: Any) -> None:
    without = run(runner, decoder.path, "-", STEPS, *PROMPT)
    assert (without.returncode, without.stdout) == (1, "")
    assert "run_package: no weights for" in without.stderr


@pytest.mark.exhaustive
def test_weights_inside(runner: Path, tmp_path: Path) -> None:
    model = tiny("qwen3", num_hidden_layers=1)
    clsa_compile.export(model, (torch.tensor([PROMPT]),), path=tmp_path / "a.pt2")
    done = run(runner, tmp_path / "a.pt2", "-", STEPS, *PROMPT)
    assert done.stderr == ""
    assert [int(token) for token in done.stdout.split()] == tokens(model)


def test_what_it_cannot_read(runner: Path, tmp_path: Path) -> None:
    assert "usage: run_package" in run(runner).stderr
    found = run(runner, tmp_path / "a.pt2", tmp_path / "a.safetensors", 1, 2, 3)
    assert found.returncode == 1
    assert "cannot read" in found.stderr
