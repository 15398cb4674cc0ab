"""Rows that suit a likelihood: inside its support, a few rows like no others, no column constant."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_vae.model import likelihoods


def data_for(likelihood: likelihoods.Likelihood, size: int, shape: tuple[int, ...] = (6,)) -> Tensor:
    """Rows (size, *shape) with two clusters, drawn by torch's ambient generator."""
    cluster = (torch.arange(size) % 2).reshape(-1, *(1,) * len(shape)) * 2.0 - 1.0
    normal = torch.randn(size, *shape) + cluster * torch.linspace(-1.0, 1.0, shape[-1])
    uniform = torch.special.ndtr(normal / 1.5).clamp(1e-4, 1.0 - 1e-4)
    match likelihood:
        case likelihoods.Bernoulli():
            return (normal > 0.0).float()
        case likelihoods.Categorical():
            return (uniform * likelihood.num_classes).floor()
        case likelihoods.Binomial():
            return (uniform * (likelihood.n + 1.0)).floor()
        case likelihoods.DiscretisedLogistic() | likelihoods.DiscretisedLogisticMixture():
            levels = likelihood.grid.levels - 1
            return (uniform * levels).round() / levels * likelihood.grid.top
        case likelihoods.Poisson() | likelihoods.NegativeBinomial() | likelihoods.ZeroInflatedNegativeBinomial():
            return torch.poisson(normal.exp())
        case likelihoods.ContinuousBernoulli() | likelihoods.Beta():
            return uniform
        case likelihoods.LogNormal():
            return normal.exp()
        case _:
            return normal
