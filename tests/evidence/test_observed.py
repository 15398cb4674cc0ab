"""What programs observe, and bits per dimension of those that observe discrete data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_gaussian import LinearGaussian
from torch import Tensor
from torch.distributions import MixtureSameFamily, constraints

import pyro_vae as pv
from pyro_vae.evidence.estimate import Estimate
from pyro_vae.evidence.observed import Observed, discrete_dimensions, observed_sites

WEIGHT, BIAS = torch.tensor([1.3, -0.7, 2.1]).double(), torch.tensor([0.4, -1.1, 0.2]).double()


def program_of(observe: Callable[..., None]) -> pv.Program:
    """z ~ N(0, 1), and `observe(z, *rows)` inside the plate."""

    def model(*rows: Tensor) -> None:
        with pyro.plate("data", len(rows[0])):
            z = pyro.sample("z", dist.Normal(rows[0].new_zeros(()), 1.0))
            observe(z, *rows)

    def guide(*rows: Tensor) -> None:
        with pyro.plate("data", len(rows[0])):
            pyro.sample("z", dist.Normal(rows[0].new_zeros(len(rows[0])), 1.2))

    return pv.Program(model, guide)


def bernoulli(z: Tensor, x: Tensor) -> None:
    pyro.sample("x", dist.Bernoulli(logits=z[..., None] * WEIGHT + BIAS).to_event(1), obs=x)


def binary_rows() -> Tensor:
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)), dtype=torch.float64)


def by_quadrature(x: Tensor) -> Tensor:
    """log p(x) of `bernoulli` by the midpoint rule, (N,)."""
    z = (torch.arange(4000, dtype=torch.float64) + 0.5) * (20.0 / 4000) - 10.0
    logits = z[:, None] * WEIGHT + BIAS
    log_p = (x[:, None] * logits - torch.nn.functional.softplus(logits)).sum(-1) - 0.5 * z**2
    return torch.logsumexp(log_p, -1) + math.log(20.0 / 4000 / math.sqrt(2.0 * math.pi))


def test_bits_of_all_rows_there_are_spell_a_probability() -> None:
    x = binary_rows()
    estimate = pv.log_evidence(program_of(bernoulli), x, method=pv.evidence.exact)
    assert estimate.dimensions.tolist() == [3] * 8
    bits = estimate.bits_per_dimension
    assert float(torch.exp2(-3.0 * bits).sum()) == pytest.approx(1.0, abs=1e-6)
    torch.testing.assert_close(bits, -by_quadrature(x) / (3.0 * math.log(2.0)), atol=1e-6, rtol=0.0)
    assert estimate.mean_bits_per_dimension == pytest.approx(float(bits.mean()), rel=1e-12)
    assert f"nats a row, {float(bits.mean()):.3f} bits per dimension (" in str(estimate)
    assert len(str(estimate).splitlines()) <= 8
    frame = estimate.to_dataframe()
    assert (frame["bits_per_dimension"].to_numpy() == bits.numpy()).all()
    assert frame["dimensions"].tolist() == [3] * 8


@pytest.mark.parametrize("method", [None, pv.posterior.from_guide])
def test_bits_come_with_every_way_to_log_p(method: Any) -> None:
    x = binary_rows()[[5, 2, 7]]
    estimate = pv.log_evidence(program_of(bernoulli), x, method=method)
    error = estimate.standard_error / (3.0 * math.log(2.0))
    truth = -by_quadrature(x) / (3.0 * math.log(2.0))
    assert ((estimate.bits_per_dimension - truth).abs() < 4.5 * error).all()


def test_densities_have_none_and_say_why() -> None:
    known = LinearGaussian()
    estimate = pv.log_evidence(known.program(), known.draw(4), method=pv.evidence.exact)
    assert estimate.dimensions.tolist() == [-1] * 4
    assert not estimate.discrete
    for name in ("bits_per_dimension", "mean_bits_per_dimension"):
        with pytest.raises(ValueError, match=r"p.x. is a density, .* no bits per dimension: give a likelihood of discrete"):
            getattr(estimate, name)
    assert "bits" not in str(estimate)
    assert "bits_per_dimension" not in estimate.to_dataframe().columns


def test_rows_without_a_number_keep_their_dimensions() -> None:
    x = binary_rows()[:4]
    x[1, 0], x[2, 1] = 0.5, torch.nan
    estimate = pv.log_evidence(program_of(bernoulli), x, method=pv.posterior.from_guide, num_particles=500)
    bits = estimate.bits_per_dimension
    assert bits[1] == torch.inf
    assert bits[2].isnan()
    assert estimate.mean_bits_per_dimension == math.inf
    # A row without a number is in neither sum, an impossible one in both.
    known = estimate.take(torch.tensor([0, 2, 3]))
    assert known.mean_bits_per_dimension == pytest.approx(float(bits[[0, 3]].mean()))
    good = estimate.take(torch.tensor([0, 3]))
    assert good.mean_bits_per_dimension == pytest.approx(float(bits[[0, 3]].mean()))


def test_parts_put_together_keep_the_dimensions_of_their_rows() -> None:
    a = pv.log_evidence(program_of(bernoulli), binary_rows()[:3], method=pv.evidence.exact)
    b = Estimate.known(a.log_p[:2], a.standard_error[:2], "test", 1)
    assert b.dimensions.tolist() == [-1, -1]
    both = Estimate.cat([b, a])
    assert both.dimensions.tolist() == [-1, -1, 3, 3, 3]
    assert both.rows(3).dimensions.tolist() == [-1, -1, 3]
    assert both.take(torch.tensor([4, 0])).dimensions.tolist() == [3, -1]
    assert both.put(torch.tensor([1]), a.rows(1)).dimensions.tolist() == [-1, 3, 3, 3, 3]
    assert both.doubted(["no"] * 5).dimensions.tolist() == [-1, -1, 3, 3, 3]
    assert both.bits_per_dimension.isnan().tolist() == [True, True, False, False, False]
    assert both.mean_bits_per_dimension == pytest.approx(a.mean_bits_per_dimension)
    # Bits of all rows by dimensions of all rows, not the mean of ratios: rows may have different numbers.
    mixed = Estimate.cat([a.rows(1), Estimate(**{**vars(a.rows(1)), "dimensions": torch.tensor([1])})])
    assert mixed.mean_bits_per_dimension == pytest.approx(-2.0 * float(a.log_p[0]) / (4.0 * math.log(2.0)))


def test_missing_numbers_are_not_counted() -> None:
    x = torch.tensor([[0.0, 1.0, 1.0], [torch.nan, 1.0, 0.0], [torch.nan] * 3]).double()
    counts = discrete_dimensions(program_of(bernoulli), (x,), torch.arange(3))
    assert counts.tolist() == [3, 2, 0]
    codes = torch.tensor([[[0.0, 1.0], [1.0, 0.0]], [[torch.nan, torch.nan], [0.0, 1.0]]])
    site = Observed("x", "OneHotCategorical", (2, 2), discrete=True, masked=False, place=0, unit=2)
    assert site.dimensions == 2
    assert site.count((codes,)).tolist() == [2, 1]


def test_rows_of_which_nothing_was_seen_have_no_bits() -> None:
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(1),
        likelihood=pv.likelihoods.Poisson(pv.nets.MLP(1, 3), missing=True),
        guide=pv.guides.DiagonalNormal(pv.nets.MLP(3, hidden=(4,)), latent_dim=1),
    )
    x = torch.tensor([[0.0, 2.0, 1.0], [math.nan] * 3, [1.0, math.nan, 0.0], [math.nan] * 3])
    estimate = pv.log_evidence(vae, x, method=pv.evidence.exact)
    assert estimate.dimensions.tolist() == [3, 0, 2, 0]
    torch.testing.assert_close(estimate.log_p[[1, 3]], torch.zeros(2).double(), atol=1e-5, rtol=0.0)
    bits = estimate.bits_per_dimension
    assert bits.isfinite().tolist() == [True, False, True, False]
    assert bits[[1, 3]].isnan().all()
    assert estimate.to_dataframe()["bits_per_dimension"].isna().tolist() == [False, True, False, True]
    assert estimate.mean_bits_per_dimension == pytest.approx(float(3.0 * bits[0] + 2.0 * bits[2]) / 5.0)
    # A table of such rows alone is one of discrete data all the same: no number, and no word of densities.
    nothing = estimate.take(torch.tensor([1, 3]))
    assert nothing.discrete
    assert nothing.bits_per_dimension.isnan().all()
    assert math.isnan(nothing.mean_bits_per_dimension)
    assert nothing.to_dataframe()["dimensions"].tolist() == [0, 0]
    assert "nan bits per dimension" in str(nothing)


def rates(z: Tensor) -> Tensor:
    return (0.3 * z).exp()[..., None] * torch.tensor([1.0, 2.0, 0.5, 3.0])


MEAN = torch.ones(4)
COUNTS = torch.tensor([[0.0, 2.0, 1.0, 3.0], [1.0, 1.0, 0.0, 2.0], [4.0, 0.0, 1.0, 1.0], [1.0, 0.0, 0.0, 5.0]])
CASES: dict[str, tuple[Callable[[Tensor], Any], bool, int]] = {
    "poisson": (lambda z: dist.Poisson(rates(z)).to_event(1), True, 4),
    "negative binomial": (lambda z: dist.GammaPoisson(rates(z), 1.0).to_event(1), True, 4),
    "zero-inflated": (lambda z: dist.ZeroInflatedPoisson(rates(z), gate=torch.tensor(0.2)).to_event(1), True, 4),
    "binomial": (lambda z: dist.Binomial(9, rates(z) / 9.0).to_event(1), True, 4),
    "categorical": (lambda z: dist.Categorical(rates(z)[..., None].expand(*z.shape, 4, 6)).to_event(1), True, 4),
    "masked": (lambda z: dist.Poisson(rates(z)).mask(torch.tensor([True, False, True, True])).to_event(1), True, 4),
    "mixture": (
        lambda z: dist.Independent(
            MixtureSameFamily(dist.Categorical(torch.ones(*z.shape, 4, 2)), dist.Poisson(rates(z)[..., None] + MEAN[:2])), 1
        ),
        True,
        4,
    ),
    "normal": (lambda z: dist.Normal(rates(z), 1.0).to_event(1), False, 4),
    "full normal": (lambda z: dist.MultivariateNormal(rates(z), torch.eye(4)), False, 4),
}


@pytest.mark.parametrize("case", CASES)
def test_masses_are_told_from_densities(case: str) -> None:
    make, discrete, dimensions = CASES[case]

    def observe(z: Tensor, x: Tensor) -> None:
        pyro.sample("counts", make(z), obs=x)

    program = program_of(observe)
    (site,) = observed_sites(program, (COUNTS,))
    assert (site.name, site.discrete, site.dimensions, site.place) == ("counts", discrete, dimensions, 0)
    assert site.masked == (case == "masked")
    assert discrete_dimensions(program, (COUNTS,), torch.tensor([2])).tolist() == [4 if discrete else -1] * 4


def test_a_one_hot_code_is_one_dimension() -> None:
    codes = torch.eye(5)[[3, 1, 1]]
    program = program_of(lambda z, x: pyro.sample("x", dist.OneHotCategorical(torch.ones(*z.shape, 5)), obs=x))
    assert discrete_dimensions(program, (codes,), torch.arange(3)).tolist() == [1, 1, 1]


def test_columns_of_both_kinds_are_a_density() -> None:
    class Beside(dist.TorchDistribution):
        """Two counts and two real numbers; only its support matters here."""

        arg_constraints: ClassVar[dict[str, Any]] = {}
        support = constraints.cat([constraints.nonnegative_integer, constraints.real], -1, [2, 2])

        def log_prob(self, value: Tensor) -> Tensor:
            return value.new_zeros(value.shape[:-1])

        def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
            return Beside(torch.Size(batch_shape), self.event_shape)

    program = program_of(lambda z, x: pyro.sample("x", Beside(z.shape, torch.Size([4])), obs=x))
    assert Beside.support.is_discrete  # torch's word
    assert discrete_dimensions(program, (COUNTS,), torch.arange(4)).tolist() == [-1] * 4


def test_a_density_or_a_factor_beside_a_mass_is_a_density() -> None:
    x, y = binary_rows(), torch.randn(8, dtype=torch.float64)

    def both(z: Tensor, x: Tensor, y: Tensor) -> None:
        bernoulli(z, x)
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def weighed(z: Tensor, x: Tensor) -> None:
        bernoulli(z, x)
        pyro.factor("factor", 0.1 * z)

    assert [site.place for site in observed_sites(program_of(both), (x, y))] == [0, 1]
    assert discrete_dimensions(program_of(both), (x, y), torch.arange(8)).tolist() == [-1] * 8
    assert [(site.family, site.place) for site in observed_sites(program_of(weighed), (x,))][1] == ("Unit", None)
    assert discrete_dimensions(program_of(weighed), (x,), torch.arange(8)).tolist() == [-1] * 8


@pytest.mark.parametrize(
    ("observe", "place"),
    [
        (lambda z, x, y: pyro.sample("x", dist.Poisson(rates(z)).to_event(1), obs=x.long()), 0),
        (
            lambda z, x, y: pyro.sample("x", dist.Poisson(rates(z).reshape(-1, 2, 2)).to_event(2), obs=x.reshape(-1, 2, 2)),
            0,
        ),
        (lambda z, x, y: pyro.sample("x", dist.Poisson(rates(z)).to_event(1), obs=x + 1.0), None),
        (lambda z, x, y: pyro.sample("x", dist.Poisson(rates(z)[..., :2]).to_event(1), obs=x[..., :2]), None),
        (lambda z, x, y: pyro.sample("x", dist.Poisson(rates(z)[..., 0]), obs=y), 1),
    ],
)
def test_x_is_found_in_another_shape_or_dtype(observe: Callable[..., Any], place: int | None) -> None:
    (site,) = observed_sites(program_of(observe), (COUNTS, torch.tensor([3.0, 1.0, 0.0, 2.0])))
    assert site.place == place
