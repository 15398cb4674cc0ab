"""Normal priors."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.model.component import positive_from
from pyro_vae.model.priors.prior import Prior
from pyro_vae.rows import positive

MINIMUM_SCALE = 1e-3


class StandardNormal(Prior):
    """z ~ N(0, I).

    Args:
        latent_dim: D.

    Examples:
        >>> StandardNormal(3)().event_shape
        torch.Size([3])
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        positive(latent_dim=latent_dim)
        self.latent_dim = latent_dim
        self.register_buffer("loc", torch.zeros(latent_dim), persistent=False)
        self.register_buffer("scale", torch.ones(latent_dim), persistent=False)

    def settings(self) -> dict[str, Any]:
        """See `Component.settings`."""
        return {"latent_dim": self.latent_dim}

    def forward(self) -> Any:
        """N(0, I), event shape (D,)."""
        return dist.Normal(self.loc, self.scale).to_event(1)


class Normal(Prior):
    """z ~ N(m, L L'), mean and covariance learned; it starts at N(0, I).

    Args:
        latent_dim: D.

    Examples:
        >>> Normal(3)().covariance_matrix.detach().round()
        tensor([[1., 0., 0.],
                [0., 1., 0.],
                [0., 0., 1.]])
    """

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        positive(latent_dim=latent_dim)
        self.latent_dim = latent_dim
        self.loc = nn.Parameter(torch.zeros(latent_dim))
        self.raw_diagonal = nn.Parameter(torch.full((latent_dim,), unit_raw()))
        self.lower = nn.Parameter(torch.zeros(latent_dim * (latent_dim - 1) // 2)) if latent_dim > 1 else None

    def settings(self) -> dict[str, Any]:
        """See `Component.settings`."""
        return {"latent_dim": self.latent_dim}

    def forward(self) -> Any:
        """N(m, L L'), event shape (D,)."""
        factor = torch.diag_embed(positive_from(self.raw_diagonal, MINIMUM_SCALE))
        if self.lower is not None:
            row, column = torch.tril_indices(self.latent_dim, self.latent_dim, offset=-1, device=factor.device)
            factor[row, column] = self.lower
        return dist.MultivariateNormal(self.loc, scale_tril=factor)


def unit_raw(scale: float = 1.0) -> float:
    """What `positive_from(raw, MINIMUM_SCALE)` makes `scale` of."""
    return math.log(math.expm1(scale - MINIMUM_SCALE))
