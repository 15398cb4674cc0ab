"""A Normal whose scale many dimensions share."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor


class Normal(dist.Normal):
    """N(loc, scale^2), with log scale computed once and not once for each element of `loc`.

    torch spreads the scale over all elements before it takes logarithms; with 784 pixels and one s this costs a fifth of
    the whole density of a VAE. In everything else it is torch's Normal.

    Args:
        loc: mean, (..., *event_shape).
        scale: standard deviation, positive, broadcasts against `loc`.
        validate_args: see `torch.distributions.Distribution`.
    """

    def __init__(self, loc: Tensor, scale: Tensor, *, validate_args: bool | None = None) -> None:
        self._narrow = scale
        super().__init__(loc, scale, validate_args=validate_args)

    def expand(self, batch_shape: torch.Size | list[int] | tuple[int, ...], _instance: Any = None) -> Normal:
        """The same distribution with the batch shape `batch_shape`."""
        new = self._get_checked_instance(Normal, _instance)
        super().expand(batch_shape, _instance=new)
        new._narrow = self._narrow
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """log N(value; loc, scale^2), elementwise."""
        if self._validate_args:
            self._validate_sample(value)
        standard = (value - self.loc) / self._narrow
        return -0.5 * standard * standard - (self._narrow.log() + 0.5 * math.log(2.0 * math.pi))
