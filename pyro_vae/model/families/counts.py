"""Counts: Poisson and negative binomial by log mean, so that no mean underflows, with more zeros; binomial by logits."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import logsigmoid

from pyro_vae.model.families.elements import Elements
from pyro_vae.model.families.saddle import count_ratio, factorial_remainder, log_one_plus, remainder

NONE = torch.Size()


class Poisson(Elements):
    """P(x) = m^x exp(-m) / x!.

    Args:
        log_mean: log m.
        validate_args: see `torch.distributions.Distribution`.
    """

    arg_constraints = {"log_mean": constraints.real}  # noqa: RUF012 - torch's own spelling
    support = constraints.nonnegative_integer
    log_mean: Tensor

    @property
    def mean(self) -> Tensor:
        """m, of the batch shape."""
        return self.spread(self.log_mean.exp())

    @property
    def variance(self) -> Tensor:
        """m, of the batch shape."""
        return self.mean

    def sample(self, sample_shape: Sequence[int] = NONE) -> Tensor:
        """Counts as floating point numbers."""
        with torch.no_grad():
            return torch.poisson(self.spread(self.log_mean.exp(), sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """log P(value), elementwise."""
        if self._validate_args:
            self._validate_sample(value)
        gap = self.log_mean.exp() - value
        return count_ratio(value, gap, self.log_mean) - gap - factorial_remainder(value)


class NegativeBinomial(Elements):
    """A Poisson whose rate is Gamma distributed with mean m and shape 1 / a: variance m + a m^2.

    P(x) = Γ(x + 1/a) / (Γ(1/a) x!) (1 / (1 + a m))^(1/a) (a m / (1 + a m))^x.

    Args:
        log_mean: log m.
        dispersion: a, positive; towards 0 it is Poisson.
        validate_args: see `torch.distributions.Distribution`.
    """

    arg_constraints = {"log_mean": constraints.real, "dispersion": constraints.positive}  # noqa: RUF012
    support = constraints.nonnegative_integer
    log_mean: Tensor
    dispersion: Tensor

    @property
    def mean(self) -> Tensor:
        """m, of the batch shape."""
        return self.spread(self.log_mean.exp())

    @property
    def variance(self) -> Tensor:
        """m + a m^2, of the batch shape."""
        return self.mean + self.dispersion * self.mean.square()

    def sample(self, sample_shape: Sequence[int] = NONE) -> Tensor:
        """Counts as floating point numbers."""
        with torch.no_grad():
            shape = self.spread(1.0 / self.dispersion, sample_shape)
            return torch.poisson(torch._standard_gamma(shape) * (self.log_mean.exp() * self.dispersion))

    def log_prob(self, value: Tensor) -> Tensor:
        """log P(value), elementwise; with r = 1 / a and R of `saddle`,

        r log[(1 + a x) / (1 + a m)] + x log[m (1 + a x) / (x (1 + a m))] - log(1 + a x) / 2
            + R(r + x) - R(r) - [log x! - x log x + x].
        """  # noqa: D415 - the formula ends it
        if self._validate_args:
            self._validate_sample(value)
        mean, a = self.log_mean.exp(), self.dispersion
        shape, whole, log_whole, log_spread = 1.0 / a, 1.0 + a * mean, torch.log1p(a * mean), torch.log1p(a * value)
        gap = (mean - value) / whole
        zeros = shape * log_one_plus(-a * gap, log_spread - log_whole)
        ones = count_ratio(value, gap, self.log_mean + log_spread - log_whole)
        rest = remainder(shape + value) - remainder(shape) - factorial_remainder(value)
        return zeros + ones - 0.5 * log_spread + rest


class Binomial(Elements):
    """P(x) = C(n, x) p^x (1 - p)^(n - x).

    Args:
        total_count: n, at least 1.
        logits: log(p / (1 - p)).
        validate_args: see `torch.distributions.Distribution`.
    """

    arg_constraints = {"total_count": constraints.positive_integer, "logits": constraints.real}  # noqa: RUF012
    total_count: Tensor
    logits: Tensor

    @property
    def support(self) -> constraints.Constraint:
        """0, ..., n."""
        return constraints.integer_interval(0, self.total_count)

    @property
    def mean(self) -> Tensor:
        """n p, the batch shape."""
        return self.spread(self.total_count * torch.sigmoid(self.logits))

    @property
    def variance(self) -> Tensor:
        """n p (1 - p), the batch shape."""
        return self.mean * torch.sigmoid(-self.logits)

    def sample(self, sample_shape: Sequence[int] = NONE) -> Tensor:
        """Counts as floating point numbers."""
        with torch.no_grad():
            p = torch.sigmoid(self.spread(self.logits, sample_shape))
            return torch.binomial(self.total_count.expand(p.shape).contiguous(), p)

    def log_prob(self, value: Tensor) -> Tensor:
        """log P(value), elementwise: x log(n p / x) + (n - x) log(n q / (n - x)) and remainders of the factorials."""
        if self._validate_args:
            self._validate_sample(value)
        n, log_p, log_q = self.total_count, logsigmoid(self.logits), logsigmoid(-self.logits)
        # n p - x from whichever of p and 1 - p has more digits.
        gap = torch.where(self.logits < 0.0, n * log_p.exp() - value, (n - value) - n * log_q.exp())
        ratios = count_ratio(value, gap, n.log() + log_p) + count_ratio(n - value, -gap, n.log() + log_q)
        return ratios + factorial_remainder(n) - factorial_remainder(value) - factorial_remainder(n - value)


class ZeroInflated(dist.TorchDistribution):
    """Zero with probability g, else a draw of `base`.

    Args:
        base: of counts, event shape ().
        gate_logits: log(g / (1 - g)), broadcasts against the batch of `base`.
        validate_args: see `torch.distributions.Distribution`.
    """

    arg_constraints = {"gate_logits": constraints.real}  # noqa: RUF012
    support = constraints.nonnegative_integer
    has_rsample = False

    def __init__(self, base: Any, gate_logits: Tensor, *, validate_args: bool | None = None) -> None:
        self.inflated, self.gate_logits = base, gate_logits
        shape = torch.broadcast_shapes(base.batch_shape, gate_logits.shape)
        super().__init__(torch.Size(shape), validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> ZeroInflated:
        """The same distribution with the batch shape `batch_shape`."""
        new = copy.copy(self)
        new._batch_shape = torch.Size(batch_shape)
        new.inflated = self.inflated.expand(new._batch_shape)
        return new

    @property
    def mean(self) -> Tensor:
        """(1 - g) times that of the base, the batch shape."""
        mean: Tensor = torch.sigmoid(-self.gate_logits) * self.inflated.mean
        return mean

    @property
    def variance(self) -> Tensor:
        """(1 - g) (v + g m^2), the batch shape."""
        g, m = torch.sigmoid(self.gate_logits), self.inflated.mean
        variance: Tensor = (1.0 - g) * (self.inflated.variance + g * m.square())
        return variance

    def sample(self, sample_shape: Sequence[int] = NONE) -> Tensor:
        """Counts as floating point numbers."""
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            counts: Tensor = self.inflated.expand(self._batch_shape).sample(sample_shape)
            return torch.where(torch.rand_like(counts) < torch.sigmoid(self.gate_logits).expand(shape), 0.0, counts)

    def log_prob(self, value: Tensor) -> Tensor:
        """log[g 1(value = 0) + (1 - g) P(value)], elementwise."""
        if self._validate_args:
            self._validate_sample(value)
        counted = logsigmoid(-self.gate_logits) + self.inflated.log_prob(value)
        return torch.where(value == 0, torch.logaddexp(logsigmoid(self.gate_logits), counted), counted)
