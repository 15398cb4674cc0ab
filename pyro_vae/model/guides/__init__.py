"""Guides q(z | x): `forward(x)` returns the distribution of a row's latents; each owns its encoder."""

from pyro_vae.model.guides.custom import Custom
from pyro_vae.model.guides.gaussian import DiagonalNormal, FullNormal
from pyro_vae.model.guides.guide import Guide

__all__ = ["Custom", "DiagonalNormal", "FullNormal", "Guide"]
