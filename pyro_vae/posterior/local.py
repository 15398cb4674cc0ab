"""Laplace's method as importance sampling: posterior modes, the local covariance at each, and weights that mend the rest.

From several starts the ascent finds the modes (`modes`); one step of Gaussian variational inference (Opper & Archambeau
2009, eq. 13) moves each Gaussian from the mode to about the mean of its bump, which halves the variance of the weights
where a posterior is skewed; the mixture of all of them (`mixture`) is drawn from and weighted. The mean weight is unbiased
for p(x), whatever the modes; a mode that no start reached costs variance, and more than anyone can see if it lies far away.
So where the first starts do not agree on one mode, further ones are climbed from; and a row in which a mode of some mass
was reached by one start alone is in doubt: where one of S starts finds what no other does, the next start may as well
(Good 1953). On a ridge every start ends elsewhere; there a mode counts as found again
where the peaks of the other starts cover it. A long shoulder without a mode of its own is covered thinly; the cascade
looks for such mass from outside (`coverage`), a direct call does not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_vae.layouts import Values
from pyro_vae.log_joint import LogJoint
from pyro_vae.memory import BUDGET, at_u, in_chunks
from pyro_vae.posterior.derivatives import Local, value_and_gradient
from pyro_vae.posterior.engine import Engine, Sampler
from pyro_vae.posterior.mixture import Mixture
from pyro_vae.posterior.modes import COMMON, DOUBTFUL_SHARE, LARGEST_DENSE, Modes, find_modes, join, least_curvature
from pyro_vae.posterior.particles import Particles, rounding_error
from pyro_vae.posterior.refinement import learnt, nearest_shape, tuned, with_peak
from pyro_vae.posterior.secants import with_kinks
from pyro_vae.posterior.shapes import Shape
from pyro_vae.posterior.shapes import positive as positive_precision
from pyro_vae.program import Program
from pyro_vae.rows import Rows, positive, take
from pyro_vae.seeds import Seed, derive, seeded

PAIRS = 8
"""Antithetic pairs that estimate the mean gradient under a Gaussian: what is odd in it cancels."""

FEW = 64
"""Fewer numbers have no median deviation to rely on; of so many it is good to a seventh."""

SPREAD = 1
"""Sub-stream of the seed."""

KINKED_MOVES = 6
"""Steps to the mean of a bump among kinks: the mode itself lies at one of them, and anywhere."""

LONGEST_MOVE = 1.0
"""In standard deviations: a longer one says that the Gaussian is no picture of the bump."""

COVERED = 3.0
"""Log of the largest relative weight at a mode that other peaks, or another proposal, are said to cover."""

HESSIAN = 4
"""Passes through the decoder for each dimension that a refinement costs at most: one Hessian for each new peak."""

FOUND_SHARE = 0.2
"""Of the draws, for a peak that fresh starts have found, until a pilot has tuned it."""

LONELY = "a mode was found by one start alone"


class LocalSampler(Sampler):
    """Draws from a mixture at the modes of each row."""

    def __init__(
        self,
        program: Program,
        rows: Rows,
        mixture: Mixture,
        least: Tensor,
        cost: Tensor,
        doubts: tuple[str, ...],
        memory: int,
    ) -> None:
        self.program, self.rows, self.mixture, self.memory = program, rows, mixture, memory
        self.least, self.cost, self.doubts, self.refined = least, cost, doubts, False

    def draw(self, num_particles: int, seed: Seed, exact: Values | None = None) -> Particles:
        """See `Sampler.draw`; the draws come in strata, a fixed number from each component."""
        log_joint, dtype = self.program.log_joint(self.rows), self.rows[0].dtype
        counts = self.mixture.allot(num_particles)
        log_share = torch.log(counts / num_particles)
        slot = torch.arange(num_particles, device=counts.device)[:, None, None]
        component = (slot >= counts.cumsum(0)).sum(1)
        with seeded(seed, self.rows[0].device):
            u = self.mixture.draw(component, dtype)
            if exact is not None:
                _plant(self.mixture, u, component, log_share, log_joint.flatten({k: v[None] for k, v in exact.items()}))
        log_p = in_chunks(self.program, self.rows, {"u": u}, at_u, self.memory)
        log_q = self.mixture.log_density(u, log_share)
        with torch.no_grad():
            z = log_joint.unflatten(u)
        info = {
            "engine": "laplace",
            "evaluations": self.cost + num_particles,
            "modes": self.mixture.modes_per_row,
            "doubts": self.doubts,
        }
        return Particles(log_p - log_q, z, rounding_error(log_p, log_q, dtype), strata=component, info=info)

    def take(self, index: Tensor) -> LocalSampler:
        """See `Sampler.take`."""
        other = copy.copy(self)
        other.rows, other.mixture, other.cost = take(self.rows, index), self.mixture.take(index), self.cost[index]
        other.doubts = tuple(self.doubts[i] for i in index.tolist())
        return other

    def log_density(self, u: Tensor, index: Tensor) -> Tensor:
        """See `Sampler.log_density`."""
        mixture = self.mixture.take(index)
        return mixture.log_density(u, mixture.log_share)

    def widen(self, index: Tensor, u: Tensor) -> LocalSampler:
        """One more peak in the rows at `index` (n,), at u (n, D): what `uncovered` has found there."""
        share = torch.full((len(index),), FOUND_SHARE, dtype=torch.float64, device=u.device)
        other = copy.copy(self)
        if len(index):
            other.mixture = with_peak(self.mixture, index, u.double(), self._shape_at(index, u), share)
        return other

    def adapt(self, pilot: Particles) -> LocalSampler:
        """The shares of the components tuned on the pilot, unless it is refined: then they are as they should be."""
        return self if self.refined else self._learnt(pilot, tuned)

    def refine(self, pilot: Particles) -> LocalSampler:
        """Peaks added and moved, widths fitted and shares tuned on the pilot: for rows that the pilot shows to be hard."""

        def lesson(mixture: Mixture, u: Tensor, log_weights: Tensor) -> Mixture:
            return learnt(mixture, u, log_weights, self._shape_at)

        other = self._learnt(pilot, lesson)
        other.refined, other.cost = True, other.cost + HESSIAN * self.mixture.peaks[0].mean.shape[-1]
        return other

    def _shape_at(self, rows: Tensor, u: Tensor) -> Shape:
        """Precisions at u (n, D) in the rows (n,); above `LARGEST_DENSE` those of the nearest peak."""
        if u.shape[-1] > LARGEST_DENSE:
            return nearest_shape(self.mixture, rows, u.double())
        hessian = Local(self.program.log_joint(self.rows).take(rows), u.to(self.rows[0].dtype)[None]).hessian()
        return positive_precision(-hessian[0], self.least)

    def _learnt(self, pilot: Particles, lesson: Callable[[Mixture, Tensor, Tensor], Mixture]) -> LocalSampler:
        with torch.no_grad():
            u = self.program.log_joint(self.rows).flatten(dict(pilot.z))
            mixture = lesson(self.mixture, u, pilot.log_weights)
        other = copy.copy(self)
        other.mixture, other.cost = mixture, self.cost + len(pilot.log_weights)
        return other


@dataclass(frozen=True)
class Laplace(Engine):
    """Importance sampling from a mixture at the posterior modes, with the exact local covariance at each.

    Attributes:
        num_starts: of the ascent: the centre of the guide, draws of the prior, some wide draws of the guide; `near` first.
        num_further: more of them at most, all draws of the prior, in rows where the first ones lead to different modes, and
            in all rows where many have several modes: see `find_modes`. One start has nothing to disagree with: none.
    """

    num_starts: int = 4
    num_further: int = 64
    name = "laplace"
    default_particles = 200
    pilot_particles = 64

    def prepare(
        self, program: Program, rows: Rows, *, seed: Seed = 0, memory: int = BUDGET, near: Tensor | None = None
    ) -> LocalSampler:
        """See `Engine.prepare`: modes, covariances and centres; `near` are starts, in place of draws of the prior first."""
        positive(num_starts=self.num_starts)
        with seeded(seed, rows[0].device):
            starts = find_starts(program, rows, self.num_starts, near)
            least = _least_curvature(program, rows, starts, seed, few=near is not None)
            if self.num_starts > 1 and self.num_further:
                with torch.no_grad():
                    further = program.sample_prior(rows, self.num_further)[0]
                    starts = torch.cat([starts, program.log_joint(rows).flatten(further)])
            modes, cost = find_modes(program, rows, starts, memory, least, self.num_starts)
            modes = centred(program.log_joint(rows), modes, rows[0].dtype)
        cost += 4 * PAIRS * torch.bincount(modes.row, minlength=len(cost))
        mixture = Mixture.at(modes, len(rows[0]))
        doubts = _doubts(mixture, self.num_starts)
        return LocalSampler(program, rows, mixture, least, cost, doubts, memory)


laplace = Laplace()


def find_starts(program: Program, rows: Rows, num_starts: int, near: Tensor | None = None) -> Tensor:
    """The guide's centre (mean of some draws, in u), draws of the prior, draws of the guide twice as wide: (S, N, D).

    The points `near` (M, N, D) come first. They take the place of draws of the prior; where there are not so many, of the
    wide draws, and of the centre last.
    """
    if near is not None:
        if near.shape[1:] != (shape := (len(rows[0]), program.log_joint(rows).dim)) or len(near) == 0:
            raise ValueError(f"near has shape {tuple(near.shape)}: give (S, {shape[0]}, {shape[1]}), S at least 1.")
        near = near[:num_starts].to(rows[0])
        if (left := num_starts - len(near)) == 0:
            return near
        others = find_starts(program, rows, num_starts)
        kept = torch.cat([others[:1], others[len(others) - (num_starts - 1) // 4 :], others[1:]])
        return torch.cat([near, kept[:left]])
    log_joint = program.log_joint(rows)
    with torch.no_grad():
        draws = log_joint.flatten(program.sample(rows, 16)[0])
        centre = draws.mean(0, keepdim=True)
        wide = (num_starts - 1) // 4
        starts = [centre, centre + 2.0 * (draws - centre)[:wide].repeat(-(-wide // 16) or 1, 1, 1)[:wide]]
        if num_starts - 1 - wide:
            starts.insert(1, log_joint.flatten(program.sample_prior(rows, num_starts - 1 - wide)[0]))
        return torch.cat(starts)


def _least_curvature(program: Program, rows: Rows, starts: Tensor, seed: Seed, *, few: bool = False) -> Tensor:
    """That of the starts; where these are few numbers, of the wider of the starts and of some draws of the prior.

    The median deviation of four numbers may be next to nothing, and every proposal as narrow; `few` says that the starts
    hold too few draws of the prior whatever their number.
    """
    if starts.numel() >= FEW and not few:
        return least_curvature(starts)
    with torch.no_grad(), seeded(derive(seed, SPREAD), rows[0].device):
        draws = program.log_joint(rows).flatten(program.sample_prior(rows, -(-FEW // starts[0].numel()))[0])
    return torch.minimum(least_curvature(starts), least_curvature(draws))


def centred(log_joint: LogJoint, modes: Modes, dtype: torch.dtype) -> Modes:
    """Each mode moved by P^-1 E[grad log p(x, u)] under its Gaussian, to the mean of its bump; ambient generator.

    Where the same gradients show kinks that the Hessian has missed, P is mended first (`secants`).
    """
    parts = []
    # A block of modes at a time, of the size that the ascent worked on.
    for index in torch.arange(len(modes.row), device=modes.row.device).split(512):
        some = modes.take(index)
        noise = torch.randn(PAIRS, *some.u.shape, dtype=torch.float64, device=some.u.device)
        there = log_joint.take(some.row)
        moved, turned = _moved(there, some, noise, dtype)
        mended, kinked = with_kinks(there, some, turned, noise, dtype)
        if len(among := kinked.nonzero().flatten()):
            narrow, where = mended.take(among), there.take(among)
            for _ in range(KINKED_MOVES):
                narrow = replace(narrow, u=_moved(where, narrow, noise[:, among], dtype)[0])
            moved[among] = narrow.u
        parts.append(replace(mended, u=moved))
    return join(parts)


def _moved(log_joint: LogJoint, modes: Modes, noise: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Where one step of Gaussian variational inference takes each mode, (P, D), and the `turn` of its gradient, (P,)."""
    away, pairs = modes.shape.colour(noise), len(noise)
    points = torch.cat([modes.u + away, modes.u - away]).to(dtype)
    gradient = torch.cat([value_and_gradient(log_joint, part)[1] for part in points.split(4)]).double()
    step = modes.shape.precondition(gradient.mean(0, keepdim=True))
    step = step * (LONGEST_MOVE / step.norm(dim=-1, keepdim=True).clamp_min(LONGEST_MOVE))
    difference = modes.shape.precondition(gradient[pairs:] - gradient[:pairs])
    turned = (difference * noise).sum((0, -1)) / (2.0 * noise.square().sum((0, -1)))
    return modes.u + modes.shape.colour(step)[0], turned


def _doubts(mixture: Mixture, num_starts: int) -> tuple[str, ...]:
    """Why the modes of each row may not be all there are."""
    num_rows = mixture.log_share.shape[1]
    if num_starts == 1:
        return ("modes sought from one start alone",) * num_rows
    lonely = mixture.lonely_share(COVERED) > DOUBTFUL_SHARE
    if many(lonely):
        return tuple(LONELY if one else f"{LONELY} in many rows" for one in lonely.tolist())
    return tuple(LONELY if one else "" for one in lonely.tolist())


def many(rows: Tensor) -> bool:
    """Whether so many rows, boolean (N,), are in doubt that all are: rows of one model are alike, starts may be lucky."""
    return int(rows.sum()) > max(1.0, COMMON * len(rows))


def _plant(mixture: Mixture, u: Tensor, component: Tensor, log_share: Tensor, exact: Tensor) -> None:
    """Put the posterior draw `exact` (1, N, D) among the draws u of each row, in place.

    It belongs to component c with probability K_c r_c / sum_c' K_c' r_c', and takes the place of a draw of that component;
    then the K draws have the density of the strata times their mean weight over p(x).
    """
    chance = torch.softmax(log_share + mixture.by_component(exact)[:, 0], 0)
    chosen = torch.multinomial(chance.T, 1).T
    place = (component == chosen).double().argmax(0)
    row = torch.arange(u.shape[1], device=u.device)
    u[place, row] = exact[0].to(u.dtype)
