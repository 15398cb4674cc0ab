"""Hamiltonian chains against posteriors that are known, with errors from ArviZ's effective sample sizes."""

from __future__ import annotations

import math
from typing import Any

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_gaussian import LinearGaussian
from programs import Several
from torch import Tensor

import pyro_vae as pv
from pyro_vae.memory import BUDGET
from pyro_vae.posterior import Hamiltonian, at_guide, at_modes, at_prior, hamiltonian
from pyro_vae.posterior.chains import JITTER, _Walk
from pyro_vae.posterior.starts import Begin
from pyro_vae.seeds import seeded


def effective(draws: Tensor) -> Tensor:
    """ArviZ's effective number of draws (C, S, ...) for their mean, (...)."""
    flat = draws.double().flatten(2).numpy() if draws.dim() > 2 else draws.double()[..., None].numpy()
    ess = [float(az.ess(np.ascontiguousarray(flat[..., i]), method="mean")) for i in range(flat.shape[-1])]
    return torch.tensor(ess, dtype=torch.float64).reshape(draws.shape[2:])


def require_mean(draws: Tensor, expected: Tensor) -> None:
    """The mean of draws (C, S, ...) is as expected, within 5 standard errors of correlated draws."""
    draws = draws.double()
    error = draws.flatten(0, 1).std(0) / effective(draws).sqrt()
    assert ((draws.mean((0, 1)) - expected).abs() < 5.0 * error).all(), (draws.mean((0, 1)), expected, error)


@pytest.mark.parametrize("begin", [at_modes, at_guide, at_prior])
def test_moments_of_a_gaussian_posterior(begin: Begin) -> None:
    known = LinearGaussian()
    x = known.draw(5)
    # The guide is wrong in place and in width.
    method = Hamiltonian(start=begin, warm_up=100)
    chains = method(known.program(inflate=0.6, shift=1.0), x, num_chains=16, num_draws=100, seed=1)
    z = chains.z["z"]
    assert z.shape == (16, 100, 5, 3)
    assert z.dtype == x.dtype
    away = z - known.posterior_mean(x)
    require_mean(away, torch.zeros(5, 3, dtype=torch.float64))
    require_mean((away[..., :, None] * away[..., None, :]).flatten(2), known.covariance.expand(5, 3, 3).reshape(45))
    assert effective(z).min() > 100
    # Rows are independent and, whitened, alike: together they tell a width that is off by a twentieth.
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(known.covariance), away[..., None], upper=False)[..., 0]
    squares = white.square()
    error = (squares.flatten(0, 1).var(0) / effective(squares)).sum().sqrt() / 15
    assert (squares.mean() - 1.0).abs() < 5.0 * error
    assert error < 0.02
    expected = known.log_p(x) + torch.distributions.MultivariateNormal(known.posterior_mean(x), known.covariance).log_prob(
        z
    )
    torch.testing.assert_close(chains.log_joint, expected, rtol=0.0, atol=1e-8)


def counts() -> pv.Program:
    """rate ~ Gamma(1.5, 0.7), x ~ Poisson(rate): the posterior is Gamma(1.5 + x, 1.7), skewed and on a half-line."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(torch.tensor(1.5, dtype=x.dtype), 0.7))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("rate", dist.LogNormal(torch.log(x + 0.5), 0.8))

    return pv.Program(model, guide)


def test_a_skewed_posterior_of_a_constrained_latent() -> None:
    x = torch.tensor([0.0, 1.0, 7.0])
    rate = Hamiltonian(warm_up=100)(counts(), x, num_chains=24, num_draws=150, seed=2).z["rate"]
    assert rate.shape == (24, 150, 3)
    assert (rate > 0.0).all()
    shape = (1.5 + x).double()
    require_mean(rate, shape / 1.7)
    require_mean((rate - shape / 1.7) ** 2, shape / 1.7**2)
    require_mean((rate - shape / 1.7) ** 3, 2.0 * shape / 1.7**3)  # without the Jacobian this is far off


def test_several_latents_of_different_supports() -> None:
    several = Several()
    chains = Hamiltonian(warm_up=20)(several.program, torch.randn(2, 4), num_chains=3, num_draws=20, seed=1)
    shapes = {name: tuple(value.shape[3:]) for name, value in chains.z.items()}
    assert shapes == {"z1": (), "z2": (2,), "rate": (), "share": (), "simplex": (3,)}
    assert (chains.z["rate"] > 0.0).all()
    torch.testing.assert_close(chains.z["simplex"].sum(-1), torch.ones(3, 20, 2))
    assert "3 of 20 draws for each of 2 rows" in str(chains)


def test_warm_up_reaches_the_acceptance_it_aims_at_row_by_row() -> None:
    """From the prior the coordinates are not those of the posterior, and rows with more data need smaller steps."""

    def model(x: Tensor, scale: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, scale).to_event(1), obs=x)

    def guide(x: Tensor, scale: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, scale).to_event(1))

    scale = torch.tensor([[0.3, 0.1], [0.03, 0.05]], dtype=torch.float64)
    x = torch.tensor([[0.5, -1.0], [1.0, 0.2]], dtype=torch.float64)
    chains = Hamiltonian(start=at_prior)(pv.Program(model, guide), (x, scale), num_chains=16, num_draws=100, seed=3)
    assert (chains.acceptance.mean((0, 1)) - 0.8).abs().max() < 0.06
    low, high = 2.0 * scale[1].min() / scale[0].min(), 0.5 * scale[1].min() / scale[0].min()
    assert high < chains.step_size[1] / chains.step_size[0] < low


def test_a_path_never_turns_back_even_where_all_is_accepted() -> None:
    chains = Hamiltonian(num_leapfrog=3)(LinearGaussian().program(), LinearGaussian().draw(4), num_draws=4, seed=0)
    assert (chains.step_size <= math.pi / 6 + 1e-12).all()
    assert chains.step_size[0] * 3 * (1 + JITTER) < math.pi


def test_chains_start_further_apart_than_the_posterior_is_wide() -> None:
    known = LinearGaussian()
    x = known.draw(2)
    program = known.program()
    with seeded(0, x.device):
        start = at_guide(program, (x,), BUDGET)
        walk = _Walk(program, (x,), start, 4000, 4, BUDGET)
    spread = walk.points.u.var(0) / known.covariance.diagonal()
    assert (spread > 2.8).all()
    assert (spread < 6.5).all()


def test_thinning_keeps_every_other_draw_and_costs_twice() -> None:
    known = LinearGaussian()
    x = known.draw(3)
    settings: dict[str, Any] = {"num_chains": 2, "seed": 4}
    every = Hamiltonian(warm_up=5)(known.program(), x, num_draws=6, **settings)
    thinned = Hamiltonian(warm_up=5, thin=2)(known.program(), x, num_draws=3, **settings)
    assert torch.equal(thinned.z["z"], every.z["z"][:, 1::2])
    torch.testing.assert_close(thinned.acceptance, (every.acceptance[:, ::2] + every.acceptance[:, 1::2]) / 2.0)
    assert torch.equal(thinned.evaluations, every.evaluations)
    more = Hamiltonian(warm_up=5)(known.program(), x, num_draws=7, **settings)
    assert (more.evaluations - every.evaluations == 2 * 2 * 4).all()


def test_the_seed_decides_and_blocks_are_drawn_apart() -> None:
    known = LinearGaussian()
    x = known.draw(2).repeat(300, 1)  # 600 rows: two blocks
    short = Hamiltonian(warm_up=2, start=at_guide)
    first, again, other = (short(known.program(), x, num_chains=2, num_draws=2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.z["z"], again.z["z"])
    assert not torch.equal(first.z["z"], other.z["z"])
    assert first.z["z"].shape == (2, 2, 600, 3)
    assert not (first.z["z"][:, :, 0] == first.z["z"][:, :, 300]).any()


def test_the_module_is_left_in_training_as_it_was() -> None:
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(2),
        likelihood=pv.likelihoods.Normal(pv.nets.MLP(2, 3, hidden=(4,)), scale=0.5),
        guide=pv.guides.DiagonalNormal(pv.nets.MLP(3, hidden=(4,)), latent_dim=2),
    )
    Hamiltonian(warm_up=2)(vae, torch.randn(2, 3), num_chains=1, num_draws=1)
    assert vae.training
    assert all(leaf.grad is None for leaf in vae.parameters())


@pytest.mark.parametrize("name", ["num_chains", "num_draws", "memory"])
def test_numbers_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0 must be a whole number"):
        hamiltonian(counts(), torch.ones(2), **{name: 0})
    with pytest.raises(ValueError, match="thin=0 must be"):
        Hamiltonian(thin=0)(counts(), torch.ones(2))
