"""How a fit shows where it is: a progress bar on a terminal, TensorBoard scalars where they are asked for."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pyro_vae.learning.history import History


class Display:
    """A progress bar over the batches of all epochs, with the mean of a row: of its ELBO, or of log p(x).

    Args:
        total: batches in all.
        show: True, False, or None for "where the output is a terminal or a notebook".
        name: what is shown of the rows.
    """

    def __init__(self, total: int, *, show: bool | None, name: str = "ELBO") -> None:
        console = Console(stderr=True)
        # In a notebook rich draws with ipywidgets, and warns at each step where that is missing.
        notebook = console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None
        visible = ((console.is_terminal and not console.is_jupyter) or notebook) if show is None else show
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not visible,
        )
        self._task = self._bar.add_task("fit", total=total)
        self._name, self._valid = name, ""
        self._total, self._next = total, 0.0

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def step(self, done: int, epoch: int, mean: float) -> None:
        """Show that `done` batches are done and the running mean of this epoch in nats a row, ten times a second."""
        now = time.perf_counter()
        if now < self._next and done < self._total:
            return
        self._next = now + 0.1
        self._bar.update(self._task, completed=done, description=f"epoch {epoch}  {self._name} {mean:9.3f}{self._valid}")

    def say(self, what: str) -> None:
        """Show what is going on beside the steps."""
        self._bar.update(self._task, description=what)

    def validated(self, mean: float) -> None:
        """Show the latest mean of the validation rows from now on."""
        self._valid = f"  validation {mean:9.3f}"


class Scalars:
    """TensorBoard scalars, one point an epoch.

    Args:
        folder: where event files go; None writes nothing.

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self._writer: Any = None
        if folder is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError(
                    f"log_dir={str(folder)!r} needs TensorBoard: pip install 'pyro-vae[tensorboard]'."
                ) from error
            self._writer = SummaryWriter(str(folder))

    def epoch(self, history: History) -> None:
        """Write the last epoch of the history."""
        if self._writer is None:
            return
        for name in ("loss", "elbo", "valid_elbo", "learning_rate"):
            if values := getattr(history, name):
                self._writer.add_scalar(name, values[-1], history.epoch[-1])
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()
