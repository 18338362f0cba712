"""Measures in several processes: all may compile at the same time, one at a time has the device."""

import gc
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import torch
from filelock import BaseFileLock, FileLock

Key = TypeVar("Key")
Found = TypeVar("Found")


@dataclass(frozen=True)
class Turn:
    """The right to use a device, which processes that name the same path have one after the other.

    Without a path it is always one's turn. Who has the turn may take it again; what was taken twice is given
    back at once.
    """

    path: Path | None = None

    def take(self) -> None:
        """Waits until no other process has the turn."""
        if self.path and not self.held:
            lock(self.path).acquire()

    def give(self) -> None:
        """Lets the next process go on, once the device has done what this one asked for."""
        if not self.path:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        lock(self.path).release(force=True)

    @property
    def held(self) -> bool:
        """Whether this process has the turn."""
        return not self.path or lock(self.path).is_locked


@cache
def lock(path: Path) -> BaseFileLock:
    """Gives this process' one lock of a path; a turn that is sent to a process finds it again."""
    return FileLock(path)


@contextmanager
def one_turn() -> Iterator[Turn]:
    """Yields a turn for processes to share, of which nothing is left afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        yield Turn(Path(folder) / "turn")


def beside(
    work: Mapping[Key, int],
    run: Callable[[Key], Found],
    *,
    processes: int,
    room: float,
    more: Callable[[], bool] = lambda: True,
) -> Iterator[tuple[Key, Found]]:
    """Runs work in processes and yields what was found, in the order in which it ends.

    They share the cores for what Inductor compiles in parallel, unless TORCHINDUCTOR_COMPILE_THREADS is set.

    Args:
        work: what to run, with the bytes of memory that each needs.
        run: runs one; picklable.
        processes: how many at once, at most.
        room: bytes that all which run at once may need. What needs more runs alone.
        more: asked before anything is begun; after a False nothing is begun any more.

    Raises:
        BrokenProcessPool: a process has died.
    """
    # What this process has reserved is room for the others.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, cores // processes)))
    waiting = dict(work)
    running: dict[Future[Found], Key] = {}

    def fits(key: Key) -> bool:
        taken = sum(work[other] for other in running.values())
        return not running or (len(running) < processes and taken + work[key] <= room)

    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        while waiting or running:
            for key in [*waiting]:
                if fits(key) and more():
                    del waiting[key]
                    running[pool.submit(run, key)] = key
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
