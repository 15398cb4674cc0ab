"""Whether Hamiltonian chains have converged: R-hat and effective draws, computed by ArviZ.

R-hat is that of Vehtari et al. 2021 (arXiv:1903.08008, eq. 4 and sec. 3): the larger of the split R-hat of the
rank-normalised draws and of their distances from the median. They recommend four chains, R-hat below 1.01, and bulk and
tail ESS above 100 a chain. Chains that all missed a mode have a good R-hat.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.posterior.chains import Chains
from pyro_vae.report.groups import Labels

LARGEST_R_HAT, LEAST_ESS = 1.01, 100
"""R-hat of a row that may be believed, and its effective draws a chain."""

TAILS = (0.05, 0.95)
"""Quantiles of which the tail ESS is the smaller."""


@dataclass(frozen=True, repr=False)
class Mixing:
    """R-hat and effective draws of each row and latent number; float64.

    Attributes:
        r_hat: by site, (N, *event_shape); NaN where a number never changed.
        ess_bulk: effective draws for means and medians, likewise.
        ess_tail: effective draws for the 5 % and the 95 % quantile, likewise.
        num_chains: C.
    """

    r_hat: Mapping[str, Tensor]
    ess_bulk: Mapping[str, Tensor]
    ess_tail: Mapping[str, Tensor]
    num_chains: int

    @property
    def worst_r_hat(self) -> Tensor:
        """The largest R-hat of each row, (N,); infinite where one is not a number."""
        each = torch.cat([value.reshape(len(value), -1) for value in self.r_hat.values()], 1)
        return each.nan_to_num(nan=torch.inf).amax(1)

    @property
    def least_ess(self) -> Tensor:
        """The smallest number of effective draws of each row, bulk or tail, (N,); 0 where one is not a number."""
        each = [*self.ess_bulk.values(), *self.ess_tail.values()]
        return torch.cat([value.reshape(len(value), -1) for value in each], 1).nan_to_num(nan=0.0).amin(1)

    @property
    def converged(self) -> Tensor:
        """Rows with R-hat at most 1.01 and at least 100 effective draws a chain, boolean (N,)."""
        return (self.worst_r_hat <= LARGEST_R_HAT) & (self.least_ess >= LEAST_ESS * self.num_chains)

    def __repr__(self) -> str:
        """Worst values over all rows, and how many rows converged."""
        row = int(self.worst_r_hat.argmax())
        return (
            f"R-hat at most {float(self.worst_r_hat.max()):.3f} (row {row}), effective draws at least "
            f"{float(self.least_ess.min()):.0f}; {int(self.converged.sum())} of {len(self.converged)} rows have R-hat "
            f"<= {LARGEST_R_HAT} and {LEAST_ESS} effective draws a chain"
        )


def chain_mixing(chains: Chains) -> Mixing:
    """R-hat and effective draws of every row and latent number of `chains`.

    Args:
        chains: C >= 2 chains of S >= 4 draws, as `posterior.hamiltonian` makes them.

    Raises:
        ValueError: fewer chains or draws.
    """
    import arviz as az

    num_chains, num_draws, num_rows = chains.acceptance.shape
    if num_chains < 2 or num_draws < 4:
        raise ValueError(
            f"R-hat compares chains, at least 2 of 4 draws, and was given {num_chains} of {num_draws}: draw more."
        )
    labels = Labels({name: tuple(value.shape[3:]) for name, value in chains.z.items()}, num_rows)
    posterior = labels.dataset({name: value.double() for name, value in chains.z.items()})

    def by_site(found: Any) -> dict[str, Tensor]:
        return {name: torch.tensor(found[name].values, dtype=torch.float64) for name in chains.z}

    with np.errstate(divide="ignore", invalid="ignore"):  # a number that never changed has no variance
        r_hat, bulk = az.rhat(posterior), az.ess(posterior, method="bulk")
        tail = az.ess(posterior, method="tail", prob=TAILS)  # ArviZ 1.x takes others unless told
    return Mixing(by_site(r_hat), by_site(bulk), by_site(tail), num_chains)
