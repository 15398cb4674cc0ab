"""Guides q(z | x): `forward(x)` returns the distribution of a row's latents; each owns its encoder."""

from pyro_vae.model.guides.custom import Custom
from pyro_vae.model.guides.flow import InverseAutoregressive, Spline
from pyro_vae.model.guides.gaussian import DiagonalNormal, FullNormal, LowRankNormal
from pyro_vae.model.guides.guide import Guide
from pyro_vae.model.guides.mixture import Mixture
from pyro_vae.model.guides.semi_amortised import SemiAmortised

__all__ = [
    "Custom",
    "DiagonalNormal",
    "FullNormal",
    "Guide",
    "InverseAutoregressive",
    "LowRankNormal",
    "Mixture",
    "SemiAmortised",
    "Spline",
]
