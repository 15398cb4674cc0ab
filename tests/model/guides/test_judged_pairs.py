"""Every prior and every guide of the tables is judged by every engine, drawn from, and reported on."""

import math
import warnings

import pytest
import torch
from model.components import COLUMNS, GUIDES
from model.pairs import PAIRS, make, rows

import pyro_vae as pv

JUDGED = [
    pytest.param(*pair, marks=pytest.mark.slow) if pair == ("VampPrior", "Spline") else pair  # 15 s
    for pair in PAIRS
]


@pytest.mark.parametrize(("prior", "guide"), JUDGED)
def test_log_evidence_is_that_of_quadrature(prior: str, guide: str) -> None:
    """D = 2; each engine with its own error. That log p(x) does not depend on the guide is what quadrature says."""
    vae, x = make(prior, guide), rows(4)
    exact = pv.log_evidence(vae, x, method=pv.evidence.exact)
    assert exact.reliable.all()
    assert (exact.standard_error < 1e-3).all()
    for method in (None, pv.posterior.laplace, pv.posterior.annealed):
        chosen = {} if method is None else {"method": method}
        found = pv.log_evidence(vae, x, seed=5, **chosen)
        error = (found.standard_error.square() + exact.standard_error.square()).sqrt()
        away = (found.log_p - found.bias - exact.log_p).abs()
        assert (away < 4.5 * error + 0.02).all(), (method, away, error)
        assert (away < 0.3).all()
        assert method is not None or found.reliable.all()


@pytest.mark.parametrize("guide", GUIDES)
def test_log_p_does_not_depend_on_the_guide(guide: str) -> None:
    plain, x = make("Mixture", "DiagonalNormal"), rows(4)
    vae = pv.VAE(prior=plain.prior, likelihood=plain.likelihood, guide=GUIDES[guide](COLUMNS, 2))
    one, other = (pv.log_evidence(each, x, method=pv.evidence.exact).log_p for each in (plain, vae))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("prior", "guide"), PAIRS)
def test_generated_rows_are_decoded_draws_of_the_prior(prior: str, guide: str) -> None:
    """Means of 4,000 rows and of decoded draws weighted from a wide Student t, within 5 standard errors."""
    vae, count = make(prior, guide), 4000
    x = vae.generate(count, seed=2)
    assert torch.equal(x, vae.generate(count, seed=2))
    assert vae.reconstruct(rows()).shape == (8, COLUMNS)
    torch.manual_seed(6)
    wide = torch.distributions.StudentT(3.0, torch.zeros(2), 1.2)
    z = wide.sample((40_000,))
    with torch.no_grad():
        weight = (vae.p_z().log_prob(z) - wide.log_prob(z).sum(-1)).exp()[:, None]
        decoded = vae.likelihood.decoder(z)
        mean = (weight * decoded).sum(0) / weight.sum(0)
        error = (weight * (decoded - mean)).square().sum(0).sqrt() / weight.sum(0)
    assert ((x.mean(0) - mean).abs() < 5.0 * torch.hypot(x.std(0) / count**0.5, error)).all()


@pytest.mark.parametrize(("prior", "guide"), PAIRS)
def test_fit_and_latent_usage(prior: str, guide: str) -> None:
    vae, x = make(prior, guide), rows(32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*KL")
        history = pv.fit(vae, x, rows(16), epochs=2, batch_size=16, lr=1e-2, seed=0)
    assert all(map(math.isfinite, history.elbo))
    usage = pv.diagnostics.latent_usage(vae, x, num_particles=4, num_rows=16)
    assert usage.kl.isfinite().all()
    assert usage.activity.isfinite().all()
    assert "latent dimensions are active" in repr(usage)


@pytest.mark.parametrize(("prior", "guide"), [("StandardNormal", guide) for guide in GUIDES])
def test_inference_gap_takes_any_guide(prior: str, guide: str) -> None:
    vae, x = make(prior, guide), rows(4)
    gap = pv.diagnostics.inference_gap(vae, x, num_samples=64, steps=30)
    assert gap.inference.isfinite().all()
    assert (gap.inference > -4.5 * gap.inference_standard_error - 0.05).all()


@pytest.mark.parametrize("guide", ["FullNormal", "LowRankNormal"])
def test_a_normal_with_dependent_dimensions_has_the_kl_of_each_marginal(guide: str) -> None:
    vae, x = make("StandardNormal", guide), rows()
    usage, q = pv.diagnostics.latent_usage(vae, x, num_particles=2, num_rows=2), vae.encode(x)
    marginal = 0.5 * (q.variance + q.mean.square() - 1.0 - q.variance.log()).mean(0)
    assert usage.names == ("z[0]", "z[1]")
    torch.testing.assert_close(usage.kl, marginal.double(), rtol=1e-5, atol=1e-6)
    assert usage.dependence > 1e-4
