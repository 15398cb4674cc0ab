"""Every likelihood of the table is fitted for 200 epochs with default settings, and what became of its latents is seen."""

import math

import pytest
import torch
from model.components import LIKELIHOODS
from model.suited import data_for
from torch import nn

import pyro_vae as pv


class Deaf(nn.Module):
    """A decoder that returns the same for every z."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(columns))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.bias.expand(*z.shape[:-1], -1)


def build(name: str) -> tuple[pv.VAE, torch.Tensor]:
    torch.manual_seed(5)
    likelihood = LIKELIHOODS[name](2, (6,))
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(2),
        likelihood=likelihood,
        guide=pv.guides.DiagonalNormal(pv.nets.MLP(6, hidden=(16,)), latent_dim=2),
    )
    return vae, data_for(likelihood, 64)


@pytest.mark.slow  # 2 s each
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_fit_stays_finite_for_200_epochs_and_says_which_latents_are_used(name: str) -> None:
    vae, x = build(name)
    history = pv.fit(vae, x, x, epochs=200, progress=False)
    assert all(map(math.isfinite, [*history.elbo, *history.valid_elbo]))
    assert history.valid_elbo[-1] > history.valid_elbo[0]
    assert all(torch.isfinite(value).all() for value in vae.state_dict().values())
    usage = pv.diagnostics.latent_usage(vae, x)
    assert torch.isfinite(torch.as_tensor(usage.kl)).all()
    assert str(usage)
    estimate = pv.log_evidence(vae, x[:16])
    assert torch.isfinite(estimate.log_p).all()
    assert estimate.reliable.sum() >= 14


@pytest.mark.parametrize("name", ["DiscretisedLogisticMixture", "Beta", "ZeroInflatedNegativeBinomial, gate", "FullNormal"])
def test_a_few_epochs_raise_the_bound(name: str) -> None:
    vae, x = build(name)
    history = pv.fit(vae, x, x, epochs=20, lr=1e-2, progress=False)
    assert history.valid_elbo[-1] > history.valid_elbo[0] + 0.1


def test_a_collapsed_posterior_is_reported() -> None:
    """A decoder that cannot hear z leaves the guide nothing but the prior."""
    torch.manual_seed(0)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(2),
        likelihood=pv.likelihoods.Poisson(Deaf(3)),
        guide=pv.guides.DiagonalNormal(pv.nets.MLP(3, hidden=(8,)), latent_dim=2),
    )
    x = torch.poisson(torch.tensor([0.5, 1.0, 3.0]).expand(512, -1))
    pv.fit(vae, x, epochs=40, batch_size=64, lr=1e-2, progress=False)
    usage = pv.diagnostics.latent_usage(vae, x)
    assert usage.collapsed.all()
    assert "collapsed, under 0.01 nats: 2 of 2" in str(usage)
