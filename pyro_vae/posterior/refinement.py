"""What weighted pilot draws teach a mixture: more peaks, better places and widths, better shares.

* `grown`: a peak where a pilot draw has too much of the weight, that is where the mixture is thin (incremental mixture
  importance sampling, Raftery & Bao 2010).
* `refitted`: one step of weighted EM for the means and covariances of the peaks, as far as the draws determine them
  (population Monte Carlo, Cappe, Douc, Guillin, Marin & Robert 2008, arXiv:0710.4242).
* `tuned`: shares with a small variance of the weights, which is convex in them (He & Owen 2014, arXiv:1411.3954).

`learnt` does all three. What was learnt from draws is used for other draws, so weights stay unbiased.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from pyro_vae.posterior.mixture import SHARES, Mixture, Peak
from pyro_vae.posterior.shapes import Dense, Shape

KEPT, KEPT_EVENLY = 0.05, 0.02
"""How much of the draws stays with the components of each peak as they were meant, and with all peaks alike: tuning is
greedy, and would leave nothing for tails that the pilot has not seen."""

DEFENSIVE = (0.05, 0.1, 0.07, 0.05)
"""What stays with each component of a peak in hard rows: there the mixture must be wider than the posterior everywhere."""

TUNING_ROUNDS = 20

NEW_PEAKS, MOST_PEAKS, HEAVY = 3, 24, 5.0
"""Peaks that one pilot may add, and that a mixture may have then; the least multiple of the mean weight that a draw must
have to get one."""

DRAWS_PER_DIMENSION = 10.0
"""Effective draws for each dimension below which a covariance is left alone: they would be noise."""


ShapeAt = Callable[[Tensor, Tensor], Shape]
"""(rows (n,), u (n, D)) -> the local shape of the posterior there, n precisions."""


def learnt(mixture: Mixture, u: Tensor, log_weights: Tensor, shape_at: ShapeAt) -> Mixture:
    """All three steps, from pilot draws u (K, N, D) of the mixture with log-weights (K, N)."""
    log_pilot = mixture.log_density(u, mixture.log_share)
    log_p = _usable(log_weights) + log_pilot
    return _shared(refitted(grown(mixture, u, log_p, shape_at), u, log_p), u, log_p, log_pilot, DEFENSIVE)


def tuned(mixture: Mixture, u: Tensor, log_weights: Tensor) -> Mixture:
    """The last step alone."""
    log_pilot = mixture.log_density(u, mixture.log_share)
    return _shared(mixture, u, _usable(log_weights) + log_pilot, log_pilot, tuple(KEPT * share for share in SHARES))


def _usable(log_weights: Tensor) -> Tensor:
    return torch.nan_to_num(log_weights, nan=-torch.inf, posinf=-torch.inf)


def _shared(mixture: Mixture, u: Tensor, log_p: Tensor, log_pilot: Tensor, kept: tuple[float, ...]) -> Mixture:
    """Shares that make the variance of the weights small, judged by draws u (K, N, D) of density exp(log_pilot).

    E w^2 = E_pilot[p^2 / (r r_pilot)] is convex in the shares of r. Each round multiplies a share by the square root of
    the part that its component has in it, which lowers it (the multiplicative algorithm for optimal designs, Yu 2010).
    """
    logs, log_p2 = mixture.by_component(u), 2.0 * log_p - log_pilot
    share = mixture.log_share
    for _ in range(TUNING_ROUNDS):
        log_r = torch.logsumexp(share[:, None] + logs, 0)
        part = torch.logsumexp(logs + log_p2 - 2.0 * log_r, 1)
        share = torch.log_softmax(share + 0.5 * part, 0)
    parts = share.exp().unflatten(0, (-1, len(SHARES)))
    present = (parts.sum(1) > 0.0).double()
    even = KEPT_EVENLY * present / present.sum(0)
    meant = torch.tensor(kept, dtype=parts.dtype, device=parts.device)[:, None]
    rest = (1.0 - KEPT_EVENLY) * ((1.0 - sum(kept)) * parts + parts.sum(1)[:, None] * meant)
    mixed = (rest + even[:, None] * meant / sum(kept)).flatten(0, 1)
    usable = ~mixed.isnan().any(0)
    return replace(mixture, log_share=torch.where(usable, mixed.log(), mixture.log_share))


def grown(mixture: Mixture, u: Tensor, log_p: Tensor, shape_at: ShapeAt) -> Mixture:
    """The mixture with a peak at the heaviest draw of each row, of the local shape; `NEW_PEAKS` times."""
    used = torch.zeros_like(log_p, dtype=torch.bool)
    for _ in range(NEW_PEAKS):
        log_weights = log_p - mixture.log_density(u, mixture.log_share)
        share = torch.nan_to_num(torch.softmax(log_weights, 0), nan=0.0)
        heaviest, k = share.masked_fill(used, 0.0).max(0)
        used[k, torch.arange(len(k), device=k.device)] = True
        rows = (heaviest > HEAVY / len(u)).nonzero().flatten()
        if len(rows) == 0 or len(mixture.peaks) >= MOST_PEAKS:
            break
        point = u[k[rows], rows]
        mixture = with_peak(mixture, rows, point.double(), shape_at(rows, point), heaviest[rows].clamp_max(0.5))
    return mixture


def with_peak(mixture: Mixture, rows: Tensor, mean: Tensor, shape: Shape, share: Tensor) -> Mixture:
    """One more peak at mean (n, D) in the rows (n,), taking `share` (n,) of the draws from all others."""
    # Not a mode: neither a height nor a number of starts belongs to it.
    new = Peak(rows, mean, shape, torch.full_like(share, torch.nan), torch.full_like(rows, 2))
    taken = torch.zeros_like(mixture.log_share[0])
    taken[rows] = share
    each = torch.tensor(SHARES, dtype=taken.dtype, device=taken.device)[:, None]
    log_share = torch.cat([mixture.log_share + torch.log1p(-taken), torch.log(each * taken)])
    return Mixture((*mixture.peaks, new), log_share)


def nearest_shape(mixture: Mixture, rows: Tensor, u: Tensor) -> Shape:
    """The shapes of the peaks that give most density at u (n, D) in the rows (n,)."""
    here = mixture.take(rows)
    logs = (here.log_share[:, None] + here.by_component(u[None]))[:, 0]
    nearest = logs.unflatten(0, (-1, len(SHARES))).logsumexp(1).argmax(0)
    parts, order = [], []
    for m, peak in enumerate(here.peaks):
        mine = (nearest[peak.rows] == m).nonzero().flatten()
        if len(mine):
            parts.append(peak.shape.take(mine))
            order.append(peak.rows[mine])
    return type(parts[0]).join(parts).take(torch.argsort(torch.cat(order)))


def refitted(mixture: Mixture, u: Tensor, log_p: Tensor) -> Mixture:
    """One EM step for the means and covariances of all peaks, held back by what they were."""
    kinds = len(SHARES)
    logs = mixture.log_share[:, None] + mixture.by_component(u)
    log_r = torch.logsumexp(logs, 0)
    weight = torch.nan_to_num(torch.softmax(log_p - log_r, 0), nan=0.0)
    # One draw with most of the weight must not draw everything to itself (truncation, Ionides 2008).
    weight = weight.clamp_max(len(u) ** -0.5)
    mine = weight * torch.exp(logs - log_r).unflatten(0, (-1, kinds)).sum(1)
    peaks = [_moved(peak, u[:, peak.rows].double(), mine[m][:, peak.rows]) for m, peak in enumerate(mixture.peaks)]
    return replace(mixture, peaks=tuple(peaks))


def _moved(peak: Peak, u: Tensor, weight: Tensor) -> Peak:
    """A peak with the mean and covariance of draws u (K, n, D) of weights (K, n), as far as these are enough."""
    dim, total = u.shape[-1], weight.sum(0).clamp_min(1e-300)
    effective = total.square() / weight.square().sum(0).clamp_min(1e-300)
    trust = (effective / (effective + dim + 2.0))[:, None]
    mean = torch.einsum("kn,knd->nd", weight / total, u)
    moved = peak.mean + trust * (mean - peak.mean)
    if not isinstance(peak.shape, Dense):
        return replace(peak, mean=moved)
    enough = (effective > DRAWS_PER_DIMENSION * dim).nonzero().flatten()
    if len(enough) == 0:
        return replace(peak, mean=moved)
    delta = u[:, enough] - mean[enough]
    spread = torch.einsum("kn,knd,kne->nde", (weight / total)[:, enough], delta, delta)
    inverse = peak.shape.inverse[enough]
    believe = (1.0 - DRAWS_PER_DIMENSION * dim / effective[enough])[:, None, None]
    covariance = believe * spread + (1.0 - believe) * inverse.mT @ inverse
    root, failed = torch.linalg.cholesky_ex(covariance)
    good = enough[failed == 0]
    factor, whole = torch.linalg.cholesky_ex(torch.cholesky_inverse(root[failed == 0]))
    fine = whole == 0
    new = Dense.of(factor[fine])
    shape = Dense(peak.shape.factor.clone(), peak.shape.inverse.clone())
    shape.factor[good[fine]], shape.inverse[good[fine]] = new.factor, new.inverse
    return replace(peak, mean=moved, shape=shape)
