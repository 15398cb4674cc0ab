"""What changes while a program is fitted: the state of a run, kept in a checkpoint, the same on all ranks of a team."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyro_vae import files
from pyro_vae.learning import checkpoint as checkpoints
from pyro_vae.learning.history import History
from pyro_vae.program import Program
from pyro_vae.team import Team, flat


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


@dataclass
class State:
    """Parameters, buffers, optimiser, learning rate, position and history of a run.

    Attributes:
        program: model and guide.
        leaves: the parameters, by name.
        optimiser: of these.
        schedule: of its learning rate, or None.
        position: where the run is.
        history: what it went through.
        best: parameters and buffers of the best validation ELBO; empty where none is sought.
    """

    program: Program
    leaves: dict[str, Tensor]
    optimiser: Optimizer
    schedule: LRScheduler | None
    position: Position = field(default_factory=Position)
    history: History = field(default_factory=History)
    best: dict[str, Tensor] = field(default_factory=dict)

    def keep_best(self) -> None:
        """Remember parameters and buffers as they are now."""
        self.best = {name: value.detach().clone() for name, value in self._everything().items()}

    def restore_best(self) -> None:
        """Go back to what `keep_best` remembered, if anything."""
        if self.best:
            files.copy_into(self._everything(), self.best, Path("best"))

    def write(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Write the checkpoint of `folder`.

        Raises:
            OSError: it cannot be written; the one that was there is untouched.
        """
        groups: dict[str, dict[str, Tensor]] = {"parameter": {}, "buffer": {}, "best": self.best}
        for name, value in self._everything().items():
            group, _, rest = name.partition("/")
            groups[group][rest] = value
        state = {"position": vars(self.position), "history": self.history.to_dict()}
        checkpoints.write(folder, settings, state, groups, self.optimiser, self.schedule)

    def read(self, folder: Path, settings: Mapping[str, Any]) -> bool:
        """Take everything from the checkpoint in `folder`; False where there is none yet.

        Raises:
            ValueError: it is of other settings, or damaged.
        """
        found = checkpoints.read(folder)
        if found is None:
            return False
        header, groups = found
        checkpoints.require_same(folder, header["settings"], settings)
        tensors = {f"{group}/{n}": t for group in ("parameter", "buffer") for n, t in groups[group].items()}
        files.copy_into(self._everything(), tensors, folder)
        checkpoints.restore_optimiser(self.optimiser, self.schedule, header, groups["optimiser"])
        self.best = groups["best"]
        self.position = Position(**header["state"]["position"])
        self.history = History(**header["state"]["history"])
        return True

    def begin(self, team: Team) -> None:
        """Give all ranks the parameters and buffers of rank 0."""
        _become_first(list(self._everything().values()), team)

    def level(self, team: Team) -> None:
        """Give all ranks the same buffers: the mean over the ranks of floating-point ones, rank 0's of the others.

        BatchNorm has seen other rows on each rank. The mean of running means is that of all rows; the mean of running
        variances, each unbiased for the rows' variance, is so as well. What is the same on all ranks stays so to the bit.
        """
        if team.size == 1:
            return
        buffers = list(self._buffers().values())
        own = [buffer.clone() for buffer in buffers]
        _become_first(buffers, team)
        moving = [(mine, first) for mine, first in zip(own, buffers, strict=True) if first.is_floating_point()]
        if moving:
            # Where they are equal no difference is taken: that of two infinities (a mask) would be NaN.
            apart = [torch.where(mine == first, 0.0, mine - first) for mine, first in moving]
            away = team.add(flat(apart)) / team.size
            for (_, first), mean in zip(moving, away.split([first.numel() for _, first in moving]), strict=True):
                first.add_(mean.view_as(first).to(first.dtype))

    def _everything(self) -> dict[str, Tensor]:
        """Leaves and buffers by name, as they are now."""
        return {f"parameter/{n}": t for n, t in self.leaves.items()} | self._buffers()

    def _buffers(self) -> dict[str, Tensor]:
        return {
            f"buffer/{at}.{name}": buffer
            for at, module in self.program.modules_found().items()
            for name, buffer in module.named_buffers()
        }


def _become_first(tensors: list[Tensor], team: Team) -> None:
    """Copy rank 0's values into the tensors, in place, to the bit."""
    if team.size == 1:
        return
    with torch.no_grad():
        for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
            alike = [tensor for tensor in tensors if tensor.dtype is dtype]
            values = team.same(torch.cat([tensor.detach().reshape(-1) for tensor in alike]))
            for tensor, value in zip(alike, values.split([tensor.numel() for tensor in alike]), strict=True):
                tensor.copy_(value.view_as(tensor))
