"""Student's t with few parameters for many dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_vae.model.families.elements import Elements
from pyro_vae.model.families.saddle import remainder

NONE = torch.Size()


class StudentT(Elements):
    """p(x) = Γ((v + 1) / 2) / (Γ(v / 2) sqrt(pi v) s) (1 + (x - m)^2 / (v s^2))^(-(v + 1) / 2).

    torch takes the logarithms of the gamma functions apart, which costs a thousandth of a nat a dimension in float32
    where v is large.

    Args:
        df: v, positive.
        loc: m.
        scale: s, positive.
        validate_args: see `torch.distributions.Distribution`.
    """

    arg_constraints = {  # noqa: RUF012 - torch's own spelling
        "df": constraints.positive,
        "loc": constraints.real,
        "scale": constraints.positive,
    }
    support = constraints.real
    df: Tensor
    loc: Tensor
    scale: Tensor

    @property
    def mean(self) -> Tensor:
        """m where v > 1, else NaN; the batch shape."""
        return self.spread(torch.where(self.df > 1.0, self.loc, torch.nan))

    @property
    def mode(self) -> Tensor:
        """m, the batch shape."""
        return self.spread(self.loc)

    @property
    def variance(self) -> Tensor:
        """s^2 v / (v - 2) where v > 2, else infinite, NaN for v <= 1; the batch shape."""
        finite = self.scale.square() * self.df / torch.where(self.df > 2.0, self.df - 2.0, 1.0)
        variance = torch.where(self.df > 2.0, finite, torch.inf)
        return self.spread(torch.where(self.df > 1.0, variance, torch.nan))

    def sample(self, sample_shape: Sequence[int] = NONE) -> Tensor:
        """Draws: a Normal over the root of a chi-squared over v."""
        with torch.no_grad():
            half = self.spread(0.5 * self.df, sample_shape)
            # A chi-squared with few degrees of freedom underflows, and the ratio would be infinite.
            chi = torch._standard_gamma(half).clamp(min=torch.finfo(half.dtype).tiny) / half
            return self.loc + self.scale * torch.randn_like(half) * chi.rsqrt()

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(value), elementwise.

        With h = v / 2 and R of `saddle`, log Γ(h + 1/2) - log Γ(h) = h log(1 + 1/v) + (log h - 1) / 2 + R(h + 1/2) - R(h).
        """
        if self._validate_args:
            self._validate_sample(value)
        half = 0.5 * self.df
        gammas = half * torch.log1p(0.5 / half) + 0.5 * (half.log() - 1.0) + remainder(half + 0.5) - remainder(half)
        standard = (value - self.loc) / self.scale
        constant = gammas - 0.5 * (math.pi * self.df).log() - self.scale.log()
        return constant - (half + 0.5) * torch.log1p(standard * standard / self.df)
