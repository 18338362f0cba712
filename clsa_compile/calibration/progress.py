"""Progress: a bar a stage, with the time that is left."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from rich import progress
from rich.console import Console

__all__ = ["Progress"]


class Progress:
    """A context that shows bars on standard error, or nothing."""

    def __init__(self, shown: bool) -> None:
        self._bars = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(),
            progress.TimeElapsedColumn(),
            console=Console(stderr=True),
            disable=not shown,
        )

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def stage(self, name: str, steps: int | None) -> Callable[[], None]:
        """Adds a bar of so many steps, or of an unknown number; the function returned counts one."""
        task = self._bars.add_task(name, total=steps)
        return lambda: self._bars.advance(task)
