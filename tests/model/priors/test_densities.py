"""What a prior's density and draws must be, against quadrature, scipy and autograd; in float64."""

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from model.components import COLUMNS, GUIDES, LATENT_DIMS, PRIORS, every_parameter_has_a_gradient, p_z
from model.quadratures import grid, integral
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.model.families.mixture import Mixture
from pyro_vae.model.families.normal_mixture import NormalMixture
from pyro_vae.model.priors import Prior


def moved(name: str, dim: int) -> Prior:
    """A prior of the table in float64, away from where its parameters start."""
    prior = PRIORS[name](dim).double()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return prior


@pytest.mark.parametrize("dim", LATENT_DIMS)
@pytest.mark.parametrize("name", PRIORS)
def test_a_density_integrates_to_one(name: str, dim: int) -> None:
    prior = moved(name, dim)
    guide = GUIDES["DiagonalNormal"](COLUMNS, dim).double()
    with torch.no_grad():
        p = prior(guide) if prior.reads_guide else prior()
        total, error = integral(p.log_prob, p.sample((500,)))
    assert error < 0.05
    assert abs(total - 1.0) < error


@pytest.mark.parametrize("dim", LATENT_DIMS)
@pytest.mark.parametrize("name", PRIORS)
def test_draws_come_from_the_density(name: str, dim: int) -> None:
    """E_p[g(z) / p(z)] = 1 for any density g: here one in the midst of the prior, but not at its centre."""
    torch.manual_seed(2)
    count = 40_000
    p = p_z(moved(name, dim).float())
    with torch.no_grad():
        z = p.expand((2,)).sample((count // 2,))
        assert z.shape == (count // 2, 2, dim)
        some = p.sample((64,))
        g = torch.distributions.Normal(some.mean(0) + 0.3, 0.5 * some.std(0))
        ratio = (g.log_prob(z).sum(-1) - p.log_prob(z)).exp()
        both = ratio - ratio.mean()
    assert abs(ratio.mean() - 1.0) < 4.5 * ratio.std() / count**0.5
    # Rows of a plate are independent.
    assert abs((both[:, 0] * both[:, 1]).mean() / both.var()) < 5.0 / (count / 2) ** 0.5


@pytest.mark.parametrize("name", PRIORS)
def test_draws_in_one_dimension_have_the_density_as_distribution(name: str) -> None:
    p = p_z(moved(name, 1).float())
    nodes, log_weight = grid(1, 8001)
    with torch.no_grad():
        cdf = (p.log_prob(nodes.float()).double() + log_weight).exp().cumsum(0)
        draws = p.sample((4000,)).flatten().double().numpy()
    uniform = np.interp(draws, nodes.flatten().numpy(), cdf.numpy())
    assert scipy.stats.kstest(uniform, "uniform").pvalue > 1e-4


@pytest.mark.parametrize("dim", LATENT_DIMS)
@pytest.mark.parametrize("name", PRIORS)
def test_every_parameter_has_a_gradient(name: str, dim: int) -> None:
    prior = moved(name, dim)
    if list(prior.parameters()):
        guide = GUIDES["DiagonalNormal"](COLUMNS, dim).double()
        p = prior(guide) if prior.reads_guide else prior()
        weight = torch.linspace(1.0, 2.0, 400, dtype=torch.float64)
        every_parameter_has_a_gradient(prior, weight * p.log_prob(1.5 * torch.randn(400, dim).double()))


@pytest.mark.parametrize("name", PRIORS)
def test_log_p_has_two_derivatives_in_z(name: str) -> None:
    prior = moved(name, 3)
    p = prior(GUIDES["DiagonalNormal"](COLUMNS, 3).double()) if prior.reads_guide else prior()
    z = torch.tensor([[0.3, -0.7, 1.1], [-1.2, 0.4, 0.9]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(p.log_prob, z)
    assert torch.autograd.gradgradcheck(p.log_prob, z)


def z_of(dim: int) -> Tensor:
    return 2.0 * torch.randn(20, dim, dtype=torch.float64)


def close(found: Tensor, expected: object) -> None:
    torch.testing.assert_close(found.detach().double(), torch.as_tensor(expected).double(), rtol=1e-6, atol=1e-6)


def test_laplace_and_student_are_scipys() -> None:
    z = z_of(3)
    close(pv.priors.Laplace(3, scale=0.7).double()().log_prob(z), scipy.stats.laplace.logpdf(z, scale=0.7).sum(-1))
    t = pv.priors.StudentT(3, df=2.5, scale=1.7).double()
    close(t().log_prob(z), scipy.stats.t.logpdf(z, 2.5, scale=1.7).sum(-1))


def test_normal_is_scipys_and_starts_at_the_standard_normal() -> None:
    start = pv.priors.Normal(4).double()()
    torch.testing.assert_close(start.loc, torch.zeros(4).double())
    torch.testing.assert_close(start.covariance_matrix, torch.eye(4).double(), rtol=0, atol=1e-6)
    z, p = z_of(4), moved("Normal", 4)()
    assert (p.covariance_matrix - p.covariance_matrix.diagonal().diag()).abs().max() > 0.05
    mean, covariance = p.loc.detach().numpy(), p.covariance_matrix.detach().numpy()
    close(p.log_prob(z), scipy.stats.multivariate_normal.logpdf(z, mean, covariance))


def by_components(z: Tensor, weight: Tensor, loc: Tensor, scale: Tensor) -> object:
    each = [scipy.stats.norm.logpdf(z, m, s).sum(-1) for m, s in zip(loc.detach(), scale.detach(), strict=True)]
    return scipy.special.logsumexp(np.stack(each, -1), b=weight.detach().numpy(), axis=-1)


def test_mixture_is_a_sum_of_scipys_normals_with_its_moments() -> None:
    z, prior = z_of(3), moved("Mixture", 3)
    p, normal = prior(), torch.nn.functional.softplus
    weight, scale = prior.logits.softmax(-1), normal(prior.raw_scale) + 1e-3
    close(p.log_prob(z), by_components(z, weight, prior.loc, scale))
    mean = (weight[:, None] * prior.loc).sum(0)
    close(p.mean, mean.detach())
    close(p.variance, ((weight[:, None] * (scale.square() + prior.loc.square())).sum(0) - mean.square()).detach())
    assert p.expand((5,)).mean.shape == (5, 3)


def test_the_components_of_a_mixture_start_apart_and_by_the_ambient_generator() -> None:
    torch.manual_seed(4)
    first = pv.priors.Mixture(2)
    torch.manual_seed(4)
    again = pv.priors.Mixture(2)
    assert torch.equal(first.loc, again.loc)
    assert torch.pdist(first.loc).min() > 1e-3
    assert not torch.equal(pv.priors.Mixture(2).loc, first.loc)


def test_a_mixture_does_not_underflow() -> None:
    """In float32 every density at a distance of 60 is exp(-1800): the logarithm is still that of the nearest component."""
    p = pv.priors.Mixture(1, 3)()
    z = torch.tensor([[60.0], [-60.0]])
    each = p.components.log_prob(z.unsqueeze(-2))
    assert torch.isfinite(p.log_prob(z)).all()
    assert (each.exp() == 0).all()
    close(p.log_prob(z), torch.logsumexp(each.detach() - torch.log(torch.tensor(3.0)), -1))


def test_a_mixture_of_one_row_is_expanded_to_independent_rows() -> None:
    torch.manual_seed(5)
    logits, loc = torch.tensor([[0.4, -0.3]]), torch.tensor([[[-2.0], [3.0]]])
    q = NormalMixture(logits, loc, torch.full((1, 2, 1), 0.5)).expand((2,))
    z = q.rsample((20_000,))
    assert z.shape == (20_000, 2, 1)
    assert abs(torch.corrcoef(z[..., 0].T)[0, 1]) < 5.0 / 20_000**0.5
    assert ((z.mean(0) - q.mean).abs() < 4.5 * q.stddev / 20_000**0.5).all()
    torch.testing.assert_close(
        q.log_prob(z)[:, 1], NormalMixture(logits, loc, torch.full((1, 2, 1), 0.5)).log_prob(z[:, 1:])[:, 0]
    )
    with pytest.raises(ValueError, match=r"logits of shape \(3,\) do not go with"):
        Mixture(torch.zeros(3), q.components)


def test_product_is_a_sum_over_blocks_of_different_families() -> None:
    prior = pv.priors.Product(pv.priors.Laplace(1, 0.5), pv.priors.StudentT(2, 3.0), pv.priors.StandardNormal(2)).double()
    z, p = z_of(5), prior()
    expected = scipy.stats.laplace.logpdf(z[:, :1], scale=0.5).sum(-1)
    expected = expected + scipy.stats.t.logpdf(z[:, 1:3], 3.0).sum(-1) + scipy.stats.norm.logpdf(z[:, 3:]).sum(-1)
    close(p.log_prob(z), expected)
    assert p.has_rsample
    assert p.rsample((3,)).shape == (3, 5)
    close(p.variance, [0.5, 3.0, 3.0, 1.0, 1.0])
    close(p.mean, torch.zeros(5))
    with pytest.raises(ValueError, match="support"):
        p.log_prob(z * torch.nan)


def test_a_users_prior_may_be_a_part_of_a_product_with_a_support_of_its_own() -> None:
    class Positive(Prior):
        def __init__(self) -> None:
            super().__init__()
            self.latent_dim, self.log_rate = 2, nn.Parameter(torch.tensor([0.1, 0.5]))

        def settings(self) -> dict[str, object]:
            return {}

        def forward(self) -> object:
            return dist.Exponential(self.log_rate.exp()).to_event(1)

    prior = pv.priors.Product(pv.priors.StandardNormal(1), Positive())
    p = prior()
    z = p.sample((50,))
    assert (z[:, 1:] > 0).all()
    assert p.support.check(z).all()
    assert not p.support.check(-z).any()
    expected = scipy.stats.norm.logpdf(z[:, 0]) + scipy.stats.expon.logpdf(
        z[:, 1:], scale=1.0 / prior.parts[1].log_rate.exp().detach()
    ).sum(-1)
    torch.testing.assert_close(p.log_prob(z).detach().double(), torch.as_tensor(expected), rtol=1e-5, atol=1e-5)
    bijection = torch.distributions.biject_to(p.support)
    torch.testing.assert_close(bijection(bijection.inv(z)), z)


@pytest.mark.parametrize("dim", LATENT_DIMS)
def test_the_density_of_a_flow_is_that_of_its_base_with_the_jacobian(dim: int) -> None:
    p = moved("Flow", dim)()
    z = p.sample((5,))
    for row in z:
        jacobian = torch.autograd.functional.jacobian(p.dist.transform, row).reshape(dim, dim)
        base = scipy.stats.norm.logpdf(p.dist.transform(row).detach()).sum()
        close(p.log_prob(row), base + torch.linalg.slogdet(jacobian).logabsdet.detach())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: pv.priors.Laplace(2, scale=0.0), ValueError, "scale=0.0 must be a positive number"),
        (lambda: pv.priors.StudentT(2, df=-1.0), ValueError, "df=-1.0 must be a positive number"),
        (lambda: pv.priors.StudentT(2, scale=float("nan")), ValueError, "scale=nan must be a positive number"),
        (lambda: pv.priors.Mixture(2, 0), ValueError, "num_components=0"),
        (lambda: pv.priors.Flow(2, bins=0), ValueError, "bins=0"),
        (lambda: pv.priors.VampPrior(2, (3, 0)), ValueError, "shape=0"),
        (lambda: pv.priors.Product(), ValueError, "needs at least one prior"),
        (lambda: pv.priors.Product(nn.Linear(1, 1)), TypeError, "a Linear: give a subclass of pv.priors.Prior"),
        (lambda: pv.priors.Product(pv.priors.VampPrior(2, 3)), ValueError, r"VampPrior\(.*it is no part of a Product"),
    ],
)
def test_bad_settings_are_named(make: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()  # type: ignore[operator]


def test_a_repr_is_the_call_that_makes_it() -> None:
    assert repr(pv.priors.Normal(3)) == "Normal(latent_dim=3)"
    assert repr(pv.priors.Mixture(3)) == "Mixture(latent_dim=3, num_components=10)"
    assert repr(pv.priors.VampPrior(3, (2, 4))) == "VampPrior(latent_dim=3, shape=(2, 4), num_inputs=50)"
    assert repr(pv.priors.Flow(3)) == "Flow(latent_dim=3, transforms=3, bins=8, hidden=(64, 64))"
    assert repr(pv.priors.Laplace(3)) == "Laplace(latent_dim=3, scale=1.0)"
    assert repr(pv.priors.StudentT(3)) == "StudentT(latent_dim=3, df=5.0, scale=1.0)"
    assert repr(pv.priors.Product(pv.priors.Laplace(3), pv.priors.Normal(1))) == (
        "Product(Laplace(latent_dim=3, scale=1.0), Normal(latent_dim=1))"
    )
