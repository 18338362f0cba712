"""Work that says when it was done, for processes that import it."""

from __future__ import annotations

import time
from pathlib import Path

from beside import Turn

Span = tuple[float, float]
HALVES = ("half", "other half")


def sleeping(seconds: float, _: str) -> Span:
    begin = time.time()
    time.sleep(seconds)
    return begin, time.time()


def in_turn(turn: Turn, key: str) -> tuple[Span, Span]:
    """Builds and measures in turn; between them it compiles, for which the turn is given away."""
    turn.take()
    turn.take()
    built = sleeping(0.05, key)
    turn.give()
    assert not turn.held
    time.sleep(0.3)
    turn.take()
    assert turn.held
    measured = sleeping(0.1, key)
    turn.give()
    return built, measured


def meeting(folder: Path, key: str) -> Span:
    """Sleeps; who is a half waits for the other half."""
    begin = time.time()
    (folder / key).touch()
    while "half" in key and time.time() < begin + 60 and not all((folder / k).exists() for k in HALVES):
        time.sleep(0.01)
    return begin, sleeping(0.1, key)[1]
