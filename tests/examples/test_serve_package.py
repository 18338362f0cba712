"""The server: tokens stream from a process of its own, and equal eager's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples/serve_package.py"


@pytest.mark.exhaustive
def test_a_package_is_built_served_and_served_again(tmp_path: Path) -> None:
    path = tmp_path / "decoder.pt2"
    for _ in range(2):
        before = path.stat().st_mtime_ns if path.exists() else None
        command = [sys.executable, "-W", "ignore", str(SCRIPT), "--tiny", "--device", "cpu", "--tokens", "6"]
        done = subprocess.run([*command, "--package", str(path)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "tokens equal eager's: True" in done.stdout
        assert "all 6 after" in done.stdout
        assert before in (None, path.stat().st_mtime_ns), "what is there is served"
