"""Bounds and their gradients against quadrature, for programs whose rows have parameters of their own."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from one_dimension import Chain, Line, nodes, normal_without_rsample, require_mean
from torch import Tensor
from torch.distributions import AffineTransform

import pyro_vae as pv
from pyro_vae.learning.objectives import Objective

o = pv.objectives

COPIES = 40_000
KINDS = {"line": Line, "chain": Chain}

# name: objective, its number of particles, alpha of the bound (1: the ELBO)
UNBIASED: dict[str, tuple[Callable[[], Objective], int, float]] = {
    "ELBO": (lambda: o.ELBO(), 1, 1.0),
    "ELBO, two draws": (lambda: o.ELBO(num_particles=2), 2, 1.0),
    "ELBO, sampled": (lambda: o.ELBO(kl=o.sampled_kl), 1, 1.0),
    "IWAE": (lambda: o.IWAE(2), 2, 0.0),
    "Renyi 1/2": (lambda: o.Renyi(0.5, 2), 2, 0.5),
    "Renyi 2": (lambda: o.Renyi(2.0, 2), 2, 2.0),
    "Renyi -1": (lambda: o.Renyi(-1.0, 1), 1, -1.0),
    "STL": (lambda: o.STL(), 1, 1.0),
    "DReG, one draw": (lambda: o.DReG(1), 1, 1.0),
    "DReG": (lambda: o.DReG(2), 2, 0.0),
    "score function": (lambda: o.ScoreFunction(), 1, 1.0),
    "score function, two draws": (lambda: o.ScoreFunction(2), 2, 1.0),
    "score function, no baseline": (lambda: o.ScoreFunction(2, baseline=o.no_baseline), 2, 1.0),
}


def exact(line: Line, num_particles: int, alpha: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The bound, the standard deviation of one row's estimate, and the gradients for theta and phi."""
    theta, phi = line.leaves()
    value, deviation = line.bound(theta, phi, num_particles, alpha, count=60 if line.latents == 1 else 14)
    return value.detach(), deviation.detach(), *torch.autograd.grad(value, [theta, phi])


def test_the_quadrature_of_the_elbo_is_the_closed_form() -> None:
    line = Line()
    theta, phi = line.leaves()
    (a, b, s), (c, d, e) = theta, phi
    mean = c * line.x + d
    spread = (line.x - a * mean - b).square() + (a * e.exp()).square()
    kl = 0.5 * ((e.exp().square() + (mean - 0.4).square()) / 1.69 - 1.0) + torch.tensor(1.3).log() - e
    elbo = -0.5 * spread / s.exp().square() - s - 0.5 * torch.tensor(2.0 * torch.pi).log() - kl
    torch.testing.assert_close(line.bound(theta, phi, 1, alpha=1.0)[0], elbo)


@pytest.mark.parametrize("looped", [False, True], ids=["batched", "looped"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", UNBIASED)
def test_value_and_gradients_agree_with_the_exact_bound(name: str, kind: str, looped: bool) -> None:
    make, num_particles, alpha = UNBIASED[name]
    line = KINDS[kind](copies=COPIES, looped=looped)
    value, deviation, theta, phi = exact(line, num_particles, alpha)
    loss, elbo = make().loss_and_elbo(line.model, line.guide, *line.rows)
    assert abs(loss.detach() / COPIES + value) <= 5.0 * deviation / COPIES**0.5
    truth, noise, *_ = exact(line, num_particles, 1.0)
    assert abs(elbo - truth) <= 5.0 * noise / COPIES**0.5
    drawn = line.samples(loss)
    require_mean(drawn[0], theta)
    require_mean(drawn[1], phi)


def transformed(loc: Tensor, scale: Tensor) -> object:
    """The same Normal as a flow, which remembers the last draw it made and inverts any other."""
    standard = dist.Normal(torch.zeros_like(loc), torch.ones_like(loc))
    return dist.TransformedDistribution(standard, [AffineTransform(loc, scale, cache_size=1)])


@pytest.mark.parametrize("name", ["IWAE", "STL", "DReG", "score function"])
def test_a_flow_has_the_gradients_of_its_density(name: str) -> None:
    make, num_particles, alpha = UNBIASED[name]
    line = Chain(copies=COPIES, family=transformed)
    _, _, theta, phi = exact(line, num_particles, alpha)
    drawn = line.samples(make().differentiable_loss(line.model, line.guide, *line.rows))
    require_mean(drawn[0], theta)
    require_mean(drawn[1], phi)


@pytest.mark.parametrize("name", [*UNBIASED, "wake-sleep"])
def test_a_scale_multiplies_both_gradients(name: str) -> None:
    line, found = Line(copies=5), []
    make = UNBIASED[name][0] if name in UNBIASED else (lambda: o.ReweightedWakeSleep(2, wake_phi=0.5))
    for scale in (1.0, 0.25):
        torch.manual_seed(1)
        scaled = [pyro.poutine.scale(function, scale) for function in (line.model, line.guide)]
        found.append(line.samples(make().differentiable_loss(*scaled, *line.rows)))
    torch.testing.assert_close(found[1], tuple(0.25 * each for each in found[0]))


@pytest.mark.parametrize("kind", KINDS)
def test_stl_of_several_particles_is_biased_as_said(kind: str) -> None:
    line = KINDS[kind](copies=COPIES)
    value, deviation, theta, phi = exact(line, 2, 0.0)
    loss = o.STL(2).differentiable_loss(line.model, line.guide, *line.rows)
    drawn = line.samples(loss)
    assert abs(loss.detach() / COPIES + value) <= 5.0 * deviation / COPIES**0.5
    require_mean(drawn[0], theta)
    error = drawn[1].std(0) / COPIES**0.5
    assert ((drawn[1].mean(0) - phi).abs() > 20.0 * error).any()


def test_stl_has_no_noise_at_the_exact_posterior_and_little_near_it() -> None:
    at = Line(copies=2000, phi=Line().posterior())
    landing = at.samples(o.STL().differentiable_loss(at.model, at.guide, *at.rows))[1]
    torch.testing.assert_close(landing, torch.zeros_like(landing), rtol=0.0, atol=1e-12)
    c, d, e = Line().posterior()
    near = Line(copies=2000, phi=(c + 0.01, d, e + 0.02))
    found = {}
    for objective in (o.STL(), o.ELBO(), o.ELBO(kl=o.sampled_kl), o.ScoreFunction()):
        found[repr(objective)] = (
            near.samples(objective.differentiable_loss(near.model, near.guide, *near.rows))[1].var(0).sum()
        )
    stl, exact_kl, sampled_kl, score = found.values()
    assert 20.0 * stl < min(exact_kl, sampled_kl)
    assert 3.0 * max(exact_kl, sampled_kl) < score


@pytest.mark.parametrize("num_particles", [4, 16])
def test_dreg_has_less_noise_than_iwae(num_particles: int) -> None:
    """Near the optimum, per parameter of the guide; 4,000 draws know a variance to some 5 %."""
    c, d, e = Line().posterior()
    line = Line(copies=4000, phi=(c - 0.05, d + 0.1, e + 0.1))
    dreg, iwae = (
        line.samples(objective.differentiable_loss(line.model, line.guide, *line.rows))
        for objective in (o.DReG(num_particles), o.IWAE(num_particles))
    )
    assert (3.0 * dreg[1].var(0) < iwae[1].var(0)).all()
    torch.testing.assert_close(dreg[0].var(0), iwae[0].var(0), rtol=0.3, atol=0.0)


def test_the_baseline_of_the_other_draws_takes_noise_away() -> None:
    line = Line(copies=4000)
    noise = [
        line.samples(o.ScoreFunction(4, baseline).differentiable_loss(line.model, line.guide, *line.rows))[1].var(0).sum()
        for baseline in (o.leave_one_out, o.no_baseline)
    ]
    assert 2.0 * noise[0] < noise[1]


@pytest.mark.parametrize("family", [dist.Normal, normal_without_rsample], ids=["rsample", "no rsample"])
@pytest.mark.parametrize("kind", KINDS)
def test_wake_gradients_of_reweighted_wake_sleep(kind: str, family: Callable[..., object]) -> None:
    line = KINDS[kind](copies=COPIES, family=family)
    value, deviation, theta, _ = exact(line, 2, 0.0)
    loss = o.ReweightedWakeSleep(2).differentiable_loss(line.model, line.guide, *line.rows)
    assert abs(loss.detach() / COPIES + value) <= 5.0 * deviation / COPIES**0.5
    drawn = line.samples(loss)
    require_mean(drawn[0], theta)
    # sum_k s_k grad log q(z_k), with shares and draws held fixed
    at, phi = line.leaves()
    count = 60 if line.latents == 1 else 14
    log_w, weights = line.log_weights(at, phi, 2, count)
    noise, _ = nodes(2 * line.latents, count)
    z = line.draw(noise.reshape(-1, 2, line.latents), phi).detach()
    wake = (weights * (log_w.detach().softmax(-1) * line.log_q(z, phi)).sum(-1)).sum()
    require_mean(drawn[1], torch.autograd.grad(wake, phi)[0])


@pytest.mark.parametrize("wake_phi", [0.0, 0.3])
def test_the_sleep_gradient_is_that_of_log_q_under_the_model(wake_phi: float) -> None:
    line = Line(copies=COPIES)
    loss = o.ReweightedWakeSleep(2, wake_phi=wake_phi).differentiable_loss(line.model, line.guide, *line.rows)
    awake = o.ReweightedWakeSleep(2).differentiable_loss(line.model, line.guide, *line.rows)
    drawn = line.samples(loss)
    theta, phi = line.leaves()
    require_mean(drawn[0], exact(line, 2, 0.0)[2])
    noise, weights = nodes(2, 20)
    a, b, s = theta.detach()
    z = 0.4 + 1.3 * noise[:, :1]
    x = a * z[:, 0] + b + s.exp() * noise[:, 1]
    (sleep,) = torch.autograd.grad((weights * line.log_q(z, phi, x)).sum(), phi)
    require_mean(drawn[1] - wake_phi * line.samples(awake)[1], (1.0 - wake_phi) * sleep)


@pytest.mark.parametrize(("alpha", "log_scale"), [(0.5, -0.5), (2.0, -0.5), (-0.5, -0.1)])
def test_renyi_of_many_draws_is_the_variational_bound(alpha: float, log_scale: float) -> None:
    """log E_q w^(1 - alpha) / (1 - alpha) by quadrature, up to error and bias of the log of a mean of 4,000 draws."""
    line = Line(copies=100, phi=(0.3, 0.35, log_scale))  # wide where the tails of w matter
    log_w, weights = line.log_weights(line.theta[0].detach(), line.phi[0].detach(), 1, 80)
    log_moment = (weights.log() + (1.0 - alpha) * log_w[:, 0]).logsumexp(0)
    relative = ((weights.log() + 2.0 * (1.0 - alpha) * log_w[:, 0]).logsumexp(0) - 2.0 * log_moment).exp() - 1.0
    loss = o.Renyi(alpha, 4000).loss(line.model, line.guide, *line.rows)
    assert (
        abs(log_moment / (1.0 - alpha) - line.bound(line.theta[0], line.phi[0], 1, alpha=1.0)[0]) > 20.0 * relative / 4000
    )
    error = (relative / (100 * 4000)).sqrt() / abs(1.0 - alpha)
    assert abs(-loss / 100 - log_moment / (1.0 - alpha)) < 5.0 * error + relative / 4000
    assert error < 0.01
