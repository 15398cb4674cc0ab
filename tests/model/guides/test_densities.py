"""What a guide's density and draws must be, against quadrature, scipy and autograd."""

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from model.components import GUIDES, LATENT_DIMS
from model.quadratures import grid, integral
from torch import nn

import pyro_vae as pv
from pyro_vae.model.guides import Guide

FLOWS = ("InverseAutoregressive", "Spline")


def moved(name: str, dim: int) -> Guide:
    """A guide of the table in float64, away from where its parameters start."""
    guide = GUIDES[name](6, dim).double()
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return guide


def x_of(count: int) -> torch.Tensor:
    return torch.randn(count, 6, dtype=torch.float64)


@pytest.mark.parametrize("dim", LATENT_DIMS)
@pytest.mark.parametrize("name", GUIDES)
def test_a_density_integrates_to_one(name: str, dim: int) -> None:
    with torch.no_grad():
        q = moved(name, dim)(x_of(1))
        total, error = integral(lambda z: q.log_prob(z.unsqueeze(-2))[..., 0], q.sample((500,))[:, 0])
    assert error < 0.1
    assert abs(total - 1.0) < error


@pytest.mark.parametrize("dim", LATENT_DIMS)
@pytest.mark.parametrize("name", GUIDES)
def test_draws_come_from_the_density(name: str, dim: int) -> None:
    """E_q[g(z) / q(z)] = 1 for any density g: here a narrow one off the centre; and rows are independent."""
    torch.manual_seed(3)
    count = 20_000
    with torch.no_grad():
        q = moved(name, dim)(x_of(2))
        z, some = q.rsample((count,)), q.sample((64,))
        g = torch.distributions.Normal(some.mean(0) + 0.2 * some.std(0), 0.5 * some.std(0))
        ratio = (g.log_prob(z).sum(-1) - q.log_prob(z)).exp()
        away = ratio - ratio.mean(0)
    assert ((ratio.mean(0) - 1.0).abs() < 4.5 * ratio.std(0) / count**0.5).all()
    assert abs((away[:, 0] * away[:, 1]).mean() / ratio.std(0).prod()) < 5.0 / count**0.5


@pytest.mark.parametrize("name", GUIDES)
def test_draws_in_one_dimension_have_the_density_as_distribution(name: str) -> None:
    with torch.no_grad():
        q = moved(name, 1)(x_of(1))
        nodes, log_weight = grid(1, 8001)
        cdf = (q.log_prob(nodes.unsqueeze(-2))[:, 0] + log_weight).exp().cumsum(0)
        draws = q.rsample((4000,)).flatten().numpy()
    uniform = np.interp(draws, nodes.flatten().numpy(), cdf.numpy())
    assert scipy.stats.kstest(uniform, "uniform").pvalue > 1e-4


def test_low_rank_normal_is_scipys() -> None:
    guide, x = moved("LowRankNormal", 5), x_of(3)
    features = guide.encoder(x)
    w = guide.factor(features).reshape(3, 5, 2)
    d = nn.functional.softplus(guide.raw_scale(features)) + 1e-6
    covariance = (w @ w.mT + torch.diag_embed(d.square())).detach()
    z = torch.randn(3, 5, dtype=torch.float64)
    by_hand = [
        scipy.stats.multivariate_normal.logpdf(z[i], guide.loc(features)[i].detach(), covariance[i]) for i in range(3)
    ]
    torch.testing.assert_close(guide(x).log_prob(z).detach(), torch.tensor(np.array(by_hand)))


def test_mixture_is_a_sum_of_scipys_normals() -> None:
    guide, x = moved("Mixture", 3), x_of(4)
    q, z = guide(x), torch.randn(4, 3, dtype=torch.float64)
    features = guide.encoder(x)
    weight = guide.logits(features).softmax(-1).detach()
    loc = guide.loc(features).reshape(4, 3, 3).detach()
    scale = (nn.functional.softplus(guide.raw_scale(features)) + 1e-6).reshape(4, 3, 3).detach()
    each = np.stack([scipy.stats.norm.logpdf(z, loc[:, k], scale[:, k]).sum(-1) for k in range(3)], -1)
    by_hand = scipy.special.logsumexp(each, b=weight.numpy(), axis=-1)
    torch.testing.assert_close(q.log_prob(z).detach(), torch.tensor(by_hand))
    torch.testing.assert_close(guide.centre(q).detach(), (weight[..., None] * loc).sum(1))


@pytest.mark.parametrize("dim", LATENT_DIMS)
@pytest.mark.parametrize("name", FLOWS)
def test_the_density_of_a_flow_is_that_of_its_base_with_the_jacobian(name: str, dim: int) -> None:
    """The draw z = T(eps) by its own Jacobian, in the direction that `log_prob` does not take."""
    guide = moved(name, dim)
    x = x_of(1)
    q = guide(x)
    base, push = q.dist.base, q.dist.transform.inv
    for eps in base.sample((4,)):
        jacobian = torch.autograd.functional.jacobian(push, eps).reshape(dim, dim)
        z = push(eps)
        by_hand = base.log_prob(eps) - torch.linalg.slogdet(jacobian).logabsdet
        torch.testing.assert_close(q.log_prob(z), by_hand)
    torch.testing.assert_close(guide.centre(q), push(base.mean))


@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_starts_near_the_normal_of_its_heads(name: str) -> None:
    guide = {"InverseAutoregressive": pv.guides.InverseAutoregressive, "Spline": pv.guides.Spline}[name](
        pv.nets.MLP(6, hidden=(30,)), latent_dim=4
    )
    x = torch.randn(5, 6)
    with torch.no_grad():
        q, features = guide(x), guide.encoder(x)
        normal = torch.distributions.Normal(guide.loc(features), nn.functional.softplus(guide.raw_scale(features)))
        z = normal.sample((2000,))
        kl = (normal.log_prob(z).sum(-1) - q.log_prob(z)).mean(0)
        assert (kl < 0.3).all()
        assert ((guide.centre(q) - normal.mean).abs() < 0.5 * normal.stddev).all()
        assert not torch.allclose(q.log_prob(z), normal.log_prob(z).sum(-1))


@pytest.mark.parametrize("name", GUIDES)
def test_a_row_does_not_depend_on_the_others(name: str) -> None:
    guide, x, z = moved(name, 3), x_of(5), torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(guide(x).log_prob(z)[2], guide(x[2:3]).log_prob(z[2:3])[0])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda net: pv.guides.LowRankNormal(net, 2, rank=0), ValueError, "rank=0"),
        (lambda net: pv.guides.Mixture(net, 2, num_components=0), ValueError, "num_components=0"),
        (lambda net: pv.guides.InverseAutoregressive(net, 2, transforms=0), ValueError, "transforms=0"),
        (lambda net: pv.guides.Spline(net, 2, bins=-1), ValueError, "bins=-1"),
        (
            lambda net: pv.guides.SemiAmortised(pv.guides.FullNormal(net, 2)),
            TypeError,
            r"DiagonalNormal, .*given FullNormal\(",
        ),
        (lambda net: pv.guides.SemiAmortised(pv.guides.DiagonalNormal(net, 2), num_draws=3), ValueError, "num_draws=3"),
        (lambda net: pv.guides.SemiAmortised(pv.guides.DiagonalNormal(net, 2), rate=0.0), ValueError, "rate=0.0"),
        (lambda net: pv.guides.SemiAmortised(pv.guides.DiagonalNormal(net, 2), steps=0), ValueError, "steps=0"),
    ],
)
def test_bad_settings_are_named(make: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(pv.nets.MLP(6, hidden=(7,)))  # type: ignore[operator]


def test_a_repr_is_the_call_that_makes_it() -> None:
    net = pv.nets.MLP(6, hidden=(7,))
    assert repr(pv.guides.LowRankNormal(net, 3)).endswith("latent_dim=3, rank=2, features=None)")
    assert repr(pv.guides.Mixture(net, 3)).endswith("latent_dim=3, num_components=3, features=None)")
    assert repr(pv.guides.Spline(net, 3)).endswith("latent_dim=3, transforms=2, bins=8, hidden=(64, 64), features=None)")
    told = "latent_dim=3, transforms=2, hidden=(64, 64), features=None)"
    assert repr(pv.guides.InverseAutoregressive(net, 3)).endswith(told)
    plain = pv.guides.DiagonalNormal(net, 3)
    assert repr(pv.guides.SemiAmortised(plain)) == f"SemiAmortised(guide={plain!r}, steps=3, rate=0.5, num_draws=4)"
