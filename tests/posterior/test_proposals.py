import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_gaussian import LinearGaussian
from torch import Tensor

import pyro_vae as pv
from pyro_vae.posterior.derivatives import derivatives

ENGINES = {"prior": pv.posterior.from_prior, "guide": pv.posterior.from_guide}


@pytest.mark.parametrize("name", ENGINES)
def test_mean_weight_is_unbiased_for_p_of_x(name: str) -> None:
    """The mean over 50 x 2,000 weights against p(x), on the scale of p: within 4.5 of its own standard errors."""
    known = LinearGaussian(dim=3, latent_dim=2)
    x = known.draw(20)
    particles = ENGINES[name](known.program(inflate=1.3, shift=0.2), x, num_particles=100_000, seed=3)
    relative = torch.exp(particles.log_weights - known.log_p(x))
    error = relative.std(0) / 100_000**0.5
    assert ((relative.mean(0) - 1.0).abs() < 4.5 * error).all()
    assert (error < 0.1).all()


@pytest.mark.parametrize("name", ENGINES)
def test_shapes_info_and_seeds(name: str) -> None:
    known = LinearGaussian()
    x = known.draw(4)
    a, b, c = (ENGINES[name](known.program(), x, num_particles=7, seed=seed) for seed in (0, 0, 1))
    assert a.log_weights.shape == (7, 4)
    assert a.log_weights.dtype == torch.float64
    assert a.z["z"].shape == (7, 4, 3)
    assert a.info["engine"] == name
    assert repr(a) == f"Particles({name}: 7 for each of 4 rows; z (3,))"
    assert torch.equal(a.log_weights, b.log_weights)
    assert not torch.equal(a.log_weights, c.log_weights)
    with pytest.raises(ValueError, match="num_particles=0"):
        ENGINES[name](known.program(), x, num_particles=0)


def test_weights_are_the_formulas_of_their_engines() -> None:
    known = LinearGaussian()
    x = known.draw(5)
    program = known.program(inflate=1.5, shift=-0.4)
    prior = pv.posterior.from_prior(program, x, num_particles=6)
    z = prior.z["z"]
    residual = (x - z @ known.weight.T - known.bias) / known.scale
    log_likelihood = -0.5 * (residual.square() + 2 * known.scale.log() + math.log(2 * math.pi)).sum(-1)
    torch.testing.assert_close(prior.log_weights, log_likelihood)
    guide = pv.posterior.from_guide(program, x, num_particles=6)
    z = guide.z["z"]
    factor = 1.5 * torch.linalg.cholesky(known.covariance)
    mean = known.posterior_mean(x) - 0.4 * torch.linalg.cholesky(known.covariance).sum(-1)
    log_q = torch.distributions.MultivariateNormal(mean, scale_tril=factor).log_prob(z)
    residual = (x - z @ known.weight.T - known.bias) / known.scale
    log_p = -0.5 * (residual.square() + 2 * known.scale.log() + math.log(2 * math.pi)).sum(-1)
    log_p = log_p - 0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)
    torch.testing.assert_close(guide.log_weights, log_p - log_q)


def test_resampled_particles_have_the_posterior_moments() -> None:
    known = LinearGaussian(dim=4, latent_dim=2)
    x = known.draw(3)
    particles = pv.posterior.from_guide(known.program(inflate=1.5, shift=0.5), x, num_particles=20_000, seed=2)
    draws = particles.resample(20_000, seed=7)["z"]
    sd = known.covariance.diagonal().sqrt()
    # Resampling K particles into K draws at most doubles the variance of a mean; the weights' ESS is above half of K.
    error = 4.0 * sd * (2.0 / 10_000) ** 0.5
    assert ((draws.mean(0) - known.posterior_mean(x)).abs() < error).all()
    assert torch.equal(draws, particles.resample(20_000, seed=7)["z"])


def test_particles_refuse_latents_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"z\['a'\] has shape \(3, 2\)"):
        pv.Particles(torch.zeros(3, 4), {"a": torch.zeros(3, 2)}, torch.zeros(4))


def test_derivatives_are_those_of_an_asymmetric_function() -> None:
    """log p(u) = sum of u_i^3 / 6 - u_0 u_1^2 ... through a Gamma latent and a factor: Hessian by hand."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z[..., 0] * z[..., 1].square(), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), 2, dtype=x.dtype), 1.0).to_event(1))

    x = torch.tensor([0.7, -1.3], dtype=torch.float64)
    u = torch.randn(3, 2, 2, dtype=torch.float64)
    value, gradient, hessian = derivatives(pv.Program(model, guide).log_joint(x), u)
    a, b = u[..., 0], u[..., 1]
    r = x - a * b**2
    log_2pi = math.log(2 * math.pi)
    torch.testing.assert_close(value, -0.5 * (r**2 + a**2 + b**2) - 1.5 * log_2pi)
    torch.testing.assert_close(gradient, torch.stack([r * b**2 - a, 2 * r * a * b - b], -1))
    expected = torch.stack(
        [
            torch.stack([-(b**4) - 1, 2 * b * r - 2 * a * b**3], -1),
            torch.stack([2 * b * r - 2 * a * b**3, 2 * a * r - 4 * a**2 * b**2 - 1], -1),
        ],
        -2,
    )
    torch.testing.assert_close(hessian, expected)
