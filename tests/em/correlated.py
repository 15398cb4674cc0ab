"""Rows of correlated columns with different means, units and noises, and holes in them."""

from __future__ import annotations

import torch
from torch import Tensor

COLUMNS, LATENT = 7, 2


def draw(count: int = 300, columns: int = COLUMNS, latent_dim: int = LATENT, *, seed: int = 0) -> Tensor:
    """Correlated columns of different means, units and noises, (count, columns), float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(columns, latent_dim, generator=generator, dtype=torch.float64)
    z = torch.randn(count, latent_dim, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, columns, generator=generator, dtype=torch.float64)
    x = z @ weight.mT + noise * torch.linspace(0.4, 1.2, columns).double()
    return x * torch.logspace(-1.0, 1.0, columns).double() + torch.linspace(-5.0, 20.0, columns).double()


def with_holes(x: Tensor, *, share: float = 0.25) -> Tensor:
    """Missing at random, rows 3 and 8 whole, row 0 complete."""
    gone = torch.rand(x.shape, generator=torch.Generator().manual_seed(5)) < share
    gone[0], gone[3], gone[8] = False, True, True
    return torch.where(gone, torch.nan, x)
