"""The benchmark of trained indices: what was timed is kept."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import distilling
import pytest


@pytest.fixture
def arguments(tmp_path: Path) -> argparse.Namespace:
    return argparse.Namespace(out=tmp_path, batch=2, cache=64, model=None, jobs=3)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names that were timed; timing takes no time."""
    seen: list[str] = []

    def beside(work: Any, run: Any, *, more: Callable[[], bool], **_: Any) -> Iterator[tuple[str, float]]:
        for name in work:
            if more():
                seen.append(name)
                yield name, float(len(seen))

    monkeypatch.setattr(distilling, "beside", beside)
    return seen


def test_steps_are_timed_once(arguments: argparse.Namespace, timed: list[str]) -> None:
    plans: dict[str, Any] = {"exact": None, "a": None}
    *_, known = distilling.step_times(plans, arguments, lambda: True)
    assert known == {"exact": 1.0, "a": 2.0}
    *_, known = distilling.step_times({**plans, "b": None}, arguments, lambda: True)
    assert known == {"exact": 1.0, "a": 2.0, "b": 3.0}
    assert timed == ["exact", "a", "b"]
    assert json.loads((arguments.out / "distilling/steps-2-64.json").read_text()) == known


def test_what_was_timed_is_known_when_time_is_up(arguments: argparse.Namespace, timed: list[str]) -> None:
    *_, known = distilling.step_times({"exact": None, "a": None}, arguments, lambda: not timed)
    assert [*distilling.step_times({"exact": None, "a": None}, arguments, lambda: False)] == [known]
    assert known == {"exact": 1.0}
