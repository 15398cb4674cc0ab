"""What holds of every likelihood of the table."""

import math

import pyro
import pytest
import torch
from model.components import LIKELIHOOD_SHAPES, LIKELIHOODS, VECTORS_ONLY
from model.suited import data_for
from torch import Tensor
from torch.distributions import constraints

from pyro_vae.model.likelihoods import Likelihood

ELEMENTWISE = [name for name in LIKELIHOODS if name not in VECTORS_ONLY]
NUMBERS = [name for name in ELEMENTWISE if name != "Categorical"]  # classes have no moments
HEAVY = {"StudentT", "StudentT, learned df"}  # no fourth moment: no error of a variance


def support_of(likelihood: Likelihood) -> tuple[Tensor, Tensor]:
    """Points (M, 1) over the whole support, and weights (M,) with which a sum over them is an integral or a sum."""
    like = likelihood(torch.zeros(1, 2, dtype=torch.float64)).support
    while isinstance(like, constraints.independent):
        like = like.base_constraint
    if likelihood.discrete:
        counts = torch.arange(3000, dtype=torch.float64)
        if hasattr(likelihood, "grid"):
            x = torch.arange(likelihood.grid.levels).double() / (likelihood.grid.levels - 1) * likelihood.grid.top
        else:
            x = counts[like.check(counts)]
        return x[:, None], torch.ones_like(x)
    # The trapezoidal rule after a change of variable that reaches the whole support, double-exponentially at its ends.
    t = torch.linspace(-1.0, 1.0, 40_001, dtype=torch.float64)
    width = t[1] - t[0]
    if like is constraints.real:
        t = 12.0 * t
        return t.sinh()[:, None], 12.0 * width * t.cosh()
    if like is constraints.positive:
        t = 30.0 * t
        return t.exp()[:, None], 30.0 * width * t.exp()
    assert like is constraints.unit_interval
    t = 35.0 * t
    return torch.sigmoid(t)[:, None], 35.0 * width * torch.sigmoid(t) * torch.sigmoid(-t)


def one_number(name: str) -> tuple[Likelihood, Tensor, Tensor, Tensor]:
    """The likelihood of rows of one number, at three z: points, weights and log-densities (M, 3) on them."""
    torch.manual_seed(11)
    likelihood = LIKELIHOODS[name](2, (1,)).double()
    for parameter in likelihood.parameters():
        parameter.requires_grad_(requires_grad=False)
    z = torch.tensor([[0.0, 0.0], [1.5, -0.7], [-2.0, 2.5]], dtype=torch.float64)
    x, weights = support_of(likelihood)
    return likelihood, z, x, weights[:, None] * likelihood(z).log_prob(x[:, None]).exp()


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_probabilities_sum_to_one_and_densities_integrate_to_one(name: str) -> None:
    _, _, _, mass = one_number(name)
    # A Laplace has a kink, where the trapezoidal rule is of second order.
    torch.testing.assert_close(mass.sum(0), torch.ones(3, dtype=torch.float64), atol=1e-6, rtol=0.0)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_draws_are_those_of_the_density(name: str) -> None:
    """20,000 draws: mean of log p, mean and variance within 5 standard errors of sums over the support."""
    likelihood, z, points, mass = one_number(name)
    p = likelihood(z)
    draws = p.sample((20_000,))
    assert p.support.check(draws).all()
    likelihood.check(draws.reshape(-1, 1))
    log_mass = likelihood(z).log_prob(points[:, None])
    expected = torch.where(mass > 0.0, mass * log_mass, 0.0).sum(0)
    found = p.log_prob(draws)
    assert ((found.mean(0) - expected).abs() < 5.0 * found.std(0) / 20_000**0.5 + 1e-6).all()
    if name in HEAVY or name not in NUMBERS:
        return
    mean = (mass * points).sum(0)
    variance = (mass * (points - mean) ** 2).sum(0)
    draws = draws[..., 0]
    assert ((draws.mean(0) - mean).abs() < 5.0 * draws.std(0) / 20_000**0.5).all()
    squares = (draws - mean).square()
    assert ((squares.mean(0) - variance).abs() < 5.0 * squares.std(0) / 20_000**0.5).all()


@pytest.mark.parametrize("name", NUMBERS)
def test_mean_and_variance_are_those_of_the_density(name: str) -> None:
    likelihood, z, points, mass = one_number(name)
    p = likelihood(z)
    mean = (mass * points).sum(0)
    torch.testing.assert_close(p.mean[:, 0], mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(p.variance[:, 0], (mass * (points - mean) ** 2).sum(0), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(likelihood.centre(p), p.mean, equal_nan=True)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_density_has_two_derivatives_in_z_and_one_row_does_not_depend_on_others(name: str) -> None:
    """Against finite differences: the engines go uphill and take Hessians."""
    likelihood = LIKELIHOODS[name](2, (3,)).double()
    x = data_for(likelihood, 4, (3,)).double()
    z = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda z: likelihood(z).log_prob(x), z)
    torch.autograd.gradgradcheck(lambda z: likelihood(z).log_prob(x), z)
    whole = likelihood(z).log_prob(x)
    for i in range(4):
        torch.testing.assert_close(likelihood(z[i : i + 1]).log_prob(x[i : i + 1]), whole[i : i + 1])


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_single_precision_is_near_double_and_finite_for_wild_latents(name: str) -> None:
    likelihood = LIKELIHOODS[name](2, (3,))
    x = data_for(likelihood, 16, (3,))
    for width in (1.0, 30.0, 1000.0):
        z = width * torch.randn(16, 2)
        single = likelihood(z.requires_grad_()).log_prob(x)
        likelihood.zero_grad()
        single.sum().backward()
        assert torch.isfinite(single).all()
        assert all(torch.isfinite(p.grad).all() for p in (z, *likelihood.parameters()) if p.grad is not None)
        double = likelihood.double()(z.detach().double()).log_prob(x.double())
        # The decoder's own output is rounded; far out, that is all of the difference.
        torch.testing.assert_close(single.double(), double, rtol=3e-5 * max(1.0, width), atol=1e-5)
        likelihood.float()


@pytest.mark.parametrize(("name", "shape"), LIKELIHOOD_SHAPES)
def test_expanded_distributions_and_many_draws_have_their_shapes(name: str, shape: tuple[int, ...]) -> None:
    likelihood = LIKELIHOODS[name](2, shape)
    p = likelihood(torch.randn(1, 2))
    wide = p.expand((5, 4))
    x = wide.sample()
    assert x.shape == (5, 4, *shape)
    assert wide.sample((2,)).shape == (2, 5, 4, *shape)
    assert wide.mean.shape == (5, 4, *shape)
    assert wide.variance.shape == (5, 4, *shape)
    torch.testing.assert_close(wide.log_prob(x), p.log_prob(x))
    assert x.dtype == torch.float32
    assert likelihood.centre(wide).shape == x.shape


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_repr_names_every_setting(name: str) -> None:
    likelihood = LIKELIHOODS[name](2, (3,))
    assert all(f"{setting}=" in repr(likelihood) for setting in likelihood.settings())
    assert repr(likelihood).startswith(f"{type(likelihood).__name__}(decoder=MLP(")


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_discreteness_is_what_the_support_says(name: str) -> None:
    likelihood = LIKELIHOODS[name](2, (3,))
    assert likelihood.discrete == bool(likelihood(torch.zeros(1, 2)).support.is_discrete)
    log_prob = likelihood(torch.randn(50, 2)).log_prob(data_for(likelihood, 50, (3,)))
    assert not likelihood.discrete or (log_prob <= 0.0).all()


OUTSIDE = {
    "Normal, fixed": (math.inf, "takes any finite number"),
    "FullNormal": (math.inf, "takes any finite number"),
    "Bernoulli": (0.43, r"takes 0 and 1 alone: binarise it.*ContinuousBernoulli"),
    "ContinuousBernoulli": (17.0, r"numbers in \[0, 1\] alone: rescale it \(grey levels: divide by 255\)"),
    "Categorical": (4.0, r"the classes 0, 1, \.\.\., 3 alone: number the classes from 0"),
    "Binomial": (6.0, r"the counts 0, 1, \.\.\., 5 alone: give the number of successes, or a larger total_count"),
    "DiscretisedLogistic": (
        0.2,
        r"the 9 levels 0, 1 / 8, \.\.\., 1 alone: rescale it to \[0, 1\] and round it, \(x \* 8\)\.round",
    ),
    "DiscretisedLogisticMixture": (
        0.2,
        r"the 12 levels 0, 3 / 11, \.\.\., 3 alone: .*\(x \* 3\.66667\)\.round\(\) \* 3 / 11",
    ),
    "Poisson": (1.5, r"counts 0, 1, 2, \.\.\. alone: give the raw counts"),
    "NegativeBinomial": (-1.0, "give the raw counts"),
    "ZeroInflatedNegativeBinomial": (math.inf, "give the raw counts"),
    "LogNormal": (0.0, "positive numbers alone: add a positive offset"),
    "Beta": (1.0, r"strictly between 0 and 1 alone: squeeze it, \(x \* \(n - 1\) \+ 0\.5\) / n"),
    "Laplace": (-math.inf, "takes any finite number"),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_data_outside_the_support_is_refused_with_the_mend(name: str) -> None:
    value, message = OUTSIDE[name]
    likelihood = LIKELIHOODS[name](2, (3,))
    x = data_for(likelihood, 5, (3,))
    likelihood.check(x)
    x[3, 1] = value
    with pytest.raises(ValueError, match=rf"in row 3, column 1, and {type(likelihood).__name__} takes .*"):
        likelihood.check(x)
    with pytest.raises(ValueError, match=message):
        likelihood.check(x)
    if math.isfinite(value) and name != "Beta":  # torch counts the ends of the unit interval to its support
        with pytest.raises(ValueError, match="within the support"):
            likelihood(torch.zeros(5, 2)).log_prob(x)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_missing_values_cost_nothing_but_themselves(name: str) -> None:
    """log p of the numbers seen, each by itself where they are independent, by the marginal Normal where they are not."""
    likelihood = LIKELIHOODS[name](2, (4,)).double()
    x = data_for(likelihood, 6, (4,)).double()
    gone = torch.rand(6, 4) < 0.4
    gone[0], gone[1] = False, True
    holes = torch.where(gone, torch.nan, x)
    z = torch.randn(3, 6, 2, dtype=torch.float64, requires_grad=True)
    complete = likelihood(z)
    likelihood.check(holes)
    with pytest.raises(ValueError, match="within the support"):
        complete.log_prob(holes)
    likelihood.missing = True
    partial = likelihood(z)
    assert partial.support.check(holes).all()
    assert partial.support.is_discrete == complete.support.is_discrete
    found = partial.log_prob(holes)
    if name in VECTORS_ONLY:
        rows = []
        for i, row in enumerate(~gone):
            inside = complete.covariance_matrix[row][:, row].expand(3, -1, -1)
            normal = torch.distributions.MultivariateNormal(complete.mean[:, i, row], inside) if row.any() else None
            rows.append(normal.log_prob(x[i, row]) if normal else torch.zeros(3, dtype=torch.float64))
        expected = torch.stack(rows, 1)
    else:
        expected = torch.where(gone, 0.0, complete.base_dist.log_prob(x)).sum(-1)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(partial.log_prob(x), complete.log_prob(x))
    found.sum().backward()
    assert torch.isfinite(z.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in likelihood.parameters())
    spoilt = torch.where(gone, torch.nan, torch.full_like(x, OUTSIDE[name][0] if name in OUTSIDE else math.inf))
    assert not likelihood.inside(spoilt)[~gone].any()


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_completed_rows_keep_what_was_seen(name: str) -> None:
    from pyro_vae.model.families.partial import complete

    likelihood = LIKELIHOODS[name](2, (4,))
    likelihood.missing = True
    x = data_for(likelihood, 50, (4,))
    holes = torch.where(torch.rand(50, 4) < 0.5, torch.nan, x)
    p = likelihood(torch.randn(50, 2))
    full = complete(p, holes)
    assert torch.equal(full[~holes.isnan()], x[~holes.isnan()])
    assert not full.isnan().any()
    likelihood.check(full)
    with pyro.validation_enabled():
        assert torch.isfinite(p.log_prob(full)).all()
