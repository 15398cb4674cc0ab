"""The linear-Gaussian program against torch's and scipy's Normals: marginal, posterior, engines, missing values."""

import copy

import numpy as np
import pyro
import pytest
import scipy.stats
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor
from torch.distributions import MultivariateNormal

import pyro_vae as pv
from pyro_vae.em.linear import LinearGaussian

COLUMNS, LATENT = 5, 2


def program(dtype: torch.dtype = torch.float64) -> LinearGaussian:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(COLUMNS, LATENT, generator=generator, dtype=torch.float64) * torch.tensor([1.5, 0.4]).double()
    noise = torch.linspace(0.3, 1.1, COLUMNS, dtype=torch.float64)
    return LinearGaussian(weight.to(dtype), torch.linspace(-2.0, 1.0, COLUMNS).to(dtype), noise.to(dtype))


def moments(linear: LinearGaussian) -> tuple[Tensor, Tensor]:
    weight, noise = linear.weight.detach().double(), linear.noise.detach().double()
    return linear.mean.detach().double(), weight @ weight.mT + torch.diag(noise.square())


def rows(count: int = 9, *, holes: bool = False) -> Tensor:
    mean, covariance = moments(program())
    noise = torch.randn(count, COLUMNS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = mean + noise @ torch.linalg.cholesky(covariance).mT
    if holes:
        gone = torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) < 0.4
        gone[0], gone[1], gone[2] = False, True, torch.tensor([True, True, True, False, True])
        x[gone] = torch.nan
    return x


def scipy_marginal(linear: LinearGaussian, x: Tensor) -> Tensor:
    """log p of what was seen, row by row."""
    mean, covariance = (part.numpy() for part in moments(linear))
    log_p = []
    for row in x.double().numpy():
        seen = ~np.isnan(row)
        inside = scipy.stats.multivariate_normal(mean[seen], covariance[np.ix_(seen, seen)]) if seen.any() else None
        log_p.append(inside.logpdf(row[seen]) if inside else 0.0)
    return torch.tensor(np.array(log_p))


@pytest.mark.parametrize("holes", [False, True])
def test_log_p_is_the_marginal_density_of_the_values_seen(holes: bool) -> None:
    linear, x = program(), rows(holes=holes)
    torch.testing.assert_close(linear.log_p(x).detach(), scipy_marginal(linear, x), rtol=1e-12, atol=1e-12)
    single = program(torch.float32).log_p(x.float()).detach()
    assert single.dtype == torch.float64
    torch.testing.assert_close(single, scipy_marginal(linear, x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("holes", [False, True])
def test_the_guide_is_the_posterior_by_conditioning_the_joint_normal(holes: bool) -> None:
    linear, x = program(), rows(holes=holes)
    mean, covariance = moments(linear)
    q = linear.q_z(x)
    for row, loc, spread in zip(x, q.mean, q.covariance_matrix, strict=True):
        seen = ~row.isnan()
        cross = linear.weight.detach()[seen].mT  # Cov(z, x_seen)
        gain = cross @ torch.linalg.inv(covariance[seen][:, seen])
        torch.testing.assert_close(loc, gain @ (row - mean)[seen], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(spread, torch.eye(LATENT).double() - gain @ cross.mT, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("holes", [False, True])
def test_every_engine_agrees_and_weights_through_the_guide_have_no_noise(holes: bool) -> None:
    linear, x = program(), rows(holes=holes)
    truth = scipy_marginal(linear, x)
    weights, _ = linear.log_weights(x, 50, seed=3)
    assert weights.std(0).max() < 1e-12
    torch.testing.assert_close(weights, truth.expand(50, -1), rtol=1e-11, atol=1e-11)
    for method in (pv.posterior.from_guide, pv.evidence.exact, pv.posterior.laplace):
        estimate = pv.log_evidence(linear, x, method=method, seed=0)
        assert ((estimate.log_p - truth).abs() < 5.0 * estimate.standard_error + 1e-9).all(), method
        assert estimate.reliable.all()
    cascade = pv.log_evidence(linear, x, seed=0)
    assert ((cascade.log_p - truth).abs() < 5.0 * cascade.standard_error + 1e-9).all()


def test_single_precision_weights_have_the_noise_of_rounding_alone() -> None:
    weights, _ = program(torch.float32).log_weights(rows(holes=True).float(), 50, seed=3)
    assert weights.std(0).max() < 1e-4


@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO, pv.objectives.ELBO])
def test_every_elbo_is_the_log_likelihood(loss: type) -> None:
    """KL(q || p(z | x)) = 0, so the ELBO has its value; TraceMeanField's adds an exact KL to one draw of log p(x | z)."""
    linear, x = program(), rows(holes=True)
    truth = float(scipy_marginal(linear, x).sum())
    losses = torch.tensor([loss().loss(linear.model, linear.guide, x) for _ in range(200)], dtype=x.dtype)
    tolerance = 1e-9 if loss is Trace_ELBO else 4.5 * float(losses.std()) / 200**0.5 + 1e-9
    assert abs(float(losses.mean()) + truth) < tolerance


def test_draws_have_the_moments_of_the_marginal_within_5_standard_errors() -> None:
    linear, count = program(), 20_000
    mean, covariance = moments(linear)
    pyro.set_rng_seed(1)
    x = linear.model(size=count).detach()
    sd = covariance.diagonal().sqrt()
    assert ((x.mean(0) - mean).abs() < 5.0 * sd / count**0.5).all()
    error = ((covariance.square() + torch.outer(sd, sd).square()) / count).sqrt()
    assert ((torch.cov(x.mT) - covariance).abs() < 5.0 * error).all()
    assert pv.evidence.sandwich(linear, num_simulated=6, seed=1).x.shape == (6, COLUMNS)


def test_training_moves_every_parameter_towards_the_data() -> None:
    """By pv.fit and by plain Pyro; the guide has no parameters of its own."""
    x = rows(256, holes=True) + 0.5
    for train in (fit, svi):
        linear = program()
        before, start = linear.log_p(x).mean().detach(), copy.deepcopy(linear)
        assert set(linear.trainable(x)) == {f"model.{name}" for name in ("weight", "mean", "log_noise")}
        train(linear, x)
        assert linear.log_p(x).mean() > before + 0.05
        assert all((a != b).any() for a, b in zip(linear.parameters(), start.parameters(), strict=True))
        assert linear.log_weights(x, 5)[0].std(0).max() < 1e-11


def fit(linear: LinearGaussian, x: Tensor) -> None:
    pv.fit(linear, x, epochs=10, batch_size=64, lr=1e-2, progress=False)


def svi(linear: LinearGaussian, x: Tensor) -> None:
    step = SVI(linear.model, linear.guide, pyro.optim.Adam({"lr": 1e-2}), loss=Trace_ELBO())
    for _ in range(40):
        step.step(x)


def test_two_programs_in_one_process_do_not_share_parameters() -> None:
    one, other = program(), program()
    with torch.no_grad():
        other.weight.mul_(2.0)
    kept = other.weight.detach().clone()
    x = rows()
    for linear in (one, other, copy.deepcopy(one)):
        Trace_ELBO().loss(linear.model, linear.guide, x)
    assert torch.equal(other.weight, kept)
    one.weight = torch.nn.Parameter(3.0 * kept)  # the store still holds the one before
    Trace_ELBO().loss(one.model, one.guide, x)
    assert torch.equal(one.weight, 3.0 * kept)
    assert any(value is one.weight for value in pyro.get_param_store().values())  # what plain SVI trains


def test_a_shared_noise_stays_shared() -> None:
    linear = LinearGaussian(torch.ones(3, 1), torch.zeros(3), torch.tensor(0.5))
    assert linear.log_noise.shape == ()
    assert torch.allclose(linear.noise, torch.full((3,), 0.5))


def test_what_does_not_fit_is_refused_in_a_sentence() -> None:
    linear, x = program(), rows()
    with pytest.raises(ValueError, match=r"shape \(9, 4\).*rows of 5 numbers: give one tensor \(N, 5\)"):
        linear.log_p(x[:, :4])
    with pytest.raises(ValueError, match="infinite values in 1 of 9 rows, first in row 2"):
        pv.log_evidence(linear, x.index_fill(0, torch.tensor([2]), torch.inf))
    with pytest.raises(ValueError, match=r"noise \(2,\) do not go together"):
        LinearGaussian(torch.ones(3, 1), torch.zeros(3), torch.ones(2))
    with pytest.raises(ValueError, match=r"noise=0 must be positive"):
        LinearGaussian(torch.ones(3, 1), torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match=r"model\(size=64\)"):
        linear.model()


def test_the_posterior_of_a_row_without_values_is_the_prior() -> None:
    with torch.no_grad():
        q = program().q_z(torch.full((1, COLUMNS), torch.nan, dtype=torch.float64))
    prior = MultivariateNormal(torch.zeros(LATENT).double(), torch.eye(LATENT).double())
    assert float(torch.distributions.kl_divergence(q, prior.expand((1,)))) == pytest.approx(0.0, abs=1e-12)


def test_repr_tells_sizes_and_noise() -> None:
    assert repr(program()) == "LinearGaussian(5 columns, latent_dim=2, noise 0.3 .. 1.1)"
