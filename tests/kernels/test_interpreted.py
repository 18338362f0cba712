"""Runs the numeric tests of this folder on the CPU, in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import triton

FOLDER = Path(__file__).parent


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


# Neighbours differ in one size or option: every third one is a fair sample, and the rest takes twice as long.
@pytest.mark.parametrize("part", ["0/3", *(pytest.param(p, marks=pytest.mark.slow) for p in ("1/3", "2/3"))])
def test_kernels_agree_with_the_references_in_the_interpreter(part: str, tmp_path: Path) -> None:
    if version(triton.__version__) < (3, 7) and version(numpy.__version__) >= (2, 4):
        pytest.skip("triton 3.6 cannot interpret loops with numpy 2.4")
    chosen = {"TRITON_INTERPRET": "1", "CLSA_INTERPRETED_PART": part, "XDG_CACHE_HOME": str(tmp_path)}
    environment = {**os.environ, **chosen}
    command = [sys.executable, "-m", "pytest", str(FOLDER), "-q", "-x", "-p", "no:cacheprovider"]
    # The interpreter computes with numpy, which warns of log2(0) and of overflow to infinity.
    command += ["-W", "ignore::RuntimeWarning"]
    done = subprocess.run(command, env=environment, cwd=FOLDER.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
