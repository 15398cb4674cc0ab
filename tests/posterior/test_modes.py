"""The search for modes, where starts or rows are unlike."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_gaussian import LinearGaussian
from torch import Tensor

import pyro_vae as pv
from pyro_vae.posterior.modes import find_modes, least_curvature
from pyro_vae.posterior.shapes import Dense


def test_the_least_curvature_is_that_of_twice_the_spread_of_the_starts() -> None:
    """Starts from N(1, 3^2): 1 / (2 x 3)^2, within the error of a median of 6,000 deviations (relative, 1.17 / sqrt(n))."""
    starts = 1.0 + 3.0 * torch.randn(4, 300, 5, dtype=torch.float64)
    error = 2.0 * 4.5 * 1.17 / 6000**0.5
    assert abs(float(least_curvature(starts)) * 36.0 - 1.0) < error
    for spoilt in (torch.inf, -torch.inf, torch.nan, 1e12):
        starts[0, 7] = spoilt
        assert abs(float(least_curvature(starts)) * 36.0 - 1.0) < error
    assert torch.isfinite(least_curvature(torch.full((1, 2, 3), torch.nan)))
    assert torch.isfinite(least_curvature(torch.zeros(1, 2, 3)))


@pytest.mark.parametrize("bad", [torch.inf, torch.nan, 1e200])
def test_starts_that_are_no_points_are_passed_over(bad: float) -> None:
    """The first start of each row is none, and all starts of the last row; modes of the others are the closed form's."""
    known = LinearGaussian()
    x, starts = known.draw(6), torch.randn(3, 6, 3, dtype=torch.float64)
    starts[0], starts[:, 5] = bad, bad
    modes, _ = find_modes(known.program(), (x,), starts)
    assert modes.row.tolist() == list(range(6))
    assert (modes.visits[:5] >= 2).all()
    torch.testing.assert_close(modes.u[:5], known.posterior_mean(x)[:5])
    assert isinstance(modes.shape, Dense)
    torch.testing.assert_close(torch.cholesky_inverse(modes.shape.factor[:5]), known.covariance.expand(5, -1, -1))
    assert torch.isfinite(modes.shape.factor).all()


def test_memory_does_not_change_the_modes() -> None:
    known = LinearGaussian(dim=20, latent_dim=12)
    x, starts = known.draw(9), 2.0 * torch.randn(4, 9, 12, dtype=torch.float64)
    (whole, spent), (small, spent_small) = (find_modes(known.program(), (x,), starts, budget) for budget in (2**30, 2**15))
    torch.testing.assert_close(small.u, whole.u)
    torch.testing.assert_close(small.log_mass, whole.log_mass)
    torch.testing.assert_close(whole.log_mass, known.log_p(x))
    assert torch.equal(spent, spent_small)


@pytest.mark.parametrize(("num_rows", "unlike", "searched"), [(60, 2, 2), (60, 4, 60), (8, 0, 8)])
def test_further_starts_serve_rows_whose_first_ones_disagree(num_rows: int, unlike: int, searched: int) -> None:
    """Modes at +-sqrt(x). Where many rows have two modes, or few rows are known, all rows are searched further."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z.square(), 0.3), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.sqrt(), 0.1))

    x = torch.linspace(3.0, 5.0, num_rows, dtype=torch.float64)
    starts = torch.cat([torch.full((3, num_rows, 1), 1.8), torch.full((2, num_rows, 1), -2.2)]).double()
    starts[2, :unlike] = -1.7
    modes, cost = find_modes(
        pv.Program(model, guide), (x,), starts, least=torch.tensor(0.0625, dtype=torch.float64), first=3
    )
    count = torch.bincount(modes.row)
    assert count.tolist() == [2] * searched + [1] * (num_rows - searched)
    # The log joint is -u^2 / 2 - (x - u^2)^2 / 0.18, so that u^2 = x - 0.045 at both modes.
    torch.testing.assert_close(modes.u[:, 0].square(), x[modes.row] - 0.045, atol=0.05, rtol=0.0)
    visits = torch.zeros(num_rows, dtype=torch.long).index_add_(0, modes.row, modes.visits)
    assert visits.tolist() == [5] * searched + [3] * (num_rows - searched)
    assert searched == num_rows or (cost[:searched].min() > cost[searched:].max())


def test_more_modes_ask_for_more_starts() -> None:
    """Modes at (+-sqrt(x_1), +-sqrt(x_2)): three of them found by 20 starts ask for more, by which the fourth is found."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.square(), 0.3).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.sqrt(), 0.1).to_event(1))

    x = torch.tensor([[3.0, 4.0], [4.5, 3.5]], dtype=torch.float64)
    signs = torch.tensor([[1, 1], [1, -1], [1, 1], [-1, 1]] * 5 + [[-1, -1]] * 17, dtype=torch.float64)
    starts, least = 1.9 * signs[:, None].expand(-1, 2, -1), torch.tensor(0.0625, dtype=torch.float64)
    for count, found in ((4, 3), (20, 3), (37, 4)):
        modes, _ = find_modes(pv.Program(model, guide), (x,), starts[:count], least=least, first=4)
        assert torch.bincount(modes.row).tolist() == [found] * 2
    assert torch.bincount(modes.row, modes.visits).tolist() == [36.0] * 2  # after 36 starts 6 x (4 + 1) are enough


@pytest.mark.parametrize("latent_dim", [1, 2])
def test_one_row_is_judged_as_well_as_many(latent_dim: int) -> None:
    """A median of four numbers may be next to nothing: no width may hang on it."""
    known = LinearGaussian(dim=3, latent_dim=latent_dim)
    x, program = known.draw(1), known.program(inflate=1.5)
    found = torch.stack([pv.log_evidence(program, x, method=pv.posterior.laplace, seed=s).log_p for s in range(30)])
    assert (found - known.log_p(x)).abs().max() < 0.05
    upper = torch.stack([pv.evidence.sandwich(program, x, seed=s).upper for s in range(4)])
    assert (upper - known.log_p(x) > -0.05).all()
