"""Kinks: a Laplace likelihood, whose Hessian is almost everywhere that of the prior; against quadrature."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_gaussian import LinearGaussian
from torch import Tensor

import pyro_vae as pv
from pyro_vae.posterior.local import Laplace, LocalSampler
from pyro_vae.posterior.modes import Modes
from pyro_vae.posterior.secants import turn, with_kinks
from pyro_vae.posterior.shapes import Dense

COLUMNS, SCALE = 120, 0.3


def kinked(latent_dim: int = 2) -> tuple[pv.Program, Tensor]:
    """z ~ N(0, I), x ~ Laplace(W z, 0.3) in 120 columns; the guide is the prior, seven times too wide."""
    weight = torch.randn(latent_dim, COLUMNS, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    prior = dist.Normal(torch.zeros(latent_dim, dtype=torch.float64), 1.0).to_event(1)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Laplace(z @ weight, SCALE).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", prior)

    return pv.Program(model, guide), weight


def data(program: pv.Program, count: int) -> Tensor:
    (x,), _ = program.simulate(torch.zeros(count, COLUMNS, dtype=torch.float64), seed=3)
    return x


def test_evidence_of_a_laplace_likelihood_is_that_of_quadrature() -> None:
    """The trapezoid rule over seven posterior widths each way around the best point of a coarse grid."""
    program, weight = kinked()
    x = data(program, 10)
    truth = []
    coarse = torch.cartesian_prod(*[torch.linspace(-4.5, 4.5, 121, dtype=torch.float64)] * 2)
    line = torch.linspace(-0.2, 0.2, 161, dtype=torch.float64)
    fine = torch.cartesian_prod(line, line)
    for row in x:

        def log_joint(z: Tensor, row: Tensor = row) -> Tensor:
            likelihood = -(row - z @ weight).abs().sum(-1) / SCALE - COLUMNS * math.log(2.0 * SCALE)
            return likelihood - 0.5 * z.square().sum(-1) - math.log(2.0 * math.pi)

        top = coarse[log_joint(coarse).argmax()]
        truth.append(torch.logsumexp(log_joint(top + fine), 0) + 2.0 * math.log(0.4 / 160))
    estimate = pv.log_evidence(program, x, method=pv.posterior.laplace, num_particles=1000, seed=1)
    error = 5.0 * estimate.standard_error + 2.0 * estimate.bias.abs() + 1e-3
    assert ((estimate.log_p - torch.stack(truth)).abs() < error).all()
    assert (estimate.standard_error < 0.03).all()
    assert (estimate.ess > 500.0).all()  # k-hat may object: these weights end in a plateau
    cascade = pv.log_evidence(program, x, seed=1)
    assert set(cascade.engine) == {"laplace"}
    assert (
        (cascade.log_p - torch.stack(truth)).abs() < 5.0 * cascade.standard_error + 2.0 * cascade.bias.abs() + 1e-3
    ).all()


@pytest.mark.parametrize("latent_dim", [2, 6])
def test_precisions_among_kinks_are_near_the_fisher_information(latent_dim: int) -> None:
    """I + W W' / s^2 in the limit of many columns; with 120 the turn of the gradient scatters by a tenth or two."""
    program, weight = kinked(latent_dim)
    sampler = Laplace().prepare(program, (data(program, 30),), seed=1)
    assert isinstance(sampler, LocalSampler)
    factor = sampler.mixture.peaks[0].shape.factor
    information = weight @ weight.T / SCALE**2 + torch.eye(latent_dim, dtype=torch.float64)
    log_ratio = 2.0 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1) - torch.logdet(information)
    assert log_ratio.abs().mean() < 0.25 * latent_dim
    assert torch.logdet(information) > 6.0 * latent_dim  # what the Hessian, that of the prior, misses


def test_smooth_posteriors_are_left_alone_bends_among_them() -> None:
    known = LinearGaussian()
    x = known.draw(5)
    precision = torch.linalg.inv(known.covariance)
    shape = Dense.of(torch.linalg.cholesky(precision).repeat(5, 1, 1))
    row = torch.arange(5)
    modes = Modes(row, known.posterior_mean(x), torch.zeros(5).double(), shape, torch.ones(5).long())
    noise = torch.randn(8, 5, 3, dtype=torch.float64)
    log_joint = known.program().log_joint(x)
    # The gradient is linear, so that each direction turns it by just what the Gaussian does.
    turned = turn(log_joint, modes, noise, torch.float64)
    torch.testing.assert_close(turned, torch.ones(5).double())
    assert not with_kinks(log_joint, modes, turned, noise, torch.float64)[1].any()

    def ring(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.norm(dim=-1), 0.05), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))

    on_ring = pv.Program(ring, guide).log_joint(torch.ones(1, dtype=torch.float64))
    wide = Dense.of(torch.diag(torch.tensor([20.0, 1.0], dtype=torch.float64))[None])
    top = Modes(row[:1], torch.tensor([[1.0, 0.0]]).double(), torch.zeros(1).double(), wide, row[:1] + 1)
    noise = torch.randn(8, 1, 2, dtype=torch.float64)
    turned = turn(on_ring, top, noise, torch.float64)
    assert turned > 5.0  # a whole step leaves the ring, and the gradient turns back
    assert not with_kinks(on_ring, top, turned, noise, torch.float64)[1].any()
