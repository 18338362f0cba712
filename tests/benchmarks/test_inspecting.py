"""What looking costs: the benchmark sees processes whole, and *bare* leaves no hook of a graph in place."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import inspecting
import pytest
from inspecting import Compile, Inspection

from clsa_compile.watch import Watch


def test_no_hook_is_left_out() -> None:
    """One that is would count on both sides."""
    hooks = {name for name, value in vars(Watch).items() if callable(value) and not name.startswith("_")}
    assert hooks == set(inspecting.HOOKS)


def test_memory_is_that_of_a_process_and_all_below_it() -> None:
    # A shell stays while its child holds 200 MiB.
    child = f"{sys.executable} -c \"a = b'x' * (200 << 20); print(1, flush=True); input()\"; true"
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(child, shell=True, text=True, **pipes) as shell:
        assert shell.stdout is not None
        shell.stdout.readline()
        held = inspecting.resident(shell.pid)
        shell.communicate("\n")
    assert 200 << 20 < held < 400 << 20
    assert inspecting.resident(shell.pid) == 0, "it is gone"


def test_limits_and_noise_decide(capsys: pytest.CaptureFixture[str]) -> None:
    assert Inspection("a", 1, 1, 59.0, inspecting.GIB).holds
    assert not Inspection("a", 1, 1, 61.0, inspecting.GIB).holds
    assert not Inspection("a", 1, 1, 59.0, 9 * inspecting.GIB).holds

    def runs(more: float) -> dict[str, list[Any]]:
        bare = [Compile(2.0 + 0.01 * (i % 2), 0.2) for i in range(8)]
        off = [Compile(one.seconds + more, one.step_ms) for one in bare]
        return {"bare": bare, "off": off, "on": off}

    assert inspecting.show_sides(runs(0.005))
    assert not inspecting.show_sides(runs(0.02))
    assert "+20.00 (noise 10.00)" in capsys.readouterr().out
