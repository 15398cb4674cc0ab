"""What the command line calls priors, likelihoods, guides and objectives."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.distributions import kl_divergence

from pyro_vae.learning import objectives
from pyro_vae.learning.objectives import Objective
from pyro_vae.model import guides, likelihoods, nets, priors
from pyro_vae.model.vae import VAE


class Sizes(NamedTuple):
    """What parts are made for: latent dimensions, columns of a row, the encoder's hidden layers, grey levels."""

    latent: int
    columns: int
    hidden: tuple[int, ...]
    levels: int

    def decoder(self, width: int = 1) -> nets.MLP:
        """The mirror image of the encoder, `width` numbers a column."""
        return nets.MLP(self.latent, width * self.columns, hidden=self.hidden[::-1])


PRIORS: dict[str, Callable[[Sizes], priors.Prior]] = {
    "standard": lambda s: priors.StandardNormal(s.latent),
    "normal": lambda s: priors.Normal(s.latent),
    "mixture": lambda s: priors.Mixture(s.latent),
    "vamp": lambda s: priors.VampPrior(s.latent, (s.columns,)),
    "flow": lambda s: priors.Flow(s.latent),
    "laplace": lambda s: priors.Laplace(s.latent),
    "student": lambda s: priors.StudentT(s.latent),
}

_Make = Callable[[Sizes, str | None, bool], likelihoods.Likelihood]

LIKELIHOODS: dict[str, _Make] = {
    "normal": lambda s, scale, m: likelihoods.Normal(s.decoder(), scale=_scale(scale, s), missing=m),
    "low-rank": lambda s, _, m: likelihoods.LowRankNormal(s.decoder(), rank=5, missing=m),
    "student": lambda s, scale, m: likelihoods.StudentT(s.decoder(), scale=_scale(scale, s), missing=m),
    "laplace": lambda s, scale, m: likelihoods.Laplace(s.decoder(), scale=_scale(scale, s), missing=m),
    "log-normal": lambda s, scale, m: likelihoods.LogNormal(s.decoder(), scale=_scale(scale, s), missing=m),
    "beta": lambda s, _, m: likelihoods.Beta(s.decoder(), concentration=likelihoods.Learned(initial=10.0), missing=m),
    "bernoulli": lambda s, _, m: likelihoods.Bernoulli(s.decoder(), missing=m),
    "continuous-bernoulli": lambda s, _, m: likelihoods.ContinuousBernoulli(s.decoder(), missing=m),
    "logistic": lambda s, _, m: likelihoods.DiscretisedLogistic(
        s.decoder(), scale=likelihoods.Learned(initial=0.2), levels=s.levels, missing=m
    ),
    "logistic-mixture": lambda s, _, m: likelihoods.DiscretisedLogisticMixture(
        s.decoder(9), num_components=3, levels=s.levels, missing=m
    ),
    "poisson": lambda s, _, m: likelihoods.Poisson(s.decoder(), missing=m),
    "negative-binomial": lambda s, _, m: likelihoods.NegativeBinomial(
        s.decoder(), dispersion=likelihoods.Learned(s.columns), missing=m
    ),
    "zero-inflated": lambda s, _, m: likelihoods.ZeroInflatedNegativeBinomial(
        s.decoder(), dispersion=likelihoods.Learned(s.columns), missing=m
    ),
}
SCALED = ("normal", "student", "laplace", "log-normal")
"""Likelihoods that --scale is for."""

COUNTS = ("poisson", "negative-binomial", "zero-inflated")
"""Likelihoods whose encoder reads log(1 + x)."""

GUIDES: dict[str, Callable[[nn.Module, int], guides.Guide]] = {
    "diagonal": guides.DiagonalNormal,
    "full": guides.FullNormal,
    "low-rank": guides.LowRankNormal,
    "autoregressive": guides.InverseAutoregressive,
    "spline": guides.Spline,
    "mixture": guides.Mixture,
}

OBJECTIVES: dict[str, Callable[[int], Objective]] = {
    "iwae": objectives.IWAE,
    "stl": objectives.STL,
    "dreg": objectives.DReG,
    "wake-sleep": objectives.ReweightedWakeSleep,
}
"""Besides elbo: called with a number of particles."""


def objective(name: str, particles: int | None) -> Objective:
    """The objective of this name, other than elbo; without a number of particles it has its own."""
    return OBJECTIVES[name]() if particles is None else OBJECTIVES[name](particles)  # type: ignore[call-arg]


def kl_for(vae: VAE) -> objectives.KL:
    """`analytic_kl` where torch has a formula for the VAE's guide and prior, else `sampled_kl`."""
    with torch.no_grad():
        try:
            kl_divergence(vae.q_z(*vae.template(1)), vae.p_z())
        except NotImplementedError:
            return objectives.sampled_kl
    return objectives.analytic_kl


def _scale(name: str | None, sizes: Sizes) -> likelihoods.Scale:
    """A scale by its name on the command line, or a number."""
    if name == "learned":
        return likelihoods.Learned()
    if name == "optimal":
        return likelihoods.Optimal()
    if name == "per-dimension":
        return likelihoods.Learned(sizes.columns)
    if name == "network":
        return likelihoods.FromNetwork(sizes.decoder())
    try:
        return likelihoods.Fixed(float(str(name)))
    except ValueError as error:
        raise ValueError(
            f"--scale {name!r} is none of learned, optimal, per-dimension, network, nor a positive number."
        ) from error
