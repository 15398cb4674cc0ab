"""Progress of an evaluation: a bar for each engine at work, with the rows done of the rows given."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from pyro_vae.evidence.cascade import LEVELS
from pyro_vae.posterior.engine import Engine


def on_stderr(*, show: bool = True) -> Progress:
    """Bars on stderr; none unless `show`, nor where that is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not (show and sys.stderr.isatty()))


class Bars:
    """The bars of one `evidence.log_evidence`, and of what follows it.

    The cascade reports a level once a block of it is done, and no level that no row needs. So the bar of the next level
    waits, its total unknown, from the moment that the level before it has ended.

    Args:
        progress: where they are shown.
        method: its name; None for the cascade.
        num_rows: N.
    """

    def __init__(self, progress: Progress, method: str | None, num_rows: int) -> None:
        self.progress = progress
        names = [_named(level.engine) for level in LEVELS] if method is None else [method]
        self.next = iter(names[1:])
        self.begin(names[0], num_rows)

    def begin(self, name: str, total: int | None) -> None:
        """A bar without a row done; it waves where the total is not known."""
        self.task: TaskID | None = self.progress.add_task(name, total=total)
        self.done = 0

    def on_block(self, _: str, done: int, given: int) -> None:
        """See `evidence.log_evidence`; its levels come one after the other."""
        if self.task is None:
            return
        self.progress.update(self.task, completed=done, total=given)
        self.done = done
        if done == given:
            self.task = None
            if (name := next(self.next, None)) is not None:
                self.begin(name, None)

    def close(self, *, filled: bool = True) -> None:
        """The bar at work ends, filled or as far as it came; one with nothing done is taken away."""
        if self.task is None:
            return
        total = next(task.total for task in self.progress.tasks if task.id == self.task) or 1
        if filled:
            self.progress.update(self.task, total=total, completed=total)
        elif self.done == 0:
            self.progress.remove_task(self.task)
        else:
            self.progress.stop_task(self.task)
        self.task = None


def _named(engine: Engine) -> str:
    """Such as laplace, 16 starts."""
    starts = getattr(engine, "num_starts", None)
    return engine.name if starts is None else f"{engine.name}, {starts} starts"
