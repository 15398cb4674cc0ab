"""What happens to gradients once they are there: averaged over ranks, clipped, handed to the optimiser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

Number = TypeVar("Number", float, Tensor)


class Spent(NamedTuple):
    """What steps came to since they were last read.

    Attributes:
        loss: summed over their rows.
        elbo: likewise.
        rows: how many these were.
        steps: how many; a step whose loss or ELBO is not finite is not among them.
        failed: whether there was such a step; nothing is counted after it.
    """

    loss: float = 0.0
    elbo: float = 0.0
    rows: int = 0
    steps: int = 0
    failed: bool = False

    def plus(self, loss: float, elbo: float, rows: int) -> Spent:
        """With one more step, loss and ELBO of a mean row."""
        return Spent(self.loss + loss * rows, self.elbo + elbo * rows, self.rows + rows, self.steps + 1, self.failed)

    def and_(self, later: Spent) -> Spent:
        """Both together; `later` does not count if this failed."""
        if self.failed:
            return self
        rows, steps = self.rows + later.rows, self.steps + later.steps
        return Spent(self.loss + later.loss, self.elbo + later.elbo, rows, steps, later.failed)


class Tally:
    """`Spent`, added up where the step runs.

    Attributes:
        values: loss, ELBO, rows, steps, failures; (5,) float64.
    """

    def __init__(self, device: torch.device) -> None:
        self.values = torch.zeros(5, dtype=torch.float64, device=device)

    def add(self, loss: Tensor, elbo: Tensor, rows: int) -> Tensor:
        """Count one step, loss and ELBO of a mean row, each (); whether all is well so far, ()."""
        both = torch.stack([loss.detach(), elbo.detach()]).double()
        fine = torch.isfinite(both).all() & (self.values[4] == 0.0)
        step = torch.cat([torch.where(fine, both * rows, 0.0), fine * both.new_tensor([rows, 1.0, 0.0])])
        self.values.add_(step)
        self.values[4].add_((~fine).double())
        return fine

    def read(self) -> Spent:
        """What was counted since the last reading: the one place where the host waits for the device."""
        loss, elbo, rows, steps, failures = self.values.tolist()
        self.values.zero_()
        return Spent(loss, elbo, int(rows), int(steps), failures > 0.0)


@dataclass
class Update:
    """The step of an optimiser on the gradients in `.grad`.

    Attributes:
        leaves: the parameters.
        optimiser: of these.
        clip_norm: largest norm of the gradient, or None.
    """

    leaves: Sequence[Tensor]
    optimiser: Optimizer
    clip_norm: float | None = None

    @property
    def alone(self) -> bool:
        """Whether no other rank has a part of the gradient."""
        return True

    def over_ranks(self, loss: Number, elbo: Number, rows: int) -> tuple[Number, Number, int]:
        """Make loss, ELBO and `.grad`, all of a mean row, those of all ranks' rows; also how many these are."""
        return loss, elbo, rows

    def __call__(self) -> None:
        """Clip, and move the parameters."""
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.leaves, self.clip_norm)
        self.optimiser.step()
