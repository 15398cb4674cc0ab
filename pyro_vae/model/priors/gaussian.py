"""Normal priors."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vae.model.priors.prior import Prior
from pyro_vae.rows import positive


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
