"""The E-step of Monte Carlo EM: weighted particles of p(z | x) for some rows, begun where those of the last epoch were.

With log w_ik = log p(x_i, z_ik) - log r(z_ik | x_i) of an engine's K draws, the shares s_ik = w_ik / sum_l w_il turn sums
over particles into expectations under p(z | x_i), with a bias of order 1/K; the mean weight itself is unbiased for p(x_i).
Between epochs one point a row is kept: a particle drawn by its share, that is an approximate draw of the posterior.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae.evidence.estimate import Estimate
from pyro_vae.layouts import Values
from pyro_vae.memory import block_rows
from pyro_vae.posterior.engine import PILOT, PREPARED, REPORTED, Engine
from pyro_vae.posterior.particles import Particles
from pyro_vae.program import Program
from pyro_vae.rows import Rows, even_blocks, take
from pyro_vae.seeds import Seed, derive, seeded

KEPT, UNKNOWN = 3, 4
"""Sub-streams of a block's seed; `posterior.engine` has the others."""


@dataclass(frozen=True)
class Weighed:
    """Particles of n rows, held for the M-step.

    Attributes:
        rows: the rows.
        z: latents by name, (K, n, *event_shape), in their own support.
        shares: (K, n), float64, constant; those of a row add up to 1.
    """

    rows: Rows
    z: Values
    shares: Tensor


@dataclass
class EStep:
    """The E-step of some rows, and the points it begins at.

    Attributes:
        program: model and guide.
        engine: makes the particles.
        num_particles: K.
        memory: byte budget of the engine.
        points: one for each of all N rows, (N, D), unconstrained; NaN where a row has not been met.
    """

    program: Program
    engine: Engine
    num_particles: int
    memory: int
    points: Tensor

    def __call__(self, rows: Rows, index: Tensor, seed: Seed) -> tuple[list[Weighed], Estimate]:
        """Particles of n rows, in blocks, and the estimate of log p(x) that their weights make.

        A row all of whose densities are zero or not finite has no particles; its estimate says why.

        Args:
            rows: n rows.
            index: which of all rows these are, (n,).
            seed: of the draws.
        """
        parts, estimates = [], []
        index = index.to(self.points.device)
        for number, block in enumerate(even_blocks(torch.arange(len(index), device=index.device), self._most)):
            some, at, key = take(rows, block), index[block], derive(seed, number)
            particles = self._draw(some, self._near(some, at, key), key)
            shares, lost = _shares(particles.log_weights)
            self._keep(some, at, particles.z, shares, lost, key)
            if len(good := (~lost).nonzero().flatten()):
                z = {name: value[:, good] for name, value in _usable(particles, shares).items()}
                parts.append(Weighed(take(some, good), z, shares[:, good]))
            estimates.append(Estimate.from_particles(particles))
        return parts, Estimate.cat(estimates)

    @property
    def _most(self) -> int:
        """Rows of a block."""
        return block_rows(max(self.num_particles, self.engine.pilot_particles), self.points.shape[1])

    def _draw(self, rows: Rows, near: Tensor | None, key: Seed) -> Particles:
        begin = {} if near is None else {"near": near}
        sampler = self.engine.prepare(self.program, rows, seed=derive(key, PREPARED), memory=self.memory, **begin)
        if self.engine.pilot_particles:
            sampler = sampler.adapt(sampler.draw(self.engine.pilot_particles, derive(key, PILOT)))
        return sampler.draw(self.num_particles, derive(key, REPORTED))

    def _near(self, rows: Rows, index: Tensor, key: Seed) -> Tensor | None:
        """Where to begin, (1, n, D): draws of the prior where a row has no point; None where none has one."""
        points = self.points[index]
        known = torch.isfinite(points).all(-1)
        if not bool(known.any()):
            return None
        if not bool(known.all()):
            with torch.no_grad(), seeded(key, rows[0].device, UNKNOWN):
                drawn = self.program.log_joint(rows).flatten(self.program.sample_prior(rows, 1)[0])[0]
            points = torch.where(known[:, None], points, drawn)
        return points[None]

    def _keep(self, rows: Rows, index: Tensor, z: Mapping[str, Tensor], shares: Tensor, lost: Tensor, key: Seed) -> None:
        """One particle of each row, drawn by its share, is where the next E-step begins."""
        with torch.no_grad(), seeded(key, shares.device, KEPT):
            chosen = torch.multinomial(shares.T, 1)[:, 0]
            column = torch.arange(len(chosen), device=chosen.device)
            u = self.program.log_joint(rows).flatten({name: value[chosen, column][None] for name, value in z.items()})[0]
        self.points[index] = torch.where(lost[:, None], torch.nan, u).to(self.points)


def _shares(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Self-normalised weights (K, n), and the rows without any, boolean (n,), whose shares mean nothing."""
    broken = log_weights.isnan() | log_weights.isposinf()
    clean = torch.where(broken, -torch.inf, log_weights)
    lost = clean.isneginf().all(0)
    return torch.softmax(torch.where(lost, 0.0, clean), 0), lost


def _usable(particles: Particles, shares: Tensor) -> Values:
    """The latents, a row's best where a particle has no share: 0 times the gradient of an overflow would be NaN."""
    best = shares.argmax(0)
    source = torch.where(shares > 0.0, torch.arange(len(shares), device=shares.device)[:, None], best)
    column = torch.arange(shares.shape[1], device=shares.device)
    return {name: value[source, column] for name, value in particles.z.items()}
