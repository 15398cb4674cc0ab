"""Mixtures of Normals with independent dimensions, whose draws carry a gradient.

A draw chooses a component, which has no derivative. Implicit reparametrisation (Graves 2016, arXiv:1607.05690; Figurnov,
Mohamed & Mnih 2018, arXiv:1805.08498, sec. 4 and eq. 8) differentiates the distributional transform instead: with

    S_d(z; phi) = sum_k w_kd Phi(x_kd),   x_kd = (z_d - mu_kd) / s_kd,
    w_kd = P(k | z_1 .. z_d-1)  proportional to  pi_k prod_{j<d} N(z_j; mu_kj, s_kj^2),

S(z; phi) is uniform whatever phi is, so that dz = -(dS/dz)^-1 (dS/dphi) dphi. Row d divided by the density
f_d = sum_k w_kd N(z_d; mu_kd, s_kd^2) is a system with a unit diagonal,

    dz_d + sum_k c_kd sum_{j<d} (-x_kj / s_kj) dz_j  =  sum_k r_kd (dmu_kd + x_kd ds_kd)
                                                      - sum_k c_kd (dlog pi_k + sum_{j<d} dlog N(z_j; mu_kj, s_kj^2)),

with r_kd = P(k | z_1 .. z_d) and c_kd = w_kd (Phi(x_kd) - S_d) / f_d. Nothing here but c divides, and c is taken from
logarithms and from the nearer tail of Phi: it is good in float32 wherever a draw can lie.
"""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vae.model.families.mixture import Mixture

LARGEST_LOG_RATIO = 60.0
"""log (w / f) is cut here: beyond, float32 overflows. Such draws come from components of weight e^-60."""


class NormalMixture(Mixture):
    """sum_k pi_k N(mu_k, diag s_k^2), with reparametrised draws. Their second derivatives are not those of the mixture.

    Args:
        logits: log-weights, (..., M).
        loc: means, (..., M, D).
        scale: standard deviations, (..., M, D).
        validate_args: see `torch.distributions.Distribution`.
    """

    has_rsample = True

    def __init__(self, logits: Tensor, loc: Tensor, scale: Tensor, *, validate_args: bool | None = None) -> None:
        components = dist.Normal(loc, scale, validate_args=validate_args).to_event(1)
        super().__init__(logits, components, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> NormalMixture:
        """See `Mixture.expand`."""
        new = self._get_checked_instance(NormalMixture, _instance)
        super().expand(batch_shape, _instance=new)
        return new

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 - torch's own signature
        """Draws (*sample_shape, ..., D), differentiable once in the logits, means and scales."""
        z = self.sample(sample_shape)
        if not torch.is_grad_enabled():
            return z
        loc, scale = self.components.base_dist.loc, self.components.base_dist.scale
        with torch.no_grad():
            x = (z.unsqueeze(-2) - loc) / scale
            system, shares, ratios = _system(x, scale, self.logits)
        standard = (z.unsqueeze(-2) - loc) / scale
        log_weight = self.logits.unsqueeze(-1) + _before(_log_density(standard, scale))
        right = (shares * (loc + x * scale) - ratios * log_weight).sum(-2)
        # The value of `right` means nothing: only what it depends on does.
        change = torch.linalg.solve_triangular(system, (right - right.detach()).unsqueeze(-1), upper=False)
        return z + change.squeeze(-1)


def _log_density(x: Tensor, scale: Tensor) -> Tensor:
    """log N(z_d; mu_kd, s_kd^2), (..., M, D)."""
    return -0.5 * x.square() - scale.log() - 0.5 * math.log(2.0 * math.pi)


def _before(values: Tensor) -> Tensor:
    """Sums over the dimensions before each, (..., M, D)."""
    return torch.nn.functional.pad(values.cumsum(-1)[..., :-1], (1, 0))


def _system(x: Tensor, scale: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The matrix (..., D, D) of the system above, r and c, both (..., M, D), from x (..., M, D)."""
    density = _log_density(x, scale)
    log_weight = (logits.unsqueeze(-1) + _before(density)).log_softmax(-2)
    log_joint = log_weight + density
    weight = log_weight.exp()
    below = torch.special.ndtr(x)
    # Phi_k - S = (1 - S) - (1 - Phi_k): of the two, that which does not subtract numbers close to one.
    tail = torch.where((weight * below).sum(-2, keepdim=True) < 0.5, below, -torch.special.ndtr(-x))
    log_ratio = log_weight - log_joint.logsumexp(-2, keepdim=True)
    ratios = log_ratio.clamp(max=LARGEST_LOG_RATIO).exp() * (tail - (weight * tail).sum(-2, keepdim=True))
    lower = torch.einsum("...kd,...kj->...dj", ratios, -x / scale).tril(-1)
    return lower + torch.eye(x.shape[-1], dtype=x.dtype, device=x.device), log_joint.softmax(-2), ratios
