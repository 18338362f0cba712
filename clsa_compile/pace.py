"""Two costs of CPython that a compiler pays without need, and how to avoid them."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

__all__ = ["roomy", "uncollected"]

# Slots of eight bytes. CPython doubles 16 KiB until they fit, which leaves the other half to what is called.
_ROOM = 32768


@contextmanager
def uncollected() -> Iterator[None]:
    """Holds the garbage collector back: passes make many objects that live, and it would visit each again."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def roomy(function: Callable[P, R]) -> Callable[P, R]:
    """Runs a function on a large piece of the frame stack of its own.

    CPython keeps the frames of Python functions in chunks of 16 KiB. A chunk comes from the system when a
    call crosses the end of the last one, and goes back when that call returns; a loop that happens to sit
    on an end pays two system calls and a page fault for each call in it. Capturing a graph of 32 layers did
    so 57,000 times, half of its time. A frame that does not fit gets a chunk of its own size, and what it
    calls has the room that is left there.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return function(*args, **kwargs)

    code: CodeType = call.__code__  # type: ignore[attr-defined]
    call.__code__ = code.replace(co_stacksize=_ROOM)  # type: ignore[attr-defined]
    return call
