"""Bounds of a linear-Gaussian model in three latent dimensions, and reweighted wake-sleep up to the exact maximum."""

from __future__ import annotations

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_gaussian import LinearGaussian, kl_normal
from one_dimension import normal_without_rsample
from torch import Tensor

import pyro_vae as pv

o = pv.objectives


def test_iwae_lies_between_the_elbo_and_log_p_and_rises_with_the_particles() -> None:
    """1,000 draws of each bound for each of 12 rows; each step up is more than 5 standard errors of the difference."""
    known = LinearGaussian()
    x = known.draw(12)
    program = known.program(inflate=1.5, shift=0.5)
    factor = torch.linalg.cholesky(known.covariance)
    mean = known.posterior_mean(x)
    elbo = float((known.log_p(x) - kl_normal(mean + 0.5 * factor.sum(-1), 1.5 * factor, mean, factor)).mean())
    log_p = float(known.log_p(x).mean())
    found = []
    for num_particles in (1, 2, 5, 25, 125):
        objective, copies = o.IWAE(num_particles), x.repeat(20, 1)
        draws = torch.tensor([-objective.loss(program.model, program.guide, copies) / len(copies) for _ in range(50)])
        found.append((float(draws.mean()), float(draws.std()) / 50**0.5))
    assert abs(found[0][0] - elbo) < 5.0 * found[0][1]
    for (low, low_error), (high, high_error) in itertools.pairwise(found):
        assert high - low > 5.0 * math.hypot(low_error, high_error)
    assert found[-1][0] < log_p
    assert log_p - found[-1][0] < 0.05 * (log_p - elbo)


def test_every_bound_is_tight_at_the_exact_posterior() -> None:
    known = LinearGaussian()
    x = known.draw(7)
    program = known.program()
    for objective in (
        o.ELBO(kl=o.sampled_kl), o.IWAE(3), o.Renyi(0.5, 3), o.Renyi(-2.0, 3), o.STL(2), o.DReG(3),
        o.ReweightedWakeSleep(3), o.ScoreFunction(3),
    ):  # fmt: skip
        loss, elbo = objective.loss_and_elbo(program.model, program.guide, x)
        torch.testing.assert_close(loss, -known.log_p(x).sum())
        torch.testing.assert_close(elbo, known.log_p(x).mean())


class Principal:
    """x ~ N(w z + b, 0.5^2 I) in R^3 with one latent number, whose maximum of log p(x) has a closed form."""

    noise = 0.5

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        z = torch.randn(400, 1, generator=generator, dtype=torch.float64)
        spread = self.noise * torch.randn(400, 3, generator=generator, dtype=torch.float64)
        self.x = z @ torch.tensor([[1.2, -0.6, 0.3]]).double() + torch.tensor([0.5, -1.0, 2.0]) + spread
        shapes = {"w": (3,), "b": (3,), "gain": (3,), "shift": (), "log_scale": ()}
        self.p = torch.nn.ParameterDict(
            {
                name: torch.nn.Parameter(0.1 * torch.randn(shape, generator=generator).double())
                for name, shape in shapes.items()
            }
        )

    def model(self, x: Tensor) -> None:
        pyro.module("principal", self.p)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
            pyro.sample("x", dist.Normal(z[..., None] * self.p["w"] + self.p["b"], self.noise).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        scale = self.p["log_scale"].exp()
        with pyro.plate("data", len(x)):
            pyro.sample("z", normal_without_rsample(x @ self.p["gain"] + self.p["shift"], scale.expand(len(x))))

    def log_p(self, w: Tensor, b: Tensor) -> float:
        covariance = torch.outer(w, w) + self.noise**2 * torch.eye(3, dtype=torch.float64)
        return float(torch.distributions.MultivariateNormal(b, covariance).log_prob(self.x).mean())

    def maximum(self) -> float:
        """Probabilistic PCA with known noise (Tipping & Bishop 1999): w = sqrt(lambda - s^2) v, the first eigenpair."""
        values, vectors = torch.linalg.eigh(torch.cov(self.x.T, correction=0))
        return self.log_p((values[-1] - self.noise**2).sqrt() * vectors[:, -1], self.x.mean(0))


@pytest.mark.parametrize("wake_phi", [1.0, 0.5, 0.0])
def test_reweighted_wake_sleep_reaches_the_exact_maximum(wake_phi: float) -> None:
    it = Principal()
    before = it.log_p(it.p["w"].detach(), it.p["b"].detach())
    history = pv.fit(
        pv.Program(it.model, it.guide),
        it.x,
        objective=o.ReweightedWakeSleep(10, wake_phi),
        epochs=200,
        batch_size=400,
        lr=0.1,
        schedule=lambda optimiser: torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 200),
    )
    w, b = it.p["w"].detach(), it.p["b"].detach()
    assert before < it.maximum() - 1.0
    assert it.maximum() - 0.005 < it.log_p(w, b) <= it.maximum() + 1e-9
    # And the guide is the posterior of that model: N(w'(x - b), s^2) / (s^2 + w'w).
    precision = (it.noise**2 + w @ w) / it.noise**2
    gain = w / it.noise**2 / precision
    deviation = float(precision) ** -0.5
    mean = (it.x - b) @ gain
    found = it.x @ it.p["gain"].detach() + it.p["shift"].detach()
    assert float((found - mean).abs().mean()) < 0.1 * deviation
    assert float(it.p["log_scale"].detach().exp()) == pytest.approx(deviation, rel=0.05)
    assert history.elbo[-1] == pytest.approx(it.maximum(), abs=0.05)
