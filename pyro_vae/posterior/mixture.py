"""Importance sampling from a mixture of Gaussians at the posterior modes.

Each mode m of a row, with P the negative Hessian there, gives two components: N(m, P^-1), which is the posterior where that
is Gaussian, and a Student t of the same shape, wider and with heavy tails, which bounds the weights where it is not. Draws
are allotted to the components in fixed numbers (strata) and weighted by the whole mixture, the balance heuristic of Veach &
Guibas 1995: w = p(x, u) / sum_c (K_c / K) r_c(u). The mean weight is unbiased for p(x), whatever the modes; a mode that no
start reached costs variance, and more than anyone can see if it lies far away.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae.log_joint import LogJoint
from pyro_vae.memory import BUDGET, in_chunks
from pyro_vae.posterior.modes import EVALUATIONS, Modes, find_modes
from pyro_vae.posterior.particles import Particles, rounding_error
from pyro_vae.program import Program
from pyro_vae.rows import Data, Rows, as_rows, positive
from pyro_vae.seeds import Seed, seeded

DEFENSIVE = 0.05
"""Share of the draws that go to the wide components."""

WIDTH, FREEDOM = 1.4, 5.0
"""Scale and degrees of freedom of the wide components."""


@dataclass(frozen=True)
class Mixture:
    """Components at M modes of N rows; a row with fewer modes has zero counts for the rest.

    Attributes:
        mean: (M, N, D), float64.
        factor: Cholesky factors of the precisions, (M, N, D, D).
        counts: draws for each component, (2 M, N), integer: first the Gaussians, then the wide ones.
    """

    mean: Tensor
    factor: Tensor
    counts: Tensor

    @classmethod
    def at(cls, modes: Modes, starts: Tensor, num_draws: int) -> Mixture:
        """The mixture at `modes`, draws allotted by Laplace's masses, with a floor for each mode.

        A row without a mode, because its density is nowhere finite, gets a unit component at its first start (S, N, D).
        """
        num_rows = starts.shape[1]
        alone = torch.ones(num_rows, dtype=torch.bool, device=starts.device)
        alone[modes.row] = False
        modes = modes.and_at(alone.nonzero().flatten(), starts[0].double())
        order = torch.argsort(modes.row, stable=True)
        row = modes.row[order]
        first = torch.searchsorted(row, torch.arange(num_rows, device=row.device))
        rank = torch.arange(len(row), device=row.device) - first[row]
        most, dim = int(rank.max()) + 1, modes.u.shape[-1]
        mean = modes.u.new_zeros(most, num_rows, dim)
        factor = torch.eye(dim, dtype=mean.dtype, device=mean.device).repeat(most, num_rows, 1, 1)
        mass = mean.new_full((most, num_rows), -torch.inf)
        mean[rank, row], factor[rank, row], mass[rank, row] = modes.u[order], modes.factor[order], modes.log_mass[order]
        present = mass > -torch.inf
        share = 0.9 * torch.softmax(mass, 0) + 0.1 * present / present.sum(0)
        wide = max(1, round(DEFENSIVE * num_draws))
        return cls(mean, factor, torch.cat([_allot(share, num_draws - wide), _allot(share, wide)]))

    @property
    def modes_per_row(self) -> Tensor:
        """Number of modes of each row, (N,)."""
        most = len(self.mean)
        return (self.counts[:most] + self.counts[most:] > 0).sum(0)

    def draw_strata(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """As many draws (K, N, D) of each component as its count says, in `dtype`, and their components, (K, N)."""
        ends = self.counts.cumsum(0)
        slot = torch.arange(int(ends[-1, 0]), device=ends.device)[:, None, None]
        component = (slot >= ends).sum(1)
        return self._draw(component, dtype), component

    def draw_independent(self, num_draws: int, dtype: torch.dtype) -> Tensor:
        """Draws (K, N, D) in `dtype`, each of a component chosen by chance in proportion to its count."""
        component = torch.multinomial(self.counts.T.double(), num_draws, replacement=True).T
        return self._draw(component, dtype)

    def _draw(self, component: Tensor, dtype: torch.dtype) -> Tensor:
        most, num_rows, dim = self.mean.shape
        num_draws = len(component)
        noise = torch.randn(num_draws, num_rows, dim, dtype=self.mean.dtype, device=self.mean.device)
        chi = torch.distributions.Chi2(torch.tensor(FREEDOM, dtype=noise.dtype, device=noise.device))
        stretch = WIDTH * torch.rsqrt(chi.sample((num_draws, num_rows)) / FREEDOM)
        noise = noise * torch.where(component >= most, stretch, 1.0)[..., None]
        u = torch.empty_like(noise)
        for m in range(most):
            rows = (self.counts[m] + self.counts[most + m] > 0).nonzero().flatten()
            away = torch.linalg.solve_triangular(self.factor[m, rows].mT, noise[:, rows].permute(1, 2, 0), upper=True)
            mine = (component[:, rows] % most == m)[..., None]
            u[:, rows] = torch.where(mine, self.mean[m, rows] + away.permute(2, 0, 1), u[:, rows])
        return u.to(dtype)

    def rows(self, part: slice) -> Mixture:
        """The mixture of some of the rows."""
        return Mixture(self.mean[:, part], self.factor[:, part], self.counts[:, part])

    def log_density(self, u: Tensor) -> Tensor:
        """log of the mixture with weights K_c / K at u (K, N, D): (K, N), float64."""
        most, dim = len(self.mean), u.shape[-1]
        log_share = torch.log(self.counts / self.counts.sum(0))
        total = torch.full(u.shape[:2], -torch.inf, dtype=torch.float64, device=u.device)
        t_constant = (
            math.lgamma(0.5 * (FREEDOM + dim)) - math.lgamma(0.5 * FREEDOM) - 0.5 * dim * math.log(FREEDOM * math.pi)
        ) - dim * math.log(WIDTH)
        for m in range(most):
            rows = (self.counts[m] + self.counts[most + m] > 0).nonzero().flatten()
            delta = (u[:, rows].double() - self.mean[m, rows]).transpose(0, 1)
            square = (delta @ self.factor[m, rows]).square().sum(-1).T
            log_det = self.factor[m, rows].diagonal(dim1=-2, dim2=-1).log().sum(-1)
            gauss = log_det - 0.5 * dim * math.log(2.0 * math.pi) - 0.5 * square + log_share[m, rows]
            tails = 0.5 * (FREEDOM + dim) * torch.log1p(square / (WIDTH**2 * FREEDOM))
            wide = log_det + t_constant - tails + log_share[most + m, rows]
            total[:, rows] = torch.logaddexp(total[:, rows], torch.logaddexp(gauss, wide))
        return total


def _allot(share: Tensor, total: int) -> Tensor:
    """Whole numbers (M, N) that sum to `total` in each column, nearest to total * share (largest remainders)."""
    exact = share * total
    whole = exact.floor()
    missing = total - whole.sum(0)
    rank = torch.argsort(torch.argsort(exact - whole, dim=0, descending=True), dim=0)
    return (whole + (rank < missing)).long()


def laplace(
    program: Program, x: Data, *, num_particles: int = 200, seed: Seed = 0, memory: int = BUDGET, num_starts: int = 4
) -> Particles:
    """K draws of a mixture at the posterior modes of each row, weighted by p(x, z) over the whole mixture.

    Args:
        program: model and guide; the guide only gives a start.
        x: rows, (N, ...).
        num_particles: K.
        seed: of starts and draws.
        memory: byte budget of the evaluations, besides the particles themselves.
        num_starts: of the ascent: the centre of the guide, and draws of the prior.

    Returns:
        Particles with log w in nats, in strata; `info["modes"]` counts the modes of each row, (N,).
    """
    positive(num_particles=num_particles, memory=memory, num_starts=num_starts)
    rows = as_rows(x)
    with seeded(seed, rows[0].device):
        log_joint = program.log_joint(rows)
        mixture = mixture_of(program, rows, log_joint, num_starts, num_particles, memory)
        u, component = mixture.draw_strata(rows[0].dtype)
        log_p = in_chunks(program, rows, {"u": u}, _at_u, memory)
        z = log_joint.unflatten(u)
    log_q = mixture.log_density(u)
    return Particles(
        log_p - log_q,
        z,
        rounding_error(log_p, log_q, rows[0].dtype),
        strata=component,
        info={"engine": "laplace", "evaluations": num_particles + EVALUATIONS * num_starts, "modes": mixture.modes_per_row},
    )


def mixture_of(program: Program, rows: Rows, log_joint: LogJoint, num_starts: int, num_draws: int, memory: int) -> Mixture:
    """The mixture at the modes that `num_starts` starts a row lead to, with `num_draws` draws allotted."""
    starts = _starts(program, rows, log_joint, num_starts)
    return Mixture.at(find_modes(program, rows, starts, memory), starts, num_draws)


def _at_u(log_joint: LogJoint, values: Mapping[str, Tensor]) -> Tensor:
    return log_joint(values["u"])


def _starts(program: Program, rows: Rows, log_joint: LogJoint, num_starts: int) -> Tensor:
    """The guide's centre (mean of some draws, in u) and draws of the prior, (S, N, D)."""
    with torch.no_grad():
        centre = log_joint.flatten(program.sample(rows, 16)[0]).mean(0, keepdim=True)
        if num_starts == 1:
            return centre
        return torch.cat([centre, log_joint.flatten(program.sample_prior(rows, num_starts - 1)[0])])
