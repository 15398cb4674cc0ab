"""Simultaneous bands and p-values of uniformity: against enumeration, and against simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from pyro_vae.report.bands import Uniform


def enumerated(count: int, inside: torch.Tensor) -> float:
    """P(every count is inside) by adding up the multinomial probability of each way to fill the G cells."""
    steps, total = inside.shape[0] + 1, 0.0
    for cells in itertools.product(range(count + 1), repeat=steps):
        if sum(cells) != count:
            continue
        below = np.cumsum(cells)[:-1]
        if all(inside[i, c] for i, c in enumerate(below)):
            total += math.factorial(count) / math.prod(math.factorial(c) for c in cells) / steps**count
    return total


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("level", [0.05, 0.2, 0.5])
def test_the_chain_of_convolutions_is_the_multinomial(count: int, level: float) -> None:
    uniform = Uniform(count)
    inside = uniform.tails > level
    inside[0, 0] = count == 5  # an interval that is not symmetric
    assert uniform._probability(inside) == pytest.approx(enumerated(count, inside), abs=1e-12)


@pytest.mark.parametrize("count", [7, 250])
def test_tails_are_those_of_the_binomial(count: int) -> None:
    uniform = Uniform(count)
    c, p = np.arange(count + 1), uniform.points.numpy()[:, None]
    expected = np.minimum(1.0, 2.0 * np.minimum(stats.binom.cdf(c, count, p), stats.binom.sf(c - 1, count, p)))
    assert np.allclose(uniform.tails.numpy(), expected, rtol=1e-9, atol=1e-30)
    assert len(uniform.points) == min(count, 100) - 1


def numbers(count: int, columns: int) -> torch.Tensor:
    return torch.rand(count, columns, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("count", [20, 150, 1000])
def test_the_band_holds_95_percent_of_all_curves_as_a_whole(count: int) -> None:
    uniform, columns = Uniform(count), 20_000
    share = np.full(uniform.steps, 1.0 / uniform.steps)
    cells = np.random.default_rng(5).multinomial(count, share, columns)  # of independent uniform numbers
    curves = torch.from_numpy(cells.cumsum(1)[:, :-1])
    lower, upper = uniform.band()
    covered = ((curves >= lower) & (curves <= upper)).all(1).double().mean()
    exact = uniform._probability((uniform.tails > 0) & _between(lower, upper, count))
    assert 0.95 <= exact < 0.96  # counts are whole numbers: the next narrower band holds less
    assert abs(float(covered) - exact) < 4.5 * math.sqrt(0.05 * 0.95 / columns)


def _between(lower: torch.Tensor, upper: torch.Tensor, count: int) -> torch.Tensor:
    c = torch.arange(count + 1)
    return (c >= lower[:, None]) & (c <= upper[:, None])


def test_other_probabilities_make_narrower_bands() -> None:
    uniform = Uniform(200)
    (low, high), (inner_low, inner_high) = uniform.band(), uniform.band(0.5)
    assert (inner_low >= low).all()
    assert (inner_high <= high).all()
    assert (inner_high - inner_low).sum() < (high - low).sum()
    assert uniform._probability(_between(inner_low, inner_high, 200)) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("count", [20, 400])
def test_p_values_of_uniform_numbers_are_uniform(count: int) -> None:
    uniform, columns = Uniform(count), 600
    p = uniform.p_value(numbers(count, columns)).numpy()
    for level in (0.02, 0.05, 0.2, 0.5, 0.8):  # P(p <= level) is at most level, less where counts are few
        share, slack = float((p <= level).mean()), 4.5 * math.sqrt(level * (1.0 - level) / columns)
        assert level - slack - 0.1 * (count < 100) < share < level + slack
    assert p.min() >= 0.0
    assert p.max() <= 1.0


@pytest.mark.parametrize("count", [5, 60, 400])
def test_p_is_at_most_five_percent_where_the_curve_leaves_the_band(count: int) -> None:
    uniform, values = Uniform(count), numbers(count, 300) ** torch.linspace(0.7, 1.5, 300)
    lower, upper = uniform.band()
    curves = uniform.curve(values)
    inside = ((curves >= lower[:, None]) & (curves <= upper[:, None])).all(0)
    assert torch.equal(uniform.p_value(values) > 0.05, inside)
    assert 0 < int(inside.sum()) < 300


def test_curves_count_what_lies_at_or_below_a_point() -> None:
    uniform = Uniform(4)
    values = torch.tensor([[0.1], [0.25], [0.6], [0.9]], dtype=torch.float64)
    assert uniform.curve(values).flatten().tolist() == [2, 2, 3]


def test_departures_are_found() -> None:
    values = numbers(500, 1)
    shapes = torch.cat([values, values**1.3, 0.2 + 0.8 * values, 0.5 + 0.8 * (values - 0.5), (6.3 * values).sin().abs()], 1)
    p = Uniform(500).p_value(shapes)
    assert p[0] > 0.05
    assert (p[1:] < 1e-3).all()
