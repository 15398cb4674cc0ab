import math

import pytest
import torch
from linear_gaussian import LinearGaussian

import pyro_vae as pv
from pyro_vae.evidence.estimate import Estimate


def estimate_of(log_weights: torch.Tensor) -> Estimate:
    zero = torch.zeros(log_weights.shape[1], dtype=torch.float64)
    return Estimate.from_particles(pv.Particles(log_weights, {}, zero, {"engine": "test"}))


def test_means_and_errors_add_up_as_independent_rows_do() -> None:
    generator = torch.Generator().manual_seed(0)
    log_weights = torch.randn(400, 3, generator=generator, dtype=torch.float64) * torch.tensor([0.1, 0.5, 1.0])
    estimate = estimate_of(log_weights)
    assert estimate.mean == pytest.approx(float(estimate.log_p.mean()))
    errors = [float(e) for e in estimate.standard_error]
    assert estimate.mean_standard_error == pytest.approx(math.sqrt(sum(e**2 for e in errors)) / 3)
    assert estimate.data_standard_error == pytest.approx(float(estimate.log_p.std()) / math.sqrt(3))


def test_heavy_weights_are_not_reliable_and_light_ones_are() -> None:
    generator = torch.Generator().manual_seed(0)
    light = 0.3 * torch.randn(1000, 1, generator=generator, dtype=torch.float64)
    heavy = 6.0 * torch.randn(1000, 1, generator=generator, dtype=torch.float64)
    estimate = estimate_of(torch.cat([light, heavy], 1))
    assert estimate.reliable.tolist() == [True, False]
    assert "k-hat" in estimate.reasons[1]
    assert "WARNING: 1 of 2 rows" in str(estimate)


def test_a_nan_weight_marks_its_row_and_no_other() -> None:
    log_weights = 0.1 * torch.randn(200, 3, dtype=torch.float64)
    clean = estimate_of(log_weights)
    spoilt = log_weights.clone()
    spoilt[4, 1] = torch.nan
    estimate = estimate_of(spoilt)
    assert estimate.reliable.tolist() == [True, False, True]
    assert "NaN" in estimate.reasons[1]
    assert torch.isfinite(estimate.log_p).all()
    torch.testing.assert_close(estimate.log_p[[0, 2]], clean.log_p[[0, 2]])


def test_zero_weights_and_few_particles_are_told() -> None:
    nothing = torch.full((100, 1), -torch.inf, dtype=torch.float64)
    assert estimate_of(nothing).reasons == ("all weights are zero",)
    assert estimate_of(nothing).log_p.item() == -math.inf
    assert estimate_of(torch.zeros(5, 1, dtype=torch.float64)).reasons == ("too few particles to judge",)


def test_table_has_a_line_a_row_and_str_is_short() -> None:
    estimate = estimate_of(0.1 * torch.randn(100, 4, dtype=torch.float64))
    frame = estimate.to_dataframe()
    assert list(frame["row"]) == [0, 1, 2, 3]
    promised = {"row", "log_p", "standard_error", "lower", "upper", "ess", "pareto_k", "engine", "reliable"}
    assert promised <= set(frame.columns)
    assert (frame["log_p"].to_numpy() == estimate.log_p.numpy()).all()
    assert len(str(estimate).splitlines()) <= 8
    assert repr(estimate) == str(estimate)


def test_cat_and_rows_keep_the_order() -> None:
    a, b = (estimate_of(0.1 * torch.randn(50, n, dtype=torch.float64)) for n in (2, 3))
    both = Estimate.cat([a, b])
    assert len(both) == 5
    assert torch.equal(both.log_p, torch.cat([a.log_p, b.log_p]))
    assert torch.equal(both.rows(2).log_p, a.log_p)


def test_interval_refuses_a_level_that_is_none() -> None:
    with pytest.raises(ValueError, match=r"level=1.5"):
        estimate_of(torch.zeros(50, 1, dtype=torch.float64)).interval(1.5)


def test_the_interval_covers_log_p_in_95_percent_of_2000_rows() -> None:
    """Weights are bounded because the guide is wider than the posterior."""
    known = LinearGaussian()
    x = known.draw(2000)
    program, guide = known.program(inflate=1.4, shift=0.3), pv.posterior.from_guide
    estimate = pv.log_evidence(program, x, method=guide, num_particles=2000, seed=4)
    low, high = estimate.interval(0.95)
    truth = known.log_p(x)
    covered = float(((low <= truth) & (truth <= high)).double().mean())
    plain = float(((estimate.log_p - truth).abs() <= 1.96 * estimate.standard_error).double().mean())
    assert 0.93 <= covered <= 0.97
    assert 0.93 <= plain <= 0.97
    assert estimate.reliable.double().mean() > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_under_the_exact_posterior_the_error_is_rounding_and_is_reported(dtype: torch.dtype) -> None:
    known = LinearGaussian(dim=40, latent_dim=5, dtype=dtype)
    x = known.draw(300)
    estimate = pv.log_evidence(known.program(), x, method=pv.posterior.from_guide, num_particles=100)
    error = (estimate.log_p - known.log_p(x)).abs()
    assert (estimate.standard_error > 0.0).all()
    assert (error <= 3.0 * estimate.standard_error).all()
    assert estimate.reliable.all()
    # Not a loose bound either: the error reported is that of the arithmetic, some hundred epsilons of a log-density.
    assert (estimate.standard_error < 1e4 * torch.finfo(dtype).eps).all()
