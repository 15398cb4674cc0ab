"""The state of a fit and its loop: steps, epochs, validation, early stopping, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pyro_vae import files
from pyro_vae.learning import checkpoint as checkpoints
from pyro_vae.learning.batches import Batches
from pyro_vae.learning.engine import Compile, Engine
from pyro_vae.learning.history import History
from pyro_vae.learning.precision import Precision
from pyro_vae.learning.progress import Display, Scalars
from pyro_vae.learning.signals import Stop, noted
from pyro_vae.learning.steps import Stepper, explain
from pyro_vae.learning.updates import Spent, Update
from pyro_vae.learning.validation import mean_kl, precision_gap, true_elbo
from pyro_vae.program import Program
from pyro_vae.rows import Rows
from pyro_vae.seeds import kept, reseed

Callback = Callable[[int, History], bool | None]

TRAIN, ORDER = 0, 2
"""Sub-streams of a fit's random numbers; `validation` has the others."""


@dataclass
class Position:
    """Where a run is; all of it goes into the checkpoint.

    Attributes:
        epoch: epochs finished.
        batch: batches finished of the epoch that has begun.
        loss: sum over the rows of these batches.
        elbo: likewise.
        rows: how many rows these were.
        best: the best validation ELBO.
        stale: epochs since.
        seconds: spent.
    """

    epoch: int = 0
    batch: int = 0
    loss: float = 0.0
    elbo: float = 0.0
    rows: int = 0
    best: float = -math.inf
    stale: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class _Run:
    """What one call of `run` has around its steps.

    Attributes:
        total: steps to the last epoch.
        stop: whether a signal came.
        display: the progress bar.
        watched: whether callbacks run between epochs, which may change the program.
    """

    total: int
    stop: Stop
    display: Display
    watched: bool


@dataclass
class Training:
    """One fit: its parts, and the loop over them. See `fit` for the meaning of each."""

    program: Program
    leaves: dict[str, Tensor]
    batches: Batches
    valid: Batches | None
    objective: Any
    optimiser: Optimizer
    schedule: LRScheduler | None
    seed: int
    clip_norm: float | None
    patience: int | None
    checkpoint: Path | None
    compile: Compile = "auto"
    precision: str = "full"
    position: Position = field(default_factory=Position)
    history: History = field(default_factory=History)
    best: dict[str, Tensor] = field(default_factory=dict)

    def run(
        self, epochs: int, *, callbacks: Sequence[Callback], log_dir: str | Path | None, progress: bool | None
    ) -> History:
        """Go on from where the checkpoint is, to the last epoch."""
        precision = Precision(self.precision, self.batches.device)
        stepper = Stepper(self.program, self.objective, self.leaves, self.batches.first(2), precision)
        update = Update(stepper.leaves, self.optimiser, self.clip_norm)
        whole = min(self.batches.batch_size, self.batches.num_rows)
        engine = Engine(stepper, update, self.compile, whole, self._usable)
        self._resume()
        total = epochs * self.batches.num_batches
        with (
            closing(Scalars(log_dir)) as scalars,
            noted(active=self.checkpoint is not None) as stop,
            Display(total, show=progress) as display,
        ):
            run = _Run(total, stop, display, watched=bool(callbacks))
            while self.position.epoch < epochs and not self.history.stopped:
                self._epoch(engine, run)
                scalars.epoch(self.history)
                if self.valid is not None:
                    display.validated(self.history.valid_elbo[-1])
                if any([callback(self.position.epoch, self.history) for callback in callbacks]):
                    self.history.stopped = "stopped by a callback"
                self._save()
                stop.leave()
        if self.best:
            self._put("best", self.best)
        judged = self.batches if self.valid is None else self.valid
        self.history.kl = mean_kl(self.program, judged, self.seed)
        self.history.precision_gap = precision_gap(self.program, judged, self.seed, precision)
        return self.history

    def _epoch(self, engine: Engine, run: _Run) -> None:
        position, started = self.position, time.perf_counter() - self.position.seconds
        order = self.batches.order((self.seed, ORDER), position.epoch)
        unread = 0
        with kept(self.batches.device):
            while position.batch < self.batches.num_batches:
                self._step(engine, order, run)
                position.batch, unread = position.batch + 1, unread + 1
                stopping = run.stop.signal is not None
                if unread == engine.interval or position.batch == self.batches.num_batches or stopping:
                    self._count(engine.read(), unread)
                    unread = 0
                    position.seconds = time.perf_counter() - started
                    done = position.epoch * self.batches.num_batches + position.batch
                    run.display.step(done, position.epoch + 1, position.elbo / position.rows)
                if stopping:
                    self._require_finite()
                    self._save()
                    run.stop.leave()
        self._finish_epoch()
        position.seconds = time.perf_counter() - started
        self.history.seconds.append(position.seconds)

    def _step(self, engine: Engine, order: Tensor, run: _Run) -> None:
        """One gradient step, with the draws of its own key."""
        position = self.position
        steps_taken = position.epoch * self.batches.num_batches + position.batch
        rows = self._rows(order, position.batch)
        if engine.pays(steps_taken, run.total - steps_taken, before=self.history.compiled_from is not None):
            run.display.say("compiling the step")
            engine.capture(rows, steps_taken)
            if engine.compiled and self.history.compiled_from is None:
                self.history.compiled_from = steps_taken
        elif position.batch == 0:
            engine.check(rows, steps_taken, now=run.watched)
        self.history.why_eager = engine.why_eager
        try:
            engine.take(rows, steps_taken)
        except ValueError as error:
            if len(rows[0]) == 1 and "more than 1 value per channel" in str(error):
                raise ValueError(
                    f"The last batch has one row, which BatchNorm cannot take: {self.batches.num_rows} rows leave one "
                    f"over with batch_size={self.batches.batch_size}, choose another."
                ) from error
            # Pyro's validation refuses a NaN parameter before there is a loss; other mistakes are told as they are.
            if found := self._not_finite(order):
                raise FloatingPointError(self._where(found)) from error
            raise

    def _rows(self, order: Tensor, batch: int) -> Rows:
        """The rows of a batch of this epoch, and the random state that its step goes on with."""
        reseed(self.seed, self.batches.device, TRAIN, self.position.epoch, batch)
        return self.batches.at(order, batch)

    def _count(self, spent: Spent, steps: int) -> None:
        """Add to this epoch's sums what the last `steps` steps came to."""
        position = self.position
        position.loss += spent.loss
        position.elbo += spent.elbo
        position.rows += spent.rows
        if spent.failed:
            position.batch -= steps - spent.steps
            order = self.batches.order((self.seed, ORDER), position.epoch)
            raise FloatingPointError(self._where(self._not_finite(order) or "the loss is not finite"))

    def _not_finite(self, order: Tensor) -> str | None:
        """Where the failing batch is not finite, met again with the same draws."""
        return explain(self.program, self._rows(order, self.position.batch))

    def _where(self, what: str) -> str:
        kept = "" if self.checkpoint is None else f" {self.checkpoint} keeps the last good state."
        return (
            f"Epoch {self.position.epoch + 1}, batch {self.position.batch + 1}: {what}. "
            f"Try a smaller lr, clip_norm=, or look at the rows.{kept}"
        )

    def _require_finite(self) -> None:
        """Nothing that is broken goes into a checkpoint."""
        if broken := checkpoints.first_not_finite(self.leaves):
            self.position.batch -= 1  # the step that broke it
            raise FloatingPointError(self._where(f"parameter {broken!r} is not finite after the step"))

    def _finish_epoch(self) -> None:
        position, history = self.position, self.history
        self._require_finite()
        position.epoch += 1
        history.epoch.append(position.epoch)
        history.loss.append(position.loss / position.rows)
        history.elbo.append(position.elbo / position.rows)
        history.learning_rate.append(float(self.optimiser.param_groups[0]["lr"]))
        position.batch, position.loss, position.elbo, position.rows = 0, 0.0, 0.0, 0
        if self.valid is not None:
            history.valid_elbo.append(true_elbo(self.program, self.valid, self.seed))
            self._judge(history.valid_elbo[-1])
        if isinstance(self.schedule, ReduceLROnPlateau):
            self.schedule.step((history.valid_elbo or history.elbo)[-1])
        elif self.schedule is not None:
            self.schedule.step()

    def _usable(self) -> bool:
        """Whether the training rows lie inside the support; a VAE has looked at them before the first step."""
        if hasattr(self.program, "check_training"):
            return True
        whole = self.batches.tensors if self.batches.transform is None else None
        return bool(self.program.usable_rows(whole if whole is not None else self.batches.spread(1024))[0].all())

    def _judge(self, valid_elbo: float) -> None:
        if self.patience is None:
            return
        if valid_elbo > self.position.best:
            self.position.best, self.position.stale = valid_elbo, 0
            self.best = {name: value.detach().clone() for name, value in self._everything().items()}
        else:
            self.position.stale += 1
            if self.position.stale >= self.patience:
                self.history.stopped = f"no better validation ELBO for {self.patience} epochs"

    def _everything(self) -> dict[str, Tensor]:
        """Leaves and buffers by name, as they are now."""
        return {f"parameter/{n}": t for n, t in self.leaves.items()} | {
            f"buffer/{at}.{name}": buffer
            for at, module in self.program.modules_found().items()
            for name, buffer in module.named_buffers()
        }

    def _put(self, what: str, values: dict[str, Tensor]) -> None:
        files.copy_into(self._everything(), values, Path(what))

    def _settings(self) -> dict[str, Any]:
        name, defaults = checkpoints.name_of, {k: v for k, v in self.optimiser.defaults.items() if k != "lr"}
        return {
            "train": self.batches.fingerprint(),
            "valid": None if self.valid is None else self.valid.fingerprint(),
            "batch_size": self.batches.batch_size,
            "transform": name(self.batches.transform),
            "objective": name(self.objective),
            "optimiser": f"{name(type(self.optimiser))}({name(defaults)})",
            "lr": [group.get("initial_lr", group["lr"]) for group in self.optimiser.param_groups],
            "schedule": name(self.schedule),
            "clip_norm": self.clip_norm,
            "patience": self.patience,
            "seed": self.seed,
            "precision": None if self.precision == "full" else self.precision,
            "parameters": {name: list(leaf.shape) for name, leaf in self.leaves.items()},
            "modules": {at: " ".join(repr(m).split()) for at, m in self.program.modules_found().items()},
        }

    def _save(self) -> None:
        if self.checkpoint is None:
            return
        groups: dict[str, dict[str, Tensor]] = {"parameter": {}, "buffer": {}, "best": self.best}
        for name, value in self._everything().items():
            group, _, rest = name.partition("/")
            groups[group][rest] = value
        state = {"position": vars(self.position), "history": self.history.to_dict()}
        checkpoints.write(self.checkpoint, self._begun_with, state, groups, self.optimiser, self.schedule)

    def _resume(self) -> None:
        """Take everything from the checkpoint, if there is one of the same settings."""
        if self.checkpoint is None:
            return
        self._begun_with = self._settings()
        checkpoints.tidy(self.checkpoint)
        found = checkpoints.read(self.checkpoint)
        if found is None:
            self._save()
            return
        header, groups = found
        checkpoints.require_same(self.checkpoint, header["settings"], self._begun_with)
        tensors = {f"{group}/{n}": t for group in ("parameter", "buffer") for n, t in groups[group].items()}
        files.copy_into(self._everything(), tensors, self.checkpoint)
        checkpoints.restore_optimiser(self.optimiser, self.schedule, header, groups["optimiser"])
        self.best = groups["best"]
        self.position = Position(**header["state"]["position"])
        self.history = History(**header["state"]["history"])
