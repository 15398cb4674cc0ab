"""Annealed importance sampling against closed forms and quadrature."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_gaussian import LinearGaussian
from torch import Tensor

import pyro_vae as pv
from pyro_vae.posterior.hmc import Bridge, Density, Points, transition
from pyro_vae.posterior.shapes import Dense

STARTS = {"modes": pv.posterior.at_modes, "guide": pv.posterior.at_guide, "prior": pv.posterior.at_prior}


@pytest.mark.parametrize("name", STARTS)
def test_mean_weight_is_unbiased_for_p_of_x(name: str) -> None:
    """600 rows of one x, 16 chains each, few temperatures: the mean of exp(log w) / p(x) is 1 within 4.5 errors."""
    known = LinearGaussian(dim=4, latent_dim=2)
    x = known.draw(1).repeat(600, 1)
    particles = pv.posterior.annealed(known.program(), x, start=STARTS[name], num_particles=16, most_steps=8, seed=2)
    ratio = torch.exp(particles.log_weights - known.log_p(x)).mean(0)
    assert abs(ratio.mean() - 1.0) < 4.5 * ratio.std() / 600**0.5
    assert ratio.std() / 600**0.5 < 0.05
    assert (particles.info["temperatures"] == 8).all()


def test_more_temperatures_bring_the_prior_to_the_posterior() -> None:
    known = LinearGaussian(dim=4, latent_dim=2)
    x = known.draw(10)
    variances = [
        pv.posterior.annealed(
            known.program(), x, start=pv.posterior.at_prior, num_particles=100, most_steps=steps, seed=1
        ).log_weights.var(0)
        for steps in (4, 64)
    ]
    assert (variances[1] < variances[0]).all()
    assert variances[1].median() < 1.0


def test_chains_end_as_posterior_draws() -> None:
    known = LinearGaussian(dim=4, latent_dim=2)
    x = known.draw(4)
    z = pv.posterior.annealed(known.program(), x, num_particles=4000, most_steps=16, seed=1).resample(4000)["z"]
    sd = known.covariance.diagonal().sqrt()
    # Resampling at most doubles the variance of a mean here: the weights are nearly equal.
    assert ((z.mean(0) - known.posterior_mean(x)).abs() < 4.5 * sd * (2.0 / 4000) ** 0.5).all()
    relative = z.var(0) / known.covariance.diagonal()
    assert ((relative - 1.0).abs() < 4.5 * (4.0 / 4000) ** 0.5).all()


def test_a_ring_is_within_its_errors_of_quadrature() -> None:
    """x = |z|^2 + noise: the posterior is a ring, where no Gaussian at a mode fits."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.square().sum(-1), 0.3), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), 2, dtype=x.dtype), 1.0).to_event(1))

    x = torch.tensor([0.2, 1.5, 4.0], dtype=torch.float64)
    # |z|^2 is exponential with rate 1/2: one integral over t >= 0.
    t = torch.linspace(0.0, 40.0, 400_001, dtype=torch.float64)[:, None]
    integrand = torch.exp(-0.5 * t) / 2.0 * torch.exp(-0.5 * ((x - t) / 0.3) ** 2) / (0.3 * math.sqrt(2.0 * math.pi))
    truth = torch.log(torch.trapezoid(integrand, t[:, 0], dim=0))
    estimate = pv.log_evidence(
        pv.Program(model, guide),
        x,
        method=lambda *a, seed, num_particles=400: pv.posterior.annealed(
            *a, seed=seed, num_particles=num_particles, start=pv.posterior.at_prior, most_steps=64
        ),
    )
    assert ((estimate.log_p - truth).abs() < 4.5 * estimate.standard_error + estimate.bias.abs()).all()
    assert (estimate.standard_error < 0.2).all()


def test_a_transition_keeps_its_target_and_conserves_energy_for_small_steps() -> None:
    known = LinearGaussian(dim=4, latent_dim=2)
    x = known.draw(1).repeat(2, 1)
    program = known.program()
    factor = torch.linalg.cholesky(known.covariance)
    mean = known.posterior_mean(x)

    def log_start(index: Tensor) -> Density:
        return lambda u: torch.distributions.Normal(0.0, 1.0).log_prob(u).sum(-1).double()

    start = mean + torch.randn(5000, 2, 2, dtype=torch.float64) @ factor.T
    bridge = Bridge(program, (x,), log_start, start, 2**30)
    points = bridge(start)
    scale = known.covariance.diagonal().sqrt().expand(2, -1)
    shape = Dense.of(torch.diag_embed(1.0 / scale))
    moved, probability = transition(bridge, points, 1.0, torch.full((2,), 0.4, dtype=torch.float64), shape, 5)
    assert ((moved.u.mean(0) - mean).abs() < 4.5 * scale / 5000**0.5).all()
    assert (probability.mean(0) > 0.8).all()
    assert (moved.u != points.u).any(-1).double().mean() > 0.8
    _, tiny = transition(bridge, points, 1.0, torch.full((2,), 1e-3, dtype=torch.float64), shape, 5)
    assert (tiny > 1.0 - 1e-4).all()


def test_gradients_are_cached_and_chunks_change_nothing() -> None:
    known = LinearGaussian(dim=4, latent_dim=2)
    x = known.draw(6)
    u = torch.randn(3, 6, 2, dtype=torch.float64)

    def log_start(index: Tensor) -> Density:
        # A start of each row's own: row i is N(0, 1 / (1 + i)).
        return lambda u: -0.5 * (1.0 + index) * u.square().sum(-1)

    whole, small = (Bridge(known.program(), (x,), log_start, u, budget)(u) for budget in (2**30, 1))
    for name in Points.__dataclass_fields__:
        torch.testing.assert_close(getattr(whole, name), getattr(small, name))
    point = u.clone().requires_grad_()
    residual = (x - point @ known.weight.T - known.bias) / known.scale
    by_hand = -0.5 * residual.square().sum(-1) - 0.5 * point.square().sum(-1)
    (gradient,) = torch.autograd.grad(by_hand.sum(), point)
    torch.testing.assert_close(whole.gradient_p, gradient)
    start_gradient = -(1.0 + torch.arange(6.0, dtype=torch.float64))[:, None] * u
    torch.testing.assert_close(whole.force(0.25), 0.25 * gradient + 0.75 * start_gradient)


def test_seeds_repeat_and_bad_numbers_are_named() -> None:
    known = LinearGaussian(dim=4, latent_dim=2)
    x = known.draw(3)
    a, b, c = (
        pv.posterior.annealed(known.program(), x, num_particles=4, most_steps=4, seed=seed).log_weights
        for seed in (1, 1, 2)
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    with pytest.raises(ValueError, match="most_steps=0"):
        pv.posterior.annealed(known.program(), x, most_steps=0)


def test_the_density_of_a_start_belongs_to_its_draws() -> None:
    """E_r[N(u; m, C) / r(u)] is 1 where r covers the posterior N(m, C); and some of the rows are those rows."""
    known = LinearGaussian(dim=4, latent_dim=2)
    x = known.draw(4)
    posterior = torch.distributions.MultivariateNormal(known.posterior_mean(x), known.covariance)
    for name, begin in STARTS.items():
        start = begin(known.program(inflate=1.5), (x,), 2**30)
        u = start.draw(20_000)
        ratio = torch.exp(posterior.log_prob(u) - start.log_density(u))
        error = ratio.std(0) / 20_000**0.5
        assert ((ratio.mean(0) - 1.0).abs() < 4.5 * error).all(), name
        assert (error < 0.2).all(), name
        some = torch.tensor([2, 0])
        torch.testing.assert_close(start.take(some).log_density(u[:, some]), start.log_density(u)[:, some])
