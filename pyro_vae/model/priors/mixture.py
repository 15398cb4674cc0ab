"""A learned mixture of Normals."""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
from torch import nn

from pyro_vae.model.component import positive_from
from pyro_vae.model.families.normal_mixture import NormalMixture
from pyro_vae.model.priors.gaussian import MINIMUM_SCALE, unit_raw
from pyro_vae.model.priors.prior import Prior
from pyro_vae.rows import positive


class Mixture(Prior):
    """z ~ sum_k pi_k N(m_k, diag s_k^2), all of it learned.

    The means start at draws of N(0, I / 2) by torch's ambient generator and the variances at 1 / 2, so that no two
    components are the same and the whole has about the moments of N(0, I).

    Args:
        latent_dim: D.
        num_components: how many.
    """

    def __init__(self, latent_dim: int, num_components: int = 10) -> None:
        super().__init__()
        positive(latent_dim=latent_dim, num_components=num_components)
        self.latent_dim, self.num_components = latent_dim, num_components
        self.logits = nn.Parameter(torch.zeros(num_components))
        self.loc = nn.Parameter(sqrt(0.5) * torch.randn(num_components, latent_dim))
        self.raw_scale = nn.Parameter(torch.full((num_components, latent_dim), unit_raw(sqrt(0.5))))

    def settings(self) -> dict[str, Any]:
        """See `Component.settings`."""
        return {"latent_dim": self.latent_dim, "num_components": self.num_components}

    def forward(self) -> Any:
        """The mixture, event shape (D,)."""
        return NormalMixture(self.logits, self.loc, positive_from(self.raw_scale, MINIMUM_SCALE))
