"""What a sampler's own weights cannot say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_gaussian import LinearGaussian
from torch import Tensor

import pyro_vae as pv
from pyro_vae.posterior.coverage import light_tailed


def told_little(guide_of: Callable[[], Any]) -> pv.Program:
    """z ~ Laplace(0, 1), x ~ N(z, 10^2): the posterior is nearly the prior."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Laplace(torch.zeros((), dtype=x.dtype), 1.0))
            pyro.sample("x", dist.Normal(z, 10.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", guide_of())

    return pv.Program(model, guide)


ZERO = torch.zeros((), dtype=torch.float64)


@pytest.mark.parametrize(
    ("guide", "light"),
    [
        (lambda: dist.Normal(ZERO, 1.2), True),  # the weights have no variance
        (lambda: dist.Laplace(ZERO, 0.9), False),  # from |z| = 9.9 on: 0.0003
        (lambda: dist.StudentT(3.0, ZERO, 1.0), False),
    ],
)
def test_a_guide_that_falls_off_faster_than_the_posterior_is_seen(guide: Callable[[], Any], light: bool) -> None:
    program, x = told_little(guide), torch.linspace(-3.0, 3.0, 41, dtype=torch.float64)
    log_z = pv.evidence.exact(program, x).log_p
    sampler = pv.posterior.from_guide.prepare(program, (x,))
    found, where, cost = light_tailed(program, (x,), sampler, log_z, seed=1, memory=2**30)
    assert (found.float().mean() > 0.95) if light else not found.any()
    assert where.shape == (41, 1)
    assert (cost > 0).all()


def test_normal_guides_of_normal_posteriors_pass_unless_they_are_far_too_narrow() -> None:
    known = LinearGaussian()
    x = known.draw(50)
    for inflate, share in ((1.0, 0.0), (1.3, 0.0), (0.55, 1.0)):
        program = known.program(inflate=inflate)
        sampler = pv.posterior.from_guide.prepare(program, (x,))
        found, _, _ = light_tailed(program, (x,), sampler, known.log_p(x), seed=1, memory=2**30)
        assert abs(float(found.double().mean()) - share) <= 0.05


def test_the_cascade_is_right_under_a_prior_with_heavier_tails_than_the_guide() -> None:
    """Against quadrature: rows within 5 standard errors, the mean within 4, where the guide alone had been 10 off."""
    program, x = told_little(lambda: dist.Normal(ZERO, 1.2)), torch.linspace(-20.0, 20.0, 201, dtype=torch.float64)
    estimate, truth = pv.log_evidence(program, x, seed=3), pv.evidence.exact(program, x).log_p
    error = estimate.log_p - truth
    assert "guide" not in estimate.engine[:190]
    assert (error.abs() < 5.0 * estimate.standard_error + 1e-3).all()
    assert abs(float(error.mean())) < 4.0 * estimate.mean_standard_error + abs(float(estimate.bias.mean()))
