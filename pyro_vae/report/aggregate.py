"""The aggregate posterior q(z), the mean of q(z | x) over rows, against the prior p(z).

Averaged over rows the KL term of the ELBO falls into two (Hoffman & Johnson 2016, "ELBO surgery"):

    mean KL(q(z | x) || p(z)) = I_q(x; z) + KL(q(z) || p(z)),

what the code tells about the row, and how far codes are from what the prior would draw. With M rows, log q(z) at a draw
of row i is estimated by the mixture of the M guides. With row i's own guide among them, the estimate of I_q is that of the
information between z and the index of the row among those M, at most log M and too low for more rows; the mixture of the
other M - 1 makes it too high (Poole et al. 2019, arXiv:1905.06922, the bounds with a known conditional). In expectation
over rows I_q lies between the two, and KL(q(z) || p(z)) between what they leave of the mean KL. All in nats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_vae.layouts import Values
from pyro_vae.memory import CACHE, bytes_allocated
from pyro_vae.program import Program
from pyro_vae.report.looks import Look
from pyro_vae.report.measured import Measured, mean_of
from pyro_vae.rows import Rows, probe

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class Aggregate:
    """q(z) of M rows; float64.

    Attributes:
        kl: log q(z | x) - log p(z), mean over the draws of a row, (M,).
        with_own: log q(z | x) - log q(z), q(z) the mixture of all M guides, (M,).
        without_own: the same with the mixture of the other M - 1, (M,).
        mean: of q(z) in unconstrained coordinates, (D,).
        covariance: of q(z), (D, D).
        prior_mean: of p(z), (D,).
        prior_covariance: of p(z), (D, D).
        names: D names.
    """

    kl: Tensor
    with_own: Tensor
    without_own: Tensor
    mean: Tensor
    covariance: Tensor
    prior_mean: Tensor
    prior_covariance: Tensor
    names: tuple[str, ...]

    @property
    def mean_kl(self) -> Measured:
        """Mean KL(q(z | x) || p(z)), sampled: the sum of an information and the marginal KL beside it.

        All errors here are those of a mean over rows, sd / sqrt(M): they hold for other rows of the same kind.
        """
        return mean_of(self.kl)

    @property
    def information_lower(self) -> Measured:
        """I_q(x; z) from below: exact for the index among these M rows, so at most log M, too low for other rows."""
        return mean_of(self.with_own)

    @property
    def information_upper(self) -> Measured:
        """I_q(x; z) from above, in expectation; far above where codes of rows hardly overlap."""
        return mean_of(self.without_own)

    @property
    def marginal_kl_upper(self) -> Measured:
        """KL(q(z) || p(z)) from above: exact for the mixture of these M guides, too high for q(z) of all data."""
        return mean_of(self.kl - self.with_own)

    @property
    def marginal_kl_lower(self) -> Measured:
        """KL(q(z) || p(z)) from below, in expectation; it may be negative, which the KL is not."""
        return mean_of(self.kl - self.without_own)

    def __len__(self) -> int:
        """M."""
        return len(self.kl)

    def to_dataframe(self) -> pd.DataFrame:
        """One line a dimension: mean and standard deviation under q(z) and under p(z)."""
        import pandas as pd

        columns = {
            "q_mean": self.mean,
            "q_sd": self.covariance.diagonal().sqrt(),
            "prior_mean": self.prior_mean,
            "prior_sd": self.prior_covariance.diagonal().sqrt(),
        }
        frame = pd.DataFrame({name: value.cpu().numpy() for name, value in columns.items()})
        frame.insert(0, "dimension", self.names)
        return frame

    def __repr__(self) -> str:
        """Both terms between their bounds, and the moments that differ most."""
        prior_sd = self.prior_covariance.diagonal().sqrt()
        shift = (self.mean - self.prior_mean).abs() / prior_sd
        ratio = self.covariance.diagonal().sqrt() / prior_sd
        low, high = (bound.value for bound in (self.marginal_kl_lower, self.marginal_kl_upper))
        error = max(self.information_lower.standard_error, self.information_upper.standard_error)
        return (
            f"I_q(x; z) from {self.information_lower.value:.3g} to {self.information_upper.value:.3g} nats "
            f"(error {error:.2g}; {len(self)} rows, log M = {math.log(len(self)):.3g}), "
            f"KL(q(z) || p(z)) from {max(low, 0.0):.3g} to {high:.3g}\n"
            f"q(z) against p(z): mean up to {float(shift.max()):.2g} prior deviations off "
            f"({self.names[int(shift.argmax())]}), "
            f"deviation {float(ratio.min()):.2g} to {float(ratio.max()):.2g} times the prior's"
        )


def aggregate_of(
    program: Program, rows: Rows, draws: Sequence[Look], prior: Sequence[Look], names: tuple[str, ...], memory: int
) -> Aggregate:
    """The aggregate posterior of M rows from K looks at each, and as many at the prior.

    Args:
        program: gives log q(z | x) of one row's draws under the guides of the others.
        rows: M rows, two at least.
        draws: K looks at the guide.
        prior: looks at the prior.
        names: D names of the dimensions.
        memory: byte budget.
    """
    count, num_rows = len(draws), len(rows[0])
    z = {name: torch.cat([one.z[name] for one in draws]) for name in draws[0].z}  # (K M, *event_shape)
    step = _draws_that_fit(program, rows, z, memory)
    log_q = torch.cat([one.log_q for one in draws])
    kl = log_q - torch.cat([one.log_p for one in draws])
    own = torch.arange(num_rows, device=log_q.device).repeat(count)
    with_own, without_own = torch.empty_like(log_q), torch.empty_like(log_q)
    guides = program.guide_density(rows)
    for at in torch.arange(len(own), device=own.device).split(step):
        here = {name: value[at, None].expand(-1, num_rows, *value.shape[1:]) for name, value in z.items()}
        with torch.no_grad():
            density = guides.of_sites(here)
        with_own[at] = log_q[at] - torch.logsumexp(density, 1) + math.log(num_rows)
        density[torch.arange(len(at), device=at.device), own[at]] = -torch.inf
        without_own[at] = log_q[at] - torch.logsumexp(density, 1) + math.log(num_rows - 1)
    u, u_prior = (torch.cat([one.u for one in looks]) for looks in (draws, prior))
    kl, with_own, without_own = (value.reshape(count, num_rows).mean(0) for value in (kl, with_own, without_own))
    covariance, prior_covariance = (torch.atleast_2d(value.T.cov()) for value in (u, u_prior))
    return Aggregate(kl, with_own, without_own, u.mean(0), covariance, u_prior.mean(0), prior_covariance, names)


def _draws_that_fit(program: Program, rows: Rows, z: Values, memory: int) -> int:
    """Of how many draws the densities under all guides are computed at once: at least one."""
    guides = program.guide_density(probe(rows, 4))

    @torch.no_grad()
    def size(count: int) -> int:
        some = {name: value[:1, None].expand(count, 4, *value.shape[1:]) for name, value in z.items()}
        return bytes_allocated(lambda: guides.of_sites(some))

    large, small = size(4), size(2)
    each = max(1, -(-(large - small) // 8))  # two draws under four guides more
    encoders = max(0, small - 8 * each) // 4 * len(rows[0])
    return max(1, min(memory - encoders, CACHE) // (each * len(rows[0])))
