"""Plots against the numbers that they are of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from clsa_compile.html.plots import BOTTOM, LEFT, RIGHT, TOP, cost_plot, roofline
from clsa_compile.prediction import Prediction


@pytest.fixture
def found(make: Any) -> Prediction:
    (prediction,) = make(8, "mass").predictions
    return prediction


def test_marks_stand_where_the_numbers_are(found: Prediction) -> None:
    plot = cost_plot(found, (4096, 131072))
    assert [mark.side for mark in plot.marks] == ["before"] * 2 + ["after"] * 2
    for mark, cost in zip(plot.marks, [found.before] * 2 + [found.after] * 2, strict=True):
        tokens = 4096 if " 4K " in mark.says else 131072
        assert mark.x == plot.x.at(tokens)
        assert mark.y == plot.y.at(cost.at(tokens)[2] / 1e6)
    assert plot.marks[1].says == "before, 128K tokens: 22.5 ms"


def test_lines_go_through_the_marks_from_end_to_end(found: Prediction) -> None:
    plot = cost_plot(found, (4096, 131072))
    for line in plot.lines:
        points = [tuple(map(float, part.split())) for part in line.path[1:].split("L")]
        assert (points[0][0], points[-1][0]) == (LEFT, RIGHT)
        assert all(TOP <= y <= BOTTOM for _, y in points)
        marks = [mark for mark in plot.marks if mark.side == line.side]
        for mark in marks:
            near = min(points, key=lambda point: abs(point[0] - mark.x))
            assert abs(near[1] - mark.y) < 4


def test_break_even_is_marked_where_there_is_one(found: Prediction) -> None:
    plot = cost_plot(found, (4096,))
    assert plot.break_even == (plot.x.at(2100), "2,100")
    assert cost_plot(replace(found, break_even=None), (4096,)).break_even is None


def test_a_prompt_begins_with_its_own_tokens(found: Prediction) -> None:
    plot = cost_plot(replace(found, queries=2048), (512, 4096))
    assert plot.x.low == 2048
    assert [mark.says.split(",")[1] for mark in plot.marks] == [" 4K tokens: 2.18 ms", " 4K tokens: 1.75 ms"]


def test_lengths_beyond_all_others_are_in_the_plot(found: Prediction) -> None:
    plot = cost_plot(found, (2**24,))
    assert plot.x.high > 2**24


def test_the_roof_is_the_memory_and_then_the_arithmetic(found: Prediction) -> None:
    roof = roofline(found, 131072)
    assert roof is not None
    corners = [tuple(map(float, part.split())) for part in roof.roof[1:].split("L")]
    ridge = found.rate / found.bandwidth
    assert corners[1] == (roof.x.at(ridge), roof.y.at(found.rate))
    assert corners[2] == (RIGHT, roof.y.at(found.rate))


def test_kinds_of_work_are_where_their_numbers_say(found: Prediction) -> None:
    roof = roofline(found, 131072)
    assert roof is not None
    entries = {(entry.side, entry.name): entry for entry in roof.entries}
    attention = entries["before", "attention"]
    size, flops, us = found.operations[0][0].cost.at(131072)
    assert attention.intensity == flops / size == 2
    assert attention.speed == pytest.approx(flops / us * 1e6)
    assert attention.us == us
    assert attention.ordinals == tuple(sorted(found.layers, key=list(found.layers).index))
    mark = next(mark for mark in roof.marks if mark.number == attention.number)
    assert (mark.x, mark.y) == (roof.x.at(attention.intensity), roof.y.at(attention.speed))
    assert sorted(mark.number for mark in roof.marks) == list(range(1, len(roof.marks) + 1))


def test_everything_else_is_what_the_layers_leave(found: Prediction) -> None:
    roof = roofline(found, 4096)
    assert roof is not None
    for side, whole in (("before", found.before), ("after", found.after)):
        parts = sum(
            entry.us * max(len(entry.ordinals), 1)
            for entry in roof.entries
            if entry.side == side and entry.name != "selection"
        )
        extra = sum(e.us * len(e.ordinals) for e in roof.entries if (e.side, e.name) == (side, "selection"))
        assert parts + extra == pytest.approx(whole.at(4096)[2])


def test_work_without_arithmetic_has_no_number(found: Prediction) -> None:
    roof = roofline(found, 4096)
    assert roof is not None
    selection = next(entry for entry in roof.entries if entry.name == "selection")
    assert selection.number == 0
    assert len(roof.marks) == sum(entry.number > 0 for entry in roof.entries)


def test_numbers_do_not_stand_on_each_other(found: Prediction) -> None:
    same = replace(found, operations=(found.operations[0] * 6, found.operations[1]))
    roof = roofline(same, 4096)
    assert roof is not None
    labels = [mark.label for mark in roof.marks]
    assert len(labels) == 9
    apart = [
        max(abs(a[0] - b[0]), abs(a[1] - b[1]))
        for i, a in enumerate(labels)
        for b in (*labels[:i], *((mark.x, mark.y) for mark in roof.marks))
    ]
    assert min(apart) >= 11


def test_without_a_device_there_is_no_roof(found: Prediction) -> None:
    assert roofline(replace(found, bandwidth=0.0), 4096) is None
