"""What is left of log Γ after Stirling's formula, against 50 digits (mpmath comes with torch)."""

import mpmath
import pytest
import torch

from pyro_vae.model.families.saddle import count_ratio, factorial_remainder, log_softplus, remainder

mpmath.mp.dps = 50
POINTS = [1e-3, 0.1, 0.7, 1.0, 3.3, 7.99, 8.01, 20.0, 1e3, 1e5, 1e8]


def exact(t: float) -> float:
    t = mpmath.mpf(t)
    return float(mpmath.loggamma(t) - ((t - 0.5) * mpmath.log(t) - t + mpmath.log(2 * mpmath.pi) / 2))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 4e-6)])
def test_remainder_of_stirlings_formula(dtype: torch.dtype, tolerance: float) -> None:
    t = torch.tensor(POINTS, dtype=dtype, requires_grad=True)
    found = remainder(t)
    expected = torch.tensor([exact(float(point)) for point in t.detach()], dtype=dtype)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    (slope,) = torch.autograd.grad(found.sum(), t)
    by_hand = [float(mpmath.psi(0, p) - mpmath.log(p) + mpmath.mpf(0.5) / p) for p in map(float, t.detach())]
    torch.testing.assert_close(slope, torch.tensor(by_hand, dtype=dtype), rtol=10 * tolerance, atol=10 * tolerance)


def test_remainder_of_factorials() -> None:
    x = torch.tensor([0.0, 1.0, 2.0, 7.0, 8.0, 100.0, 1e5], dtype=torch.float64)
    log = [mpmath.loggamma(n + 1) - (n * mpmath.log(n) - n if n else 0) for n in map(mpmath.mpf, x.tolist())]
    torch.testing.assert_close(factorial_remainder(x), torch.tensor([float(v) for v in log], dtype=torch.float64))


def test_the_ratio_loses_no_digits_near_its_zero_in_single_precision() -> None:
    """x log(m / x) = -200.2 with x = 100,000: the naive difference of logarithms is off by 0.6 at its worst."""
    x = torch.tensor([1e5, 1e5, 1e5, 3.0, 3.0, 0.0])
    mean = torch.tensor([99_800.0, 1e5, 100_450.0, 2.9, 1e-20, 4.0])
    expected = [
        float(a * mpmath.log(mpmath.mpf(m) / a)) if a else 0.0 for a, m in zip(x.tolist(), mean.tolist(), strict=True)
    ]
    torch.testing.assert_close(count_ratio(x, mean - x, mean.log()), torch.tensor(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
@pytest.mark.parametrize("raw", [-200.0, -15.01, -14.99, -1.0, 0.0, 3.0, 300.0])
def test_log_softplus_goes_on_where_softplus_underflows(raw: float, dtype: torch.dtype, tolerance: float) -> None:
    at = torch.tensor(raw, dtype=dtype, requires_grad=True)
    found = log_softplus(at)
    given = mpmath.mpf(float(at.detach()))
    soft = mpmath.log1p(mpmath.exp(given))
    assert float(found.detach()) == pytest.approx(float(mpmath.log(soft)), rel=tolerance)
    (slope,) = torch.autograd.grad(found, at)
    assert float(slope) == pytest.approx(float(1 / (1 + mpmath.exp(-given)) / soft), rel=100 * tolerance)
