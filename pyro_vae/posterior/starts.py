"""Where annealed chains begin: a distribution r(u) that can be drawn from and evaluated.

* `at_modes`: the mixture of `laplace`, near the posterior; few temperatures serve.
* `at_guide`: q(z | x).
* `at_prior`: p(z); the path whose temperatures trace the rate-distortion curve, and the slow one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from pyro_vae.posterior.local import Laplace, LocalSampler
from pyro_vae.posterior.shapes import Dense, LowRank, Shape
from pyro_vae.program import Program
from pyro_vae.rows import Rows, take


class Start(Protocol):
    """r(u) for N rows.

    Attributes:
        shape: N precisions that whiten the coordinates of Hamiltonian transitions.
        power: how temperatures are spaced, b_t = (t / T) ^ power; above 1 they linger at the start, as a wide one needs.
        cost: decoder evaluations so far, (N,).
        doubts: see `Sampler`.
    """

    shape: Shape
    power: float
    cost: Tensor
    doubts: tuple[str, ...]

    def draw(self, num_draws: int) -> Tensor:
        """u (K, N, D), independent and alike, by the ambient generator."""

    def log_density(self, u: Tensor) -> Tensor:
        """log r(u), (K, N, D) -> (K, N), float64, differentiable."""

    def take(self, index: Tensor) -> Start:
        """The same for some of the rows."""


Begin = Callable[[Program, Rows, int], Start]
"""(program, rows, bytes) -> a start."""


class _Known:
    """The prior or the guide."""

    power = 3.0

    def __init__(self, program: Program, rows: Rows, shape: Shape, *, guided: bool) -> None:
        self.program, self.rows, self.shape, self.guided = program, rows, shape, guided
        self.cost = torch.zeros(len(rows[0]), dtype=torch.long, device=rows[0].device)
        self.doubts = ("",) * len(rows[0])

    def draw(self, num_draws: int) -> Tensor:
        drawn = self.program.sample if self.guided else self.program.sample_prior
        return self.program.log_joint(self.rows).flatten(drawn(self.rows, num_draws)[0])

    def log_density(self, u: Tensor) -> Tensor:
        return self.program.guide_density(self.rows)(u) if self.guided else self.program.log_joint(self.rows).prior(u)

    def take(self, index: Tensor) -> _Known:
        some = _Known(self.program, take(self.rows, index), self.shape.take(index), guided=self.guided)
        some.cost = self.cost[index]
        return some


class _Modes:
    """The mixture of a `LocalSampler`; independent draws, not its strata: the chains of a row must be alike."""

    power = 1.0

    def __init__(self, sampler: LocalSampler) -> None:
        self.sampler, self.cost, self.doubts = sampler, sampler.cost, sampler.doubts
        best = sampler.mixture.peaks[0]
        self.shape = best.shape.take(torch.argsort(best.rows))

    def draw(self, num_draws: int) -> Tensor:
        mixture = self.sampler.mixture
        return mixture.draw(mixture.independent_components(num_draws), self.sampler.rows[0].dtype)

    def log_density(self, u: Tensor) -> Tensor:
        return self.sampler.mixture.log_density(u, self.sampler.mixture.log_share)

    def take(self, index: Tensor) -> _Modes:
        return _Modes(self.sampler.take(index))


def at_modes(program: Program, rows: Rows, memory: int, *, num_starts: int = 4) -> Start:
    """Begin at the mixture of `laplace`, refined on two pilots."""
    seed = int(torch.randint(2**62, ()))
    engine = Laplace(num_starts=num_starts)
    sampler = engine.prepare(program, rows, seed=(seed, 0), memory=memory)
    for i in range(2):
        sampler = sampler.refine(sampler.draw(256, (seed, 1, i)))
    return _Modes(sampler)


def at_prior(program: Program, rows: Rows, memory: int) -> Start:
    """Begin at the prior."""
    u = program.log_joint(rows).flatten(program.sample_prior(rows, 64)[0])
    return _Known(program, rows, _spread(u), guided=False)


def at_guide(program: Program, rows: Rows, memory: int) -> Start:
    """Begin at the guide."""
    u = program.log_joint(rows).flatten(program.sample(rows, 64)[0])
    return _Known(program, rows, _spread(u), guided=True)


def _spread(u: Tensor) -> Shape:
    """Precisions from the standard deviations of draws u (K, N, D)."""
    precision = 1.0 / u.double().var(0).clamp_min(1e-12)
    if u.shape[-1] <= 256:
        return Dense.of(torch.diag_embed(precision.sqrt()))
    return LowRank(precision.new_zeros(*precision.shape, 0), precision.new_zeros(len(precision), 0), precision.mean(-1))
