"""A small mixture of peaks, asymmetric, for tests of what draws from it and of what improves it."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_vae.posterior.mixture import SHARES, Mixture
from pyro_vae.posterior.modes import Modes
from pyro_vae.posterior.shapes import Dense

KINDS = len(SHARES)
"""Components of a peak."""


def two_peaks(dim: int = 2) -> Mixture:
    """Row 0 has two modes of different shapes, row 1 has one; asymmetric."""
    generator = torch.Generator().manual_seed(3)
    row = torch.tensor([0, 0, 1])
    u = torch.tensor([[1.0, 0.0], [-2.0, 0.5], [0.0, 0.3]], dtype=torch.float64)[:, :dim]
    skew = torch.randn(3, dim, dim, generator=generator, dtype=torch.float64)
    precision = skew @ skew.mT + torch.eye(dim, dtype=torch.float64)
    value = torch.tensor([0.0, -1.0, 0.0], dtype=torch.float64)
    return Mixture.at(Modes(row, u, value, Dense.of(torch.linalg.cholesky(precision)), torch.tensor([3, 1, 4])), 2)


def strata(mixture: Mixture, num_draws: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draws of a mixture in fixed numbers: u, component and the logarithms of the shares that the numbers make."""
    counts = mixture.allot(num_draws)
    component = torch.stack([torch.arange(len(counts)).repeat_interleave(column) for column in counts.T], 1)
    return mixture.draw(component, torch.float64), component, torch.log(counts / num_draws)
