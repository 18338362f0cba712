"""Work in several processes: no more at once than memory has room for, and one at a time on the device."""

from __future__ import annotations

import os
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import pytest
from beside import Turn, beside
from timed_work import Span, in_turn, meeting, sleeping


def overlapping(spans: list[Span]) -> int:
    """Counts pairs of spans of time that have an instant in common."""
    ordered = sorted(spans)
    return sum(a[1] > b[0] for i, a in enumerate(ordered) for b in ordered[i + 1 :])


def test_everything_is_run_once() -> None:
    found = dict(beside({"a": 1, "b": 1, "c": 1}, partial(sleeping, 0.0), processes=2, room=9))
    assert found.keys() == {"a", "b", "c"}


def test_what_needs_more_than_there_is_room_for_waits(tmp_path: Path) -> None:
    work = {"all": 10, "half": 5, "other half": 5, "too much": 99}
    found = dict(beside(work, partial(meeting, tmp_path), processes=4, room=10))
    alone = [
        [found[name], span] for name in ("all", "too much") for other, span in found.items() if other != name
    ]
    assert not any(overlapping(pair) for pair in alone)
    assert overlapping([found["half"], found["other half"]])


def test_nothing_is_begun_after_the_time_is_up() -> None:
    answers = iter([True, True, False, False, False])
    work = dict.fromkeys("abcd", 1)
    assert (
        len(list(beside(work, partial(sleeping, 0.0), processes=1, room=9, more=lambda: next(answers)))) == 2
    )


def test_one_measures_at_a_time(tmp_path: Path) -> None:
    work = dict.fromkeys("abc", 1)
    found = dict(beside(work, partial(in_turn, Turn(tmp_path / "turn")), processes=3, room=9))
    assert not overlapping([span for spans in found.values() for span in spans])


def test_alone_it_is_always_ones_turn() -> None:
    turn = Turn()
    for act in (turn.take, turn.give, turn.give):
        act()
        assert turn.held


def test_a_process_that_dies_is_told() -> None:
    with pytest.raises(BrokenProcessPool):
        list(beside({3: 1}, os._exit, processes=1, room=9))
