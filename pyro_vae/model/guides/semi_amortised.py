"""Semi-amortised inference: the encoder's Normal, improved row by row.

Kim, Wiseman, Miller, Sontag & Rush 2018 (arXiv:1802.02550) take gradient steps on the evidence lower bound of a row,

    L(mu, log sigma) = E_eps[log p(x, mu + sigma eps)] + sum_d log sigma_d + const,

from where the encoder puts it. Here the expectation is a mean over draws that never change, so that q(z | x) is a function
of x alone and has one density whenever it is asked for, and a step that does not raise L is taken back.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from pyro_vae.model.guides.gaussian import DiagonalNormal
from pyro_vae.model.guides.guide import Density, Guide
from pyro_vae.rows import positive

GROWTH, SHRINKAGE = 1.3, 0.3
"""Factors of a row's step length after a step that raised L, and after one that did not."""


class SemiAmortised(Guide):
    """q(z | x) = N(mu, diag sigma^2), where (mu, log sigma) is the encoder's value plus a few steps up the row's own L.

    The steps follow the natural gradient, (sigma^2 dL/dmu, (1/2) dL/dlog sigma), which needs no scale of its own. They are
    added as constants: the encoder gets the gradient that it would get at the improved point (first order). The draws are
    antithetic and of second moment one in each dimension, jointly the identity if there are at least 2 D of them: L is then
    exact where log p(x, z) is quadratic in z.

    While the decoder is trained, its dropout is drawn anew for each trial point, and BatchNorm's running statistics take
    these points in as well.

    A row costs (steps + 1) x num_draws passes through the decoder, and as many back, each time the guide is run.

    Args:
        guide: a `DiagonalNormal`, whose encoder sets where the steps begin.
        steps: how many.
        rate: length of a row's first step; 1 is a full Newton step for a Normal posterior of independent dimensions.
        num_draws: draws of eps, an even number.
    """

    noise: Tensor

    def __init__(self, guide: DiagonalNormal, steps: int = 3, rate: float = 0.5, num_draws: int = 4) -> None:
        super().__init__()
        if not isinstance(guide, DiagonalNormal):
            raise TypeError(f"SemiAmortised improves a DiagonalNormal, but was given {guide!r}: give a DiagonalNormal.")
        positive(steps=steps, num_draws=num_draws)
        if num_draws % 2:
            raise ValueError(f"num_draws={num_draws} must be even: draws come in pairs eps, -eps.")
        if not (isfinite(rate) and rate > 0.0):
            raise ValueError(f"rate={rate!r} must be a positive number.")
        self.guide, self.latent_dim = guide, guide.latent_dim
        self.steps, self.rate, self.num_draws = steps, float(rate), num_draws
        # Not kept in files: the same for the same settings.
        self.register_buffer("noise", _fixed_noise(num_draws, guide.latent_dim), persistent=False)

    @property
    def encoder(self) -> nn.Module:  # type: ignore[override]
        """The encoder of the guide inside, which alone registers it."""
        return self.guide.encoder

    def settings(self) -> dict[str, Any]:
        """See `Component.settings`."""
        return {"guide": self.guide, "steps": self.steps, "rate": self.rate, "num_draws": self.num_draws}

    def forward(self, x: Tensor, *given: Tensor) -> Any:
        """The amortised part, batch shape (N,), event shape (D,); `refine` does the rest."""
        return self.guide(x, *given)

    def refine(self, q: Independent[Normal], log_joint: Density) -> Any:
        """`q` after the steps.

        Args:
            q: what `forward` returned.
            log_joint: z (N, D) -> log p(x, z) of the same rows, (N,); differentiable once.
        """
        loc, log_scale = q.base_dist.loc, q.base_dist.scale.log()
        # A step may lead where the decoder overflows. It is then taken back, which a check of arguments would forestall.
        with torch.enable_grad(), pyro.validation_enabled(is_validate=False):
            better = self._climb(loc.detach(), log_scale.detach(), log_joint)
        loc, log_scale = (old + (new - old).detach() for old, new in zip((loc, log_scale), better, strict=True))
        return dist.Normal(loc, log_scale.exp()).to_event(1)

    def _climb(self, loc: Tensor, log_scale: Tensor, log_joint: Density) -> tuple[Tensor, Tensor]:
        """The best (mu, log sigma) of each row that the steps meet, (N, D) each."""
        bound, slope = self._bound(loc, log_scale, log_joint)
        rate = torch.full_like(bound, self.rate)
        for _ in range(self.steps):
            new_loc = loc + rate[:, None] * (2.0 * log_scale).exp() * slope[0]
            # At most a factor e: far from the optimum the curvature of L in log sigma is not that of the natural gradient.
            new_log_scale = log_scale + (0.5 * rate[:, None] * slope[1]).clamp(-1.0, 1.0)
            new_bound, new_slope = self._bound(new_loc, new_log_scale, log_joint)
            raised = new_bound > bound  # false where either is NaN
            keep = raised[:, None]
            loc, log_scale = torch.where(keep, new_loc, loc), torch.where(keep, new_log_scale, log_scale)
            slope = (torch.where(keep, new_slope[0], slope[0]), torch.where(keep, new_slope[1], slope[1]))
            bound = torch.where(raised, new_bound, bound)
            rate = rate * torch.where(raised, GROWTH, SHRINKAGE)
        return loc, log_scale

    def _bound(self, loc: Tensor, log_scale: Tensor, log_joint: Density) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """L of each row without its constant, (N,), and its gradient in mu and log sigma; zero where that is not finite."""

        def estimate(loc: Tensor, log_scale: Tensor) -> Tensor:
            scale = log_scale.exp()
            total = torch.stack([log_joint(loc + scale * eps) for eps in self.noise]).mean(0)
            return total + log_scale.sum(-1)

        bound, (first, second) = _value_and_gradients(estimate, loc, log_scale)
        finite = bound.isfinite() & first.isfinite().all(-1) & second.isfinite().all(-1)
        bound = torch.where(finite, bound, -torch.inf).detach()
        return bound, (torch.where(finite[:, None], first, 0.0), torch.where(finite[:, None], second, 0.0))


def _value_and_gradients(function: Callable[..., Tensor], *at: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """function(*at), (N,), and the gradients of its sum in each of `at`, no graph kept."""
    try:
        leaves = [tensor.detach().requires_grad_() for tensor in at]
    except RuntimeError:  # in a step that torch.func transforms, it must take the inner derivatives as well
        transformed: Any = torch.func.vjp(function, *at)
        value, pull = transformed
        return value.detach(), tuple(gradient.detach() for gradient in pull(torch.ones_like(value)))
    value = function(*leaves)
    return value.detach(), torch.autograd.grad(value.sum(), leaves)


def _fixed_noise(num_draws: int, dim: int) -> Tensor:
    """Antithetic draws (num_draws, D) of second moment one; orthogonal columns where there are enough draws."""
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(num_draws // 2, dim, generator=generator, dtype=torch.float64, device="cpu")
    if len(half) >= dim:
        half = torch.linalg.qr(half).Q
    half = half / half.square().mean(0).sqrt()
    device, dtype = torch.get_default_device(), torch.get_default_dtype()
    return torch.cat([half, -half]).to(device=device, dtype=dtype)
