"""200 epochs at default settings stay finite for every prior and guide, and a collapsed posterior is reported."""

import math
import warnings

import pytest
import torch

import pyro_vae as pv

D, COLUMNS = 2, 6

PRIORS = {
    "StandardNormal": lambda: pv.priors.StandardNormal(D),
    "Normal": lambda: pv.priors.Normal(D),
    "Mixture": lambda: pv.priors.Mixture(D),
    "VampPrior": lambda: pv.priors.VampPrior(D, COLUMNS),
    "Flow": lambda: pv.priors.Flow(D),
    "Laplace": lambda: pv.priors.Laplace(D),
    "StudentT": lambda: pv.priors.StudentT(D),
    "Product": lambda: pv.priors.Product(pv.priors.Laplace(1), pv.priors.Normal(1)),
}
GUIDES = {
    "DiagonalNormal": lambda net: pv.guides.DiagonalNormal(net, D),
    "FullNormal": lambda net: pv.guides.FullNormal(net, D),
    "LowRankNormal": lambda net: pv.guides.LowRankNormal(net, D),
    "InverseAutoregressive": lambda net: pv.guides.InverseAutoregressive(net, D),
    "Spline": lambda net: pv.guides.Spline(net, D),
    "Mixture": lambda net: pv.guides.Mixture(net, D),
    "SemiAmortised": lambda net: pv.guides.SemiAmortised(pv.guides.DiagonalNormal(net, D)),
}
PAIRS = [
    *((name, "DiagonalNormal") for name in PRIORS),
    *(("StandardNormal", name) for name in GUIDES if name != "DiagonalNormal"),
]


def fitted(prior: str, guide: str, scale: object, x: torch.Tensor, **settings: object) -> tuple[pv.VAE, pv.History]:
    torch.manual_seed(0)
    vae = pv.VAE(
        prior=PRIORS[prior](),
        likelihood=pv.likelihoods.Normal(pv.nets.MLP(D, COLUMNS, hidden=(16,)), scale=scale),
        guide=GUIDES[guide](pv.nets.MLP(COLUMNS, hidden=(16,))),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*KL")
        history = pv.fit(vae, x, epochs=200, batch_size=32, seed=0, **settings)
    assert len(history.elbo) == 200
    assert all(map(math.isfinite, history.elbo))
    assert all(torch.isfinite(parameter).all() for parameter in vae.parameters())
    return vae, history


@pytest.mark.slow
@pytest.mark.parametrize("rate", [1e-3, 1e-2])
@pytest.mark.parametrize(("prior", "guide"), PAIRS)
def test_200_epochs_stay_finite(prior: str, guide: str, rate: float) -> None:
    """64 rows on a bent curve in 6 columns, with little noise; a fast fit beats a Normal independent of the latents."""
    t = torch.randn(64, 1)
    x = torch.cat([t, t.sin(), t.square(), -t, t.cos(), 0.5 * t], -1) + 0.1 * torch.randn(64, COLUMNS)
    vae, history = fitted(prior, guide, pv.likelihoods.Learned(), x, lr=rate)
    assert history.elbo[-1] > history.elbo[0]
    usage = pv.diagnostics.latent_usage(vae, x, num_particles=8)
    assert usage.row_kl.isfinite().all()
    assert usage.kl.isfinite().all()
    assert usage.active.any()
    found = pv.log_evidence(vae, x[:16], seed=1)
    alone = torch.distributions.Normal(x.mean(0), x.std(0)).log_prob(x[:16]).sum(-1)
    assert found.log_p.isfinite().all()
    assert rate < 1e-2 or found.log_p.mean() > alone.mean() + 1.0


@pytest.mark.slow
@pytest.mark.parametrize(("prior", "guide"), PAIRS)
def test_a_collapsed_posterior_is_reported(prior: str, guide: str) -> None:
    """x is noise and the likelihood as wide as it: no latent can say anything."""
    x = torch.randn(64, COLUMNS)
    vae, _ = fitted(prior, guide, 3.0, x)
    usage = pv.diagnostics.latent_usage(vae, x, num_particles=64)
    assert usage.mean_kl.value < 0.15
    assert not usage.active.any()
    assert "0 of 2 latent dimensions are active" in repr(usage)
