import pyro.distributions as dist
import pytest
import torch
from linear_gaussian import kl_normal
from torch.distributions import kl_divergence

import pyro_vae.model.kl


def test_full_covariance_kl_is_half_trace_plus_square_less_dim_less_log_det() -> None:
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(4, 3, 3, generator=generator, dtype=torch.float64).tril(-1) + torch.diag_embed(
        torch.rand(4, 3, generator=generator, dtype=torch.float64) + 0.2
    )
    mean = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    sigma = factor @ factor.mT
    trace = sigma.diagonal(dim1=-2, dim2=-1).sum(-1)
    textbook = 0.5 * (trace + mean.square().sum(-1) - 3 - torch.logdet(sigma))
    q = dist.MultivariateNormal(mean, scale_tril=factor)
    standard = dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1)
    torch.testing.assert_close(kl_divergence(q, standard), textbook)
    loc, scale = torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([0.5, 1.5, 2.0]).double()
    general = kl_divergence(q, dist.Normal(loc, scale).expand((4, 3)).to_event(1))
    torch.testing.assert_close(general, kl_normal(mean, factor, loc, torch.diag(scale)))


def test_other_pairs_are_left_to_sampling() -> None:
    q = dist.MultivariateNormal(torch.zeros(2), torch.eye(2))
    with pytest.raises(NotImplementedError):
        pyro_vae.model.kl.kl_multivariate_independent(q, dist.Laplace(torch.zeros(2), 1.0).to_event(1))
