"""Priors p(z): `forward()` returns the distribution of one row's latent vector z in R^D."""

from pyro_vae.model.priors.custom import Custom
from pyro_vae.model.priors.gaussian import StandardNormal
from pyro_vae.model.priors.prior import Prior

__all__ = ["Custom", "Prior", "StandardNormal"]
