"""Probabilistic PCA and factor analysis against closed forms, autograd, scikit-learn and scipy."""

import math
import warnings

import numpy as np
import pytest
import scipy.stats
import torch
from em.correlated import COLUMNS, LATENT, draw, with_holes
from sklearn.decomposition import PCA, FactorAnalysis
from torch import Tensor
from torch.distributions import MultivariateNormal

import pyro_vae as pv
from pyro_vae.em.linear import LinearGaussian


def mean_log_p(program: LinearGaussian, x: Tensor) -> float:
    """Of a row, by torch's Normal on its whole covariance, from the parameters alone."""
    weight, noise = program.weight.detach().double(), program.noise.detach().double()
    covariance = weight @ weight.mT + torch.diag(noise.square())
    return float(MultivariateNormal(program.mean.detach().double(), covariance).log_prob(x.double()).mean())


def scipy_log_p(program: LinearGaussian, x: Tensor) -> np.ndarray:
    """Of what each row shows, (N,), by scipy."""
    weight, noise, mean = (p.detach().double().numpy() for p in (program.weight, program.noise, program.mean))
    covariance, log_p = weight @ weight.T + np.diag(noise**2), np.zeros(len(x))
    for number, row in enumerate(x.double().numpy()):
        seen = ~np.isnan(row)
        if seen.any():
            log_p[number] = scipy.stats.multivariate_normal.logpdf(row[seen], mean[seen], covariance[np.ix_(seen, seen)])
    return log_p


def gradient(program: LinearGaussian, x: Tensor) -> Tensor:
    """Of the mean log-likelihood by autograd through torch's Normals, one a row, in W / sd, m / sd and log s."""
    leaves = [p.detach().clone().requires_grad_() for p in (program.weight, program.mean, program.log_noise)]
    weight, mean, log_noise = leaves
    covariance = weight @ weight.mT + torch.diag_embed((2.0 * log_noise).exp().expand_as(mean))
    total = torch.zeros(()).double()
    for row in x:
        seen = ~row.isnan()
        if seen.any():
            total = total + MultivariateNormal(mean[seen], covariance[seen][:, seen]).log_prob(row[seen])
    by_weight, by_mean, by_noise = torch.autograd.grad(total / len(x), leaves)
    unit = covariance.diagonal().sqrt().detach()
    return torch.cat([(by_weight * unit[:, None]).flatten(), by_mean * unit, by_noise.flatten()])


def textbook_maximum(x: Tensor, latent_dim: int) -> float:
    """Tipping & Bishop 1999, eq. 9 at its maximum: of N (d log 2 pi + log |C| + d) / 2."""
    values = np.linalg.eigvalsh(np.cov(x.numpy().T, bias=True))[::-1]
    noise = values[latent_dim:].mean()
    log_det = np.log(values[:latent_dim]).sum() + (len(values) - latent_dim) * np.log(noise)
    return float(-0.5 * (len(values) * math.log(2.0 * math.pi) + log_det + len(values)))


def test_the_closed_form_is_the_textbooks_maximum() -> None:
    x = draw()
    program = pv.em.ppca(x, LATENT)
    assert float(program.log_likelihood) == pytest.approx(textbook_maximum(x, LATENT), abs=1e-10)
    assert mean_log_p(program, x) == pytest.approx(textbook_maximum(x, LATENT), abs=1e-10)
    assert gradient(program, x).abs().max() < 1e-9
    assert len(program.log_likelihood) == 1
    assert program.converged
    assert program.log_noise.shape == ()


@pytest.mark.parametrize("accelerate", [False, True])
@pytest.mark.parametrize("latent_dim", [1, 3])
def test_em_reaches_the_closed_form_of_ppca_and_never_loses(latent_dim: int, accelerate: bool) -> None:
    x = draw()
    program = pv.em.ppca(x, latent_dim, max_iterations=20_000, accelerate=accelerate)
    assert program.converged
    assert (program.log_likelihood.diff() >= 0.0).all()
    assert float(program.log_likelihood[-1]) == pytest.approx(textbook_maximum(x, latent_dim), abs=1e-6)
    assert float(program.log_likelihood[0]) < textbook_maximum(x, latent_dim) - 0.5  # it had something to climb
    assert mean_log_p(program, x) == pytest.approx(float(program.log_likelihood[-1]), abs=1e-10)


@pytest.mark.parametrize("latent_dim", [2, 6, 10, 11])
def test_em_does_not_stop_at_a_saddle_point_where_columns_vary_little(latent_dim: int) -> None:
    """Deviations from 1 to 1e-3: a column of W in a direction with less variance than the noise shrinks to zero."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(300, 12, generator=generator).double() * torch.logspace(0, -3, 12).double()
    x = x @ torch.randn(12, 12, generator=generator).double()
    best = pv.em.ppca(x, latent_dim)
    assert float(best.log_likelihood) == pytest.approx(textbook_maximum(x, latent_dim), abs=1e-7)
    program = pv.em.ppca(x, latent_dim, max_iterations=3000)
    assert program.converged
    assert float(best.log_likelihood - program.log_likelihood[-1]) < 1e-6


def test_em_that_is_started_at_a_saddle_point_says_so() -> None:
    x = draw()
    saddle = pv.em.ppca(x, 2)
    with torch.no_grad():
        saddle.weight[:, 1] = 0.0
    with pytest.warns(UserWarning, match=r"stopped at a saddle point, .* nats a row below the maximum"):
        program = pv.em.ppca(x, 2, initial=saddle)
    assert not program.converged


def test_columns_of_very_different_scale_have_a_closed_form() -> None:
    """Deviations 1,000 .. 0.01: s^2 is 1e-10 of the mean variance, which eigenvalues resolve and differences do not."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(500, 4, generator=generator).double() * torch.tensor([1e3, 1.0, 0.1, 0.01], dtype=torch.float64)
    program = pv.em.ppca(x, 3)
    assert float(program.log_likelihood) == pytest.approx(textbook_maximum(x, 3), abs=1e-6)
    assert program.log_p(x).mean().item() == pytest.approx(textbook_maximum(x, 3), abs=1e-5)
    with pytest.raises(ValueError, match=r"noise below 1e-08 of their mean variance.*for the closed form, which resolves"):
        pv.em.ppca(x, 3, max_iterations=5)


def test_the_score_of_scikit_learns_pca_is_lower_by_what_its_divisor_explains() -> None:
    """Its covariance is N / (N - 1) times ours: d/2 (log(N / (N - 1)) - 1/N) nats a row."""
    x = draw(40)
    count = len(x)
    difference = COLUMNS / 2.0 * (math.log(count / (count - 1.0)) - 1.0 / count)
    assert difference > 1e-3  # far above what is compared
    mine = float(pv.em.ppca(x, LATENT).log_likelihood)
    assert mine - difference == pytest.approx(PCA(LATENT).fit(x.numpy()).score(x.numpy()), abs=1e-9)


@pytest.mark.parametrize(("latent_dim", "count", "seed"), [(1, 60, 1), (2, 300, 1), (3, 600, 5)])
def test_factor_analysis_is_scikit_learns_and_a_stationary_point(latent_dim: int, count: int, seed: int) -> None:
    x = draw(count, latent_dim=latent_dim, seed=seed)
    program = pv.em.factor_analysis(x, latent_dim)
    assert program.converged
    assert (program.log_likelihood.diff() >= 0.0).all()
    standard = ((x - x.mean(0)) / x.std(0, unbiased=False)).numpy()
    other = FactorAnalysis(latent_dim, tol=1e-8, max_iter=20_000, svd_method="lapack").fit(standard)
    theirs = other.score(standard) - float(x.std(0, unbiased=False).log().sum())
    assert float(program.log_likelihood[-1]) == pytest.approx(theirs, abs=1e-6)
    assert mean_log_p(program, x) == pytest.approx(theirs, abs=1e-6)
    assert gradient(program, x).abs().max() < 1e-6


@pytest.mark.parametrize("holes", [False, True])
def test_mixing_gets_over_what_plain_iterations_do_not(holes: bool) -> None:
    """More factors than 7 columns tell apart: thousands of plain iterations are still below, by a ridge of 1e-5 nats."""
    x = draw(500, latent_dim=3, seed=8)
    x = with_holes(x, share=0.1) if holes else x
    program = pv.em.factor_analysis(x, 3)
    with pytest.warns(UserWarning, match="an estimated .* nats a row below the maximum"):
        plain = pv.em.factor_analysis(x, 3, accelerate=False, max_iterations=300)
    assert (plain.log_likelihood.diff() >= 0.0).all()
    assert (program.log_likelihood.diff() >= 0.0).all()
    assert len(program.log_likelihood) < 300
    assert gradient(program, x).abs().max() < 1e-5
    assert 1e-6 < float(program.log_likelihood[-1] - plain.log_likelihood[-1]) < 0.1


def test_factor_analysis_does_not_depend_on_the_units() -> None:
    x, unit = draw(), torch.logspace(-6.0, 6.0, COLUMNS).double()
    one, other = pv.em.factor_analysis(x, LATENT), pv.em.factor_analysis(x * unit, LATENT)
    torch.testing.assert_close(other.noise.detach(), one.noise.detach() * unit, rtol=1e-9, atol=0.0)
    torch.testing.assert_close(other.log_likelihood, one.log_likelihood - unit.log().sum(), rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("fit", [pv.em.ppca, pv.em.factor_analysis])
@pytest.mark.parametrize("accelerate", [False, True])
def test_missing_values_are_integrated_out(fit: object, accelerate: bool) -> None:
    """Monotone in the density of what was seen; its value by scipy, row by row; a stationary point by autograd."""
    x = with_holes(draw(150))
    program = fit(x, LATENT, accelerate=accelerate)  # type: ignore[operator]
    assert program.converged
    assert (program.log_likelihood.diff() >= 0.0).all()
    expected = scipy_log_p(program, x)
    np.testing.assert_allclose(program.log_p(x).detach().numpy(), expected, rtol=1e-11, atol=1e-11)
    assert expected[3] == expected[8] == 0.0
    assert float(program.log_likelihood[-1]) == pytest.approx(expected.mean(), abs=1e-10)
    assert gradient(program, x).abs().max() < (1e-5 if accelerate else 2e-4)  # sqrt(2 * 1e-8): the tolerance is in nats
    estimate = pv.log_evidence(program, x[:12], method=pv.posterior.from_guide, seed=0)
    np.testing.assert_allclose(estimate.log_p.numpy(), expected[:12], rtol=1e-10, atol=1e-10)


def test_missing_at_random_leaves_the_means_unbiased() -> None:
    """A column that is seen only where another is high: the mean of what was seen is wrong, the fit's within 5 errors.

    The half that was not seen comes from a regression on a column with correlation 0.85: twice the error of complete rows
    covers that.
    """
    x = draw(4000, 3, 1)
    truth = torch.tensor([-5.0, 7.5, 20.0]).double()
    holed = x.clone()
    holed[x[:, 0] < truth[0], 2] = torch.nan
    program = pv.em.factor_analysis(holed, 1)
    error = x[:, 2].std() / 4000**0.5
    assert (holed[:, 2].nanmean() - truth[2]).abs() > 20.0 * error
    assert (program.mean[2] - truth[2]).abs() < 5.0 * 2.0 * error


def test_a_heywood_case_is_held_at_the_floor_and_said() -> None:
    x = draw(30, 6, 3, seed=4)
    with pytest.warns(UserWarning, match=r"Heywood case.*column \d.*floor=0.001.*fewer latent dimensions than 3"):
        program = pv.em.factor_analysis(x, 3, floor=1e-3)
    share = program.noise.detach().square() / x.var(0, unbiased=False)
    assert float(share.min()) == pytest.approx(1e-3, rel=1e-6)
    assert (program.log_likelihood.diff() >= 0.0).all()
    slope = gradient(program, x)[-6:]
    assert (slope[share < 1.1e-3] < 0.0).all()  # only a smaller noise would rise further
    assert slope[share > 1.1e-3].abs().max() < 5e-4


def test_too_few_iterations_are_said_and_can_be_gone_on_with() -> None:
    x = draw()
    with pytest.warns(UserWarning, match=r"max_iterations=3, too early to say how far below .*tolerance=1e-08"):
        short = pv.em.factor_analysis(x, LATENT, max_iterations=3)
    assert not short.converged
    assert "NOT CONVERGED" in repr(short)
    assert len(short.log_likelihood) == 4
    again, whole = pv.em.factor_analysis(x, LATENT, initial=short), pv.em.factor_analysis(x, LATENT)
    assert float(again.log_likelihood[0]) == pytest.approx(float(short.log_likelihood[-1]), abs=1e-10)
    assert float(again.log_likelihood[-1]) == pytest.approx(float(whole.log_likelihood[-1]), abs=1e-6)
    holed = with_holes(x)
    start = pv.em.ppca(x, LATENT)
    assert float(pv.em.ppca(holed, LATENT, initial=start).log_likelihood[0]) == pytest.approx(
        scipy_log_p(start, holed).mean(), abs=1e-9
    )


@pytest.mark.parametrize("fit", [pv.em.ppca, pv.em.factor_analysis])
def test_single_precision_gives_the_double_results_rounded(fit: object) -> None:
    x = with_holes(draw()).float()
    single, double = fit(x, LATENT), fit(x.double(), LATENT)  # type: ignore[operator]
    assert {p.dtype for p in single.parameters()} == {torch.float32}
    assert {p.dtype for p in double.parameters()} == {torch.float64}
    assert torch.equal(single.weight, double.weight.float())
    assert torch.equal(single.mean, double.mean.float())
    assert torch.equal(single.log_likelihood, double.log_likelihood)


def test_fits_are_the_same_each_time_and_leave_the_generator_alone() -> None:
    x = draw()
    state = torch.get_rng_state()
    one, other = (pv.em.ppca(x, LATENT, max_iterations=500) for _ in range(2))
    assert torch.equal(one.weight, other.weight)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(pv.em.ppca(x.numpy(), LATENT).weight, pv.em.ppca(x, LATENT).weight)  # type: ignore[arg-type]


def test_rows_that_no_maximum_goes_with_are_refused_in_a_sentence() -> None:
    x = draw(30)
    for fit in (pv.em.ppca, pv.em.factor_analysis):
        for latent_dim in (0, COLUMNS, 2.0, True):
            with pytest.raises(ValueError, match=rf"latent_dim={latent_dim} must be a whole number from 1 to 6"):
                fit(x, latent_dim)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"x has 5 rows with values and latent_dim=4 needs at least 6"):
            fit(torch.cat([x[:5], torch.full_like(x, torch.nan)]), 4)
        with pytest.raises(ValueError, match="infinite values in 1 of 30 rows, first in row 7"):
            fit(x.index_fill(0, torch.tensor([7]), -torch.inf), 2)
        with pytest.raises(ValueError, match=r"shape \(30, 7, 1\): give one of shape \(N, d\)"):
            fit(x[..., None], 2)
        with pytest.raises(ValueError, match="No value of column 2 of x was seen"):
            fit(x.index_fill(1, torch.tensor([2]), torch.nan), 2)
        with pytest.raises(ValueError, match=r"max_iterations=0 must be a whole number"):
            fit(x, 2, max_iterations=0)
        with pytest.raises(ValueError, match=r"tolerance=nan must be"):
            fit(x, 2, max_iterations=5, tolerance=math.nan)
        with pytest.raises(ValueError, match=r"tolerance='a' must be"):
            fit(x, 2, tolerance="a")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"initial='a' is no result of ppca"):
            fit(x, 2, initial="a")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"x has 1 column: .* give at least 2"):
            fit(x[:, :1], 1)
        with pytest.raises(ValueError, match=r"initial has weight \(7, 1\) and here it is \(7, 2\)"):
            fit(x, 2, initial=pv.em.ppca(x, 1))
    with pytest.raises(ValueError, match=r"floor=0 must lie between 0 and 1"):
        pv.em.factor_analysis(x, 2, floor=0)


def test_constant_columns_are_refused_where_each_has_its_noise_and_said_where_not() -> None:
    x = draw(30)
    x[:, 3] = 0.1
    with pytest.raises(ValueError, match=r"1 of 7 columns of x are constant \(the first is column 3\).*pv\.em\.ppca"):
        pv.em.factor_analysis(x, 2)
    with pytest.warns(UserWarning, match=r"column 3\): the model predicts them without error"):
        program = pv.em.ppca(x, 2)
    assert float(program.log_likelihood) == pytest.approx(textbook_maximum(x, 2), abs=1e-9)
    with pytest.raises(ValueError, match="7 of 7 columns"):
        pv.em.ppca(torch.ones(30, 7), 2)


@pytest.mark.parametrize("missing", [False, True])
def test_rows_in_a_plane_have_no_maximum(missing: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 2, generator=generator) @ torch.randn(2, 5, generator=generator)
    x = x.double()
    x[:, 0] = x[:, 1] + 2.0 * x[:, 3]
    if missing:
        x[:20, 4] = torch.nan
    with pytest.raises(ValueError, match=r"lie in a plane of latent_dim=3 dimensions or fewer"):
        pv.em.ppca(x, 3)


def test_repr_tells_how_the_fit_ended() -> None:
    x = draw()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "nats a row in closed form)" in repr(pv.em.ppca(x, LATENT))
        program = pv.em.factor_analysis(x, LATENT)
    assert f"nats a row after {len(program.log_likelihood) - 1} iterations)" in repr(program)
