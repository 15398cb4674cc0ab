"""A mixture of Gaussians and heavy tails at the posterior modes, as an importance distribution.

Each mode m of a row, with precision P there, gives four components of the same shape: N(m, P^-1), which is the posterior
where that is Gaussian; two wider Gaussians, which cover what is a little wider or skewed; and a wide Student t, which
bounds the weights where tails are heavy. Draws are allotted to the components in fixed numbers (strata) and weighted by
the whole mixture, the balance heuristic of Veach & Guibas 1995: w = p(x, u) / sum_c (K_c / K) r_c(u). How a pilot
improves such a mixture is in `refinement`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae.posterior.modes import Modes
from pyro_vae.posterior.shapes import Shape

SHALLOW = 10.0
"""Modes with less than e^-10 of the mass of their row's best one get no draws."""

SHARES = (0.55, 0.2, 0.2, 0.05)
"""Of the components of a mode, before they are tuned."""

FREEDOM = 5.0
"""Degrees of freedom of the Student t."""


def widths(dim: int) -> tuple[float, ...]:
    """Scales of the components in D dimensions. A Gaussian's radius is sqrt(D) to within a number of order 1."""
    return 1.0, 1.0 + 0.4 / math.sqrt(dim), 1.0 + 1.25 / math.sqrt(dim), 1.4


@dataclass(frozen=True)
class Peak:
    """One mode of each of n rows.

    Attributes:
        rows: which rows, (n,), integer.
        mean: (n, D), float64.
        shape: n precisions.
        value: the log joint at the modes, (n,), in nats.
        visits: starts that led there, (n,), integer.
    """

    rows: Tensor
    mean: Tensor
    shape: Shape
    value: Tensor
    visits: Tensor

    def take(self, index: Tensor, rows: Tensor) -> Peak:
        """The modes at `index`, said to be of `rows`."""
        return Peak(rows, self.mean[index], self.shape.take(index), self.value[index], self.visits[index])


@dataclass(frozen=True)
class Mixture:
    """M peaks of C components each, for N rows; a row with fewer modes is missing from the last peaks.

    Attributes:
        peaks: the best mode of every row, then the second best of those that have one, and so on.
        log_share: log of the components' shares, (M * C, N), peak by peak, float64; -inf where a row lacks the peak.
    """

    peaks: tuple[Peak, ...]
    log_share: Tensor

    @classmethod
    def at(cls, modes: Modes, num_rows: int) -> Mixture:
        """The mixture at `modes`, ordered by row and mass as `find_modes` gives them; shares by Laplace's masses."""
        first = torch.searchsorted(modes.row, torch.arange(num_rows, device=modes.row.device))
        # The difference, not the sum: next to a huge log density SHALLOW is nothing.
        keep = (modes.log_mass - modes.log_mass[first[modes.row]] > -SHALLOW).nonzero().flatten()
        modes = modes.take(keep)
        first = torch.searchsorted(modes.row, torch.arange(num_rows, device=modes.row.device))
        rank = torch.arange(len(modes.row), device=modes.row.device) - first[modes.row]
        mass = modes.u.new_full((int(rank.max()) + 1, num_rows), -torch.inf)
        mass[rank, modes.row] = modes.log_mass
        present = (mass > -torch.inf).double()
        share = 0.9 * torch.softmax(mass, 0) + 0.1 * present / present.sum(0)
        peaks = []
        for m in range(len(mass)):
            mine = (rank == m).nonzero().flatten()
            peaks.append(
                Peak(modes.row[mine], modes.u[mine], modes.shape.take(mine), modes.value[mine], modes.visits[mine])
            )
        each = torch.tensor(SHARES, dtype=share.dtype, device=share.device)
        return cls(tuple(peaks), (share[:, None] * each[:, None]).flatten(0, 1).log())

    @property
    def modes_per_row(self) -> Tensor:
        """Number of modes of each row, (N,)."""
        return (self.log_share > -torch.inf).sum(0) // len(SHARES)

    def take(self, index: Tensor) -> Mixture:
        """The mixture of the rows at `index`, each at most once."""
        place = torch.full((self.log_share.shape[1],), -1, device=index.device)
        place[index] = torch.arange(len(index), device=index.device)
        peaks, shares = [], []
        for m, peak in enumerate(self.peaks):
            new = place[peak.rows]
            mine = torch.argsort(new)[int((new < 0).sum()) :]  # in the order of `index`
            if len(mine):
                peaks.append(peak.take(mine, new[mine]))
                shares.append(self.log_share[m * len(SHARES) : (m + 1) * len(SHARES), index])
        return Mixture(tuple(peaks), torch.cat(shares))

    def allot(self, num_draws: int) -> Tensor:
        """Draws for each component, whole numbers (M * C, N) with sum `num_draws`, nearest to the shares."""
        return _allot(self.log_share.exp(), num_draws)

    def draw(self, component: Tensor, dtype: torch.dtype) -> Tensor:
        """One draw of each component in `component` (K, N), by the ambient generator: u (K, N, D), in `dtype`."""
        dim, kinds = self.peaks[0].mean.shape[-1], len(SHARES)
        noise = torch.randn(*component.shape, dim, dtype=torch.float64, device=component.device)
        chi = torch.distributions.Chi2(torch.tensor(FREEDOM, dtype=noise.dtype, device=noise.device))
        stretch = torch.tensor(widths(dim), dtype=noise.dtype, device=noise.device)[component % kinds]
        tails = torch.rsqrt(chi.sample(component.shape) / FREEDOM)
        noise *= torch.where(component % kinds == kinds - 1, stretch * tails, stretch)[..., None]
        u = torch.empty_like(noise, dtype=dtype)
        for m, peak in enumerate(self.peaks):
            away = (peak.mean + peak.shape.colour(noise[:, peak.rows])).to(dtype)
            mine = (component[:, peak.rows] // kinds == m)[..., None]
            u[:, peak.rows] = torch.where(mine, away, u[:, peak.rows]) if m else away
        return u

    def independent_components(self, num_draws: int) -> Tensor:
        """Components (K, N), each chosen by chance in proportion to its share."""
        return torch.multinomial(self.log_share.exp().T, num_draws, replacement=True).T

    def log_densities(self, u: Tensor, peak: Peak) -> list[Tensor]:
        """log of a peak's C components at u[:, peak.rows], each (K, n), float64, differentiable in u."""
        dim = u.shape[-1]
        square = peak.shape.whiten(u[:, peak.rows].double() - peak.mean).square().sum(-1)
        *gaussian, wide = widths(dim)
        logs = [
            peak.shape.half_log_det - dim * math.log(c) - 0.5 * dim * math.log(2.0 * math.pi) - 0.5 * square / c**2
            for c in gaussian
        ]
        constant = math.lgamma(0.5 * (FREEDOM + dim)) - math.lgamma(0.5 * FREEDOM) - 0.5 * dim * math.log(FREEDOM * math.pi)
        tails = 0.5 * (FREEDOM + dim) * torch.log1p(square / (wide**2 * FREEDOM))
        return [*logs, peak.shape.half_log_det + constant - dim * math.log(wide) - tails]

    def log_density(self, u: Tensor, log_share: Tensor) -> Tensor:
        """log of the mixture at u (K, N, D) with shares `log_share` (M * C, N): (K, N), float64, differentiable in u."""
        total = torch.full(u.shape[:2], -torch.inf, dtype=torch.float64, device=u.device)
        for m, peak in enumerate(self.peaks):
            shares = log_share[m * len(SHARES) : (m + 1) * len(SHARES), peak.rows]
            logs = torch.stack([s + log for s, log in zip(shares, self.log_densities(u, peak), strict=True)])
            mine = torch.logsumexp(logs, 0)
            # Most mixtures have one peak, which all rows share.
            total = (
                mine
                if len(self.peaks) == 1
                else total.index_put(
                    (torch.arange(len(u), device=u.device)[:, None], peak.rows), torch.logaddexp(total[:, peak.rows], mine)
                )
            )
        return total

    def lonely_share(self, log_slack: float) -> Tensor:
        """The share of a row's mass at modes that one start alone has found and that the other peaks do not cover, (N,).

        A mode is covered where, without its own peak, the weight p / (p(x) r) there would be below e^log_slack, all other
        peaks having the shares they have. By Good (1953) this share is about what the starts did not find.
        """
        kinds, log_z = len(SHARES), torch.full_like(self.log_share[0], -torch.inf)
        for peak in self.peaks:
            dim = peak.mean.shape[-1]
            mass = peak.value + 0.5 * dim * math.log(2.0 * math.pi) - peak.shape.half_log_det
            log_z[peak.rows] = torch.logaddexp(log_z[peak.rows], mass)
        lonely = torch.zeros_like(log_z)
        for m, peak in enumerate(self.peaks):
            single = (peak.visits <= 1).nonzero().flatten()
            if not len(single):
                continue
            row = peak.rows[single]
            others = self.log_share.index_select(1, row)
            others[m * kinds : (m + 1) * kinds] = -torch.inf
            log_r = self.take(row).log_density(peak.mean[single][None], others)[0]
            excess = peak.value[single] - log_z[row] - log_r
            share = torch.exp(self.log_share[m * kinds : (m + 1) * kinds, row]).sum(0)
            lonely[row] += torch.where(excess > log_slack, share, 0.0)
        return lonely

    def by_component(self, u: Tensor) -> Tensor:
        """log r_c(u) of every component, (M * C, K, N), float64; -inf where a row lacks the peak."""
        out = torch.full((len(self.log_share), *u.shape[:2]), -torch.inf, dtype=torch.float64, device=u.device)
        for m, peak in enumerate(self.peaks):
            for c, log in enumerate(self.log_densities(u, peak)):
                out[m * len(SHARES) + c][:, peak.rows] = log
        return out


def _allot(share: Tensor, total: int) -> Tensor:
    """Whole numbers (M, N) that sum to `total` in each column, nearest to total * share (largest remainders).

    Where `total` allows, the component with the heaviest tails of the first peak gets one draw at least.
    """
    exact = share * total
    whole = exact.floor()
    missing = total - whole.sum(0)
    rank = torch.argsort(torch.argsort(exact - whole, dim=0, descending=True), dim=0)
    return (whole + (rank < missing)).long()
