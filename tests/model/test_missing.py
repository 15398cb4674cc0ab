"""Missing values: the evidence of what was seen, draws of what was not, on a linear-Gaussian VAE whose truth is known."""

import math

import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor
from torch.distributions import MultivariateNormal

import pyro_vae as pv

LATENT, COLUMNS, SCALE = 2, 4, 0.4


def linear(*, missing: bool = True) -> pv.VAE:
    """x = W z + b + s noise: every marginal and every conditional is a Normal."""
    torch.manual_seed(3)
    return pv.VAE(
        prior=pv.priors.StandardNormal(LATENT),
        likelihood=pv.likelihoods.Normal(pv.nets.MLP(LATENT, COLUMNS), scale=SCALE, missing=missing),
        guide=pv.guides.FullNormal(pv.nets.MLP(COLUMNS, hidden=(8,)), latent_dim=LATENT),
    ).double()


def moments(vae: pv.VAE) -> tuple[Tensor, Tensor]:
    layer = vae.likelihood.decoder.layers[0]
    weight, bias = layer.weight.detach(), layer.bias.detach()
    return bias, weight @ weight.T + SCALE**2 * torch.eye(COLUMNS, dtype=torch.float64)


def holes(count: int = 12) -> Tensor:
    """Rows with none, some and all of their values missing."""
    x = linear().generate(count, seed=5)
    gone = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    gone[0], gone[1] = False, True
    return torch.where(gone, torch.nan, x)


def marginal(vae: pv.VAE, x: Tensor) -> Tensor:
    mean, covariance = moments(vae)
    log_p = []
    for row in x:
        seen = ~row.isnan()
        inside = covariance[seen][:, seen]
        log_p.append(MultivariateNormal(mean[seen], inside).log_prob(row[seen]) if seen.any() else torch.zeros(()).double())
    return torch.stack(log_p)


@pytest.mark.parametrize(
    "method", [None, pv.evidence.exact, pv.posterior.laplace, pv.posterior.annealed, pv.posterior.from_prior]
)
def test_the_evidence_is_that_of_the_values_seen(method: object) -> None:
    vae, x = linear(), holes()
    estimate = pv.log_evidence(vae, x, method=method, seed=2)  # type: ignore[arg-type]
    truth = marginal(vae, x)
    error = 5.0 * estimate.standard_error + 2.0 * estimate.bias.abs() + 1e-6
    assert ((estimate.log_p - truth).abs() < error)[estimate.reliable].all()
    assert estimate.reliable.sum() > 6
    assert estimate.log_p[1].abs() < 5.0 * estimate.standard_error[1] + 1e-6  # nothing seen: p = 1


@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO, pv.objectives.ELBO])
def test_every_elbo_counts_the_values_seen_alone(loss: type) -> None:
    """-sum log p(x_seen | z) + KL, by hand; with Pyro's obs_mask the mean-field ELBO would count the unseen as latent."""
    vae, x = linear(), holes()
    torch.manual_seed(7)
    found = loss().loss(vae.model, vae.guide, x)
    torch.manual_seed(7)
    q = vae.q_z(x)
    z = q.rsample()
    density = torch.distributions.Normal(vae.likelihood.decoder(z), vae.likelihood.scale.value).log_prob(x.nan_to_num(0.0))
    seen = torch.where(x.isnan(), 0.0, density).sum()
    prior = torch.distributions.Normal(0.0, 1.0)
    trace = q.covariance_matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
    kl = 0.5 * (trace + q.mean.square().sum(-1) - LATENT - torch.logdet(q.covariance_matrix)).sum()
    if loss is Trace_ELBO:
        kl = (q.log_prob(z) - prior.log_prob(z).sum(-1)).sum()
    assert found == pytest.approx(float((kl - seen).detach()), rel=1e-9)


def test_gradients_are_finite_and_the_filling_learns() -> None:
    vae, x = linear(), holes(64)
    loss, _ = pv.objectives.ELBO().loss_and_elbo(vae.model, vae.guide, x)
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in vae.parameters())
    assert (vae.filling.value.grad != 0).all()
    before = vae.filling.value.detach().clone()
    history = pv.fit(vae, x, x, epochs=3, batch_size=16, progress=False)
    assert all(map(math.isfinite, history.valid_elbo))
    assert (vae.filling.value != before).all()


def test_a_fit_with_holes_finds_what_the_complete_rows_would_tell() -> None:
    """The mean of a column that is missing at random in half the rows, within 5 standard errors."""
    torch.manual_seed(0)
    x = torch.randn(2000, 1) * torch.tensor([1.0, 2.0]) + torch.randn(2000, 2) * 0.5 + torch.tensor([3.0, -1.0])
    x[torch.rand(2000) < 0.5, 1] = torch.nan
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(1),
        likelihood=pv.likelihoods.Normal(pv.nets.MLP(1, 2), scale=pv.likelihoods.Learned(), missing=True),
        guide=pv.guides.DiagonalNormal(pv.nets.MLP(2, hidden=(16,)), latent_dim=1),
    )
    pv.fit(vae, x, epochs=60, batch_size=100, lr=1e-2, progress=False)
    mean = vae.likelihood.decoder.layers[0].bias.detach()
    seen = (~x.isnan()).sum(0)
    assert ((mean - torch.tensor([3.0, -1.0])).abs() < 5.0 * torch.tensor([1.12, 2.06]) / seen.sqrt()).all()


def test_imputed_values_are_draws_of_the_conditional_normal() -> None:
    """Mean and covariance of 4,000 draws of each row, against the textbook's formulas, within 5 standard errors."""
    vae, x = linear(), holes(6)
    drawn = vae.impute(x, 4000, num_particles=40_000, seed=4)
    assert drawn.shape == (4000, 6, COLUMNS)
    assert torch.equal(drawn, vae.impute(x, 4000, num_particles=40_000, seed=4))
    mean, covariance = moments(vae)
    for row, draws in zip(x, drawn.unbind(1), strict=True):
        gone = row.isnan()
        assert torch.equal(draws[:, ~gone], row[~gone].expand(4000, -1))
        if not gone.any():
            continue
        gain = covariance[gone][:, ~gone] @ torch.linalg.inv(covariance[~gone][:, ~gone])
        expected = mean[gone] + gain @ (row[~gone] - mean[~gone])
        spread = covariance[gone][:, gone] - gain @ covariance[~gone][:, gone]
        sd = spread.diagonal().sqrt()
        assert ((draws[:, gone].mean(0) - expected).abs() < 5.0 * sd / 4000**0.5).all()
        error = (spread.square() + torch.outer(sd, sd).square()).sqrt() / 4000**0.5
        assert ((torch.cov(draws[:, gone].T).reshape(spread.shape) - spread).abs() < 5.0 * error).all()


def test_missing_values_are_an_error_unless_the_likelihood_is_asked() -> None:
    vae, x = linear(missing=False), holes()
    for use in (vae.encode, lambda x: pv.log_evidence(vae, x), lambda x: pv.fit(vae, x, epochs=1)):
        with pytest.raises(ValueError, match=r"NaN or infinite values in .* of 12 rows.*missing=True"):
            use(x)
    with pytest.raises(ValueError, match=r"takes no missing values: build it with missing=True"):
        vae.impute(x)
    with pytest.raises(ValueError, match="first in row 2"):
        linear().encode(x.index_fill(0, torch.tensor([2]), torch.inf))


def test_the_holes_survive_saving_and_reconstruction(tmp_path: object) -> None:
    vae, x = linear(), holes()
    with torch.no_grad():
        vae.filling.value.copy_(torch.arange(4.0))
    vae.save(f"{tmp_path}/vae")
    again = pv.load(f"{tmp_path}/vae")
    assert torch.equal(again.log_weights(x, 5, seed=1)[0], vae.log_weights(x, 5, seed=1)[0])
    assert torch.isfinite(vae.reconstruct(x)).all()
    assert "missing=True" in repr(vae)
