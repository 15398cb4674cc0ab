"""Quadrature against closed forms, fine sums and scipy; the tolerance is the error that quadrature itself reports."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_gaussian import LinearGaussian
from scipy import integrate as scipy_integrate
from scipy import stats
from torch import Tensor

import pyro_vae as pv
from pyro_vae.evidence.cells import POINTS, Cells, rule
from pyro_vae.evidence.quadrature import Integrals, integrate

DTYPES = [torch.float64, torch.float32]


def program_of(latent: dist.TorchDistribution, likelihood: Callable[[Tensor], dist.TorchDistribution]) -> pv.Program:
    """z ~ latent, x ~ likelihood(z); the guide is the prior."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", likelihood(pyro.sample("z", latent)), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", latent)

    return pv.Program(model, guide)


def standard(dim: int, dtype: torch.dtype = torch.float64) -> dist.TorchDistribution:
    return dist.Normal(torch.zeros(dim, dtype=dtype), 1.0).to_event(1)


def number(value: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(value, dtype=dtype)


def require(found: Integrals, truth: Tensor, least: float = 2e-6) -> None:
    """All rows are right within their own error, which is at most `least`, and none is marked."""
    assert found.reasons == ("",) * len(truth)
    assert (found.error <= least).all(), found.error.max()
    assert ((found.log_p - truth).abs() <= found.error).all(), ((found.log_p - truth).abs() / found.error).max()


def log_normal(x: Tensor, variance: float) -> Tensor:
    """log N(x; 0, variance), float64."""
    return -0.5 * x.double().square() / variance - 0.5 * math.log(2.0 * math.pi * variance)


@pytest.mark.parametrize("dim", [1, 2])
def test_the_rule_is_exact_to_degree_27(dim: int) -> None:
    nodes, weights, null, line = rule(dim)
    assert nodes.shape == (POINTS**dim, dim)

    def integral(*degrees: int) -> float:
        return math.prod(0.0 if degree % 2 else 2.0 / (degree + 1) for degree in degrees)

    for degrees in [(0, 0), (26, 2), (27, 1), (12, 26), (3, 4)]:
        value = weights @ (nodes ** torch.tensor(degrees[:dim])).prod(-1)
        assert float(value) == pytest.approx(integral(*degrees[:dim]), abs=1e-13)
    assert abs(float(weights @ nodes[:, 0] ** 28) - (2.0 / 29.0) * 2.0 ** (dim - 1)) > 1e-9
    node = rule(1)[0][:, 0]
    for number_, degree in enumerate(range(14, 6, -1)):
        sums = null.flatten(0, 1)[number_] @ torch.stack([node**k for k in range(degree + 1)], 1)
        assert (sums[:-1].abs() < 1e-12).all()  # zero for lower degrees,
        assert abs(sums[-1]) > 1e-6  # but not for its own
    assert float(line.sum()) == pytest.approx(2.0, abs=1e-14)


@pytest.mark.parametrize("shape", ["kink", "step", "peak"])
def test_the_error_of_a_cell_bounds_what_the_rule_misses(shape: str) -> None:
    """One feature at m, also a hair from a face of a cell (at 0 and +-1/2): the integral is known."""
    places = torch.cat([torch.rand(500, dtype=torch.float64), torch.linspace(0.499, 0.501, 101, dtype=torch.float64)])
    cells = Cells.first(len(places), 1, places.device)
    nodes = rule(1)[0]
    y, m = cells.centre + cells.half * nodes[:, None], places[cells.row, None]
    low, high = cells.centre - cells.half, cells.centre + cells.half
    if shape == "kink":
        values, antiderivative = (y - m).abs() + 0.1, lambda e: 0.5 * (e - m) * (e - m).abs() + 0.1 * e
    elif shape == "step":
        values, antiderivative = (y > m).double() + 0.1, lambda e: (e - m).clamp_min(0.0) + 0.1 * e
    else:
        values = torch.exp(-0.5 * ((y - m) / 0.02).square()) + 0.1
        antiderivative = lambda e: 0.02 * math.sqrt(math.pi / 2.0) * torch.erf((e - m) / 0.02 / 2**0.5) + 0.1 * e  # noqa: E731
    done = cells.integrated(values[..., 0].log())
    miss = (done.log_mass.exp() - (antiderivative(high) - antiderivative(low))[:, 0]).abs()
    assert (miss <= done.log_error[:, 0].exp() + 1e-13).all()
    assert miss.max() > 1e-6  # the rule does miss something
    assert done.log_error.exp().median() < 1e-2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "noise"), [(1, 0.3), (1, 0.001), (2, 0.3), (2, 0.02)])
def test_modes_that_mirror_each_other(dim: int, noise: float, dtype: torch.dtype) -> None:
    """x = |z| + noise: p(x) = prod 2 N(x; 0, 1 + s^2) Phi(x / (s sqrt(1 + s^2))); the kink at s = 0.3 lies in the mass."""
    z = torch.randn(30, dim, dtype=torch.float64)
    x = (z.abs() + noise * torch.randn(30, dim, dtype=torch.float64)).to(dtype)
    variance = 1.0 + noise**2
    truth = math.log(2.0) + log_normal(x, variance) + torch.special.log_ndtr(x.double() / (noise * math.sqrt(variance)))
    found = integrate(program_of(standard(dim, dtype), lambda z: dist.Normal(z.abs(), noise).to_event(1)), (x,))
    require(found, truth.sum(-1), 2e-6 if dtype is torch.float64 else 2e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("noise", "rows"), [(0.3, [-0.2, 0.01, 0.5, 2.0, 9.0]), (0.02, [0.005, 0.5, 7.129030009181575])])
def test_a_ring(noise: float, rows: list[float], dtype: torch.dtype) -> None:
    """x = |z|^2 + noise, and |z|^2 is exponential: p(x) = exp(-x/2 + s^2/8) Phi(x/s - s/2) / 2.

    The last row is a ring of radius 2.67 and width 0.004, parts of which pass between all points of the larger cells.
    """
    x = torch.tensor(rows, dtype=dtype)
    program = program_of(standard(2, dtype), lambda z: dist.Normal(z.square().sum(-1), noise))
    known = x.double()
    truth = -math.log(2.0) - 0.5 * known + noise**2 / 8.0 + torch.special.log_ndtr(known / noise - noise / 2.0)
    require(integrate(program, (x,)), truth, 2e-6 if dtype is torch.float64 else 2e-3)


def test_a_bent_posterior() -> None:
    """x ~ N(z_1 + 3 z_2^2, 0.02^2) with z_1 integrated out by hand: x | z_2 ~ N(3 z_2^2, 1.0004), then a fine grid."""
    program = program_of(standard(2), lambda z: dist.Normal(z[..., 0] + 3.0 * z[..., 1].square(), 0.02))
    x = torch.tensor([-1.0, 0.5, 4.0], dtype=torch.float64)
    grid = torch.linspace(-8.0, 8.0, 20_001, dtype=torch.float64)
    terms = log_normal(grid, 1.0) + log_normal(x[:, None] - 3.0 * grid.square(), 1.0004)
    require(integrate(program, (x,)), torch.logsumexp(terms, -1) + math.log(16.0 / 20_000))


def test_a_bent_posterior_without_symmetry() -> None:
    """Against a grid that is spectrally accurate, as the density vanishes at its ends."""
    scale = torch.tensor([0.3, 0.2], dtype=torch.float64)

    def mean(z: Tensor) -> Tensor:
        return torch.stack([z[..., 0] * z[..., 1] + 0.3 * z[..., 0], z[..., 0].square() - z[..., 1]], -1)

    x = torch.tensor([[0.5, 0.2], [-1.5, 1.0], [2.0, -1.0]], dtype=torch.float64)
    line = torch.linspace(-7.0, 7.0, 901, dtype=torch.float64)
    z = torch.cartesian_prod(line, line)
    joint = log_normal(z, 1.0).sum(-1) + (log_normal((x[:, None] - mean(z)) / scale, 1.0) - scale.log()).sum(-1)
    found = integrate(program_of(standard(2), lambda z: dist.Normal(mean(z), scale).to_event(1)), (x,))
    require(found, torch.logsumexp(joint, -1) + 2.0 * math.log(14.0 / 900))


def test_a_narrow_ridge_across_the_axes() -> None:
    """A linear-Gaussian model with posterior deviations of 0.0005 and 0.7: the correlation is 0.999998."""
    weight = torch.tensor([[1.0, 0.999], [1.0, 1.001], [0.5, 0.5]], dtype=torch.float64)
    x = torch.randn(5, 2, dtype=torch.float64) @ weight.T + 0.001 * torch.randn(5, 3, dtype=torch.float64)
    covariance = weight @ weight.T + 1e-6 * torch.eye(3, dtype=torch.float64)
    truth = torch.distributions.MultivariateNormal(torch.zeros(3, dtype=torch.float64), covariance).log_prob(x)
    require(integrate(program_of(standard(2), lambda z: dist.Normal(z @ weight.T, 0.001).to_event(1)), (x,)), truth)


def student(z: np.ndarray, freedom: float) -> np.ndarray:
    return stats.t.pdf(z, freedom)


def on_the_line(density: Callable[[np.ndarray], np.ndarray], low: float, high: float) -> float:
    """log of the integral of `density` over z = sinh(s), by a fine sum over s in [low, high]."""
    s = np.linspace(low, high, 400_001)
    return math.log(np.sum(density(np.sinh(s)) * np.cosh(s)) * (s[1] - s[0]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_heavy_tails_on_both_sides(dtype: torch.dtype) -> None:
    """A Student-t prior with 0.7 degrees of freedom under a Cauchy likelihood, off centre."""
    x = torch.tensor([-2.0, 0.1, 30.0], dtype=dtype)
    prior = dist.StudentT(number(0.7, dtype), number(0.0, dtype), number(1.0, dtype))
    found = integrate(program_of(prior, lambda z: dist.Cauchy(z, number(0.3, dtype))), (x,))
    truth = [
        on_the_line(lambda z, v=v: student(z, 0.7) * stats.cauchy.pdf(v, z, 0.3), -40.0, 40.0) for v in x.double().tolist()
    ]
    require(found, number(truth), 2e-6 if dtype is torch.float64 else 1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_skewed_posteriors_of_constrained_latents(dtype: torch.dtype) -> None:
    """Exponential prior and Student-t likelihood by scipy; Gamma-Poisson and Beta-binomial in closed form.

    In float32 exp(u) overflows in the tails and the log joint is NaN there, where there is no mass: no row is marked.
    """
    least = 2e-6 if dtype is torch.float64 else 1e-4
    x = torch.tensor([-2.0, 0.1, 6.0, 30.0], dtype=dtype)
    likelihood = lambda z: dist.StudentT(number(3.0, dtype), z, number(0.5, dtype))  # noqa: E731
    found = integrate(program_of(dist.Exponential(number(0.7, dtype)), likelihood), (x,))
    truth = []
    for v in x.double().tolist():
        pieces = [0.0, 0.5, 2.0, 20.0, 28.0, 30.0, 32.0, 60.0, 400.0]
        joint = lambda z, v=v: stats.expon.pdf(z, scale=1.0 / 0.7) * stats.t.pdf(v, 3.0, z, 0.5)  # noqa: E731
        parts = [scipy_integrate.quad(joint, a, b, epsabs=0.0, epsrel=1e-11)[0] for a, b in itertools.pairwise(pieces)]
        truth.append(math.log(sum(parts)))
    require(found, number(truth), least)
    counts = torch.tensor([0.0, 1.0, 3.0, 20.0], dtype=dtype)
    found = integrate(program_of(dist.Gamma(number(0.5, dtype), number(1.0, dtype)), dist.Poisson), (counts,))
    require(found, number(stats.nbinom.logpmf(counts.numpy(), 0.5, 0.5).tolist()), least)
    counts = torch.tensor([0.0, 1.0, 5.0, 10.0], dtype=dtype)
    program = program_of(dist.Beta(number(0.5, dtype), number(2.0, dtype)), lambda z: dist.Binomial(10, z))
    require(integrate(program, (counts,)), number(stats.betabinom.logpmf(counts.numpy(), 10, 0.5, 2.0).tolist()), least)


@pytest.mark.parametrize("dtype", DTYPES)
def test_narrow_peaks_far_away(dtype: torch.dtype) -> None:
    """Posterior deviation 0.01 under a prior of 30, at up to 90; and 0.001 / x under a prior of 1, where x ~ N(exp z)."""
    x = torch.tensor([0.1, 50.0, -90.0], dtype=dtype)
    found = integrate(program_of(dist.Normal(number(0.0, dtype), 30.0), lambda z: dist.Normal(z, 0.01)), (x,))
    require(found, log_normal(x, 900.0001), 2e-6 if dtype is torch.float64 else 1e-2)
    x = torch.tensor([0.1, 1.0, 20.0], dtype=dtype)
    found = integrate(program_of(dist.Normal(number(0.0, dtype), 1.0), lambda z: dist.Normal(z.exp(), 0.001)), (x,))
    known = x.double()[:, None]
    z = known.log() + torch.linspace(-0.02, 0.02, 20_001, dtype=torch.float64) / known
    terms = log_normal(z, 1.0) + log_normal(known - z.exp(), 1e-6)
    require(
        found, torch.logsumexp(terms, -1) + (0.04 / 20_000 / known[:, 0]).log(), 2e-6 if dtype is torch.float64 else 3e-2
    )


def test_densities_with_cuts_and_kinks() -> None:
    """A uniform likelihood, p(x) = (Phi(x) - Phi(x - 1/2)) 2, and a Laplace one, by scipy on both sides of the kink."""
    x = torch.tensor([0.1, 1.0, 2.5], dtype=torch.float64)
    normal = dist.Normal(number(0.0), 1.0)
    found = integrate(program_of(normal, lambda z: dist.Uniform(z, z + 0.5)), (x,))
    require(found, (2.0 * (torch.special.ndtr(x) - torch.special.ndtr(x - 0.5))).log())
    found = integrate(program_of(normal, lambda z: dist.Laplace(z, 0.01)), (x,))
    truth = []
    for v in x.tolist():
        joint = lambda z, v=v: stats.norm.pdf(z) * stats.laplace.pdf(v, z, 0.01)  # noqa: E731
        sides = [(v - 0.4, v), (v, v + 0.4)]
        truth.append(math.log(sum(scipy_integrate.quad(joint, *side, epsabs=0.0, epsrel=1e-11)[0] for side in sides)))
    require(found, number(truth))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 2])
def test_many_dimensions_of_data(dim: int, dtype: torch.dtype) -> None:
    """The log joint is in the hundreds, so that its rounding is what is left in float32; float64 is right to 1e-9."""
    known = LinearGaussian(dim=300, latent_dim=dim, dtype=dtype)
    x = known.draw(20)
    found = integrate(known.program(inflate=2.0, shift=1.0), (x,))
    require(found, known.log_p(x), 1e-6 if dtype is torch.float64 else 1e-3)
    if dtype is torch.float64:
        assert (found.log_p - known.log_p(x)).abs().max() < 1e-9


def with_factor(term: Callable[[Tensor, Tensor], Tensor]) -> pv.Program:
    """z ~ N(0, 1), x ~ N(z, 1), times exp(term(z, x))."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(number(0.0), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.factor("term", term(z, x))

    return pv.Program(model, program_of(dist.Normal(number(0.0), 1.0), lambda z: dist.Normal(z, 1.0)).guide)


@pytest.mark.parametrize("edge", [0.0, 0.3, -1.2])
def test_half_of_the_line_has_no_density(edge: float) -> None:
    """The posterior is N(x/2, 1/2), cut at `edge`."""
    x = torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64)
    found = integrate(with_factor(lambda z, x: torch.where(z > edge, -torch.inf, 0.0)), (x,))
    require(found, log_normal(x, 2.0) + torch.special.log_ndtr((edge - 0.5 * x) * math.sqrt(2.0)))


def test_no_density_at_all_is_minus_infinity_and_said() -> None:
    x = torch.tensor([0.0, 1.0, 2.0, 60.0], dtype=torch.float64)
    found = integrate(with_factor(lambda z, x: torch.where(x > 50.0, -torch.inf, 0.0 * z)), (x,))
    assert found.log_p[3] == -torch.inf
    assert "no density" in found.reasons[3]
    require(integrate(with_factor(lambda z, x: 0.0 * z), (x[:3],)), log_normal(x[:3], 2.0))
    assert ((found.log_p - log_normal(x, 2.0)).abs() <= found.error)[:3].all()


@pytest.mark.parametrize("edge", [30.3, 30.0, 29.1])
def test_nan_in_the_mass_is_said(edge: float) -> None:
    """The last row's posterior is N(30, 1/2); beyond `edge` the model gives NaN."""
    x = torch.tensor([0.0, 1.0, 2.0, 60.0], dtype=torch.float64)
    found = integrate(with_factor(lambda z, x: torch.where((z > edge) & (x > 50.0), torch.nan, 0.0)), (x,))
    assert found.reasons[:3] == ("", "", "")
    assert "NaN" in found.reasons[3]
    left = log_normal(x, 2.0) + torch.special.log_ndtr((edge - 0.5 * x) * math.sqrt(2.0))
    truth = torch.cat([log_normal(x, 2.0)[:3], left[3:]])  # NaN counts as no density
    assert ((found.log_p - truth).abs() <= found.error).all()


def test_nan_where_there_is_no_mass_is_not_said() -> None:
    x = torch.tensor([0.0, 1.0, 2.0, 60.0], dtype=torch.float64)
    require(
        integrate(with_factor(lambda z, x: torch.where((z > 45.0) & (x > 50.0), torch.nan, 0.0)), (x,)), log_normal(x, 2.0)
    )


@pytest.mark.parametrize(
    "push", [lambda z: 2.0 * z.square(), lambda z: z.square(), lambda z: z.square() - torch.log1p(z.abs())]
)
def test_an_integral_that_diverges_is_no_number(push: Callable[[Tensor], Tensor]) -> None:
    """exp(z^2), a constant and 1 / |z| at both ends. The first row is proper and stays as it is."""
    x = torch.tensor([0.5, 1.0, 2.0, 60.0], dtype=torch.float64)
    found = integrate(with_factor(lambda z, x: torch.where(x > 50.0, push(z) - z * x, 0.0)), (x,))
    assert found.log_p[3].isnan()
    assert found.error[3] == torch.inf
    assert "diverge" in found.reasons[3]
    assert found.reasons[:3] == ("", "", "")
    assert ((found.log_p - log_normal(x, 2.0)).abs() <= found.error)[:3].all()


def test_a_row_that_is_given_up_is_marked_and_its_error_told() -> None:
    program = program_of(standard(2), lambda z: dist.Normal(z.square().sum(-1), 0.02))
    x = torch.tensor([3.0, 0.1], dtype=torch.float64)
    truth = -math.log(2.0) - 0.5 * x + 0.02**2 / 8.0 + torch.special.log_ndtr(x / 0.02 - 0.01)
    found = integrate(program, (x,), most=30_000)
    assert found.reasons[0] == "quadrature did not converge"
    assert found.error[0] > 1e-4
    assert ((found.log_p - truth).abs() <= found.error).all()
    assert (found.evaluations < 4 * 30_000).all()


def test_neither_the_budget_nor_other_rows_change_an_answer_beyond_its_error() -> None:
    program = program_of(standard(2), lambda z: dist.Normal(z.abs(), 0.3).to_event(1))
    x = torch.tensor([[0.5, 0.2], [1.5, 1.0], [0.1, 2.0]], dtype=torch.float64)
    whole, small, alone = integrate(program, (x,)), integrate(program, (x,), memory=2**17), integrate(program, (x[1:2],))
    assert ((whole.log_p - small.log_p).abs() <= whole.error + small.error).all()
    assert abs(whole.log_p[1] - alone.log_p[0]) <= whole.error[1] + alone.error[0]


def test_three_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match="1 or 2 latent dimensions, this program has 3"):
        integrate(program_of(standard(3), lambda z: dist.Normal(z.sum(-1), 1.0)), (torch.zeros(2, dtype=torch.float64),))
