"""Densities on the unit interval: continuous Bernoulli and Beta, both by logits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import logsigmoid

from pyro_vae.model.families.elements import Elements
from pyro_vae.model.families.saddle import remainder

NONE = torch.Size()
_SMALL = 0.5  # below this |logit| series are used; their error is 1e-14 there


class ContinuousBernoulli(Elements):
    """p(x) = l exp(l x) / (exp(l) - 1) on [0, 1], uniform for l = 0.

    With lambda = sigmoid(l) this is C(lambda) lambda^x (1 - lambda)^(1 - x), C = 2 atanh(1 - 2 lambda) / (1 - 2 lambda)
    (Loaiza-Ganem & Cunningham 2019, arXiv:1907.06845).

    Args:
        logits: l, the natural parameter.
        validate_args: see `torch.distributions.Distribution`.
    """

    arg_constraints = {"logits": constraints.real}  # noqa: RUF012 - torch's own spelling
    support = constraints.unit_interval
    logits: Tensor

    @property
    def mean(self) -> Tensor:
        """1 / (1 - exp(-l)) - 1 / l, the batch shape."""
        small, near, far = self._parts()
        series = 0.5 + near * (
            1 / 12 - near**2 * (1 / 720 - near**2 * (1 / 30240 - near**2 * (1 / 1209600 - near**2 / 47900160)))
        )
        return self.spread(torch.where(small, series, -1.0 / torch.expm1(-far) - 1.0 / far))

    @property
    def variance(self) -> Tensor:
        """1 / l^2 - 1 / (4 sinh^2(l / 2)), the batch shape."""
        small, near, far = self._parts()
        series = 1 / 12 - near**2 * (1 / 240 - near**2 * (1 / 6048 - near**2 * (1 / 172800 - near**2 / 5322240)))
        size = far.abs()
        exact = 1.0 / far**2 - torch.exp(-size) / torch.expm1(-size) ** 2
        return self.spread(torch.where(small, series, exact))

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Where the logits are small; the small ones and the others, each with harmless numbers in the gaps."""
        small = self.logits.abs() < _SMALL
        return small, torch.where(small, self.logits, 0.0), torch.where(small, 1.0, self.logits)

    def sample(self, sample_shape: Sequence[int] = NONE) -> Tensor:
        """Draws by the inverse of the distribution function."""
        with torch.no_grad():
            logits = self.spread(self.logits, sample_shape)
            size = logits.abs().clamp(min=1e-6)
            low = torch.log1p(torch.rand_like(logits) * torch.expm1(-size)) / -size
            return torch.where(logits < 0.0, low, 1.0 - low).clamp(0.0, 1.0)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(value), elementwise."""
        if self._validate_args:
            self._validate_sample(value)
        small, near, far = self._parts()
        # log(sinh(h) / h) with h = l / 2, so that log p = (x - 1/2) l - this.
        h = 0.25 * near * near
        series = h * (1 / 6 - h * (1 / 180 - h * (1 / 2835 - h * (1 / 37800 - h * (1 / 467775 - h * 691 / 3831077250)))))
        size = far.abs()
        exact = value * far - far.clamp(min=0.0) + size.log() - torch.log(-torch.expm1(-size))
        return torch.where(small, (value - 0.5) * near - series, exact)


class Beta(Elements):
    """p(x) = x^(a - 1) (1 - x)^(b - 1) / B(a, b) on (0, 1) with a = m k, b = (1 - m) k.

    Args:
        logits: log(m / (1 - m)) of the mean m; taken as within ±80, where m still is a number.
        concentration: k, positive; the variance is m (1 - m) / (k + 1).
        validate_args: see `torch.distributions.Distribution`.
    """

    arg_constraints = {"logits": constraints.real, "concentration": constraints.positive}  # noqa: RUF012
    support = constraints.unit_interval
    logits: Tensor
    concentration: Tensor

    @property
    def mean(self) -> Tensor:
        """m, the batch shape."""
        return self.spread(torch.sigmoid(self.logits))

    @property
    def variance(self) -> Tensor:
        """m (1 - m) / (k + 1), the batch shape."""
        return self.mean * torch.sigmoid(-self.logits) / (self.concentration + 1.0)

    def sample(self, sample_shape: Sequence[int] = NONE) -> Tensor:
        """Draws; where rounding gives 0 or 1, which have no density, the next number inside."""
        with torch.no_grad():
            logits = self.spread(self.logits, sample_shape).clamp(-80.0, 80.0)
            numbers = torch.finfo(logits.dtype)
            a = torch._standard_gamma(torch.sigmoid(logits) * self.concentration).clamp(min=numbers.tiny)
            b = torch._standard_gamma(torch.sigmoid(-logits) * self.concentration).clamp(min=numbers.tiny)
            return (a / (a + b)).clamp(numbers.tiny, 1.0 - 0.5 * numbers.eps)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(value), elementwise; with R of `saddle`,

        a log(x / m) + b log((1 - x) / (1 - m)) + log(k m (1 - m) / (2 pi)) / 2 + R(k) - R(a) - R(b) - log x - log(1 - x).
        """  # noqa: D415 - the formula ends it
        if self._validate_args:
            self._validate_sample(value)
        logits, k = self.logits.clamp(-80.0, 80.0), self.concentration
        log_m, log_rest = logsigmoid(logits), logsigmoid(-logits)
        a, b, log_x, log_left = log_m.exp() * k, log_rest.exp() * k, value.log(), torch.log1p(-value)
        # The last two logarithms are those of the variable's change and join a and b.
        peak = 0.5 * (k.log() + log_m + log_rest - math.log(2.0 * math.pi))
        rest = remainder(k) - remainder(a) - remainder(b)
        return a * (log_x - log_m) + b * (log_left - log_rest) + peak + rest - log_x - log_left
