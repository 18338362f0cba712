"""Dumps as a whole: every file of a graph's folder, as text that is the same in every process."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import clsa_compile.backend
from clsa_compile.backend import ClsaWarning, clsa
from clsa_compile.ir.plan import Plan

GOLDENS = Path(__file__).resolve().parents[2] / "goldens" / "dump"
ROOT = Path(__file__).resolve().parents[3]
# Lines of this text stand in the goldens: a file of its own keeps them when tests change.
MODEL = '''\
import math

import torch
import torch.nn.functional as F


class Toy(torch.nn.Module):
    """One attention with grouped heads and a cache, one over selected tokens, one that needs its weights."""

    def forward(self, q, cache, new, at, iq, ik, w):
        cache.index_copy_(2, at, new)
        k = cache.repeat_interleave(2, 1)
        causal = torch.arange(cache.shape[2])[None] <= at[:, None]
        x = F.scaled_dot_product_attention(q, k, k, attn_mask=causal)

        scores = torch.einsum("bshd,btd->bsht", iq, ik).relu() * 0.25
        scores = torch.einsum("bsh,bsht->bst", w, scores).masked_fill(~causal, -math.inf)
        chosen = torch.full((2, 6, 8), -math.inf).scatter(-1, scores.topk(3, -1).indices, 0.0)
        mask = (chosen + torch.where(causal, 0.0, -math.inf))[:, None]
        x = F.scaled_dot_product_attention(x, k, k, attn_mask=mask)

        weights = (x @ k.mT).softmax(-1)
        return weights @ k, weights
'''


def inputs() -> list[torch.Tensor]:
    torch.manual_seed(0)
    cache, new = torch.randn(2, 2, 8, 4), torch.randn(2, 2, 6, 4)
    index = [torch.randn(2, 6, 32, 4), torch.randn(2, 8, 4), torch.randn(2, 6, 32)]
    return [torch.randn(2, 4, 6, 4), cache, new, torch.arange(2, 8), *index]


@pytest.fixture
def toy(tmp_path: Path) -> Any:
    (tmp_path / "toy.py").write_text(MODEL)
    spec = importlib.util.spec_from_file_location("toy", tmp_path / "toy.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Toy()


@pytest.fixture
def dumped(toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A graph's folder; its second, so that nothing may depend on what was compiled before."""
    monkeypatch.setattr(clsa_compile.backend, "_inductor", lambda gm, inputs, options: gm.forward)
    for _ in range(2):
        torch._dynamo.reset()
        clsa_compile.backend._warn_once.cache_clear()
        with torch.no_grad(), pytest.warns(ClsaWarning, match="users"):
            torch.compile(toy, backend=clsa, options={"dump": str(tmp_path / "dumps")})(*inputs())
    return tmp_path / "dumps" / "graph_001"


GOLDEN = [
    "00_captured.py", "01_canonical.py", "02_sites.json", "02_sites.txt", "03_analysis.dot", "04_plan.json",
    "04_plan.txt", "05_rewritten.py", "06_lowered.py", "07_choices.json", "diff.patch",
]  # fmt: skip


def test_the_folder_reads_as_it_should(dumped: Path) -> None:
    assert sorted(p.name for p in dumped.iterdir()) == [*GOLDEN, "repro.py", "timings.json"]
    for name in GOLDEN:
        text = (dumped / name).read_text()
        golden = GOLDENS / name
        if os.environ.get("CLSA_ACCEPT") == "1":
            golden.parent.mkdir(parents=True, exist_ok=True)
            golden.write_text(text)
        assert golden.exists(), "write it with CLSA_ACCEPT=1"
        assert text == golden.read_text(), f"{name}: read the difference; CLSA_ACCEPT=1 accepts it"


def test_what_is_json_can_be_read_back(dumped: Path) -> None:
    plan = Plan.from_dict(json.loads((dumped / "04_plan.json").read_text()))
    assert [site.action for site in plan.sites] == ["attention", "sparse", "left"]
    sites = json.loads((dumped / "02_sites.json").read_text())
    assert [site["ordinal"] for site in sites] == [0, 1, 2]
    assert sites[1]["indexer"]["topk"] == 3
    assert sites[2]["left"] == plan.sites[2].reason


def test_stages_are_timed(dumped: Path) -> None:
    seconds = json.loads((dumped / "timings.json").read_text())
    names = ["capture", "canonicalize", "match", "plan", "rewrite", "lower", "inductor"]
    assert list(seconds) == names
    assert all(s >= 0 for s in seconds.values())
    assert seconds["capture"] > 0


@pytest.mark.slow
def test_the_script_runs_alone_and_finds_no_difference(dumped: Path, tmp_path: Path) -> None:
    script = tmp_path / "elsewhere" / "repro.py"
    script.parent.mkdir()
    script.write_text((dumped / "repro.py").read_text())
    done = subprocess.run(
        [sys.executable, str(script), "--limit", "1e-4"],
        cwd=script.parent,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    counted, largest = done.stdout.strip().splitlines()
    assert "'sites': 3" in counted
    assert "'sparse_attention': 1" in counted
    assert "'left': 1" in counted
    assert largest.startswith("largest difference: ")


@pytest.mark.slow
def test_the_script_has_a_status_for_differences(dumped: Path, tmp_path: Path) -> None:
    text = (dumped / "repro.py").read_text()
    wrong = text.replace("actual = compiled(*again)", "actual = [x + 1 for x in compiled(*again)]")
    assert wrong != text
    (tmp_path / "wrong.py").write_text(wrong)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "wrong.py"), "--backend", "eager", "--limit", "0.5"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "largest difference: 1 in output" in done.stdout
