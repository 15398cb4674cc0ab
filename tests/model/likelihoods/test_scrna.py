"""Counts like those of single cells, from a known negative binomial model: which likelihood comes near to it?"""

import pytest
import torch

import pyro_vae as pv
from pyro_vae.model.likelihoods import Learned, Likelihood, NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial

GENES, LATENT, CELLS, TEST = 20, 2, 2000, 200


def vae(likelihood: Likelihood) -> pv.VAE:
    encoder = pv.nets.Log1p(pv.nets.MLP(GENES, hidden=(32,)))
    return pv.VAE(
        prior=pv.priors.StandardNormal(LATENT),
        likelihood=likelihood,
        guide=pv.guides.FullNormal(encoder, latent_dim=LATENT),
    )


def truth() -> pv.VAE:
    """x ~ NB(l softmax(W z + b), a) with dispersions a from 0.1 to 0.8."""
    made = vae(NegativeBinomial(pv.nets.MLP(LATENT, GENES), torch.linspace(0.1, 0.8, GENES).tolist(), library=1))
    with torch.no_grad():
        layer = made.likelihood.decoder.layers[0]
        layer.weight.copy_(0.8 * torch.randn(GENES, LATENT))
        layer.bias.copy_(torch.randn(GENES))
    return made


@pytest.mark.slow  # 25 s
def test_negative_binomials_come_nearer_than_poisson_to_the_model_that_made_the_counts() -> None:
    """Nats a held-out cell below the generating model: under 0.5 for NB and ZINB, many for Poisson; paired differences."""
    torch.manual_seed(3)
    made = truth()
    library = torch.empty(CELLS + TEST).log_normal_(6.0, 0.5).round()
    x = made.generate(CELLS + TEST, given=library, seed=1)
    train, test = (x[:CELLS], library[:CELLS]), (x[CELLS:], library[CELLS:])
    generating = pv.log_evidence(made, test, seed=2)
    assert generating.reliable.sum() >= 0.95 * TEST
    below = {}
    for name, likelihood in {
        "Poisson": Poisson(pv.nets.MLP(LATENT, GENES), library=1),
        "NB": NegativeBinomial(pv.nets.MLP(LATENT, GENES), Learned(GENES), library=1),
        "ZINB": ZeroInflatedNegativeBinomial(pv.nets.MLP(LATENT, GENES), Learned(GENES), library=1),
    }.items():
        model = vae(likelihood)
        pv.fit(model, train, epochs=40, batch_size=100, lr=1e-2, seed=1, progress=False)
        estimate = pv.log_evidence(model, test, seed=2)
        good = estimate.reliable & generating.reliable
        assert good.sum() >= 0.9 * TEST
        below[name] = torch.where(good, generating.log_p - estimate.log_p, torch.nan)
        if name != "Poisson":
            ratio = model.likelihood.dispersion(x) / made.likelihood.dispersion(x)
            assert float(ratio.detach().log().abs().median()) < 0.1
    for name in ("NB", "ZINB"):
        gain = below["Poisson"] - below[name]
        gain = gain[~gain.isnan()]
        assert float(gain.mean()) > 10.0 + 5.0 * float(gain.std()) / len(gain) ** 0.5
        gap = below[name][~below[name].isnan()]
        assert abs(float(gap.mean())) < 0.5 + 5.0 * float(gap.std()) / len(gap) ** 0.5
