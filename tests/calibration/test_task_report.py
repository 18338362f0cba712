"""The report of tasks: as text, plain where it is piped, as plain data and as a page."""

from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console

from clsa_compile.calibration.task_report import TaskCell, TaskReport

REPORT = TaskReport(
    topk=64,
    schedule="FSS",
    seed=0,
    cells=(
        TaskCell("single_needle", 1024, 0.25, 4, 1.0, 0.75, -0.125, -0.25, 0.875),
        TaskCell("common_words", 2048, None, 1, 0.0, 0.0, -1.5, -2.0, 1.0),
    ),
)


def test_the_report_has_a_line_for_each_cell() -> None:
    lines = str(REPORT).splitlines()
    assert lines[0] == (
        "tasks, schedule FSS, 64 tokens: 80.0% right -> 60.0%, log-probability of an answer's token -0.200 "
        "nats, over 5 samples"
    )
    assert lines[1].split("  ")[0] == "task"
    expected = ["single_needle", "1024", "0.25", "4", "100%", "75%", "-0.125", "-0.250", "-0.125", "88%"]
    assert lines[2].split() == expected
    assert lines[3].split()[:4] == ["common_words", "2048", "-", "1"]
    assert max(map(len, lines)) <= 120


def test_on_a_terminal_it_is_a_table() -> None:
    out = io.StringIO()
    Console(file=out, width=120, force_terminal=True).print(REPORT)
    text = out.getvalue()
    assert "\x1b[" in text
    assert "┃" in text
    assert "single_needle" in text
    assert "\x1b[" not in str(REPORT)


def test_plain_data_is_json() -> None:
    data = json.loads(json.dumps(REPORT.to_dict(), allow_nan=False))
    assert (data["samples"], data["dense_accuracy"], data["accuracy"]) == (5, 0.8, 0.6)
    assert data["cells"][1]["depth"] is None
    assert data["cells"][0]["logprob_difference"] == -0.125
    assert data["schedule"] == "FSS"


def test_the_page_stands_alone(tmp_path: Path) -> None:
    REPORT.to_html(tmp_path / "tasks.html")
    text = (tmp_path / "tasks.html").read_text()
    assert "Synthetic tasks" in text
    assert "single_needle" in text
    assert "FSS" in text
    assert "Who could serve whom" not in text
