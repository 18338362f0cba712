"""Pages: one well-formed file, escaped, without script or network, and written whole or not at all."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clsa_compile.calibration import page
from clsa_compile.calibration.quality import LayerQuality, Quality, WorstToken
from clsa_compile.calibration.task_report import TaskCell, TaskReport
from clsa_compile.errors import OptionError

QUALITY = Quality(
    topk=64,
    schedule="FSS",
    tokens=1000,
    dense_loss=3.0,
    loss=3.0 + math.log(1.02),
    kl=0.0123,
    agreement=0.97,
    layers=(
        LayerQuality("layers.0", "F"),
        LayerQuality("layers.1", "S", 0, 0.91),
        LayerQuality("layers.2", "S", 0, 0.84),
    ),
    worst_token=WorstToken(1, 700, 2.5, 42, " grace"),
    by_sequence=(0.01, 0.03),
    serves=((1.0, 0.9, 0.8), (math.nan, 1.0, 0.85), (math.nan, math.nan, 1.0)),
)
TASKS = TaskReport(64, "FSS", 0, (TaskCell("single_needle", 1024, 0.25, 4, 1.0, 0.75, -0.1, -0.2, 0.9),))
HOSTILE = ["<script>alert(1)</script>", '"><b>', "</title>", "&lt;", "{{ quality }}"]


def test_the_page_says_what_was_measured(read_page: Any) -> None:
    read = read_page(page.render(QUALITY, TASKS))
    text = " ".join(read.text.split())
    for part in (
        "FSS",
        "+2.00%",
        "3.0000 → 3.0198",
        "1.23e-02",
        "97.00%",
        "Worst token: 42 ' grace' at 700 of sequence 1, KL 2.500 nats.",
        "Worst layer: 2, layers.2, keeps 84.0%",
        "+1.00%, +3.00%",
        "layer 2 keeps 85.0% on what layer 1 chooses",
        "layer 1 keeps 90.0% on what layer 0 chooses, as planned",
        "100.0% of 4 samples right without the plan, 75.0% with it",
        "single_needle 1024 0.25 4 100% 75% -0.100 -0.200 -0.100 90%",
    ):
        assert part in text


def test_the_page_needs_no_network_and_no_script(read_page: Any) -> None:
    text = page.render(QUALITY, TASKS)
    read = read_page(text)
    assert {tag for tag, _ in read.tags}.isdisjoint({"script", "link", "img", "iframe", "object", "image"})
    names = {name for _, attributes in read.tags for name in attributes}
    assert not {name for name in names if name.startswith("on") or name in ("src", "href", "xlink:href")}
    assert "http" not in re.sub("http-equiv", "", text)
    assert set(re.findall(r"url\((.*?)\)", text)) == {"#scale"}
    assert "prefers-color-scheme: dark" in text
    assert any(a.get("name") == "viewport" for a in read.all("meta"))


def test_the_map_has_a_cell_for_each_pair_and_a_ring_for_each_planned_one(read_page: Any) -> None:
    read = read_page(page.render(QUALITY, None))
    cells = [a for a in read.all("rect") if str(a["fill"]).startswith("#")]
    assert len(cells) == 6
    places = {(float(str(a["x"])), float(str(a["y"]))): a["fill"] for a in cells}
    left, top, side = page.LEFT, page.TOP, page.SIDE
    assert places[left, top] == "#fde725"
    assert (left, top + side) not in places  # a layer chooses for later ones only
    assert len([a for a in read.all("circle") if a["class"] == "planned"]) == 2
    assert "Synthetic tasks" not in read.text


def test_a_large_map_has_few_labels(read_page: Any) -> None:
    size = 100
    serves = tuple(tuple(math.nan if layer < a else 0.5 for layer in range(size)) for a in range(size))
    layers = tuple(LayerQuality(f"layers.{i}", "F") for i in range(size))
    read = read_page(page.render(replace(QUALITY, serves=serves, layers=layers), None))
    cells = [a for a in read.all("rect") if str(a["fill"]).startswith("#")]
    assert len(cells) == size * (size + 1) // 2
    ends = [
        float(str(a[at])) + float(str(a[along]))
        for a in cells
        for at, along in (("x", "width"), ("y", "height"))
    ]
    assert max(ends) <= page.LEFT + page.EXTENT + 0.01
    assert len([a for a in read.all("text") if a.get("text-anchor") == "middle"]) <= page.LABELS + 1


def test_without_a_map_or_a_follower_there_is_still_a_page(read_page: Any) -> None:
    layers = tuple(LayerQuality(f"layers.{i}", "F") for i in range(3))
    text = read_page(page.render(replace(QUALITY, layers=layers, serves=(), by_sequence=()), None)).text
    assert "Who could serve whom" not in text
    assert "Worst layer" not in text
    assert "layers.2" in text


@settings(deadline=None, max_examples=50)
@given(hostile=st.one_of(st.text(min_size=1), st.sampled_from(HOSTILE)))
def test_whatever_is_shown_is_escaped(hostile: str, read_page: Any) -> None:
    layers = tuple(replace(layer, path=hostile) for layer in QUALITY.layers)
    worst = replace(QUALITY.worst_token, text=hostile)
    quality = replace(QUALITY, layers=layers, worst_token=worst)
    tasks = replace(TASKS, cells=(replace(TASKS.cells[0], task=hostile),))
    plain, shown = read_page(page.render(QUALITY, TASKS)), read_page(page.render(quality, tasks))
    assert {tag for tag, _ in shown.tags} == {tag for tag, _ in plain.tags}
    assert repr(hostile) in shown.text


@given(share=st.floats(-0.1, 1.1))
def test_colours_go_from_dark_to_bright(share: float) -> None:
    colour = page._colour(share)
    assert re.fullmatch("#[0-9a-f]{6}", colour)
    assert page._colour(0.0) == "#440154"
    assert page._colour(1.0) == "#fde725"
    green = int(colour[3:5], 16)
    assert green <= int(page._colour(min(1.0, share + 0.1))[3:5], 16)


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    QUALITY.to_html(path, TASKS)
    text = path.read_text()
    assert text.startswith("<!DOCTYPE html>")
    assert "Synthetic tasks" in text

    def full(self: Path, content: str, **_: Any) -> None:
        with self.open("w") as file:
            file.write(content[:100])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OptionError, match=r"no page can be written to '.*report.html': no space left"):
        QUALITY.to_html(path)
    assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="no page can be written to"):
        QUALITY.to_html(tmp_path / "file" / "report.html")
