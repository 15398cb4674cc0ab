"""Normal guides: z = mu(x) + L(x) eps with eps ~ N(0, I), L diagonal (`DiagonalNormal`) or triangular (`FullNormal`).

`LowRankNormal` lies between: W(x) eta on top of a diagonal.
"""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.model import kl  # noqa: F401 - registers the exact KL of FullNormal
from pyro_vae.model.component import out_features, positive_from
from pyro_vae.model.guides.guide import Guide
from pyro_vae.rows import positive

MINIMUM_SCALE = 1e-6


class DiagonalNormal(Guide):
    """q(z | x) = N(mu(x), diag(sigma(x)^2)), Kingma & Welling 2014.

    Args:
        encoder: (N, *event_shape) -> (N, features); the heads for mu and sigma are added here.
        latent_dim: D.
        features: outputs of the encoder, needed only where it has no attribute `out_features`.
    """

    def __init__(self, encoder: nn.Module, latent_dim: int, features: int | None = None) -> None:
        super().__init__()
        positive(latent_dim=latent_dim)
        self.encoder, self.latent_dim, self.features = encoder, latent_dim, features
        self.loc = nn.Linear(out_features(encoder, features), latent_dim)
        self.raw_scale = nn.Linear(out_features(encoder, features), latent_dim)

    def settings(self) -> dict[str, Any]:
        """See `Component.settings`."""
        return {"encoder": self.encoder, "latent_dim": self.latent_dim, "features": self.features}

    def forward(self, x: Tensor, *given: Tensor) -> Any:
        """q(z | x), batch shape (N,), event shape (D,)."""
        features = self.encode(x, given)
        scale = positive_from(self.raw_scale(features), MINIMUM_SCALE)
        return dist.Normal(self.loc(features), scale).to_event(1)


class FullNormal(Guide):
    """q(z | x) = N(mu(x), L(x) L(x)') with L lower triangular, its diagonal positive.

    Against N(0, I), or any Normal with independent dimensions, its KL is exact, see `pyro_vae.model.kl`.

    Args:
        encoder: (N, *event_shape) -> (N, features); the heads are added here.
        latent_dim: D; the head of L has D (D - 1) / 2 + D outputs.
        features: outputs of the encoder, needed only where it has no attribute `out_features`.
    """

    def __init__(self, encoder: nn.Module, latent_dim: int, features: int | None = None) -> None:
        super().__init__()
        positive(latent_dim=latent_dim)
        self.encoder, self.latent_dim, self.features = encoder, latent_dim, features
        size = out_features(encoder, features)
        self.loc = nn.Linear(size, latent_dim)
        self.raw_diagonal = nn.Linear(size, latent_dim)
        self.lower = nn.Linear(size, latent_dim * (latent_dim - 1) // 2) if latent_dim > 1 else None

    def settings(self) -> dict[str, Any]:
        """See `Component.settings`."""
        return {"encoder": self.encoder, "latent_dim": self.latent_dim, "features": self.features}

    def forward(self, x: Tensor, *given: Tensor) -> Any:
        """q(z | x), batch shape (N,), event shape (D,)."""
        features = self.encode(x, given)
        factor = torch.diag_embed(positive_from(self.raw_diagonal(features), MINIMUM_SCALE))
        if self.lower is not None:
            row, column = torch.tril_indices(self.latent_dim, self.latent_dim, offset=-1, device=factor.device)
            factor[..., row, column] = self.lower(features)
        return dist.MultivariateNormal(self.loc(features), scale_tril=factor)


class LowRankNormal(Guide):
    """q(z | x) = N(mu(x), W(x) W(x)' + diag(sigma(x)^2)), W of D rows and few columns.

    D (rank + 2) heads instead of the D (D + 3) / 2 of `FullNormal`. Its KL against Normals is exact, see
    `pyro_vae.model.kl`.

    Args:
        encoder: (N, *event_shape) -> (N, features); the heads are added here.
        latent_dim: D.
        rank: columns of W.
        features: outputs of the encoder, needed only where it has no attribute `out_features`.
    """

    def __init__(self, encoder: nn.Module, latent_dim: int, rank: int = 2, features: int | None = None) -> None:
        super().__init__()
        positive(latent_dim=latent_dim, rank=rank)
        self.encoder, self.latent_dim, self.rank, self.features = encoder, latent_dim, rank, features
        size = out_features(encoder, features)
        self.loc = nn.Linear(size, latent_dim)
        self.raw_scale = nn.Linear(size, latent_dim)
        self.factor = nn.Linear(size, latent_dim * rank)

    def settings(self) -> dict[str, Any]:
        """See `Component.settings`."""
        return {
            "encoder": self.encoder,
            "latent_dim": self.latent_dim,
            "rank": self.rank,
            "features": self.features,
        }

    def forward(self, x: Tensor, *given: Tensor) -> Any:
        """q(z | x), batch shape (N,), event shape (D,)."""
        features = self.encode(x, given)
        factor = self.factor(features).unflatten(-1, (self.latent_dim, self.rank))
        variance = positive_from(self.raw_scale(features), MINIMUM_SCALE).square()
        return dist.LowRankMultivariateNormal(self.loc(features), factor, variance)
