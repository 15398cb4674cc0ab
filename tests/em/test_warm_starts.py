"""Engines that begin near points of an earlier call, and what Monte Carlo EM keeps of a row."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from em.curve import Curve, line_data
from linear_gaussian import LinearGaussian
from torch import Tensor

import pyro_vae as pv
from pyro_vae.em.weighing import EStep
from pyro_vae.posterior import Annealed, Laplace, at_points

HMC = Annealed(start=at_points, num_leapfrog=5, first_steps=4, most_steps=4)


def test_near_points_lower_the_cost_and_leave_the_answer() -> None:
    """One point near the posterior does what three draws of the prior do, at 0.8 of the cost or less."""
    known = LinearGaussian(dim=8, latent_dim=4)
    x, program = known.draw(60), known.program(inflate=3.0, shift=6.0)
    draws = known.posterior_mean(x) + torch.randn(60, 4, dtype=torch.float64) @ torch.linalg.cholesky(known.covariance).T
    cold = pv.posterior.laplace.prepare(program, (x,), seed=1)
    for starts, most in ((1, 0.7), (2, 0.8)):
        warm = Laplace(num_starts=starts).prepare(program, (x,), seed=1, near=draws[None])
        assert warm.cost.double().mean() < most * cold.cost.double().mean()
        particles = warm.adapt(warm.draw(64, 2)).draw(200, 3)
        error = pv.evidence.weights.standard_error(particles.log_weights, particles.strata)
        found = pv.evidence.weights.log_mean_exp(particles.log_weights)
        assert ((found - known.log_p(x)).abs() < 4.5 * error + 1e-3).all()
        assert error.max() < 0.1


@pytest.mark.parametrize("starts", [1, 2, 3, 9])
def test_near_points_come_first_and_the_number_of_starts_stays(starts: int) -> None:
    from pyro_vae.posterior.local import find_starts

    known = LinearGaussian(dim=3, latent_dim=2)
    x = known.draw(5)
    near = torch.arange(20, dtype=torch.float64).reshape(2, 5, 2)
    found = find_starts(known.program(), (x,), starts, near)
    assert found.shape == (starts, 5, 2)
    assert torch.equal(found[:2], near[:starts])
    with pytest.raises(ValueError, match=r"near has shape \(5, 2\): give \(S, 5, 2\)"):
        find_starts(known.program(), (x,), starts, near[0])


def test_chains_from_points_are_unbiased() -> None:
    """Also where the points are far off and the posterior is skewed, and the start is the Gaussian that it says it is."""
    known = LinearGaussian(dim=3, latent_dim=2)
    x, program = known.draw(6), known.program(inflate=1.3, shift=0.5)
    away = torch.tensor([0.0, 0.5, 1.0, 2.0, -1.0, 3.0], dtype=torch.float64)[:, None]
    near = known.posterior_mean(x) + away * torch.linalg.cholesky(known.covariance).sum(-1)
    particles = HMC(program, x, num_particles=4000, seed=3, near=near[None])
    found, error = (
        f(particles.log_weights) for f in (pv.evidence.weights.log_mean_exp, pv.evidence.weights.standard_error)
    )
    assert ((found - known.log_p(x)).abs() < 4.5 * error).all()
    assert error.max() < 0.1
    start = at_points(program, (x,), 2**30, near=near[None])
    u = torch.randn(7, 6, 2, dtype=torch.float64)
    exact = dist.MultivariateNormal(near, 2.0 * known.covariance).log_prob(u)
    assert torch.allclose(start.log_density(u), exact)
    assert torch.allclose(start.take(torch.tensor([4, 1])).log_density(u[:, [4, 1]]), exact[:, [4, 1]])
    draws = start.draw(20000)
    away_from = draws - near
    assert torch.allclose(away_from[:, 3].T @ away_from[:, 3] / 20000, 2.0 * known.covariance, atol=0.02)


def test_an_epoch_begins_near_draws_of_the_last_one() -> None:
    """What is kept of a row is a particle of its own: posterior draws, so of its posterior's mean and spread."""
    known = LinearGaussian(dim=5, latent_dim=2)
    x = known.draw(1).expand(4000, 5)
    estep = EStep(known.program(inflate=1.5), pv.posterior.from_guide, 50, 2**30, x.new_full((4001, 2), math.nan))
    estep((x,), 1 + torch.arange(4000), 0)
    assert estep.points[0].isnan().all()
    points, deviation = estep.points[1:], known.covariance.diagonal().sqrt()
    assert ((points.mean(0) - known.posterior_mean(x[:1])[0]).abs() < 5.0 * deviation / 4000**0.5 + 0.02 * deviation).all()
    assert torch.allclose(points.var(0), deviation.square(), rtol=0.15)
    seen: list[Tensor | None] = []

    class Watched(Laplace):
        def prepare(self, *given: Any, near: Tensor | None = None, **told: Any) -> Any:
            seen.append(near)
            return super().prepare(*given, near=near, **told)

    curve, rows = Curve(), line_data(20)
    pv.em.fit(curve.program, rows, engine=Watched(num_starts=2), epochs=2, batch_size=20, progress=False)
    assert seen[0] is None
    assert seen[1] is not None
    assert seen[1].shape == (1, 20, 1)
