"""Distributions of values of which some are missing.

NaN stands for a value that was not seen. A `Partial` distribution has as log-density of x that of the values that were,

    log p(x_seen | z) = sum over the seen j of log p(x_j | z),

which is the integral over the others where the dimensions are independent given z. So a row with missing values stays one
sample site with one plate; Pyro's `obs_mask` would make two sites of it, and `TraceMeanField_ELBO` then counts the
unseen one as a latent.
"""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints, transform_to


class OrMissing(constraints.Constraint):
    """The values of `base`, and NaN."""

    def __init__(self, base: constraints.Constraint) -> None:
        self.base_constraint, self.event_dim, self.is_discrete = base, base.event_dim, base.is_discrete
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Whether each value is missing or lies in the base's support."""
        missing = value.isnan()
        return missing | self.base_constraint.check(torch.where(missing, self.inside(value), value))

    def inside(self, like: Tensor) -> Tensor:
        """A value of the base's support, a scalar of the dtype and device of `like`."""
        zero = like.new_zeros(())
        return zero if self.is_discrete else transform_to(self.base_constraint)(zero)

    def __repr__(self) -> str:
        """The base's support, and NaN."""
        return f"{str(self.base_constraint).removesuffix('()')} or NaN"


class Partial(dist.TorchDistribution):
    """A distribution of independent numbers, any of which may be missing.

    Args:
        base: of event shape (); its batch is (..., *event_shape).
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 - torch's own spelling

    def __init__(self, base: Any) -> None:
        self.base_dist = base
        super().__init__(base.batch_shape, base.event_shape, validate_args=base._validate_args)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """As the base."""
        return bool(self.base_dist.has_rsample)

    @property
    def support(self) -> OrMissing:
        """The base's support, and NaN."""
        return OrMissing(self.base_dist.support)

    @property
    def mean(self) -> Tensor:
        """Of the complete values, the batch shape."""
        return self.base_dist.mean

    @property
    def variance(self) -> Tensor:
        """Of the complete values, the batch shape."""
        return self.base_dist.variance

    def expand(self, batch_shape: Any, _instance: Any = None) -> Partial:
        """The same distribution with the batch shape `batch_shape`."""
        return Partial(self.base_dist.expand(torch.Size(batch_shape)))

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 - torch's own signature
        """Complete values."""
        return self.base_dist.sample(sample_shape)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 - torch's own signature
        """Complete values, reparametrised where the base is."""
        return self.base_dist.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p of the values that were seen and 0 for the others, elementwise."""
        if self._validate_args:
            self._validate_sample(value)
        missing = value.isnan()
        # A value of the support in their place, so that neither they nor the gradient of what they would give is NaN.
        seen = torch.where(missing, self.support.inside(value), value)
        return torch.where(missing, 0.0, self.base_dist.log_prob(seen))

    def complete(self, x: Tensor) -> Tensor:
        """`x` with its missing values drawn given z: independent of those that were seen."""
        return torch.where(x.isnan(), self.base_dist.sample(), x)


def complete(distribution: Any, x: Tensor) -> Tensor:
    """Rows `x` (..., *event_shape) with each missing value drawn from `distribution` given the values seen."""
    inner = distribution
    while not hasattr(inner, "complete"):
        inner = inner.base_dist
    completed: Tensor = inner.complete(x)
    return completed
