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


class Reshaped(nn.Module):
    """A user's own module: an MLP whose output has an event shape."""

    def __init__(self, latent_dim: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.net, self.shape, self.in_features = nn.Linear(latent_dim, prod(shape)), shape, latent_dim

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.net(z).reshape(*z.shape[:-1], *self.shape)


def decoder(latent_dim: int, shape: tuple[int, ...]) -> nn.Module:
    return nets.MLP(latent_dim, shape[0], hidden=(7,)) if len(shape) == 1 else Reshaped(latent_dim, shape)


PRIORS: dict[str, Callable[[int], priors.Prior]] = {
    "StandardNormal": priors.StandardNormal,
}

LIKELIHOODS: dict[str, Callable[[int, tuple[int, ...]], likelihoods.Likelihood]] = {
    "Normal, fixed": lambda d, shape: likelihoods.Normal(decoder(d, shape), scale=0.3),
    "Normal, learned": lambda d, shape: likelihoods.Normal(decoder(d, shape), scale=likelihoods.Learned()),
    "Normal, per dimension": lambda d, shape: likelihoods.Normal(decoder(d, shape), scale=likelihoods.Learned(shape)),
    "Normal, network": lambda d, shape: likelihoods.Normal(
        decoder(d, shape), scale=likelihoods.FromNetwork(decoder(d, shape))
    ),
    "Bernoulli": lambda d, shape: likelihoods.Bernoulli(decoder(d, shape)),
}

GUIDES: dict[str, Callable[[int, int], guides.Guide]] = {
    "DiagonalNormal": lambda columns, d: guides.DiagonalNormal(nets.MLP(columns, hidden=(7,)), latent_dim=d),
    "FullNormal": lambda columns, d: guides.FullNormal(nets.MLP(columns, hidden=(7,)), latent_dim=d),
}


def every_parameter_has_a_gradient(module: nn.Module, value: Any) -> None:
    value.sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, f"{name} got no gradient"
        assert torch.isfinite(parameter.grad).all(), f"{name} has a gradient that is not finite"
        assert (parameter.grad != 0).any(), f"{name} has a gradient of zero"
