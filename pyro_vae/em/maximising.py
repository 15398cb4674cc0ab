"""The M-step of Monte Carlo EM: gradient steps on the expected complete-data log-likelihood of weighed rows.

With particles z_ik and their shares s_ik held constant it raises, in nats a row (Wei & Tanner 1990),

    Q(theta) = (1/n) sum_i sum_k s_ik log p_theta(x_i, z_ik),

and, where the guide is fitted to the same particles, as wake-phi of reweighted wake-sleep (Bornschein & Bengio 2015,
arXiv:1406.2751, section 2.4), sum_i sum_k s_ik log q_phi(z_ik | x_i) / n besides: this lowers KL(p(z | x) || q(z | x)).
Networks are in `eval()` in both steps: the density that is raised is the one that weighed the particles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae.em.weighing import Weighed
from pyro_vae.layouts import Values
from pyro_vae.learning.updates import Update
from pyro_vae.log_joint import LogJoint
from pyro_vae.memory import gradient_rows
from pyro_vae.parameters import used_leaves
from pyro_vae.program import Program
from pyro_vae.rows import Rows
from pyro_vae.seeds import seeded


class _Piece(NamedTuple):
    """Rows whose gradient is taken at once: the densities to be raised, latents (K, n, ...) and shares (K, n)."""

    densities: tuple[LogJoint, ...]
    z: Values
    shares: Tensor

    @property
    def of_rows(self) -> Tensor:
        """The expected log-densities added up, (n,), float64, differentiable in the parameters."""
        total = sum((density.of_sites(self.z) for density in self.densities), torch.zeros_like(self.shares))
        return (self.shares * total).sum(0)


class MStep:
    """Gradient steps on weighed rows.

    Args:
        program: model and guide.
        update: what is done with gradients; its leaves are those that move.
        num_steps: gradient steps on the same particles.
        memory: byte budget of one gradient.
        fit_guide: whether log q(z | x) is raised as well.
    """

    def __init__(self, program: Program, update: Update, num_steps: int, memory: int, *, fit_guide: bool) -> None:
        self.program, self.update, self.num_steps, self.memory = program, update, num_steps, memory
        self.fit_guide = fit_guide

    def __call__(self, parts: Sequence[Weighed]) -> list[float]:
        """Move the parameters; the objective before each step, in nats a row.

        A step whose objective is not finite is not taken, and is the last.
        """
        pieces = [piece for part in parts for piece in self._pieces(part)]
        count = sum(part.shares.shape[1] for part in parts)
        values: list[float] = []
        for _ in range(self.num_steps):
            values.append(self._gradients(pieces, count))
            if not math.isfinite(values[-1]):
                break
            self.update()
        return values

    def _pieces(self, part: Weighed) -> Iterator[_Piece]:
        """The part cut so that a gradient fits the byte budget; how particles are laid out is found out once for all."""
        joint = self.program.log_joint(part.rows)
        densities = (joint, self.program.guide_density(part.rows)) if self.fit_guide else (joint,)
        like = part.rows[0].new_zeros(*part.shares.shape, joint.dim)
        everyone = torch.arange(part.shares.shape[1], device=part.shares.device)
        for index in everyone.split(gradient_rows(self.program, part.rows, like, self.memory)):
            z = {name: value[:, index] for name, value in part.z.items()}
            yield _Piece(tuple(density.take(index) for density in densities), z, part.shares[:, index])

    def _gradients(self, pieces: Sequence[_Piece], count: int) -> float:
        """Fill `.grad` with that of minus the objective of a mean row; the objective."""
        for leaf in self.update.leaves:
            leaf.grad = None
        total = 0.0
        for piece in pieces:
            with torch.enable_grad():
                value = piece.of_rows.sum() / count
            if value.requires_grad:
                (-value).backward()
            total += value.item()
        return total


def leaves_that_move(program: Program, rows: Rows, leaves: Mapping[str, Tensor], *, fit_guide: bool) -> dict[str, Tensor]:
    """Of the leaves those that the model's density depends on, and with `fit_guide` the guide's; by name.

    Raises:
        ValueError: there is none.
    """
    with torch.no_grad(), seeded(0, rows[0].device):
        z, _ = program.sample(rows, 1)
    with torch.enable_grad():
        value = program.log_joint(rows).of_sites(z).sum()
        if fit_guide:
            value = value + program.guide_density(rows).of_sites(z).sum()
    used = {id(leaf) for leaf in used_leaves(value)} if value.requires_grad else set()
    moving = {name: leaf for name, leaf in leaves.items() if id(leaf) in used}
    if not moving:
        raise ValueError("The model has no parameter with a gradient: there is nothing that an M-step could raise.")
    return moving
