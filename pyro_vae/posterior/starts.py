"""Where annealed chains begin: a distribution r(u) that can be drawn from and evaluated.

* `at_modes`: the mixture of `laplace`, near the posterior; few temperatures serve.
* `at_guide`: q(z | x).
* `at_prior`: p(z); the path whose temperatures trace the rate-distortion curve, and the slow one.
* `at_points`: around points that are given, such as draws of the posterior under the last parameters.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from pyro_vae.memory import gradient_rows
from pyro_vae.posterior.derivatives import Local
from pyro_vae.posterior.lanczos import lanczos
from pyro_vae.posterior.local import Laplace, LocalSampler
from pyro_vae.posterior.modes import LARGEST_DENSE, least_curvature
from pyro_vae.posterior.shapes import Dense, LowRank, Shape, positive
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


class Begin(Protocol):
    """Makes a start."""

    def __call__(self, program: Program, rows: Rows, memory: int, /, *, near: Tensor | None = None) -> Start:
        """A start for these rows within so many bytes; `near` (S, N, D), see `Engine.prepare`, may be left aside."""


WIDER = math.sqrt(2.0)
"""Standard deviations of `at_points`, in those of the posterior.

The point and a draw of the posterior are each one deviation from the mean, so that their difference has twice the variance.
"""


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


class _Points:
    """A Gaussian around one point (N, D) of each row, `WIDER` than `shape` says."""

    power = 1.0

    def __init__(self, point: Tensor, shape: Shape, cost: Tensor, dtype: torch.dtype) -> None:
        self.point, self.shape, self.cost, self.dtype = point.double(), shape, cost, dtype
        self.doubts = ("",) * len(point)

    def draw(self, num_draws: int) -> Tensor:
        noise = torch.randn(num_draws, *self.point.shape, dtype=torch.float64, device=self.point.device)
        return (self.point + WIDER * self.shape.colour(noise)).to(self.dtype)

    def log_density(self, u: Tensor) -> Tensor:
        square = (self.shape.whiten(u.double() - self.point) / WIDER).square().sum(-1)
        constant = self.point.shape[-1] * math.log(WIDER * math.sqrt(2.0 * math.pi))
        return self.shape.half_log_det - constant - 0.5 * square

    def take(self, index: Tensor) -> _Points:
        return _Points(self.point[index], self.shape.take(index), self.cost[index], self.dtype)


def at_modes(program: Program, rows: Rows, memory: int, *, near: Tensor | None = None, num_starts: int = 4) -> Start:
    """Begin at the mixture of `laplace`, refined on two pilots."""
    seed = int(torch.randint(2**62, ()))
    engine = Laplace(num_starts=num_starts)
    sampler = engine.prepare(program, rows, seed=(seed, 0), memory=memory, near=near)
    for i in range(2):
        sampler = sampler.refine(sampler.draw(256, (seed, 1, i)))
    return _Modes(sampler)


def at_prior(program: Program, rows: Rows, memory: int, *, near: Tensor | None = None) -> Start:
    """Begin at the prior, wherever `near` is."""
    u = program.log_joint(rows).flatten(program.sample_prior(rows, 64)[0])
    return _Known(program, rows, _spread(u), guided=False)


def at_guide(program: Program, rows: Rows, memory: int, *, near: Tensor | None = None) -> Start:
    """Begin at the guide, wherever `near` is."""
    u = program.log_joint(rows).flatten(program.sample(rows, 64)[0])
    return _Known(program, rows, _spread(u), guided=True)


def at_points(program: Program, rows: Rows, memory: int, *, near: Tensor | None = None) -> Start:
    """Begin around the first of the points `near` (S, N, D), or at the prior where there are none.

    r(u) is a Gaussian there. Its precision is minus the Hessian of the log joint at the point, made positive, divided by 2:
    see `WIDER`. The points are fixed before anything is drawn, so the weights are unbiased for p(x).
    """
    if near is None:
        return at_prior(program, rows, memory)
    log_joint, point = program.log_joint(rows), near[0].to(rows[0])
    with torch.no_grad():
        least = least_curvature(log_joint.flatten(program.sample_prior(rows, 16)[0]))
    shapes: list[Shape] = []
    for index in torch.arange(len(point), device=point.device).split(gradient_rows(program, rows, near[:1], memory)):
        local = Local(log_joint.take(index), point[index][None])
        dense = point.shape[-1] <= LARGEST_DENSE
        shapes.append(positive(-local.hessian()[0], least) if dense else lanczos(local, least))
    cost = torch.full((len(point),), 2 + point.shape[-1], device=point.device)
    return _Points(point, type(shapes[0]).join(shapes), cost, point.dtype)


def _spread(u: Tensor) -> Shape:
    """Precisions from the standard deviations of draws u (K, N, D)."""
    precision = 1.0 / u.double().var(0).clamp_min(1e-12)
    if u.shape[-1] <= 256:
        return Dense.of(torch.diag_embed(precision.sqrt()))
    return LowRank(precision.new_zeros(*precision.shape, 0), precision.new_zeros(len(precision), 0), precision.mean(-1))
