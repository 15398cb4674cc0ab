"""Laplace mixtures against closed forms and quadrature."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_gaussian import LinearGaussian
from torch import Tensor

import pyro_vae as pv
from pyro_vae.evidence import weights
from pyro_vae.posterior.mixture import Mixture, _allot
from pyro_vae.posterior.modes import Modes, find_modes, positive_factor


def laplace(num_starts: int) -> Callable[..., pv.Particles]:
    def method(
        program: pv.Program, x: Tensor, *, num_particles: int = 2000, seed: object = 0, memory: int = 2**30
    ) -> object:
        return pv.posterior.laplace(
            program, x, num_particles=num_particles, seed=seed, memory=memory, num_starts=num_starts
        )

    return method


def program_of(latent: dist.TorchDistribution, likelihood: Callable[[Tensor], dist.TorchDistribution]) -> pv.Program:
    """z ~ latent (two dimensions, or one constrained), x ~ likelihood(z); the guide is the prior."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", likelihood(pyro.sample("z", latent)), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", latent)

    return pv.Program(model, guide)


def quadrature(program: pv.Program, x: Tensor, half_width: float, points: int) -> Tensor:
    """log p(x) by the trapezoid rule over u in [-half_width, half_width]^D, spectrally accurate as the ends vanish."""
    log_joint = program.log_joint(x)
    line = torch.linspace(-half_width, half_width, points, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(*[line] * log_joint.dim, indexing="ij"), -1).reshape(-1, 1, log_joint.dim)
    with torch.no_grad():
        values = torch.cat([log_joint(part.expand(-1, len(x), -1)) for part in grid.split(20_000)])
    return torch.logsumexp(values, 0) + log_joint.dim * math.log(2.0 * half_width / (points - 1))


STANDARD = dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1)


@pytest.mark.parametrize("latent_dim", [3, 50])
def test_linear_gaussian_rows_are_right_to_a_hundredth_of_a_nat(latent_dim: int) -> None:
    known = LinearGaussian(dim=60, latent_dim=latent_dim)
    x = known.draw(200)
    estimate = pv.log_evidence(
        known.program(inflate=2.0, shift=1.0), x, method=pv.posterior.laplace, num_particles=2000, seed=1
    )
    error = estimate.log_p - known.log_p(x)
    assert (error.abs() < 0.01).all()
    assert abs(error.mean()) < 0.001
    assert (error.abs() < 4.5 * estimate.standard_error).all()
    assert estimate.reliable.all()


def test_errors_of_strata_cover_as_they_say() -> None:
    known = LinearGaussian(dim=10, latent_dim=4)
    x = known.draw(2000)
    estimate = pv.log_evidence(known.program(), x, method=pv.posterior.laplace, num_particles=400, seed=2)
    low, high = estimate.interval(0.95)
    truth = known.log_p(x)
    assert 0.93 <= float(((low <= truth) & (truth <= high)).double().mean()) <= 0.97


SHAPES = {
    "four modes": torch.abs,
    "bent": lambda z: torch.stack([z[..., 0] * z[..., 1], z[..., 0].square() - z[..., 1]], -1),
}


@pytest.mark.parametrize("name", SHAPES)
def test_several_starts_find_the_modes_that_one_misses(name: str) -> None:
    decoder = SHAPES[name]
    program = program_of(STANDARD, lambda z: dist.Normal(decoder(z), 0.3).to_event(1))
    z = torch.randn(20, 2, dtype=torch.float64)
    x = decoder(z) + 0.3 * torch.randn(20, 2, dtype=torch.float64)
    truth = quadrature(program, x, 7.0, 501)
    many = pv.log_evidence(program, x, method=laplace(32), seed=3)
    trusted = many.reliable
    assert trusted.double().mean() > 0.7
    error = (many.log_p - truth).abs()
    assert (error < 4.5 * many.standard_error + many.bias.abs())[trusted].all()
    assert (error < 0.1)[trusted].all()
    one = pv.log_evidence(program, x, method=laplace(1), seed=3)
    assert (truth - one.log_p).max() > 0.6  # log 2: at least one mode of some row was missed


def test_skewed_and_heavy_tailed_posteriors_agree_with_quadrature() -> None:
    """An exponential prior on a positive latent, with a Student-t likelihood: skewed in u, Jacobian included."""
    rate = torch.tensor(0.7, dtype=torch.float64)
    program = program_of(dist.Exponential(rate), lambda z: dist.StudentT(3.0, z, 0.5))
    x = torch.tensor([-2.0, 0.1, 1.0, 6.0, 30.0], dtype=torch.float64)
    truth = quadrature(program, x, 40.0, 40_001)
    estimate = pv.log_evidence(program, x, method=laplace(8), num_particles=20_000, seed=1)
    assert ((estimate.log_p - truth).abs() < 4.5 * estimate.standard_error + estimate.bias.abs()).all()
    assert (estimate.standard_error < 0.2).all()


def test_mean_weight_is_unbiased_when_modes_are_missed() -> None:
    """Mean over 4,000 repetitions of exp(log p-hat) / p(x) is 1, with one start on a posterior of four modes."""
    program = program_of(STANDARD, lambda z: dist.Normal(z.abs(), 0.9).to_event(1))
    x = torch.tensor([[0.8, 0.5]], dtype=torch.float64)
    truth = quadrature(program, x, 8.0, 401)
    estimate = pv.log_evidence(program, x.repeat(4000, 1), method=laplace(1), num_particles=20, seed=5)
    ratio = torch.exp(estimate.log_p - truth)
    assert abs(ratio.mean() - 1.0) < 4.5 * ratio.std() / 4000**0.5
    assert ratio.std() > 0.1


def test_draws_follow_their_density_in_fixed_numbers() -> None:
    """E over the mixture of N(u; 0, I) / r(u) is 1: the density belongs to the draws; every stratum has its number."""
    row = torch.tensor([0, 0, 1])
    u = torch.tensor([[1.0, 0.0], [-1.0, 0.5], [0.0, 0.0]], dtype=torch.float64)
    factor = torch.linalg.cholesky(torch.tensor([[[2.0, 0.5], [0.5, 1.0]]] * 3, dtype=torch.float64))
    modes = Modes(row, u, torch.tensor([0.0, -1.0, 0.0], dtype=torch.float64), factor)
    mixture = Mixture.at(modes, torch.zeros(1, 2, 2, dtype=torch.float64), 40_000)
    draws, component = mixture.draw_strata(torch.float64)
    for c in range(4):
        assert torch.equal((component == c).sum(0), mixture.counts[c])
    assert mixture.counts.sum(0).tolist() == [40_000, 40_000]
    assert mixture.modes_per_row.tolist() == [2, 1]
    log_weights = dist.Normal(0.0, 1.0).expand([2]).to_event(1).log_prob(draws) - mixture.log_density(draws)
    error = weights.standard_error(log_weights, component)
    assert (weights.log_mean_exp(log_weights).abs() < 4.5 * error).all()
    assert (error < 0.02).all()


def test_allotted_numbers_are_whole_and_nearest() -> None:
    share = torch.tensor([[0.5, 0.1], [0.3, 0.1], [0.2, 0.8]], dtype=torch.float64)
    # 7 x (0.5, 0.3, 0.2) = (3.5, 2.1, 1.4): whole parts 3, 2, 1, and the one left goes to the largest remainder.
    assert _allot(share, 7).T.tolist()[0] == [4, 2, 1]
    assert _allot(share, 7).sum(0).tolist() == [7, 7]
    assert _allot(share, 10).T.tolist() == [[5, 3, 2], [1, 1, 8]]


def test_flat_and_negative_curvature_become_bounded_gaussians() -> None:
    matrix = torch.diag_embed(torch.tensor([[4.0, 1e-9], [2.0, -3.0], [5.0, 1.0]], dtype=torch.float64))
    least = torch.tensor(0.25, dtype=torch.float64)
    factor = positive_factor(matrix, least)
    rebuilt = factor @ factor.mT
    torch.testing.assert_close(
        rebuilt, torch.diag_embed(torch.tensor([[4.0, 0.25], [2.0, 3.0], [5.0, 1.0]], dtype=torch.float64))
    )


def test_newton_ends_at_the_mode_of_a_linear_gaussian_model() -> None:
    known = LinearGaussian()
    x = known.draw(7)
    modes = find_modes(known.program(), (x,), torch.randn(5, 7, 3, dtype=torch.float64))
    order = modes.row.argsort()
    assert modes.row[order].tolist() == list(range(7))  # one mode a row, whatever the starts
    torch.testing.assert_close(modes.u[order], known.posterior_mean(x))
    torch.testing.assert_close(torch.cholesky_inverse(modes.factor), known.covariance.expand(7, -1, -1))
    torch.testing.assert_close(modes.log_mass[order], known.log_p(x))


def test_the_budget_moves_the_answer_by_rounding_alone() -> None:
    known = LinearGaussian(dtype=torch.float32)
    x = known.draw(30)
    answers = [
        pv.log_evidence(known.program(), x, method=pv.posterior.laplace, num_particles=100, seed=1, memory=memory)
        for memory in (2**30, 2**16)
    ]
    torch.testing.assert_close(answers[0].log_p, answers[1].log_p, rtol=1e-5, atol=1e-4)


def test_a_row_without_a_finite_density_disturbs_no_other() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", STANDARD)
            broken = torch.where(x[:, :1] > 50.0, torch.nan, 1.0)
            pyro.sample("x", dist.Normal(z * broken, 0.5).to_event(1), obs=x)

    program = pv.Program(model, program_of(STANDARD, lambda z: dist.Normal(z, 0.5).to_event(1)).guide)
    x = torch.tensor([[0.5, 0.1], [0.0, 0.0], [-1.0, 2.0], [99.0, 0.0]], dtype=torch.float64)
    estimate = pv.log_evidence(program, x, method=pv.posterior.laplace, num_particles=500)
    truth = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.25**0.5).log_prob(x).sum(-1)
    good = torch.tensor([True, True, True, False])
    assert estimate.reliable.tolist() == good.tolist()
    assert ((estimate.log_p - truth).abs() < 4.5 * estimate.standard_error)[good].all()
    assert "NaN" in estimate.reasons[3]
