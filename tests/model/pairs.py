"""Pairs of a prior and a guide of the tables, in a small VAE."""

from __future__ import annotations

import torch
from model.components import COLUMNS, GUIDES, PRIORS

import pyro_vae as pv

PAIRS = [
    *((prior, "DiagonalNormal") for prior in PRIORS),
    *(("StandardNormal", guide) for guide in GUIDES if guide != "DiagonalNormal"),
    *(("VampPrior", guide) for guide in GUIDES if guide != "DiagonalNormal"),
]


def make(prior: str, guide: str, dim: int = 2) -> pv.VAE:
    """A VAE with random weights, its decoder far from linear."""
    torch.manual_seed(1)
    vae = pv.VAE(
        prior=PRIORS[prior](dim),
        likelihood=pv.likelihoods.Normal(pv.nets.MLP(dim, COLUMNS, hidden=(7,)), scale=pv.likelihoods.Learned(initial=0.6)),
        guide=GUIDES[guide](COLUMNS, dim),
    )
    with torch.no_grad():
        vae.likelihood.decoder.layers[-1].weight.mul_(2.0)
    return vae


def rows(count: int = 8) -> torch.Tensor:
    return torch.randn(count, COLUMNS, generator=torch.Generator().manual_seed(3))
