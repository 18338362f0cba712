"""Progress: the stage that runs is there however many there were, under one line for the whole."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from clsa_compile.calibration.progress import Progress

HEIGHT = 12


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, color_system=None, width=100, height=HEIGHT)


def last_frame(shown: Progress, console: Console) -> list[str]:
    """Returns the lines that the terminal shows at last, without what moves its cursor."""
    assert isinstance(console.file, io.StringIO)
    console.file.seek(0)
    console.file.truncate()
    shown._bars.refresh()
    plain = re.sub(r"\x1b\[[0-9?]*[A-Za-z]|\r", "", console.file.getvalue())
    return plain.splitlines()


def test_the_stage_that_runs_is_shown_after_many() -> None:
    console = terminal()
    with Progress(True, console) as shown:
        for number in range(20):
            done = shown.stage(f"trying {number} anchors", 4)
            done()
        lines = last_frame(shown, console)
    assert len(lines) == 2
    assert "stage 20, 0:00:00 in all" in lines[0]
    assert "trying 19 anchors" in lines[1]
    assert "1/4" in lines[1]


def test_the_whole_has_a_time_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    console = terminal()
    with Progress(True, console) as shown:
        now = shown._bars.get_time()
        shown.stage("recording", 1)()
        monkeypatch.setattr(shown._bars, "get_time", lambda: now + 3725)
        shown.stage("trying", None)()
        lines = last_frame(shown, console)
    assert "stage 2, 1:02:0" in lines[0]
    assert "recording" not in "".join(lines)
    assert "1/?" in lines[1]
    assert "0:00:00" in lines[1], "of the stage that runs"


def test_nothing_is_shown_where_it_is_not_asked_for() -> None:
    console = terminal()
    with Progress(False, console) as shown:
        shown.stage("recording", 1)()
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == ""
