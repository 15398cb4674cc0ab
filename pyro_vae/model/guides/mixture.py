"""Mixtures of Normals as guides."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pyro_vae.model.component import out_features, positive_from
from pyro_vae.model.families.normal_mixture import NormalMixture
from pyro_vae.model.guides.gaussian import MINIMUM_SCALE
from pyro_vae.model.guides.guide import Guide
from pyro_vae.rows import positive

SPREAD = 0.5
"""Standard deviation of the components' means at the start, whatever x is."""


class Mixture(Guide):
    """q(z | x) = sum_k pi_k(x) N(mu_k(x), diag(sigma_k(x)^2)), for posteriors with several modes.

    Draws carry a gradient by implicit reparametrisation, see `pyro_vae.model.families.normal_mixture`. The components start
    apart by torch's ambient generator.

    Args:
        encoder: (N, *event_shape) -> (N, features); the heads are added here.
        latent_dim: D.
        num_components: how many.
        features: outputs of the encoder, needed only where it has no attribute `out_features`.
    """

    def __init__(self, encoder: nn.Module, latent_dim: int, num_components: int = 3, features: int | None = None) -> None:
        super().__init__()
        positive(latent_dim=latent_dim, num_components=num_components)
        self.encoder, self.latent_dim = encoder, latent_dim
        self.num_components, self.features = num_components, features
        size = out_features(encoder, features)
        self.logits = nn.Linear(size, num_components)
        self.loc = nn.Linear(size, num_components * latent_dim)
        self.raw_scale = nn.Linear(size, num_components * latent_dim)
        nn.init.normal_(self.loc.bias, std=SPREAD)

    def settings(self) -> dict[str, Any]:
        """See `Component.settings`."""
        return {
            "encoder": self.encoder,
            "latent_dim": self.latent_dim,
            "num_components": self.num_components,
            "features": self.features,
        }

    def forward(self, x: Tensor, *given: Tensor) -> Any:
        """q(z | x), batch shape (N,), event shape (D,)."""
        features = self.encode(x, given)
        shape = (self.num_components, self.latent_dim)
        loc, raw_scale = self.loc(features).unflatten(-1, shape), self.raw_scale(features).unflatten(-1, shape)
        return NormalMixture(self.logits(features), loc, positive_from(raw_scale, MINIMUM_SCALE))
