"""What log-weights say about log p(x): pure functions of a (K, N) tensor, column by column.

With weights w_1 .. w_K independent, E w = p(x), and CV their coefficient of variation:

* the estimate is log (1/K) sum w,                       `log_mean_exp`
* its standard error CV / sqrt(K) by the delta method,   `standard_error`
* its bias -CV^2 / (2 K), low, to first order,           `bias`
* the effective sample size (sum w)^2 / sum w^2,         `ess`  (Kong 1992)
* and k-hat, the shape of a generalised Pareto distribution fitted to the largest weights, tells whether CV itself can be
  estimated at all.                                      `pareto_k`  (Vehtari et al. 2024, arXiv:1507.02646)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def log_mean_exp(log_weights: Tensor) -> Tensor:
    """log (1/K) sum_k w_k in nats: (K, N) -> (N,). A lower bound of log p(x) in expectation (Burda et al. 2016, eq. 8)."""
    return torch.logsumexp(log_weights, 0) - math.log(len(log_weights))


def _relative(log_weights: Tensor) -> Tensor:
    """Weights divided by the largest of their column; zero where all of a column are zero."""
    largest = log_weights.amax(0)
    return torch.exp(log_weights - torch.where(largest.isneginf(), 0.0, largest))


def relative_variance(log_weights: Tensor, strata: Tensor | None = None) -> Tensor:
    """Variance of the mean weight over its square: (K, N) -> (N,). Infinite for K = 1, NaN where all weights are 0.

    Args:
        log_weights: (K, N).
        strata: which stratum a draw belongs to, (K, N), integers from 0; None where all draws are independent and alike.
            With K_c draws in stratum c of variance s_c^2 the mean of all K has the variance sum_c K_c s_c^2 / K^2. s_c^2 is
            uncertain where K_c is small: it is taken times (K_c - 1) / (K_c - 3), the variance of a Student t of that many
            draws. Strata of fewer than four draws are taken together; if these are fewer than four, twice their squared
            deviations from the mean of all stand for it.
    """
    weights, count = _relative(log_weights), len(log_weights)
    if count == 1:
        return torch.full_like(weights[0], torch.inf)
    whole = weights.var(0)
    if strata is None:
        return whole / count / weights.mean(0).square()
    total, few = torch.zeros_like(whole), torch.zeros_like(strata, dtype=torch.bool)
    for c in range(int(strata.max()) + 1):
        inside = strata == c
        size = inside.sum(0)
        total = total + torch.where(size > 3, _spread(weights, inside), 0.0)
        few |= inside & (size <= 3)
    about_all = 2.0 * ((weights - weights.mean(0)).square() * few).sum(0)
    total = total + torch.where(few.sum(0) > 3, _spread(weights, few), about_all)
    return total / count**2 / weights.mean(0).square()


def _spread(weights: Tensor, inside: Tensor) -> Tensor:
    """n s^2 (n - 1) / (n - 3) of the n weights (K, N) `inside` a stratum: (N,); of no use for n below 4."""
    size = inside.sum(0)
    mean = (weights * inside).sum(0) / size.clamp_min(1)
    return size * ((weights - mean).square() * inside).sum(0) / (size - 3).clamp_min(1)


def standard_error(log_weights: Tensor, strata: Tensor | None = None) -> Tensor:
    """Monte Carlo standard error of `log_mean_exp` in nats, by the delta method: (K, N) -> (N,)."""
    return torch.sqrt(relative_variance(log_weights, strata))


def bias(log_weights: Tensor, strata: Tensor | None = None) -> Tensor:
    """Estimated bias of `log_mean_exp` in nats, first order: (K, N) -> (N,), never positive."""
    return -0.5 * relative_variance(log_weights, strata)


def halves(log_weights: Tensor, strata: Tensor | None = None) -> Tensor:
    """How far apart the estimates of two independent halves of the draws are, in their standard errors: (K, N) -> (N,).

    Every other draw goes to one half, so that strata, which follow one another, are halved as well. 0 where both halves
    agree that there is no weight, infinite where one does.
    """
    parts = [(log_weights[i::2], strata[i::2] if strata is not None else None) for i in (0, 1)]
    (first, first_error), (second, second_error) = ((log_mean_exp(w), standard_error(w, s)) for w, s in parts)
    distance = (first - second).abs() / torch.hypot(first_error, second_error)
    alone = first.isneginf() != second.isneginf()
    return torch.where(alone, torch.inf, torch.nan_to_num(distance, nan=0.0, posinf=torch.inf))


def ess(log_weights: Tensor) -> Tensor:
    """Effective sample size (sum w)^2 / sum w^2: (K, N) -> (N,), between 1 and K; 0 where all weights are 0."""
    weights = _relative(log_weights)
    return torch.nan_to_num(weights.sum(0).square() / weights.square().sum(0), nan=0.0)


def pareto_k(log_weights: Tensor) -> Tensor:
    """k-hat of the weights: (K, N) -> (N,).

    The largest min(K / 5, 3 sqrt(K)) weights of a column, less the next one, are fitted by a generalised Pareto
    distribution (Zhang & Stephens 2009, with the weak prior of Vehtari et al.). Moments below 1/k exist: above 0.5 the
    variance of the weights is infinite, above min(1 - 1/log10(K), 0.7) the estimate is not to be trusted.

    Returns:
        k-hat; -inf where the largest weights are all equal (no tail), NaN for fewer than 25 particles (nothing to fit).
    """
    num_particles = len(log_weights)
    size = math.ceil(min(0.2 * num_particles, 3.0 * math.sqrt(num_particles)))
    if size < 5:
        return torch.full_like(log_weights[0], torch.nan)
    top = torch.exp(torch.topk(log_weights, size + 1, dim=0).values - log_weights.amax(0))
    excess = (top[:-1] - top[-1]).flip(0)
    k = _fit_pareto(excess)
    return torch.where(excess[-1] <= 0.0, -torch.inf, k)


def _fit_pareto(excess: Tensor) -> Tensor:
    """Shape of a generalised Pareto distribution for sorted exceedances (M, N) -> (N,): Zhang & Stephens 2009."""
    size = len(excess)
    count = 30 + int(math.sqrt(size))
    grid = torch.arange(1, count + 1, dtype=excess.dtype, device=excess.device) - 0.5
    quartile = excess[int(size / 4 + 0.5) - 1].clamp_min(torch.finfo(excess.dtype).tiny)
    theta = (1.0 - torch.sqrt(count / grid))[:, None] / (3.0 * quartile) + 1.0 / excess[-1]
    shape = torch.stack([torch.log1p(-t * excess).mean(0) for t in theta])
    profile = size * (torch.log(-theta / shape) - shape - 1.0)
    posterior = torch.softmax(torch.nan_to_num(profile, nan=-torch.inf), 0)
    best = (theta * posterior).sum(0)
    k = torch.log1p(-best * excess).mean(0)
    return (size * k + 10 * 0.5) / (size + 10)


def pareto_threshold(num_particles: int) -> float:
    """The k-hat above which K particles are not enough: min(1 - 1/log10(K), 0.7), Vehtari et al. 2024, section 3.2.4."""
    return min(1.0 - 1.0 / math.log10(num_particles), 0.7) if num_particles > 1 else -math.inf
