"""Laplace mixtures against closed forms and quadrature."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_gaussian import LinearGaussian
from peaks import KINDS, strata, two_peaks
from torch import Tensor

import pyro_vae as pv
from pyro_vae.evidence import weights
from pyro_vae.posterior.mixture import _allot
from pyro_vae.posterior.modes import find_modes
from pyro_vae.posterior.shapes import Dense, positive


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
    many = pv.log_evidence(program, x, method=pv.posterior.Laplace(num_starts=32), num_particles=2000, seed=3)
    trusted = many.reliable
    assert trusted.double().mean() > 0.7
    error = (many.log_p - truth).abs()
    assert (error < 4.5 * many.standard_error + many.bias.abs())[trusted].all()
    assert (error < 0.1)[trusted].all()
    one = pv.log_evidence(program, x, method=pv.posterior.Laplace(num_starts=1), num_particles=2000, seed=3)
    assert (truth - one.log_p).max() > 0.6  # log 2: at least one mode of some row was missed


@pytest.mark.parametrize("x", [-2.0, 0.1, 30.0])
def test_skewed_and_heavy_tailed_posteriors_agree_with_quadrature(x: float) -> None:
    """An exponential prior on a positive latent, with a Student-t likelihood: skewed in u, Jacobian included.

    At x = 1 and x = 6 a narrow peak has a long shoulder, which the cascade finds, see tests/evidence/test_cascade.py.
    """
    rate = torch.tensor(0.7, dtype=torch.float64)
    program = program_of(dist.Exponential(rate), lambda z: dist.StudentT(3.0, z, 0.5))
    rows = torch.full((4,), x, dtype=torch.float64)
    truth = quadrature(program, rows, 40.0, 40_001)
    estimate = pv.log_evidence(program, rows, method=pv.posterior.Laplace(num_starts=8), num_particles=20_000, seed=1)
    assert (estimate.standard_error < 0.02).all()
    assert ((estimate.log_p - truth).abs() < 4.5 * estimate.standard_error + estimate.bias.abs()).all()


def test_mean_weight_is_unbiased_when_modes_are_missed() -> None:
    """Mean over 4,000 repetitions of exp(log p-hat) / p(x) is 1, with one start on a posterior of four modes."""
    program = program_of(STANDARD, lambda z: dist.Normal(z.abs(), 0.9).to_event(1))
    x = torch.tensor([[0.8, 0.5]], dtype=torch.float64)
    truth = quadrature(program, x, 8.0, 401)
    one = pv.posterior.Laplace(num_starts=1)
    estimate = pv.log_evidence(program, x.repeat(4000, 1), method=one, num_particles=20, seed=5)
    ratio = torch.exp(estimate.log_p - truth)
    assert abs(ratio.mean() - 1.0) < 4.5 * ratio.std() / 4000**0.5
    assert ratio.std() > 0.1


def test_draws_follow_their_density_in_fixed_numbers() -> None:
    """E over the mixture of N(u; 0, I) / r(u) is 1: the density belongs to the draws, in strata and one by one."""
    mixture = two_peaks()
    assert mixture.modes_per_row.tolist() == [2, 1]
    assert mixture.allot(40_000).sum(0).tolist() == [40_000, 40_000]
    assert (mixture.allot(40_000)[KINDS:, 1] == 0).all()  # the second row has one mode
    u, component, log_share = strata(mixture, 40_000)
    alone = mixture.independent_components(40_000)
    draws = {
        "strata": (u, component, mixture.log_density(u, log_share)),
        "one by one": (u := mixture.draw(alone, torch.float64), None, mixture.log_density(u, mixture.log_share)),
    }
    for name, (u, of, log_r) in draws.items():
        log_weights = dist.Normal(0.0, 1.0).expand([2]).to_event(1).log_prob(u) - log_r
        error = weights.standard_error(log_weights, of)
        assert (weights.log_mean_exp(log_weights).abs() < 4.5 * error).all(), name
        assert (error < 0.02).all(), name


def test_allotted_numbers_are_whole_and_nearest() -> None:
    share = torch.tensor([[0.5, 0.1], [0.3, 0.1], [0.2, 0.8]], dtype=torch.float64)
    # 7 x (0.5, 0.3, 0.2) = (3.5, 2.1, 1.4): whole parts 3, 2, 1, and the one left goes to the largest remainder.
    assert _allot(share, 7).T.tolist()[0] == [4, 2, 1]
    assert _allot(share, 7).sum(0).tolist() == [7, 7]
    assert _allot(share, 10).T.tolist() == [[5, 3, 2], [1, 1, 8]]


def test_flat_and_negative_curvature_become_bounded_gaussians() -> None:
    matrix = torch.diag_embed(torch.tensor([[4.0, 1e-9], [2.0, -3.0], [5.0, 1.0]], dtype=torch.float64))
    shape = positive(matrix, torch.tensor(0.25, dtype=torch.float64))
    torch.testing.assert_close(
        shape.factor @ shape.factor.mT,
        torch.diag_embed(torch.tensor([[4.0, 0.25], [2.0, 3.0], [5.0, 1.0]], dtype=torch.float64)),
    )


def test_newton_ends_at_the_mode_of_a_linear_gaussian_model() -> None:
    known = LinearGaussian()
    x = known.draw(7)
    modes, cost = find_modes(known.program(), (x,), torch.randn(5, 7, 3, dtype=torch.float64))
    assert modes.row.tolist() == list(range(7))  # one mode a row, whatever the starts
    assert modes.visits.tolist() == [5] * 7
    torch.testing.assert_close(modes.u, known.posterior_mean(x))
    assert isinstance(modes.shape, Dense)
    torch.testing.assert_close(torch.cholesky_inverse(modes.shape.factor), known.covariance.expand(7, -1, -1))
    torch.testing.assert_close(modes.log_mass, known.log_p(x))
    assert cost.shape == (7,)
    assert (cost >= 10).all()  # five starts, each with a forward and a backward pass at least


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


@pytest.mark.parametrize("dim", [1, 2])
def test_the_density_integrates_to_one(dim: int) -> None:
    """Two peaks in row 0 and one in row 1, summed over a grid; what the heavy tails leave outside is below 1e-3."""
    mixture = two_peaks(dim)
    line = torch.linspace(-25.0, 25.0, 1001, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(*[line] * dim, indexing="ij"), -1).reshape(-1, 1, dim).expand(-1, 2, -1)
    cell = (50.0 / 1000) ** dim
    log_density = torch.cat([mixture.log_density(part, mixture.log_share) for part in grid.split(200_000)])
    mass = torch.exp(log_density).sum(0) * cell
    assert (mass < 1.0 + 1e-6).all()
    assert (mass > 1.0 - 1e-3).all()
    # So does every component; a row without the second peak has no density there.
    if dim == 1:
        each = torch.exp(mixture.by_component(grid)).sum(1) * cell
        assert ((each - 1.0).abs() < 1e-3)[:, 0].all()
        assert (each[KINDS:, 1] == 0.0).all()


def test_draws_have_the_means_and_covariances_of_their_components() -> None:
    """In one dimension, against moments of each component's density by quadrature; the tails have a kurtosis of 9."""
    mixture, count = two_peaks(1), 100_000
    component = torch.arange(2 * KINDS)[:, None].repeat_interleave(count, 0).expand(-1, 2)
    u = mixture.draw(component, torch.float64).reshape(2 * KINDS, count, 2)[..., 0]  # of the first row
    line = torch.linspace(-400.0, 400.0, 400_001, dtype=torch.float64)
    density = torch.exp(mixture.by_component(line[:, None, None].expand(-1, 2, 1))[..., 0]) * 0.002
    mean = (density * line).sum(-1)
    variance = (density * (line - mean[:, None]).square()).sum(-1)
    assert ((u.mean(1) - mean).abs() < 4.5 * (variance / count).sqrt()).all()
    assert ((u.var(1) / variance - 1.0).abs() < 4.5 * (8.0 / count) ** 0.5).all()
    assert len(mean.unique()) > 1
    assert (variance[1:KINDS] > 1.05 * variance[0]).all()  # the first of a peak is the narrowest


def test_draws_of_two_dimensions_are_shaped_by_the_precision() -> None:
    """The first component of a peak is N(m, P^-1): its draws, whitened, have mean zero and unit covariance."""
    mixture, count = two_peaks(2), 50_000
    for m, peak in enumerate(mixture.peaks):
        component = torch.full((count, 2), m * KINDS)
        u = mixture.draw(component, torch.float64)[:, peak.rows] - peak.mean
        white = peak.shape.whiten(u)
        assert ((white.mean(0)).abs() < 4.5 / count**0.5).all()
        covariance = torch.einsum("knd,kne->nde", white, white) / count
        expected = torch.eye(2, dtype=torch.float64).expand(len(peak.rows), -1, -1)
        assert ((covariance - expected).abs() < 4.5 * (2.0 / count) ** 0.5).all()


def test_rows_taken_in_any_order_keep_their_own_peaks() -> None:
    mixture = two_peaks(2)
    u = torch.randn(5, 2, 2, dtype=torch.float64)
    log_density = mixture.log_density(u, mixture.log_share)
    for index in ([1, 0], [1], [0]):
        some = mixture.take(torch.tensor(index))
        torch.testing.assert_close(some.log_density(u[:, index], some.log_share), log_density[:, index])
        assert some.modes_per_row.tolist() == [[2, 1][row] for row in index]
        draws = some.draw(torch.zeros(20_000, len(index), dtype=torch.long), torch.float64)
        mean = torch.stack([mixture.peaks[0].mean[row] for row in index])
        assert ((draws.mean(0) - mean).abs() < 4.5 * draws.std(0) / 20_000**0.5).all()
