"""Log-densities from log-gamma functions without the cancellation, after Loader (2000).

log Γ(1e5) is a million; differences of such numbers in float32 are wrong by a tenth of a nat. What is left after Stirling's
formula is small, so densities are written with the remainder

    R(t) = log Γ(t) - [(t - 1/2) log t - t + log(2 pi) / 2],    R(t) = 1 / 12t - 1 / 360t^3 + ... for large t,

and the large parts are cancelled by hand. Everything is elementwise and has two derivatives.

C. Loader, "Fast and accurate computation of binomial probabilities", 2000.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_FROM = 8.0  # from here on five terms of the series are right to 2e-13
_HALF_LOG_TWO_PI = 0.5 * math.log(2.0 * math.pi)


def remainder(t: Tensor) -> Tensor:
    """R(t) for t > 0."""
    far = t >= _FROM
    inverse = 1.0 / torch.where(far, t, _FROM)
    square = inverse * inverse
    series = inverse * (1 / 12 - square * (1 / 360 - square * (1 / 1260 - square * (1 / 1680 - square / 1188))))
    near = torch.where(far, 1.0, t)
    exact = torch.lgamma(near) - ((near - 0.5) * near.log() - near + _HALF_LOG_TWO_PI)
    return torch.where(far, series, exact)


def factorial_remainder(x: Tensor) -> Tensor:
    """log x! - (x log x - x) for counts x = 0, 1, ...; 0 at 0."""
    some = x > 0
    count = torch.where(some, x, 1.0)
    return torch.where(some, 0.5 * count.log() + _HALF_LOG_TWO_PI + remainder(count), 0.0)


def count_ratio(x: Tensor, gap: Tensor, log_mean: Tensor) -> Tensor:
    """x log(mean / x) for counts x, 0 at x = 0.

    Args:
        x: counts.
        gap: mean - x, so that no digits are lost where the mean is close to x.
        log_mean: log of the mean, which may underflow.
    """
    some = x > 0
    count = torch.where(some, x, 1.0)
    return torch.where(some, x * log_one_plus(gap / count, log_mean - count.log()), 0.0)


def log_one_plus(small: Tensor, logarithm: Tensor) -> Tensor:
    """log(1 + small), by `logarithm`, which says the same, where 1 + small has lost its digits."""
    near = small > -0.5
    return torch.where(near, torch.log1p(torch.where(near, small, 0.0)), logarithm)


def log_softplus(raw: Tensor) -> Tensor:
    """log(softplus(raw)), which goes on falling like `raw` where softplus has underflown."""
    low = raw < -15.0
    tail = torch.where(low, raw, -15.0)
    kept = torch.where(low, 0.0, raw)
    return torch.where(low, tail - 0.5 * tail.exp(), torch.nn.functional.softplus(kept).log())
