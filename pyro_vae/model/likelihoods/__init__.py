"""Likelihoods p(x | z): `forward(z)` returns the distribution of one row given its latents; each owns its decoder."""

from pyro_vae.model.likelihoods.binary import Bernoulli
from pyro_vae.model.likelihoods.custom import Custom
from pyro_vae.model.likelihoods.gaussian import Normal
from pyro_vae.model.likelihoods.likelihood import Elementwise, Likelihood
from pyro_vae.model.scales import Fixed, FromNetwork, Learned, Scale

__all__ = ["Bernoulli", "Custom", "Elementwise", "Fixed", "FromNetwork", "Learned", "Likelihood", "Normal", "Scale"]
