"""What happens to gradients once they are there: averaged over ranks, clipped, handed to the optimiser.

Between ranks goes one message a step. It holds what each rank has of the gradient, loss and ELBO, each times its rows, so
that the sums over the ranks, divided by the sum of their rows, are those of a mean row of the whole batch; and which
signals came, so that all ranks stop after the same step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyro_vae.learning.signals import Stop
from pyro_vae.team import ALONE, Team, flat

_HEAD = 5
"""Numbers of a message before the parameters': loss, ELBO, rows, a flag for each signal."""


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

    def add(self, loss: Tensor, elbo: Tensor, rows: int | Tensor) -> Tensor:
        """Count one step, loss and ELBO of a mean row of `rows` many, each (); whether all is well so far, ()."""
        both = torch.stack([loss.detach(), elbo.detach()]).double()
        fine = torch.isfinite(both).all() & (self.values[4] == 0.0)
        one = fine.double()
        self.values.add_(torch.stack([*torch.where(fine, both * rows, 0.0), one * rows, one, 1.0 - one]))
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
        team: the ranks that have a part of the gradient.
        stop: which signal came.
        sent: messages so far.
    """

    leaves: Sequence[Tensor]
    optimiser: Optimizer
    clip_norm: float | None = None
    team: Team = ALONE
    stop: Stop = field(default_factory=Stop)
    sent: int = 0

    def __post_init__(self) -> None:
        """Signals that no one has looked at yet, (2,), float64, on the leaves' device."""
        self._flags = torch.zeros(2, dtype=torch.float64, device=self.leaves[0].device)

    @property
    def alone(self) -> bool:
        """Whether no other rank has a part of the gradient."""
        return self.team.size == 1

    @overload
    def over_ranks(self, loss: float, elbo: float, rows: int) -> tuple[float, float, int]: ...
    @overload
    def over_ranks(self, loss: Tensor, elbo: Tensor, rows: int) -> tuple[Tensor, Tensor, int]: ...

    def over_ranks(
        self, loss: float | Tensor, elbo: float | Tensor, rows: int
    ) -> tuple[float | Tensor, float | Tensor, int]:
        """Make loss, ELBO and `.grad`, all of a mean row, those of all ranks' rows.

        Args:
            loss: of this rank's rows; a number, or a tensor ().
            elbo: likewise.
            rows: how many these are; 0 where the batch has fewer rows than there are ranks.

        Returns:
            loss, ELBO and rows of all ranks; the rows as a tensor () where loss and ELBO are tensors.
        """
        if self.alone:
            return loss, elbo, rows
        sums = self._summed(loss, elbo, rows)
        found, most = sums / sums[2], _HEAD + len(self.leaves)
        self._take(found[most:], sums[_HEAD:most])
        if isinstance(loss, Tensor):
            return found[0], found[1], sums[2]  # type: ignore[return-value]
        loss, elbo, total = sums[:3].tolist()
        return loss / total, elbo / total, int(total)

    def _summed(self, loss: float | Tensor, elbo: float | Tensor, rows: int) -> Tensor:
        """The message: rows times loss and ELBO, rows, flags, which leaves have gradients, rows times these; the sums."""
        like = _real(self.leaves[0])
        numbers = [n.detach().to(like.dtype) if isinstance(n, Tensor) else like.new_tensor(n) for n in (loss, elbo, 1.0)]
        head = torch.stack(numbers) * rows
        has = like.new_tensor([*self.stop.flags(), *(float(leaf.grad is not None) for leaf in self.leaves)])
        gradients = [_real(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad) for leaf in self.leaves]
        self.sent += 1
        sums = self.team.add(torch.cat([flat([head, has]), flat(gradients) * rows]))
        self._flags += sums[_HEAD - 2 : _HEAD]
        return sums

    def _take(self, found: Tensor, has: Tensor) -> None:
        """The gradients of all ranks into `.grad`, which stays None where no rank has one."""
        nowhere = (has == 0.0).tolist() if any(leaf.grad is None for leaf in self.leaves) else [False] * len(self.leaves)
        sizes = [_real(leaf).numel() for leaf in self.leaves]
        for leaf, none, part in zip(self.leaves, nowhere, found.split(sizes), strict=True):
            if not none:
                gradient = part.reshape(_real(leaf).shape).to(_real(leaf).dtype)
                leaf.grad = torch.view_as_complex(gradient) if leaf.is_complex() else gradient

    def withdraw(self) -> None:
        """Tell the others, in place of a gradient, that this rank has none: their loss is then not finite."""
        for leaf in self.leaves:
            leaf.grad = None
        self.over_ranks(math.nan, math.nan, 1)

    def heed(self) -> bool:
        """Let `stop` know of signals that came to any rank of several, and whether there are such.

        The host waits for the device, as when it reads the loss.
        """
        if self.alone:
            return False
        self.stop.heed(self._flags.tolist())
        return self.stop.signal is not None

    def __call__(self) -> None:
        """Clip, and move the parameters."""
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.leaves, self.clip_norm)
        self.optimiser.step()


def _real(tensor: Tensor) -> Tensor:
    """Its numbers as real ones, dense."""
    return torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach().to_dense()
