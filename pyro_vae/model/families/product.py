"""Products of distributions of vectors, one beside the other: p(z) = prod_i p_i(z_i) with z = (z_1, z_2, ...)."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints


class Product(dist.TorchDistribution):
    """Independent blocks of a vector, each with a distribution of its own.

    Args:
        parts: at least one, of event shapes (D_1,), (D_2,), ...; their batch shapes broadcast.
        validate_args: see `torch.distributions.Distribution`.

    Raises:
        ValueError: an event shape that is no vector's, or a support that ties the numbers of a vector together.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 - torch's own spelling

    def __init__(self, *parts: Any, validate_args: bool | None = None) -> None:
        for part in parts:
            if len(part.event_shape) != 1:
                raise ValueError(
                    f"A part of a product has event shape {tuple(part.event_shape)}: make it a vector's, by .to_event(1)."
                )
        batch_shape = torch.broadcast_shapes(*(part.batch_shape for part in parts))
        self.parts = tuple(part.expand(batch_shape) for part in parts)
        self.sizes = [part.event_shape[0] for part in parts]
        self._support = _beside([part.support for part in parts], self.sizes)
        super().__init__(batch_shape, torch.Size([sum(self.sizes)]), validate_args=validate_args)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether all parts have."""
        return all(part.has_rsample for part in self.parts)

    @property
    def support(self) -> constraints.Constraint:
        """The supports of the parts, one beside the other."""
        return self._support

    @property
    def mean(self) -> Tensor:
        """(..., D)."""
        return torch.cat([part.mean for part in self.parts], -1)

    @property
    def variance(self) -> Tensor:
        """(..., D)."""
        return torch.cat([part.variance for part in self.parts], -1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Product:
        """The same distribution with the batch shape `batch_shape`."""
        parts = (part.expand(torch.Size(batch_shape)) for part in self.parts)
        return Product(*parts, validate_args=self._validate_args)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 - torch's own signature
        """(*sample_shape, ..., D)."""
        with torch.no_grad():
            return torch.cat([part.sample(sample_shape) for part in self.parts], -1)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 - torch's own signature
        """(*sample_shape, ..., D), reparametrised; only where all parts are."""
        return torch.cat([part.rsample(sample_shape) for part in self.parts], -1)

    def log_prob(self, value: Tensor) -> Tensor:
        """sum_i log p_i(value_i), (..., D) -> (...), in nats."""
        if self._validate_args:
            self._validate_sample(value)
        total = value.new_zeros(())
        for part, block in zip(self.parts, value.split(self.sizes, -1), strict=True):
            total = total + part.log_prob(block)
        return total


def _beside(supports: list[constraints.Constraint], sizes: list[int]) -> constraints.Constraint:
    """The constraint of a vector whose blocks of these sizes have these supports."""
    singles = []
    for support in supports:
        while isinstance(support, constraints.independent):
            support = support.base_constraint
        if support.event_dim:
            raise ValueError(f"A part of a product has the support {support}: it must be one of single numbers.")
        singles.append(support)
    if all(single is constraints.real for single in singles):
        return constraints.real_vector
    return constraints.independent(constraints.cat(singles, -1, sizes), 1)
