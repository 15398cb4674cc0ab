"""Exact KL against independent formulas and against each other's special cases; all of it asymmetric, float64."""

import pyro.distributions as dist
import pytest
import torch
from linear_gaussian import kl_normal
from torch import Tensor
from torch.distributions import kl_divergence

import pyro_vae.model.kl
from pyro_vae.model.families.product import Product


def factor_of(*shape: int, dim: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    full = torch.randn(*shape, dim, dim, generator=generator, dtype=torch.float64)
    diagonal = torch.rand(*shape, dim, generator=generator, dtype=torch.float64) + 0.2
    return full.tril(-1) + torch.diag_embed(diagonal)


def numbers(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LOC, SCALE = torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([0.5, 1.5, 2.0]).double()


def test_full_covariance_kl_is_half_trace_plus_square_less_dim_less_log_det() -> None:
    factor, mean = factor_of(4), numbers(4, 3)
    sigma = factor @ factor.mT
    trace = sigma.diagonal(dim1=-2, dim2=-1).sum(-1)
    textbook = 0.5 * (trace + mean.square().sum(-1) - 3 - torch.logdet(sigma))
    q = dist.MultivariateNormal(mean, scale_tril=factor)
    standard = dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1)
    torch.testing.assert_close(kl_divergence(q, standard), textbook)
    general = kl_divergence(q, dist.Normal(LOC, SCALE).expand((4, 3)).to_event(1))
    torch.testing.assert_close(general, kl_normal(mean, factor, LOC, torch.diag(SCALE)))


def test_independent_against_full_covariance() -> None:
    mean, scale, factor = numbers(4, 3), numbers(4, 3, seed=2).exp(), factor_of(seed=3)
    q = dist.Normal(mean, scale).to_event(1)
    expected = kl_normal(mean, torch.diag_embed(scale), LOC, factor)
    p = dist.MultivariateNormal(LOC, scale_tril=factor)
    torch.testing.assert_close(kl_divergence(q, p), expected)
    torch.testing.assert_close(kl_divergence(q, p.expand((4,))), expected)
    rows = dist.MultivariateNormal(LOC, scale_tril=factor_of(4, seed=5))
    one_by_one = [kl_normal(mean[i : i + 1], scale[i].diag()[None], LOC, factor_of(4, seed=5)[i]) for i in range(4)]
    torch.testing.assert_close(kl_divergence(q, rows), torch.cat(one_by_one))


def test_low_rank_against_independent() -> None:
    mean, wide, diagonal = numbers(4, 3), numbers(4, 3, 2, seed=2), numbers(4, 3, seed=4).exp()
    factor = torch.linalg.cholesky(wide @ wide.mT + torch.diag_embed(diagonal))
    q = dist.LowRankMultivariateNormal(mean, wide, diagonal)
    p = dist.Normal(LOC, SCALE).to_event(1)
    expected = kl_normal(mean, factor, LOC, torch.diag(SCALE))
    torch.testing.assert_close(kl_divergence(q, p), expected)
    torch.testing.assert_close(kl_divergence(q, p.expand((4,))), expected)


@pytest.mark.parametrize("low_rank", [True, False])
def test_torch_knows_the_pairs_of_multivariate_normals(low_rank: bool) -> None:
    mean, wide, diagonal = numbers(4, 3), numbers(4, 3, 2, seed=2), numbers(4, 3, seed=4).exp()
    factor = torch.linalg.cholesky(wide @ wide.mT + torch.diag_embed(diagonal))
    full = dist.MultivariateNormal(mean, scale_tril=factor)
    q = dist.LowRankMultivariateNormal(mean, wide, diagonal) if low_rank else full
    p = dist.MultivariateNormal(LOC, scale_tril=factor_of(seed=3))
    torch.testing.assert_close(kl_divergence(q, p), kl_normal(mean, factor, LOC, factor_of(seed=3)))
    torch.testing.assert_close(kl_divergence(q, p.expand((4,))), kl_normal(mean, factor, LOC, factor_of(seed=3)))


def test_independent_against_a_product_is_the_sum_over_its_blocks() -> None:
    """Against Normals by the textbook, against a Laplace by quadrature."""
    mean, scale = numbers(4, 3), numbers(4, 3, seed=2).exp()
    q = dist.Normal(mean, scale).to_event(1)
    p = Product(
        dist.Laplace(torch.tensor([0.3]).double(), torch.tensor([0.7]).double()).to_event(1),
        dist.MultivariateNormal(LOC[1:], scale_tril=factor_of(dim=2)),
    )
    nodes = torch.linspace(-40.0, 40.0, 400_001, dtype=torch.float64)
    log_q = torch.distributions.Normal(mean[:, :1], scale[:, :1]).log_prob(nodes)
    first = (log_q.exp() * (log_q - torch.distributions.Laplace(0.3, 0.7).log_prob(nodes))).sum(-1) * 2e-4
    second = kl_normal(mean[:, 1:], torch.diag_embed(scale[:, 1:]), LOC[1:], factor_of(dim=2))
    torch.testing.assert_close(kl_divergence(q, p), first + second, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(kl_divergence(q, p.expand((4,))), first + second, rtol=1e-5, atol=1e-6)


def test_other_pairs_are_left_to_sampling() -> None:
    q = dist.MultivariateNormal(torch.zeros(2), torch.eye(2))
    laplace, student = dist.Laplace(torch.zeros(2), 1.0).to_event(1), dist.StudentT(3.0, torch.zeros(2), 1.0).to_event(1)
    with pytest.raises(NotImplementedError):
        pyro_vae.model.kl.kl_multivariate_independent(q, laplace)
    low = dist.LowRankMultivariateNormal(torch.zeros(2), torch.ones(2, 1), torch.ones(2))
    plain = dist.Normal(torch.zeros(4), 1.0).to_event(1)
    for one, other in (
        (low, laplace),
        (laplace, q),
        (plain, Product(laplace, student)),
        (dist.Laplace(torch.zeros(4), 1.0).to_event(1), Product(laplace, laplace)),
    ):
        with pytest.raises(NotImplementedError):
            kl_divergence(one, other)
