"""The loop of Monte Carlo EM: batches, epochs, validation, checkpoints.

An epoch visits every batch of rows once: an E-step on that batch, then gradient steps on its particles. Parameters thus
move within the epoch, as in incremental EM (Neal & Hinton 1998, "A view of the EM algorithm that justifies incremental,
sparse, and other variants"), and a batch's particles are held while it is worked on and no longer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pyro_vae import files
from pyro_vae.em.maximising import MStep
from pyro_vae.em.record import EMHistory, Sums
from pyro_vae.em.weighing import EStep
from pyro_vae.learning import checkpoint as checkpoints
from pyro_vae.learning.batches import Batches
from pyro_vae.learning.progress import Display
from pyro_vae.learning.signals import Stop, noted
from pyro_vae.program import Program
from pyro_vae.rows import Rows
from pyro_vae.seeds import derive, seeded

Callback = Callable[[int, EMHistory], bool | None]

ROWS, ORDER, WEIGHED, VALID = 0, 1, 2, 3
"""Sub-streams of a fit's random numbers."""

POINTS = "buffer/e-step.{}"
"""What the points of an E-step are called in a checkpoint, beside the buffers of modules."""


STOPPING = "em.fit stops when this batch is done, and keeps where it is; Ctrl-C again ends it at once."


@dataclass
class Training:
    """One fit by Monte Carlo EM: its parts, where it is, and the loop. See `monte_carlo.fit` for the meaning of each.

    Attributes:
        estep: of the training rows, with the points that they begin at.
        mstep: moves the parameters.
        leaves: those that move, by name.
        optimiser: of these.
        schedule: of its learning rate, or None.
        batches: the training rows.
        valid: validation rows and their E-step, or None.
        seed: of order and draws.
        checkpoint: folder, or None.
        settings: what a resumed run must agree on, as text.
        epoch: epochs finished.
        batch: batches finished of the epoch that has begun.
        seconds: spent.
        sums: over these batches.
        history: what the run went through.
    """

    program: Program
    estep: EStep
    mstep: MStep
    leaves: dict[str, Tensor]
    optimiser: Optimizer
    schedule: LRScheduler | None
    batches: Batches
    valid: tuple[Batches, EStep] | None
    seed: int
    checkpoint: Path | None
    settings: dict[str, Any]
    epoch: int = 0
    batch: int = 0
    seconds: float = 0.0
    sums: Sums = field(default_factory=Sums)
    history: EMHistory = field(default_factory=EMHistory)

    def run(self, epochs: int, *, callbacks: Sequence[Callback], progress: bool | None) -> EMHistory:
        """Go on from where the checkpoint is, to the last epoch."""
        self._resume()
        total = epochs * self.batches.num_batches
        with (
            noted(active=self.checkpoint is not None, reply=STOPPING) as stop,
            Display(total, show=progress, name="log p(x)") as display,
        ):
            while self.epoch < epochs and not self.history.stopped:
                self._epoch(stop, display)
                if any([callback(self.epoch, self.history) for callback in callbacks]):
                    self.history.stopped = "stopped by a callback"
                self._save()
                stop.leave()
        return self.history

    def _epoch(self, stop: Stop, display: Display) -> None:
        """The batches that are left of an epoch, and what comes at its end."""
        started = time.perf_counter() - self.seconds
        order = self.batches.order((self.seed, ORDER), self.epoch)
        while self.batch < self.batches.num_batches:
            index = order[self.batch * self.batches.batch_size :][: self.batches.batch_size]
            self._step(self._rows(self.batches, order, self.batch, ROWS, self.epoch), index)
            self.batch += 1
            self.seconds = time.perf_counter() - started
            done = self.epoch * self.batches.num_batches + self.batch
            display.step(done, self.epoch + 1, self.sums.mean)
            if stop.signal is not None:
                self._save()
                stop.leave()
        self._finish(display)
        self.seconds = time.perf_counter() - started
        self.history.seconds.append(self.seconds)

    def _step(self, rows: Rows, index: Tensor) -> None:
        """E-step and M-step of one batch."""
        parts, estimate = self.estep(rows, index, derive(self.seed, WEIGHED, self.epoch, self.batch))
        if not parts:
            raise FloatingPointError(self._where(f"no row has a particle of finite density ({estimate.reasons[0]})"))
        values = self.mstep(parts)
        if not math.isfinite(values[-1]):
            raise FloatingPointError(self._where(f"the expected log-likelihood is {values[-1]} in M-step {len(values)}"))
        if broken := checkpoints.first_not_finite(self.leaves):
            raise FloatingPointError(self._where(f"parameter {broken!r} is not finite after the M-step"))
        # A gradient costs a pass forwards and one backwards for each particle.
        self.sums.add(estimate, evaluations=2 * self.estep.num_particles * self.mstep.num_steps)

    def _rows(self, batches: Batches, order: Tensor, batch: int, *key: int) -> Rows:
        """The rows of a batch, transformed with draws of its own."""
        with seeded(self.seed, batches.device, *key, batch):
            return batches.at(order, batch)

    def _finish(self, display: Display) -> None:
        """The end of an epoch: validation, history, learning rate."""
        valid = self._validated()
        self.history.note(self.sums, valid, float(self.optimiser.param_groups[0]["lr"]))
        self.epoch, self.batch, self.sums = self.epoch + 1, 0, Sums()
        if valid is not None:
            display.validated(valid.mean)
        if isinstance(self.schedule, ReduceLROnPlateau):
            self.schedule.step((self.history.valid_log_p or self.history.log_p)[-1])
        elif self.schedule is not None:
            self.schedule.step()

    def _validated(self) -> Sums | None:
        """The validation rows weighed, with the same draws each time."""
        if self.valid is None:
            return None
        batches, estep = self.valid
        sums, order = Sums(), torch.arange(batches.num_rows)
        for batch in range(batches.num_batches):
            rows = self._rows(batches, order, batch, VALID, ROWS)
            index = order[batch * batches.batch_size :][: batches.batch_size]
            sums.add(estep(rows, index, derive(self.seed, VALID, WEIGHED, batch))[1])
        return sums

    def _where(self, what: str) -> str:
        kept_at = "" if self.checkpoint is None else f" {self.checkpoint} keeps the last good state."
        return (
            f"Epoch {self.epoch + 1}, batch {self.batch + 1}: {what}. "
            f"Try a smaller lr, clip_norm=, or look at the rows.{kept_at}"
        )

    def _everything(self) -> dict[str, Tensor]:
        """Every tensor that changes, by its name in the checkpoint."""
        buffers = {
            f"buffer/{at}.{name}": buffer
            for at, module in self.program.modules_found().items()
            for name, buffer in module.named_buffers()
        }
        points = {POINTS.format("train"): self.estep.points}
        if self.valid is not None:
            points[POINTS.format("valid")] = self.valid[1].points
        return {f"parameter/{name}": leaf for name, leaf in self.leaves.items()} | buffers | points

    def _save(self) -> None:
        if self.checkpoint is None:
            return
        groups: dict[str, dict[str, Tensor]] = {"parameter": {}, "buffer": {}}
        for name, value in self._everything().items():
            group, _, rest = name.partition("/")
            groups[group][rest] = value
        state = {
            "position": {"epoch": self.epoch, "batch": self.batch, "seconds": self.seconds},
            "sums": asdict(self.sums),
            "history": self.history.to_dict(),
        }
        checkpoints.write(self.checkpoint, self.settings, state, groups, self.optimiser, self.schedule)

    def _resume(self) -> None:
        """Take everything from the checkpoint, if there is one of the same settings; begin one where there is none."""
        if self.checkpoint is None:
            return
        checkpoints.tidy(self.checkpoint)
        found = checkpoints.read(self.checkpoint)
        if found is None:
            return self._save()
        header, groups = found
        checkpoints.require_same(self.checkpoint, header["settings"], self.settings)
        tensors = {f"{group}/{n}": t for group in ("parameter", "buffer") for n, t in groups[group].items()}
        files.copy_into(self._everything(), tensors, self.checkpoint)
        checkpoints.restore_optimiser(self.optimiser, self.schedule, header, groups["optimiser"])
        state = header["state"]
        self.epoch, self.batch, self.seconds = (state["position"][name] for name in ("epoch", "batch", "seconds"))
        self.sums, self.history = Sums(**state["sums"]), EMHistory(**state["history"])
        return None
