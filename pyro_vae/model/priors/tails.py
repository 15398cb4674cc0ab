"""Priors with heavier tails than the Normal: independent dimensions, nothing learned."""

from __future__ import annotations

from math import isfinite
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vae.model.priors.prior import Prior
from pyro_vae.rows import positive


class Laplace(Prior):
    """z_d ~ Laplace(0, b), log p = -|z_d| / b - log 2b: many latents near zero, a few far from it.

    Args:
        latent_dim: D.
        scale: b; the standard deviation is b sqrt 2.
    """

    loc: Tensor
    width: Tensor

    def __init__(self, latent_dim: int, scale: float = 1.0) -> None:
        super().__init__()
        positive(latent_dim=latent_dim)
        _above_zero(scale=scale)
        self.latent_dim, self.scale = latent_dim, float(scale)
        self.register_buffer("loc", torch.zeros(latent_dim), persistent=False)
        self.register_buffer("width", torch.full((latent_dim,), float(scale)), persistent=False)

    def settings(self) -> dict[str, Any]:
        """See `Component.settings`."""
        return {"latent_dim": self.latent_dim, "scale": self.scale}

    def forward(self) -> Any:
        """Independent Laplace distributions, event shape (D,)."""
        return dist.Laplace(self.loc, self.width).to_event(1)


class StudentT(Prior):
    """z_d ~ scale * t_df: Student's t in each dimension.

    Args:
        latent_dim: D.
        df: degrees of freedom; the variance is infinite up to 2.
        scale: the width.
    """

    degrees: Tensor
    loc: Tensor
    width: Tensor

    def __init__(self, latent_dim: int, df: float = 5.0, scale: float = 1.0) -> None:
        super().__init__()
        positive(latent_dim=latent_dim)
        _above_zero(df=df, scale=scale)
        self.latent_dim, self.df, self.scale = latent_dim, float(df), float(scale)
        self.register_buffer("degrees", torch.full((latent_dim,), float(df)), persistent=False)
        self.register_buffer("loc", torch.zeros(latent_dim), persistent=False)
        self.register_buffer("width", torch.full((latent_dim,), float(scale)), persistent=False)

    def settings(self) -> dict[str, Any]:
        """See `Component.settings`."""
        return {"latent_dim": self.latent_dim, "df": self.df, "scale": self.scale}

    def forward(self) -> Any:
        """Independent t distributions, event shape (D,)."""
        return dist.StudentT(self.degrees, self.loc, self.width).to_event(1)


def _above_zero(**values: float) -> None:
    for name, value in values.items():
        if not (isfinite(value) and value > 0.0):
            raise ValueError(f"{name}={value!r} must be a positive number.")
