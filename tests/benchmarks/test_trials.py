"""Benchmarks that nothing else here runs: a trial run of each, as their first lines give it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TRIALS = [
    "early.py --tiny --tokens 64 --repeats 1",
    "decode.py --tiny --layers 2 --cache 256 --repeats 1 --only llama --topk 16 --share 2 --groups 1",
]


@pytest.mark.exhaustive
@pytest.mark.parametrize("command", TRIALS)
def test_a_trial_run_is_right(command: str, tmp_path: Path) -> None:
    script, *arguments = command.split()
    out = tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, BENCHMARKS / script, *arguments, "--device", "cpu", "--out", out],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert out.is_file()
