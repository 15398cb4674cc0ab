"""Log-densities against scipy's, in both precisions, far into the tails."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

from pyro_vae.model.families.bounded import Beta, ContinuousBernoulli
from pyro_vae.model.families.counts import Binomial, NegativeBinomial, Poisson, ZeroInflated
from pyro_vae.model.families.levels import DiscretisedLogistic, DiscretisedLogisticMixture, Grid
from pyro_vae.model.families.student import StudentT

COUNTS = [0.0, 1.0, 2.0, 17.0, 1000.0, 100_000.0]
UNIT = [1e-6, 0.01, 0.3, 0.5, 0.9, 0.999]
REAL = [-1e6, -30.0, -1.0, 0.0, 0.3, 5.0, 1e4]


def nbinom(log_mean: float, dispersion: float) -> Any:
    shape = 1.0 / dispersion
    return scipy.stats.nbinom(shape, 1.0 / (1.0 + dispersion * np.exp(log_mean)))


def beta(logit: float, concentration: float) -> Any:
    m = 1.0 / (1.0 + np.exp(-logit))
    return scipy.stats.beta(m * concentration, (1.0 - m) * concentration)


CASES: dict[str, tuple[Callable[..., Any], list[tuple[float, ...]], Callable[..., Any], list[float]]] = {
    "Poisson": (Poisson, [(-5.0,), (0.0,), (3.0,), (11.5,)], lambda m: scipy.stats.poisson(np.exp(m)).logpmf, COUNTS),
    "NegativeBinomial": (
        NegativeBinomial,
        [(-5.0, 0.5), (0.0, 1e-3), (3.0, 2.0), (11.5, 0.1), (11.5, 1e-3), (2.0, 100.0)],
        lambda m, a: nbinom(m, a).logpmf,
        COUNTS,
    ),
    "ZeroInflated": (
        lambda m, a, g: ZeroInflated(NegativeBinomial(m, a), g),
        [(0.0, 0.5, -2.0), (5.0, 0.1, 1.0), (2.0, 1.0, -30.0)],
        lambda m, a, g: (
            lambda x: np.where(
                x == 0,
                np.logaddexp(-np.log1p(np.exp(-g)), -np.log1p(np.exp(g)) + nbinom(m, a).logpmf(0)),
                -np.log1p(np.exp(g)) + nbinom(m, a).logpmf(x),
            )
        ),
        COUNTS,
    ),
    "Binomial": (
        Binomial,
        [(1.0, 0.3), (40.0, -3.0), (40.0, 20.0)],
        lambda n, g: scipy.stats.binom(n, 1.0 / (1.0 + np.exp(-g))).logpmf,
        [0.0, 1.0],
    ),
    "Binomial, of many": (
        Binomial,
        [(100_000.0, -5.0), (100_000.0, 2.0)],
        lambda n, g: scipy.stats.binom(n, 1.0 / (1.0 + np.exp(-g))).logpmf,
        COUNTS,
    ),
    "Beta": (Beta, [(0.0, 2.0), (-3.0, 0.5), (2.0, 50.0), (0.5, 1e4), (-8.0, 3.0)], lambda m, k: beta(m, k).logpdf, UNIT),
    "StudentT": (
        StudentT,
        [(1.0, 0.0, 1.0), (4.0, -2.0, 0.3), (0.7, 1.0, 5.0), (1000.0, 0.2, 2.0)],
        lambda v, m, s: scipy.stats.t(v, m, s).logpdf,
        REAL,
    ),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 2e-9), (torch.float32, 2e-5)])
@pytest.mark.parametrize("name", CASES)
def test_log_prob_is_scipys(name: str, dtype: torch.dtype, tolerance: float) -> None:
    family, parameters, reference, values = CASES[name]
    x = torch.tensor(values, dtype=dtype)
    for given in parameters:
        arguments = [torch.tensor(value, dtype=dtype) for value in given]
        found = family(*arguments).log_prob(x)
        expected = reference(*(float(a) for a in arguments))(x.double().numpy())
        torch.testing.assert_close(
            found.double(), torch.as_tensor(expected), rtol=tolerance, atol=tolerance, msg=str(given)
        )


def test_a_negative_binomial_of_no_dispersion_is_poisson() -> None:
    x, log_mean = torch.tensor(COUNTS), torch.tensor([[0.3], [11.4]])
    torch.testing.assert_close(
        NegativeBinomial(log_mean, torch.tensor(1e-12)).log_prob(x), Poisson(log_mean).log_prob(x), rtol=1e-5, atol=1e-5
    )


LOGITS = [-30.0, -5.0, -0.51, -0.49, -1e-3, -1e-8, 0.0, 1e-5, 0.2, 0.499, 0.501, 3.0, 17.0, 30.0]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 4e-6)])
def test_continuous_bernoulli_is_right_for_all_logits(dtype: torch.dtype, tolerance: float) -> None:
    """Against 50 digits: log p, its two derivatives in the logits, mean and variance."""
    import mpmath

    mpmath.mp.dps = 50
    logits = torch.tensor(LOGITS, dtype=dtype, requires_grad=True)
    x = torch.tensor([[0.0], [0.2], [1.0]], dtype=dtype)
    p = ContinuousBernoulli(logits)
    log_prob = p.log_prob(x)
    (first,) = torch.autograd.grad(log_prob.sum(), logits, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), logits)
    for i, logit in enumerate(map(mpmath.mpf, logits.detach().tolist())):
        normaliser = mpmath.log(mpmath.expm1(logit) / logit) if logit else mpmath.mpf(0)
        mean = 1 / (1 - mpmath.exp(-logit)) - 1 / logit if logit else mpmath.mpf(0.5)
        variance = 1 / logit**2 - 1 / (4 * mpmath.sinh(logit / 2) ** 2) if logit else mpmath.mpf(1) / 12
        for j, value in enumerate(map(mpmath.mpf, x[:, 0].tolist())):
            expected = float(logit * value - normaliser)
            assert float(log_prob.detach()[j, i]) == pytest.approx(expected, rel=tolerance, abs=tolerance), (logit, value)
        total = float(sum(map(mpmath.mpf, x[:, 0].tolist())) - 3 * mean)
        assert float(first.detach()[i]) == pytest.approx(total, rel=10 * tolerance, abs=10 * tolerance), logit
        assert float(second[i]) == pytest.approx(float(-3 * variance), rel=300 * tolerance, abs=30 * tolerance), logit
        assert float(p.mean.detach()[i]) == pytest.approx(float(mean), rel=tolerance, abs=tolerance), logit
        assert float(p.variance.detach()[i]) == pytest.approx(float(variance), rel=100 * tolerance, abs=10 * tolerance), (
            logit
        )


def logistic_bins(loc: float, scale: float, grid: Grid) -> np.ndarray:
    """log P of every level from scipy's distribution function, by the smaller tail."""
    step = grid.top / (grid.levels - 1)
    edges = (np.arange(grid.levels + 1) - 0.5) * step
    edges[0], edges[-1] = -np.inf, np.inf
    p = scipy.stats.logistic(loc, scale)
    below, above = np.diff(p.cdf(edges)), -np.diff(p.sf(edges))
    centre = 0.5 * (edges[1:] + edges[:-1])
    return np.log(np.where(np.nan_to_num(centre, posinf=np.inf) < loc, below, above))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 2e-5)])
@pytest.mark.parametrize(
    ("loc", "scale", "grid"),
    [
        (0.3, 0.1, Grid(256, 1.0)),
        (-0.7, 0.02, Grid(256, 1.0)),
        (200.0, 3.0, Grid(256, 255.0)),
        (0.5, 0.003, Grid(17, 1.0)),
        (0.5, 40.0, Grid(4, 1.0)),
        (2.0, 1.0, Grid(2, 1.0)),
    ],
)
def test_discretised_logistic_is_a_difference_of_distribution_functions(
    loc: float, scale: float, grid: Grid, dtype: torch.dtype, tolerance: float
) -> None:
    x = torch.arange(grid.levels, dtype=dtype) * grid.top / (grid.levels - 1)
    p = DiscretisedLogistic(torch.tensor(loc, dtype=dtype), torch.tensor(scale, dtype=dtype), grid)
    found = p.log_prob(x)
    torch.testing.assert_close(
        found.double(), torch.as_tensor(logistic_bins(loc, scale, grid)), rtol=tolerance * 20, atol=tolerance
    )
    assert float(found.logsumexp(0)) == pytest.approx(0.0, abs=1e-5)


def test_discretised_logistic_stays_finite_where_the_difference_is_zero_in_single_precision() -> None:
    loc = torch.tensor([-50.0, 0.5, 60.0], requires_grad=True)
    scale = torch.tensor(1e-3, requires_grad=True)
    log_prob = DiscretisedLogistic(loc, scale, Grid(256, 1.0)).log_prob(torch.tensor([[0.0], [51 / 255], [1.0]]))
    log_prob.sum().backward()
    # Far from its level a logistic's log-density falls by the distance over the scale.
    assert float(log_prob.detach()[1, 0]) == pytest.approx(-(51.0 / 255 - 0.5 / 255 + 50.0) / 1e-3, rel=1e-3)
    assert all(torch.isfinite(t).all() for t in (log_prob, loc.grad, scale.grad))


def test_mixture_is_the_weighted_sum_of_its_components() -> None:
    grid, weights = Grid(6, 2.0), np.array([0.2, 0.5, 0.3])
    locs, scales = (0.1, 1.3, 4.0), (0.2, 0.05, 1.0)
    expected = np.log(sum(w * np.exp(logistic_bins(m, s, grid)) for w, m, s in zip(weights, locs, scales, strict=True)))
    p = DiscretisedLogisticMixture(
        torch.as_tensor(np.log(weights) + 3.0),
        torch.tensor(locs, dtype=torch.float64),
        torch.tensor(scales, dtype=torch.float64),
        grid,
    )
    x = torch.arange(6, dtype=torch.float64) * 0.4
    torch.testing.assert_close(p.log_prob(x), torch.as_tensor(expected))
    torch.testing.assert_close(p.mean, (x * torch.as_tensor(expected).exp()).sum())
