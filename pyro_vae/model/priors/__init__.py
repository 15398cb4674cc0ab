"""Priors p(z): `forward()` returns the distribution of one row's latent vector z in R^D."""

from pyro_vae.model.priors.custom import Custom
from pyro_vae.model.priors.flow import Flow
from pyro_vae.model.priors.gaussian import Normal, StandardNormal
from pyro_vae.model.priors.mixture import Mixture
from pyro_vae.model.priors.prior import Prior
from pyro_vae.model.priors.product import Product
from pyro_vae.model.priors.tails import Laplace, StudentT
from pyro_vae.model.priors.vamp import VampPrior

__all__ = ["Custom", "Flow", "Laplace", "Mixture", "Normal", "Prior", "Product", "StandardNormal", "StudentT", "VampPrior"]
