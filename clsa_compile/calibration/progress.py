"""Progress: a line for the whole, and a bar for the stage that runs, with the time that is left."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import timedelta
from types import TracebackType

from rich import progress
from rich.console import Console, RenderableType

__all__ = ["Progress"]


class _Bars(progress.Progress):
    """Bars, of which a search has hundreds, under a line that says which it is and how long all took."""

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yields the line of the whole, then the bar that runs."""
        if self.tasks:
            elapsed = self.get_time() - (self.tasks[0].start_time or 0.0)
            yield f"stage {len(self.tasks)}, {timedelta(seconds=int(elapsed))} in all"
        yield self.make_tasks_table(self.tasks)


class Progress:
    """A context that shows the stage that runs on standard error, or nothing."""

    def __init__(self, shown: bool, console: Console | None = None) -> None:
        self._bars = _Bars(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(),
            progress.TimeElapsedColumn(),
            console=console or Console(stderr=True),
            disable=not shown,
        )
        self._running: progress.TaskID | None = None

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def stage(self, name: str, steps: int | None) -> Callable[[], None]:
        """Shows a bar of so many steps, or of an unknown number; the function returned counts one.

        It takes the place of the last one: a terminal with too many lines would cut off those that run.
        """
        if self._running is not None:
            self._bars.update(self._running, visible=False)
        task = self._running = self._bars.add_task(name, total=steps)
        return lambda: self._bars.advance(task)
