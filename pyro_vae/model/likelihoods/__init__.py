"""Likelihoods p(x | z): `forward(z)` returns the distribution of one row given its latents; each owns its decoder."""

from pyro_vae.model.likelihoods.binary import Bernoulli
from pyro_vae.model.likelihoods.bounded import Beta, ContinuousBernoulli
from pyro_vae.model.likelihoods.categorical import Categorical
from pyro_vae.model.likelihoods.counts import Binomial, NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial
from pyro_vae.model.likelihoods.covariance import FullNormal, LowRankNormal
from pyro_vae.model.likelihoods.custom import Custom
from pyro_vae.model.likelihoods.gaussian import LogNormal, Normal
from pyro_vae.model.likelihoods.levels import DiscretisedLogistic, DiscretisedLogisticMixture
from pyro_vae.model.likelihoods.likelihood import Elementwise, Likelihood
from pyro_vae.model.likelihoods.robust import Laplace, StudentT
from pyro_vae.model.scales import Fixed, FromNetwork, Learned, Optimal, Scale

__all__ = [
    "Bernoulli",
    "Beta",
    "Binomial",
    "Categorical",
    "ContinuousBernoulli",
    "Custom",
    "DiscretisedLogistic",
    "DiscretisedLogisticMixture",
    "Elementwise",
    "Fixed",
    "FromNetwork",
    "FullNormal",
    "Laplace",
    "Learned",
    "Likelihood",
    "LogNormal",
    "LowRankNormal",
    "NegativeBinomial",
    "Normal",
    "Optimal",
    "Poisson",
    "Scale",
    "StudentT",
    "ZeroInflatedNegativeBinomial",
]
