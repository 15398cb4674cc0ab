"""Exact KL(q || p) of pairs that torch does not know, registered with torch.

Pyro's `TraceMeanField_ELBO` samples a KL that has no formula without a word, so the formulas are added here. With q and p
Normal, q = N(mu, Sigma), p = N(m, P):

    KL = ( tr(P^-1 Sigma) + (mu - m)' P^-1 (mu - m) - D + log |P| - log |Sigma| ) / 2,

for p = N(0, I) the (tr Sigma + mu'mu - D - log |Sigma|) / 2 of the textbook. torch has it for two multivariate Normals
(`LowRankMultivariateNormal` among them) and for two of independent dimensions, but not for one against the other. Against
a `Product` of independent blocks the KL of a q with independent dimensions is the sum over the blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import (
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    kl_divergence,
    register_kl,
)

from pyro_vae.model.families.product import Product


@register_kl(MultivariateNormal, Independent)
def kl_multivariate_independent(q: MultivariateNormal, p: Independent[Normal]) -> Tensor:
    """KL(q || p) in nats, of q's batch shape.

    Raises:
        NotImplementedError: p is no Normal of independent dimensions; callers then sample the KL.
    """
    factor = q._unbroadcasted_scale_tril
    log_det = 2.0 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return _against_independent(q.loc, factor.square().sum(-1), log_det, _factors(p))


@register_kl(LowRankMultivariateNormal, Independent)
def kl_low_rank_independent(q: LowRankMultivariateNormal, p: Independent[Normal]) -> Tensor:
    """KL(q || p) in nats, of q's batch shape.

    Raises:
        NotImplementedError: p is no Normal of independent dimensions; callers then sample the KL.
    """
    # |W W' + diag d| = |I + W' diag(1/d) W| prod d, and torch keeps a factor of the first matrix.
    capacitance = 2.0 * q._capacitance_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    log_det = capacitance + q._unbroadcasted_cov_diag.log().sum(-1)
    return _against_independent(q.loc, q.variance, log_det, _factors(p))


@register_kl(Independent, MultivariateNormal)
def kl_independent_multivariate(q: Independent[Normal], p: MultivariateNormal) -> Tensor:
    """KL(q || p) in nats, of the broadcast batch shape.

    Raises:
        NotImplementedError: q is no Normal of independent dimensions; callers then sample the KL.
    """
    base, factor = _factors(q), p._unbroadcasted_scale_tril
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
    # tr(P^-1 diag s^2) = sum_j s_j^2 |column j of L^-1|^2, with P = L L'.
    trace = (inverse.square().sum(-2) * base.variance).sum(-1)
    square = (inverse @ (base.loc - p.loc).unsqueeze(-1)).squeeze(-1).square().sum(-1)
    log_det = 2.0 * (factor.diagonal(dim1=-2, dim2=-1).log().sum(-1) - base.scale.log().sum(-1))
    return 0.5 * (trace + square - factor.shape[-1] + log_det)


@register_kl(Independent, Product)
def kl_independent_product(q: Independent[Normal], p: Product) -> Tensor:
    """KL(q || p) in nats, the sum over the blocks of p.

    Raises:
        NotImplementedError: q is no Normal of independent dimensions, or a block has no formula.
    """
    base = _factors(q)
    blocks = zip(base.loc.split(p.sizes, -1), base.scale.split(p.sizes, -1), p.parts, strict=True)
    parts = [kl_divergence(Independent(Normal(loc, scale), 1), part) for loc, scale, part in blocks]
    return torch.stack(parts).sum(0)


def _factors(distribution: Independent[Any]) -> Normal:
    """The Normal of batch shape (..., D) that a vector of independent Normals is made of."""
    base = distribution.base_dist
    if not isinstance(base, Normal) or distribution.reinterpreted_batch_ndims != 1:
        raise NotImplementedError
    return base


def _against_independent(loc: Tensor, variance: Tensor, log_det: Tensor, p: Normal) -> Tensor:
    """KL of a Normal with this mean, these marginal variances and log |Sigma| against independent ones."""
    squares = (variance + (loc - p.loc).square()) / p.variance
    return 0.5 * ((squares - 1.0 + p.variance.log()).sum(-1) - log_det)
