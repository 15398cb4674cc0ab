"""What the families of single numbers share: parameters that stay as narrow as they were given."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor


class Elements(dist.TorchDistribution):
    """A distribution of single numbers, event shape (), whose parameters broadcast against one another.

    torch spreads every parameter over the whole batch; here one dispersion or scale that all dimensions share stays one
    number, and its logarithm is taken once. To add one: name the parameters, in the constructor's order, in
    `arg_constraints`, and implement `log_prob` and `sample`.

    Args:
        values: the parameters.
        validate_args: see `torch.distributions.Distribution`.
    """

    has_rsample = False

    def __init__(self, *values: Tensor, validate_args: bool | None = None) -> None:
        for name, value in zip(self.arg_constraints, values, strict=True):
            setattr(self, name, value)
        shape = torch.broadcast_shapes(*(value.shape for value in values))
        super().__init__(torch.Size(shape), validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Elements:
        """The same distribution with the batch shape `batch_shape`."""
        new = copy.copy(self)
        new._batch_shape = torch.Size(batch_shape)
        return new

    def spread(self, value: Tensor, sample_shape: Sequence[int] = ()) -> Tensor:
        """A parameter, or what was made of some, expanded to (*sample_shape, *batch_shape)."""
        return value.expand(self._extended_shape(torch.Size(sample_shape)))


def innermost(distribution: Any) -> Any:
    """What is left of a distribution without the wrappings of `.to_event`, `.mask` and `Partial`."""
    while hasattr(distribution, "base_dist"):
        distribution = distribution.base_dist
    return distribution
