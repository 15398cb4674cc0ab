"""What a pilot teaches a mixture, judged by fresh draws."""

from __future__ import annotations

import math

import torch
from peaks import KINDS, strata, two_peaks
from torch import Tensor

from pyro_vae.evidence import weights
from pyro_vae.posterior.refinement import learnt, nearest_shape, tuned


def test_tuned_shares_lower_the_variance_of_fresh_weights_and_leave_none_out() -> None:
    """Where Laplace's masses mislead: p is mostly a wide component of the smaller peak, and the wide one of a lone peak."""
    mixture = two_peaks(2)

    def log_p(u: Tensor) -> Tensor:
        parts = mixture.by_component(u)
        target = torch.logaddexp(math.log(0.8) + parts[KINDS + 2], math.log(0.2) + parts[0])
        return torch.where(torch.arange(2) == 0, target, parts[2])

    pilot = strata(mixture, 400)[0]
    log_share = torch.log(mixture.allot(400) / 400)
    better = tuned(mixture, pilot, log_p(pilot) - mixture.log_density(pilot, log_share))
    assert ((better.log_share.exp().sum(0) - 1.0).abs() < 1e-9).all()
    assert torch.isfinite(better.log_share)[torch.isfinite(mixture.log_share)].all()
    assert (better.log_share[KINDS:, 1] == -torch.inf).all()
    variances = []
    for one in (mixture, better):
        u, component, shares = strata(one, 20_000)
        log_weights = log_p(u) - one.log_density(u, shares)
        assert (weights.log_mean_exp(log_weights).abs() < 4.5 * weights.standard_error(log_weights, component)).all()
        variances.append(log_weights.exp().var(0))
    assert (variances[1] < 0.5 * variances[0]).all()


def test_weights_that_are_no_numbers_leave_the_shares_as_they_were() -> None:
    mixture = two_peaks(2)
    u, _, shares = strata(mixture, 64)
    log_weights = -mixture.log_density(u, shares)
    log_weights[:, 1] = torch.nan
    better = tuned(mixture, u, log_weights)
    assert torch.equal(better.log_share[:, 1], mixture.log_share[:, 1])
    assert not torch.equal(better.log_share[:, 0], mixture.log_share[:, 0])


def test_a_shoulder_and_another_width_are_learnt_from_a_pilot() -> None:
    """p is half a Gaussian of three times the width, half a bump beside it: fresh weights are better, and stay unbiased."""
    mixture = two_peaks(2)
    peak = mixture.peaks[0]

    def log_p(u: Tensor) -> Tensor:
        delta = u - peak.mean
        broad = -0.5 * peak.shape.whiten(delta).square().sum(-1) / 9.0 - math.log(9.0)
        beside = -0.5 * peak.shape.whiten(delta - torch.tensor([1.5, -2.0], dtype=torch.float64)).square().sum(-1) / 2.25
        constant = peak.shape.half_log_det - math.log(2.0 * math.pi) - math.log(2.0)
        return constant + torch.logaddexp(broad, beside - math.log(2.25))

    pilot = strata(mixture, 2000)[0]
    log_weights = log_p(pilot) - mixture.log_density(pilot, mixture.log_share)
    better = learnt(mixture, pilot, log_weights, lambda rows, u: nearest_shape(mixture, rows, u))
    effective = []
    for one in (mixture, better):
        assert ((one.log_share.exp().sum(0) - 1.0).abs() < 1e-9).all()
        u, component, shares = strata(one, 20_000)
        log_weights = log_p(u) - one.log_density(u, shares)
        assert (weights.log_mean_exp(log_weights).abs() < 4.5 * weights.standard_error(log_weights, component)).all()
        effective.append(weights.ess(log_weights))
    assert (effective[1] > 1.5 * effective[0]).all()
    u = torch.randn(3, 2, 2, dtype=torch.float64)
    for index in ([1, 0], [1]):
        some = better.take(torch.tensor(index))
        expected = better.log_density(u, better.log_share)[:, index]
        torch.testing.assert_close(some.log_density(u[:, index], some.log_share), expected)
