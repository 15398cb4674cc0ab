"""Batched L-BFGS against modes that are known."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from linear_gaussian import LinearGaussian
from torch import Tensor

from pyro_vae.posterior.ascent import ascend


class Target:
    """`f(row, u)` with row (n,) and u (K, n, D), in the place of a log joint; counts the points of each row."""

    def __init__(self, f: Callable[[Tensor, Tensor], Tensor], num_rows: int) -> None:
        self.f, self.counts, self.row = f, torch.zeros(num_rows, dtype=torch.long), torch.arange(num_rows)

    def take(self, index: Tensor) -> Target:
        some = Target(self.f, len(self.counts))
        some.counts, some.row = self.counts, self.row[index]
        return some

    def __call__(self, u: Tensor) -> Tensor:
        self.counts.index_add_(0, self.row, torch.full((u.shape[1],), len(u)))
        return self.f(self.row, u)


def climb(f: Callable[[Tensor, Tensor], Tensor], starts: list[list[float]], steps: int = 100) -> tuple[Tensor, ...]:
    """One row a start: the ends, the values there, the gradients spent, the points of each row."""
    target, u = Target(f, len(starts)), torch.tensor(starts, dtype=torch.float64)
    return (*ascend(target, torch.arange(len(u)), u, steps), target.counts)  # type: ignore[arg-type]


def rosenbrock(_: Tensor, u: Tensor) -> Tensor:
    """A bent ridge, with the maximum 0 at (1, 1)."""
    a, b = u[..., 0], u[..., 1]
    return -10.0 * (1.0 - a).square() - 100.0 * (b - a.square()).square()


def poisson(row: Tensor, u: Tensor) -> Tensor:
    """c u - exp(u) with c = (1 + row) (1, 3): the maximum of each row is at u = log c."""
    c = (1.0 + row)[:, None] * torch.tensor([1.0, 3.0], dtype=torch.float64)
    return (c * u - u.exp()).sum(-1)


def quartic(row: Tensor, u: Tensor) -> Tensor:
    """Flat at the maximum, u = (row, -2 row): the Hessian there is zero."""
    centre = row[:, None] * torch.tensor([1.0, -2.0], dtype=torch.float64)
    return -(u - centre).pow(4).sum(-1)


MAXIMA = {
    "bent ridge": (rosenbrock, [[1.0, 1.0]] * 3),
    "poisson": (poisson, torch.tensor([[1.0, 3.0], [2.0, 6.0], [3.0, 9.0]]).log().tolist()),
    "quartic": (quartic, [[0.0, 0.0], [1.0, -2.0], [2.0, -4.0]]),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_many_starts_reach_the_mode_of_a_linear_gaussian_posterior(dtype: torch.dtype) -> None:
    """The log joint at the posterior's mean is the largest there is; from far below it, ends come within half a nat."""
    known = LinearGaussian(dim=30, latent_dim=20, dtype=dtype)
    x = known.draw(6)
    log_joint, row = known.program().log_joint(x), torch.arange(6).repeat(4)
    starts = 2.0 * torch.randn(24, 20, dtype=dtype)
    ends, values, spent = ascend(log_joint, row, starts, 60)
    with torch.no_grad():
        points = (known.posterior_mean(x)[row].to(dtype), starts, ends)
        most, at_start, at_end = (log_joint.take(row)(u[None])[0] for u in points)
    torch.testing.assert_close(values, at_end, rtol=1e-6, atol=1e-4)
    assert (most - at_start > 100.0).all()
    assert (most - values < 0.5).all()
    assert values.dtype == torch.float64
    assert ends.dtype == dtype
    assert ((spent > 3) & (spent <= 61)).all()


@pytest.mark.parametrize("name", MAXIMA)
def test_curved_targets_are_climbed_to_their_maxima(name: str) -> None:
    f, maxima = MAXIMA[name]
    expected = torch.tensor(maxima, dtype=torch.float64)
    ends, values, *_ = climb(f, [[-1.2, 1.0], [0.3, -2.0], [4.0, 2.5]])
    most = f(torch.arange(3), expected[None])[0]
    assert (values <= most + 1e-12).all()
    assert (most - values < 0.05).all()
    torch.testing.assert_close(values, f(torch.arange(3), ends[None])[0])
    # Where a target is this many nats deep, 0.05 nats are this far at most: the flat quartic allows 0.05^(1/4).
    assert ((ends - expected).abs() < 0.5).all()


@pytest.mark.parametrize("outside", [-torch.inf, torch.nan])
def test_a_region_without_density_is_not_entered(outside: float) -> None:
    """The maximum, at 3, lies beyond a wall at 2; a start behind the wall stays where it is, and is told by -inf."""

    def walled(_: Tensor, u: Tensor) -> Tensor:
        return torch.where(u[..., 0] < 2.0, -0.5 * (u - 3.0).square().sum(-1), outside)

    ends, values, *_ = climb(walled, [[-4.0], [1.9], [2.5]])
    assert (ends[:2, 0] < 2.0).all()
    assert torch.isfinite(values[:2]).all()
    assert values[0] > -0.5 * 7.0**2 + 20.0  # and it did climb
    assert values[2] == -torch.inf
    assert ends[2, 0] == 2.5


def test_a_domain_with_an_open_end_is_not_left() -> None:
    """3 log(1 - u) + log(1 + u) is NaN outside (-1, 1); its maximum is at u = -1/2."""
    ends, values, *_ = climb(
        lambda _, u: 3.0 * (1.0 - u[..., 0]).log() + (1.0 + u[..., 0]).log(), [[0.95], [-0.999], [0.1]]
    )
    assert ((ends[:, 0] + 0.5).abs() < 0.1).all()
    assert (3.0 * math.log(1.5) + math.log(0.5) - values < 0.02).all()


def test_a_gradient_that_is_not_a_number_stops_its_own_problem_alone() -> None:
    """|u|^1/2 has an infinite slope at 0, where the second problem starts; the first reaches log c all the same."""

    def f(row: Tensor, u: Tensor) -> Tensor:
        root = torch.where((row == 1)[:, None], u, 1.0).abs().sqrt().sum(-1)
        return poisson(row, u) + torch.where(row == 1, root, 0.0)

    ends, values, *_ = climb(f, [[0.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(ends[0], torch.tensor([1.0, 3.0], dtype=torch.float64).log(), rtol=0.0, atol=0.1)
    assert values[1] == -torch.inf


def test_converged_problems_are_no_longer_evaluated() -> None:
    """One problem starts at its maximum, the other at the wrong end of a bent ridge: points of each are counted."""
    _, _, spent, counts = climb(rosenbrock, [[1.0, 1.0], [-1.2, 1.0]])
    assert torch.equal(spent, counts)
    assert spent[0] <= 5
    assert spent[1] >= 12
    *_, alone = climb(rosenbrock, [[-1.2, 1.0]])
    assert counts[1] == alone[0]  # its own number, whoever else is in the batch
    assert climb(rosenbrock, [[-1.2, 1.0]], steps=7)[3].tolist() == [8]  # the steps are a bound
