"""Mixtures of any family of distributions of vectors.

    p(z) = sum_k pi_k p_k(z),   log pi = log_softmax(logits),

computed in logarithms throughout, so that no density underflows. torch's `MixtureSameFamily` draws all components for every
row of a plate and gives its support a type that `biject_to` does not know; the posterior engines need both otherwise.
"""

from __future__ import annotations

from math import prod
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Categorical, constraints

LARGEST_DRAW = 2**22
"""Numbers drawn at once at most: all components are drawn, and one of them kept."""


class Mixture(dist.TorchDistribution):
    """A mixture of M components.

    Args:
        logits: log-weights, not necessarily normalised, (..., M), broadcast against the components' batch shape.
        components: batch shape (..., M), any event shape.
        validate_args: see `torch.distributions.Distribution`.
    """

    arg_constraints = {"logits": constraints.real_vector}  # noqa: RUF012 - torch's own spelling
    has_rsample = False

    def __init__(self, logits: Tensor, components: Any, *, validate_args: bool | None = None) -> None:
        if not components.batch_shape or logits.shape[-1] != components.batch_shape[-1]:
            raise ValueError(
                f"logits of shape {tuple(logits.shape)} do not go with components of batch shape "
                f"{tuple(components.batch_shape)}: both must end in the number of components."
            )
        self.logits, self.components = logits, components
        super().__init__(components.batch_shape[:-1], components.event_shape, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """That of the components."""
        support: constraints.Constraint = self.components.support
        return support

    @property
    def mean(self) -> Tensor:
        """sum_k pi_k E_k[z], (..., *event_shape), where the components have means."""
        return self._averaged(self.components.mean).expand(self._extended_shape())

    @property
    def variance(self) -> Tensor:
        """That of each coordinate, (..., *event_shape): E[Var_k] + Var[E_k]."""
        centres = self.components.mean
        away = centres - self._averaged(centres).unsqueeze(self._dim)
        return self._averaged(self.components.variance + away.square()).expand(self._extended_shape())

    @property
    def _dim(self) -> int:
        """Where the components lie in a tensor (..., M, *event_shape)."""
        return -1 - len(self.event_shape)

    def _averaged(self, values: Tensor) -> Tensor:
        """sum_k pi_k values_k, (..., M, *event_shape) -> (..., *event_shape)."""
        weights = self.logits.softmax(-1)
        return (weights.reshape(*weights.shape, *(1 for _ in self.event_shape)) * values).sum(self._dim)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Mixture:
        """The same distribution with the batch shape `batch_shape`; the components stay as they are where they can."""
        batch_shape = torch.Size(batch_shape)
        new = self._get_checked_instance(Mixture, _instance)
        own = self.components.batch_shape[:-1]
        new.logits, new.components = self.logits, self.components
        if own != batch_shape[len(batch_shape) - len(own) :]:
            new.logits = self.logits.expand(*batch_shape, -1)
            new.components = self.components.expand(torch.Size((*batch_shape, self.components.batch_shape[-1])))
        # As torch's own `expand` does: the parameters were checked when they were given, `new` goes on as `self` does.
        dist.TorchDistribution.__init__(new, batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 - torch's own signature
        """Draws without gradient, (*sample_shape, ..., *event_shape)."""
        shape, own = self._extended_shape(torch.Size(sample_shape)), self.components.batch_shape
        count = prod(shape[: len(shape) - len(self.event_shape) - len(own) + 1])
        most = max(1, LARGEST_DRAW // max(1, prod(own) * prod(self.event_shape)))
        with torch.no_grad():
            parts = [self._draw(min(most, count - start)) for start in range(0, count, most)]
            return torch.cat(parts).reshape(shape) if parts else self.logits.new_zeros(shape)

    def _draw(self, count: int) -> Tensor:
        """(count, ..., *event_shape), of the batch shape that the components have."""
        drawn = self.components.sample((count,))
        which = Categorical(logits=self.logits.expand(self.components.batch_shape)).sample((count,))
        index = which.reshape(*which.shape, *(1 for _ in range(1 + len(self.event_shape))))
        return torch.take_along_dim(drawn, index, self._dim).squeeze(self._dim)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(value), (..., *event_shape) -> (...), in nats."""
        if self._validate_args:
            self._validate_sample(value)
        each = self.components.log_prob(value.unsqueeze(self._dim))
        return torch.logsumexp(self.logits.log_softmax(-1) + each, -1)
