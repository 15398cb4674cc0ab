"""Likelihoods with heavier tails than a Normal: a few wild values do not drag the decoder along."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
from torch import Tensor, nn

from pyro_vae.model.families.elements import innermost
from pyro_vae.model.families.student import StudentT as SharedStudentT
from pyro_vae.model.likelihoods.scaled import Scaled, as_scale, require_columns
from pyro_vae.model.scales import Optimal, Scale


class StudentT(Scaled):
    """x_j ~ f(z)_j + s t(v), Student's t with v degrees of freedom.

    p(x) ∝ (1 + (x - f)^2 / (v s^2))^(-(v + 1) / 2); the variance is s^2 v / (v - 2) for v > 2 (Lange, Little & Taylor
    1989).

    Args:
        decoder: f, (..., D) -> (..., *event_shape).
        scale: s: a number (fixed), or a `Scale`: `Fixed`, `Learned` (shared or per dimension), `FromNetwork`.
        df: v: likewise; `Learned(initial=5.0)` is learned.
        missing: whether NaN in x is a missing value.
    """

    def __init__(self, decoder: nn.Module, scale: float | Scale, df: float | Scale = 5.0, *, missing: bool = False) -> None:
        super().__init__(decoder, scale, missing=missing)
        self.df = as_scale(df, "df")
        if isinstance(self.df, Optimal):
            raise ValueError(f"df={self.df!r} is the optimal scale of a Normal: give a number, or Learned(initial=5.0).")
        require_columns("df", self.df, decoder)

    def settings(self) -> dict[str, Any]:
        """See `Component.settings`."""
        return {"decoder": self.decoder, "scale": self.scale, "df": self.df, "missing": self.missing}

    def elements(self, z: Tensor, *given: Tensor) -> Any:
        """t(v) at f(z), with scale s."""
        return SharedStudentT(self.df(z, *given), self.decode(z, given), self.scale(z, *given))

    def centre(self, distribution: Any) -> Tensor:
        """The median f(z): a mean exists for v > 1 only."""
        mode: Tensor = innermost(distribution).mode
        return mode


class Laplace(Scaled):
    """p(x_j | z) = exp(-|x_j - f(z)_j| / s) / (2 s): the sum of absolute errors as a likelihood.

    It has a kink at x = f(z), so log p(x, z) has kinks in z: engines that build on its curvature (`posterior.laplace`) need
    more particles here than with a smooth likelihood.

    Args:
        decoder: f, (..., D) -> (..., *event_shape).
        scale: s: a number (fixed), or a `Scale`: `Fixed`, `Learned` (shared or per dimension), `FromNetwork`.
        missing: whether NaN in x is a missing value.
    """

    def elements(self, z: Tensor, *given: Tensor) -> Any:
        """Laplace(f(z), s)."""
        return dist.Laplace(self.decode(z, given), self.scale(z, *given))
