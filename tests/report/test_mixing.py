"""R-hat and effective draws: ArviZ's numbers against the formulas, on chains that agree and on chains that do not."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_gaussian import LinearGaussian
from scipy.stats import multivariate_normal, norm, rankdata
from torch import Tensor

import pyro_vae as pv
from pyro_vae.posterior.chains import Chains
from pyro_vae.report.mixing import chain_mixing


def chains_of(**z: Tensor) -> Chains:
    """Chains with these draws, each (C, S, N, ...)."""
    shape = next(iter(z.values())).shape[:3]
    nothing, rows = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape[2], dtype=torch.float64)
    return Chains(z, nothing, nothing + 0.8, rows, 4, rows.long())


def split_r_hat(draws: np.ndarray) -> float:
    """Gelman-Rubin of half chains: draws (C, S), eq. 4 of Vehtari et al. 2021."""
    half = draws.shape[1] // 2
    halves = np.concatenate([draws[:, :half], draws[:, -half:]])
    within, between = halves.var(1, ddof=1).mean(), half * halves.mean(1).var(ddof=1)
    return float(np.sqrt((within * (half - 1) / half + between / half) / within))


def normalised(draws: np.ndarray) -> np.ndarray:
    """Eq. 14: ranks over all chains through the inverse of the normal distribution function."""
    half = draws.shape[1] // 2
    halves = np.concatenate([draws[:, :half], draws[:, -half:]])
    scores = norm.ppf((rankdata(halves).reshape(halves.shape) - 0.375) / (halves.size + 0.25))
    return np.concatenate([scores[: len(draws)], scores[len(draws) :]], axis=1)


def r_hat(draws: np.ndarray) -> float:
    """The larger of the two for location and for scale."""
    return max(split_r_hat(normalised(part)) for part in (draws, np.abs(draws - np.median(draws))))


@pytest.mark.parametrize("kind", ["alike", "shifted", "scaled", "trend"])
def test_r_hat_is_that_of_the_formula(kind: str) -> None:
    draws = torch.randn(3, 40, 2, 2, dtype=torch.float64).exp()  # heavy-tailed and one-sided
    if kind == "shifted":
        draws[0] += 1.0
    elif kind == "scaled":
        draws[0] = draws[0].median() + 4.0 * (draws[0] - draws[0].median())
    elif kind == "trend":
        draws += torch.linspace(0.0, 1.5, 40, dtype=torch.float64)[:, None, None]
    found = chain_mixing(chains_of(z=draws))
    expected = [[r_hat(draws[:, :, i, j].numpy()) for j in range(2)] for i in range(2)]
    torch.testing.assert_close(found.r_hat["z"], torch.tensor(expected, dtype=torch.float64), rtol=0.0, atol=1e-9)
    torch.testing.assert_close(found.worst_r_hat, found.r_hat["z"].amax(1))
    assert (found.worst_r_hat > 1.05).all() == (kind != "alike")


def test_effective_draws_of_independent_and_of_correlated_chains() -> None:
    """An AR(1) chain with correlation rho has n (1 - rho) / (1 + rho) effective draws of its mean."""
    noise, rho = torch.randn(4, 4000, 1, dtype=torch.float64), 0.6
    draws = noise.clone()
    for i in range(1, 4000):
        draws[:, i] = rho * draws[:, i - 1] + (1.0 - rho**2) ** 0.5 * noise[:, i]
    found = chain_mixing(chains_of(free=noise, tied=draws))
    assert float(found.ess_bulk["free"]) == pytest.approx(16_000, rel=0.1)
    assert float(found.ess_bulk["tied"]) == pytest.approx(16_000 * 0.4 / 1.6, rel=0.15)
    # Indicators of a tail are less correlated than the draws: by orthants of the bivariate normal distribution.
    tail, sum_of_correlations = norm.ppf(0.05), 0.0
    for lag in range(1, 30):
        pair = multivariate_normal([0.0, 0.0], [[1.0, rho**lag], [rho**lag, 1.0]])
        sum_of_correlations += (pair.cdf([tail, tail]) - 0.05**2) / (0.05 * 0.95)
    tail_ess = 16_000 / (1.0 + 2.0 * sum_of_correlations)
    assert tail_ess > 5_000
    assert float(found.ess_tail["tied"]) == pytest.approx(tail_ess, rel=0.15)
    least = min(float(value) for part in (found.ess_bulk, found.ess_tail) for value in part.values())
    assert found.least_ess.tolist() == [least]
    assert found.converged.tolist() == [True]


def test_chains_on_a_gaussian_posterior_have_converged() -> None:
    known = LinearGaussian()
    method = pv.posterior.Hamiltonian(warm_up=100)
    found = chain_mixing(method(known.program(), known.draw(4), num_draws=250, seed=1))
    assert (found.worst_r_hat < 1.01).all()
    assert found.converged.all()
    assert "4 of 4 rows" in str(found)


def folded() -> pv.Program:
    """x = z^2 + noise: two modes at +-sqrt(x), far apart where x is large."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.2, dtype=x.dtype), 1.5))
            pyro.sample("x", dist.Normal(z**2, 0.3), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.5))

    return pv.Program(model, guide)


def test_chains_in_two_modes_are_found_out() -> None:
    """Row 0 has one bump, between whose ends chains travel; no chain of row 1 ever leaves the mode in which it began."""
    x = torch.tensor([0.0, 6.0], dtype=torch.float64)
    method = pv.posterior.Hamiltonian(start=pv.posterior.at_guide, warm_up=120)
    chains = method(folded(), x, num_chains=6, num_draws=250, seed=0)
    signs = chains.z["z"][:, :, 1].sign()
    assert (signs == signs[:, :1]).all()
    assert set(signs[:, 0].tolist()) == {-1.0, 1.0}
    found = chain_mixing(chains)
    assert found.worst_r_hat[1] > 1.1
    assert found.worst_r_hat[0] < 1.05
    assert not found.converged[1]
    assert "(row 1)" in str(found)


def test_the_worst_number_of_a_row_counts_and_one_that_never_moves_is_the_worst() -> None:
    good, bad = torch.randn(4, 200, 3, 2, 3, dtype=torch.float64), torch.randn(4, 200, 3, dtype=torch.float64)
    bad[0, :, 1] += 3.0
    bad[..., 2] = 1.0
    found = chain_mixing(chains_of(good=good, bad=bad))
    assert found.r_hat["good"].shape == (3, 2, 3)
    assert found.worst_r_hat[0] < 1.05
    assert found.worst_r_hat[1] == found.r_hat["bad"][1] > 1.3
    assert found.worst_r_hat[2] == torch.inf


@pytest.mark.parametrize("shape", [(1, 100, 2), (4, 3, 2)])
def test_what_cannot_be_judged_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"was given {shape[0]} of {shape[1]}: draw more"):
        chain_mixing(chains_of(z=torch.randn(shape)))
