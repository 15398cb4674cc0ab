"""Normal likelihoods whose dimensions are independent given z, of x and of log x."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vae.model.families.normal import Normal as SharedNormal
from pyro_vae.model.likelihoods.scaled import Scaled
from pyro_vae.model.scales import Optimal


class Normal(Scaled):
    """x ~ N(f(z), s^2 I).

    Args:
        decoder: f, (..., D) -> (..., *event_shape).
        scale: s: a number (fixed), or a `Scale`: `Fixed`, `Learned` (shared or per dimension), `Optimal`, `FromNetwork`.
        missing: whether NaN in x is a missing value.

    Examples:
        >>> import torch
        >>> from pyro_vae.model.nets import MLP
        >>> Normal(MLP(2, 5), scale=0.25)(torch.zeros(3, 2)).event_shape
        torch.Size([5])
    """

    takes_optimal = True

    def elements(self, z: Tensor, *given: Tensor) -> Any:
        """N(f(z), s^2)."""
        return SharedNormal(self.decode(z, given), self.scale(z, *given))

    def seeing(self, x: Tensor, z: Tensor, *given: Tensor) -> Any:
        """See `Likelihood.seeing`: N(f(z), s^2) with the s of these rows, where it is `Optimal`."""
        if not isinstance(self.scale, Optimal):
            return self(z, *given)
        loc = self.decode(z, given)
        return self.rows(SharedNormal(loc, self.scale.seeing(x - loc)), z)


class LogNormal(Scaled):
    """log x ~ N(f(z), s^2 I), for positive data.

    The density is that of x, in units of 1 / x: p(x) = N(log x; f(z), s^2) / x. Its mean is exp(f(z) + s^2 / 2).

    Args:
        decoder: f, (..., D) -> (..., *event_shape).
        scale: s, of log x: a number (fixed), or a `Scale`: `Fixed`, `Learned` (shared or per dimension), `Optimal`,
            `FromNetwork`.
        missing: whether NaN in x is a missing value.
    """

    takes_optimal = True
    takes = "positive numbers alone"
    mend = "add a positive offset to x, remove these rows, or take Normal"

    def elements(self, z: Tensor, *given: Tensor) -> Any:
        """LogNormal(f(z), s)."""
        return dist.LogNormal(self.decode(z, given), self.scale(z, *given))

    def seeing(self, x: Tensor, z: Tensor, *given: Tensor) -> Any:
        """See `Likelihood.seeing`; the best s is that of the Normal of log x."""
        if not isinstance(self.scale, Optimal):
            return self(z, *given)
        loc = self.decode(z, given)
        return self.rows(dist.LogNormal(loc, self.scale.seeing(x.log() - loc)), z)

    def inside(self, x: Tensor) -> Tensor:
        """See `Likelihood.inside`."""
        return (x > 0) & torch.isfinite(x)
