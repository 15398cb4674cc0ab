"""The state of a fit and its loop: steps, epochs, validation, early stopping, checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pyro_vae.graph import Compile
from pyro_vae.learning import checkpoint as checkpoints
from pyro_vae.learning.batches import Batches
from pyro_vae.learning.engine import Engine
from pyro_vae.learning.history import History
from pyro_vae.learning.precision import Precision
from pyro_vae.learning.progress import Display, Scalars
from pyro_vae.learning.signals import Stop, noted
from pyro_vae.learning.state import State
from pyro_vae.learning.steps import Stepper, explain
from pyro_vae.learning.updates import Spent, Update
from pyro_vae.learning.validation import mean_kl, precision_gap, true_elbo
from pyro_vae.rows import Rows
from pyro_vae.seeds import derive, kept, start
from pyro_vae.team import ALONE, Team

Callback = Callable[[int, History], bool | None]

TRAIN, ORDER = 0, 2
"""Sub-streams of a fit's random numbers; `validation` has the others."""


@dataclass(frozen=True)
class _Run:
    """What one call of `run` has around its steps.

    Attributes:
        engine: takes the steps.
        update: what it does with the gradients.
        total: steps to the last epoch.
        display: the progress bar.
        callbacks: run between epochs, and may change the program.
    """

    engine: Engine
    update: Update
    total: int
    display: Display
    callbacks: Sequence[Callback]

    @property
    def stop(self) -> Stop:
        """Whether a signal came."""
        return self.update.stop


@dataclass(frozen=True)
class _Plan:
    """What an epoch goes by.

    Attributes:
        order: of the rows, (N,).
        seeds: of the draws of each batch. All at once: between steps, which empty the processor's caches, one takes long.
    """

    order: Tensor
    seeds: Sequence[int]


@dataclass
class Training:
    """One fit: its parts, and the loop over them. See `fit` for the meaning of each.

    On a team every rank runs the loop: on its own part of each batch, with its own noise, on validation batches of its own.
    What is decided is decided by numbers that all ranks have: they take the same steps and end alike.
    """

    state: State
    batches: Batches
    valid: Batches | None
    objective: Any
    seed: int
    clip_norm: float | None
    patience: int | None
    checkpoint: Path | None
    compile: Compile = "auto"
    precision: str = "full"
    team: Team = ALONE

    def run(
        self, epochs: int, *, callbacks: Sequence[Callback], log_dir: str | Path | None, progress: bool | None
    ) -> History:
        """Go on from where the checkpoint is, to the last epoch."""
        state, program = self.state, self.state.program
        precision = Precision(self.precision, self.batches.device)
        stepper = Stepper(program, self.objective, state.leaves, self.batches.first(2), precision)
        self._resume(epochs)
        total = epochs * self.batches.num_batches
        with (
            closing(Scalars(log_dir if self.team.leads else None)) as scalars,
            noted(active=self.checkpoint is not None, alone=self.team.size == 1) as stop,
            Display(total, show=progress if self.team.leads else False) as display,
        ):
            update = Update(stepper.leaves, state.optimiser, self.clip_norm, self.team, stop)
            engine = Engine(stepper, update, self.compile, self._whole, self._usable, state.history.why_eager)
            run = _Run(engine, update, total, display, callbacks)
            while state.position.epoch < epochs and not state.history.stopped:
                self._epoch(run)
                scalars.epoch(state.history)
                self._agree(run)
                self._save()
                stop.leave()
        state.restore_best()
        judged = self.batches if self.valid is None else self.valid
        state.history.kl = mean_kl(program, judged, self.seed)
        state.history.precision_gap = precision_gap(program, judged, self.seed, precision)
        return state.history

    @cached_property
    def _whole(self) -> int:
        """Rows that this rank has of a whole batch."""
        part = self.team.part(min(self.batches.batch_size, self.batches.num_rows))
        return part.stop - part.start

    def _epoch(self, run: _Run) -> None:
        """The steps that are left of an epoch, and what comes at its end."""
        position, started = self.state.position, time.perf_counter() - self.state.position.seconds
        plan, unread = self._plan(), 0
        with kept(self.batches.device):
            while position.batch < self.batches.num_batches:
                self._step(plan, run)
                position.batch, unread = position.batch + 1, unread + 1
                asked = run.stop.signal is not None
                # All ranks look after each step: they may take steps in different ways, and must end at the same one.
                due = unread == (run.engine.interval if self.team.size == 1 else 1)
                if due or position.batch == self.batches.num_batches or asked:
                    self._count(run.engine.read(), unread)
                    unread = 0
                    position.seconds = time.perf_counter() - started
                    done = position.epoch * self.batches.num_batches + position.batch
                    run.display.step(done, position.epoch + 1, position.elbo / position.rows)
                    if run.update.heed() or asked:
                        self._require_finite()
                        self.state.level(self.team)
                        self._save()
                        run.stop.leave()
        self._finish_epoch()
        if self.valid is not None:
            run.display.validated(self.state.history.valid_elbo[-1])
        position.seconds = time.perf_counter() - started
        self.state.history.seconds.append(position.seconds)

    def _agree(self, run: _Run) -> None:
        """Ask the callbacks, and let all ranks know of their votes, of signals and of rank 0's clock."""
        position, history = self.state.position, self.state.history
        vote = any([callback(position.epoch, history) for callback in run.callbacks])
        told = [float(vote), *run.stop.flags(), position.seconds if self.team.leads else 0.0]
        sums = self.team.add(torch.tensor(told, dtype=torch.float64, device=self.batches.device))
        votes, *flags, seconds = sums.tolist()
        if votes:
            history.stopped = "stopped by a callback"
        run.stop.heed(flags)
        position.seconds = history.seconds[-1] = seconds

    def _plan(self) -> _Plan:
        epoch, batches = self.state.position.epoch, self.batches
        seeds = [derive(self.seed, TRAIN, epoch, batch, *self.team.key) for batch in range(batches.num_batches)]
        return _Plan(batches.order((self.seed, ORDER), epoch), seeds)

    def _step(self, plan: _Plan, run: _Run) -> None:
        """One gradient step, with the draws of its own key; the other ranks hear of it if it fails here."""
        sent = run.update.sent
        try:
            rows = self._rows(plan)
            self._compile(rows, run)
            self._take(rows, plan, run)
        except Exception:
            if run.update.sent == sent:
                run.update.withdraw()
            raise

    def _compile(self, rows: Rows, run: _Run) -> None:
        """Go over to a graph if it is time, or look whether it still does what the eager step does."""
        position, history, engine = self.state.position, self.state.history, run.engine
        steps_taken = self._steps_taken
        if len(rows[0]) != self._whole:
            return
        if engine.pays(steps_taken, run.total - steps_taken, before=history.compiled_from is not None):
            run.display.say("compiling the step")
            engine.capture(rows, steps_taken)
            if engine.compiled and history.compiled_from is None:
                history.compiled_from = steps_taken
        elif position.batch == 0:
            engine.check(rows, steps_taken, now=bool(run.callbacks))
        history.why_eager = engine.why_eager

    def _take(self, rows: Rows, plan: _Plan, run: _Run) -> None:
        """One step of the engine, its errors told in the run's words."""
        try:
            run.engine.take(rows, self._steps_taken)
        except ValueError as error:
            if len(rows[0]) == 1 and "more than 1 value per channel" in str(error):
                ranks = f" to one of {self.team.size} ranks" if self.team.size > 1 else ""
                raise ValueError(
                    f"The last batch has one row, which BatchNorm cannot take: {self.batches.num_rows} rows leave one "
                    f"over{ranks} with batch_size={self.batches.batch_size}, choose another."
                ) from error
            # Pyro's validation refuses a NaN parameter before there is a loss; other mistakes are told as they are.
            if found := self._not_finite(plan):
                raise FloatingPointError(self._where(found)) from error
            raise

    @property
    def _steps_taken(self) -> int:
        return self.state.position.epoch * self.batches.num_batches + self.state.position.batch

    def _rows(self, plan: _Plan) -> Rows:
        """This rank's rows of the batch that is next, and the random state that its step goes on with."""
        batch = self.state.position.batch
        start(plan.seeds[batch], self.batches.device)
        return self.batches.at(plan.order, batch, self.team)

    def _count(self, spent: Spent, steps: int) -> None:
        """Add to this epoch's sums what the last `steps` steps came to."""
        position = self.state.position
        position.loss += spent.loss
        position.elbo += spent.elbo
        position.rows += spent.rows
        if spent.failed:
            position.batch -= steps - spent.steps
            elsewhere = " in the rows of another rank, whose message says more" if self.team.size > 1 else ""
            raise FloatingPointError(self._where(self._not_finite(self._plan()) or f"the loss is not finite{elsewhere}"))

    def _not_finite(self, plan: _Plan) -> str | None:
        """Where the failing batch is not finite, met again with the same draws."""
        rows = self._rows(plan)
        return explain(self.state.program, rows) if len(rows[0]) else None

    def _where(self, what: str) -> str:
        kept = "" if self.checkpoint is None else f" {self.checkpoint} keeps the last good state."
        return (
            f"Epoch {self.state.position.epoch + 1}, batch {self.state.position.batch + 1}: {what}. "
            f"Try a smaller lr, clip_norm=, or look at the rows.{kept}"
        )

    def _require_finite(self) -> None:
        """Nothing that is broken goes into a checkpoint."""
        if broken := checkpoints.first_not_finite(self.state.leaves):
            self.state.position.batch -= 1  # the step that broke it
            raise FloatingPointError(self._where(f"parameter {broken!r} is not finite after the step"))

    def _finish_epoch(self) -> None:
        position, history, schedule = self.state.position, self.state.history, self.state.schedule
        self._require_finite()
        self.state.level(self.team)
        position.epoch += 1
        history.epoch.append(position.epoch)
        history.loss.append(position.loss / position.rows)
        history.elbo.append(position.elbo / position.rows)
        history.learning_rate.append(float(self.state.optimiser.param_groups[0]["lr"]))
        position.batch, position.loss, position.elbo, position.rows = 0, 0.0, 0.0, 0
        if self.valid is not None:
            history.valid_elbo.append(true_elbo(self.state.program, self.valid, self.seed, self.team))
            self._judge(history.valid_elbo[-1])
        if isinstance(schedule, ReduceLROnPlateau):
            schedule.step((history.valid_elbo or history.elbo)[-1])
        elif schedule is not None:
            schedule.step()

    def _usable(self) -> bool:
        """Whether the training rows lie inside the support; a VAE has looked at them before the first step."""
        program = self.state.program
        if hasattr(program, "check_training"):
            return True
        whole = self.batches.tensors if self.batches.transform is None else None
        return bool(program.usable_rows(whole if whole is not None else self.batches.spread(1024))[0].all())

    def _judge(self, valid_elbo: float) -> None:
        position = self.state.position
        if self.patience is None:
            return
        if valid_elbo > position.best:
            position.best, position.stale = valid_elbo, 0
            self.state.keep_best()
        else:
            position.stale += 1
            if position.stale >= self.patience:
                self.state.history.stopped = f"no better validation ELBO for {self.patience} epochs"

    def _settings(self) -> dict[str, Any]:
        name, optimiser = checkpoints.name_of, self.state.optimiser
        defaults = {k: v for k, v in optimiser.defaults.items() if k != "lr"}
        return {
            "train": self.batches.fingerprint(),
            "valid": None if self.valid is None else self.valid.fingerprint(),
            "batch_size": self.batches.batch_size,
            "transform": name(self.batches.transform),
            "objective": name(self.objective),
            "optimiser": f"{name(type(optimiser))}({name(defaults)})",
            "lr": [group.get("initial_lr", group["lr"]) for group in optimiser.param_groups],
            "schedule": name(self.state.schedule),
            "clip_norm": self.clip_norm,
            "patience": self.patience,
            "seed": self.seed,
            "precision": None if self.precision == "full" else self.precision,
            "parameters": {name: list(leaf.shape) for name, leaf in self.state.leaves.items()},
            "modules": {at: " ".join(repr(m).split()) for at, m in self.state.program.modules_found().items()},
        }

    def _save(self) -> None:
        if self.checkpoint is not None and self.team.leads:
            self.state.write(self.checkpoint, self._begun_with)

    def _resume(self, epochs: int) -> None:
        """Take everything from the checkpoint, if there is one of the same settings; all ranks then stand at one place."""
        if self.checkpoint is None and self.team.size == 1:
            return
        self._begun_with = self._settings()
        told = {**self._begun_with, "checkpoint": str(self.checkpoint), "epochs": epochs}
        self.team.require_same(told, "give all of them the same arguments; each takes its own part of every batch.")
        if self.checkpoint is not None:
            if self.team.leads:
                checkpoints.tidy(self.checkpoint)
            found = self.state.read(self.checkpoint, self._begun_with)
            # None writes before all have looked, or some would find what others did not.
            seen = {"the epoch": self.state.position.epoch, "the batch": self.state.position.batch}
            self.team.require_same(seen, f"{self.checkpoint} must be a folder that all machines share.")
            if not found:
                self._save()
        self.state.begin(self.team)
