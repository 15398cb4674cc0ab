"""One table of constructors a kind: a new prior, likelihood or guide is one class in the package and one line here.

Every constructor is called with the event shape or the latent size that a test asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import nn

from pyro_vae.model import guides, likelihoods, nets, priors

EVENT_SHAPES = ((1,), (3,), (2, 3))
LATENT_DIMS = (1, 2, 5)
COLUMNS = 6
"""Of the rows that a `VampPrior` of the table makes up, and that the guide beside it reads."""


class Reshaped(nn.Module):
    """A user's own module: an MLP whose output has an event shape."""

    def __init__(self, latent_dim: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.net, self.shape, self.in_features = nn.Linear(latent_dim, prod(shape)), shape, latent_dim

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.net(z).reshape(*z.shape[:-1], *self.shape)


def decoder(latent_dim: int, shape: tuple[int, ...]) -> nn.Module:
    return nets.MLP(latent_dim, shape[0], hidden=(7,)) if len(shape) == 1 else Reshaped(latent_dim, shape)


def repeated(shape: tuple[int, ...], count: int) -> tuple[int, ...]:
    """The shape of `count` outputs for each number of a row."""
    return (*shape[:-1], shape[-1] * count)


PRIORS: dict[str, Callable[[int], priors.Prior]] = {
    "StandardNormal": priors.StandardNormal,
    "Normal": priors.Normal,
    "Mixture": lambda d: priors.Mixture(d, num_components=3),
    "VampPrior": lambda d: priors.VampPrior(d, COLUMNS, num_inputs=4),
    "Flow": lambda d: priors.Flow(d, transforms=2, bins=4, hidden=(8,)),
    "Laplace": lambda d: priors.Laplace(d, scale=0.8),
    "StudentT": lambda d: priors.StudentT(d, df=4.0, scale=0.7),
    "Product": lambda d: (
        priors.Product(priors.Laplace(1), priors.StandardNormal(d - 1)) if d > 1 else priors.Product(priors.StudentT(1))
    ),
}

LIKELIHOODS: dict[str, Callable[[int, tuple[int, ...]], likelihoods.Likelihood]] = {
    "Normal, fixed": lambda d, shape: likelihoods.Normal(decoder(d, shape), scale=0.3),
    "Normal, learned": lambda d, shape: likelihoods.Normal(decoder(d, shape), scale=likelihoods.Learned()),
    "Normal, per dimension": lambda d, shape: likelihoods.Normal(decoder(d, shape), scale=likelihoods.Learned(shape)),
    "Normal, network": lambda d, shape: likelihoods.Normal(
        decoder(d, shape), scale=likelihoods.FromNetwork(decoder(d, shape))
    ),
    "Normal, optimal": lambda d, shape: likelihoods.Normal(decoder(d, shape), scale=likelihoods.Optimal()),
    "Normal, optimal, per dimension": lambda d, shape: likelihoods.Normal(
        decoder(d, shape), scale=likelihoods.Optimal(shape, initial=0.7)
    ),
    "FullNormal": lambda d, shape: likelihoods.FullNormal(decoder(d, shape), initial=0.8),
    "LowRankNormal": lambda d, shape: likelihoods.LowRankNormal(decoder(d, shape), rank=2),
    "StudentT": lambda d, shape: likelihoods.StudentT(decoder(d, shape), scale=likelihoods.Learned(), df=4.0),
    "StudentT, learned df": lambda d, shape: likelihoods.StudentT(
        decoder(d, shape), scale=likelihoods.Learned(shape, initial=0.6), df=likelihoods.Learned(initial=5.0)
    ),
    "Laplace": lambda d, shape: likelihoods.Laplace(decoder(d, shape), scale=likelihoods.Learned()),
    "Bernoulli": lambda d, shape: likelihoods.Bernoulli(decoder(d, shape)),
    "ContinuousBernoulli": lambda d, shape: likelihoods.ContinuousBernoulli(decoder(d, shape)),
    "Categorical": lambda d, shape: likelihoods.Categorical(decoder(d, repeated(shape, 4)), num_classes=4),
    "Binomial": lambda d, shape: likelihoods.Binomial(decoder(d, shape), total_count=5),
    "DiscretisedLogistic": lambda d, shape: likelihoods.DiscretisedLogistic(
        decoder(d, shape), scale=likelihoods.Learned(initial=0.2), levels=9
    ),
    "DiscretisedLogisticMixture": lambda d, shape: likelihoods.DiscretisedLogisticMixture(
        decoder(d, repeated(shape, 6)), num_components=2, levels=12, top=3.0
    ),
    "Poisson": lambda d, shape: likelihoods.Poisson(decoder(d, shape)),
    "NegativeBinomial": lambda d, shape: likelihoods.NegativeBinomial(decoder(d, shape)),
    "NegativeBinomial, per dimension": lambda d, shape: likelihoods.NegativeBinomial(
        decoder(d, shape), dispersion=likelihoods.Learned(shape, initial=0.4)
    ),
    "ZeroInflatedNegativeBinomial": lambda d, shape: likelihoods.ZeroInflatedNegativeBinomial(decoder(d, shape)),
    "ZeroInflatedNegativeBinomial, gate": lambda d, shape: likelihoods.ZeroInflatedNegativeBinomial(
        decoder(d, shape), dispersion=likelihoods.FromNetwork(decoder(d, shape)), gate=decoder(d, shape)
    ),
    "LogNormal": lambda d, shape: likelihoods.LogNormal(decoder(d, shape), scale=likelihoods.Learned()),
    "Beta": lambda d, shape: likelihoods.Beta(decoder(d, shape), concentration=likelihoods.Learned(initial=3.0)),
}
VECTORS_ONLY = {"FullNormal", "LowRankNormal"}
LIKELIHOOD_SHAPES = [
    (name, shape) for name in LIKELIHOODS for shape in EVENT_SHAPES if len(shape) == 1 or name not in VECTORS_ONLY
]
NO_DRAWS_ON_META = {"Binomial"}  # torch.binomial has no kernel there

GUIDES: dict[str, Callable[[int, int], guides.Guide]] = {
    "DiagonalNormal": lambda columns, d: guides.DiagonalNormal(nets.MLP(columns, hidden=(7,)), latent_dim=d),
    "FullNormal": lambda columns, d: guides.FullNormal(nets.MLP(columns, hidden=(7,)), latent_dim=d),
    "LowRankNormal": lambda columns, d: guides.LowRankNormal(nets.MLP(columns, hidden=(7,)), latent_dim=d, rank=2),
    "InverseAutoregressive": lambda columns, d: guides.InverseAutoregressive(
        nets.MLP(columns, hidden=(7,)), latent_dim=d, hidden=(8,)
    ),
    "Spline": lambda columns, d: guides.Spline(nets.MLP(columns, hidden=(7,)), latent_dim=d, bins=4, hidden=(8,)),
    "Mixture": lambda columns, d: guides.Mixture(nets.MLP(columns, hidden=(7,)), latent_dim=d),
    "SemiAmortised": lambda columns, d: guides.SemiAmortised(
        guides.DiagonalNormal(nets.MLP(columns, hidden=(7,)), latent_dim=d)
    ),
}

PLAIN_GUIDES = ("DiagonalNormal", "FullNormal")
"""For tests that cross guides with likelihoods; the others meet all priors in tests/model/guides and tests/model/priors."""


def p_z(prior: priors.Prior) -> Any:
    """The distribution of a prior of the table, with a guide where it reads one."""
    return prior(GUIDES["DiagonalNormal"](COLUMNS, prior.latent_dim)) if prior.reads_guide else prior()


def every_parameter_has_a_gradient(module: nn.Module, value: Any) -> None:
    value.sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, f"{name} got no gradient"
        assert torch.isfinite(parameter.grad).all(), f"{name} has a gradient that is not finite"
        assert (parameter.grad != 0).any(), f"{name} has a gradient of zero"
