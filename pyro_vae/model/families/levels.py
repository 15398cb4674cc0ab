"""Mass functions of floating point values: classes, and grids with a logistic density integrated over their steps."""

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

NONE = torch.Size()


class Categorical(dist.Categorical):
    """torch's Categorical with draws of the dtype of its logits: rows of data are floating point."""

    def sample(self, sample_shape: Sequence[int] = NONE) -> Tensor:
        """Classes 0, ..., C - 1, (*sample_shape, *batch_shape), floating point."""
        return super().sample(torch.Size(sample_shape)).to(self.logits)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Categorical:
        """The same distribution with the batch shape `batch_shape`."""
        return Categorical(logits=self.logits.expand(*batch_shape, -1), validate_args=self._validate_args)


class Grid(constraints.Constraint):
    """The numbers k top / (levels - 1), k = 0, ..., levels - 1, up to rounding.

    Args:
        levels: how many, at least 2.
        top: the last of them.
    """

    is_discrete, event_dim = True, 0

    def __init__(self, levels: int, top: float) -> None:
        self.levels, self.top = levels, top
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Which values lie on the grid, to a thousandth of a step or the rounding of their own dtype."""
        k = value * ((self.levels - 1) / self.top)
        rounding = 8.0 * torch.finfo(value.dtype).eps * self.levels
        return ((k - k.round()).abs() < max(1e-3, rounding)) & (k > -0.5) & (k < self.levels - 0.5)

    def __repr__(self) -> str:
        """The grid in words."""
        return f"Grid(levels={self.levels}, top={self.top})"


class DiscretisedLogistic(Elements):
    """A logistic density integrated over the steps of a grid, the tails going to the first and the last of them.

    P(x) = sigmoid((x + h - m) / s) - sigmoid((x - h - m) / s), h half a step; without the second term at 0 and with 1 for
    the first at the top (Salimans et al. 2017, arXiv:1701.05517, eq. 2; Kingma et al. 2016, arXiv:1606.04934).

    Args:
        loc: m.
        scale: s, positive.
        grid: the support.
        validate_args: see `torch.distributions.Distribution`.
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}  # noqa: RUF012 - torch's own spelling
    loc: Tensor
    scale: Tensor

    def __init__(self, loc: Tensor, scale: Tensor, grid: Grid, *, validate_args: bool | None = None) -> None:
        self.grid, self.step = grid, grid.top / (grid.levels - 1)
        super().__init__(loc, scale, validate_args=validate_args)

    @property
    def support(self) -> Grid:
        """The grid."""
        return self.grid

    def moments(self) -> tuple[Tensor, Tensor]:
        """E x and E x^2, each of the batch shape: sums over P(x >= each level)."""
        first = second = self.spread(torch.zeros_like(self.loc))
        for k in range(1, self.grid.levels):
            reached = torch.sigmoid((self.loc - (k - 0.5) * self.step) / self.scale)
            first, second = first + reached, second + (2 * k - 1) * reached
        return first * self.step, second * self.step**2

    @property
    def mean(self) -> Tensor:
        """E x, the batch shape."""
        return self.moments()[0]

    @property
    def variance(self) -> Tensor:
        """Var x, the batch shape."""
        first, second = self.moments()
        return (second - first.square()).clamp(min=0.0)

    def sample(self, sample_shape: Sequence[int] = NONE) -> Tensor:
        """Draws of the logistic, put on the nearest level."""
        with torch.no_grad():
            uniform = torch.rand_like(self.spread(self.loc, sample_shape))
            x = self.loc + self.scale * torch.logit(uniform, eps=torch.finfo(uniform.dtype).eps)
            return (x / self.step).round().clamp(0, self.grid.levels - 1) * self.grid.top / (self.grid.levels - 1)

    def log_prob(self, value: Tensor) -> Tensor:
        """log P(value), elementwise.

        sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - exp(a - b)): its logarithm has no difference of close numbers.
        """
        if self._validate_args:
            self._validate_sample(value)
        k = (value / self.step).round()
        first, last = k <= 0, k >= self.grid.levels - 1
        above = ((k + 0.5) * self.step - self.loc) / self.scale
        below = ((k - 0.5) * self.step - self.loc) / self.scale
        width = torch.log(-torch.expm1(-self.step / self.scale))
        log_above = torch.where(last, 0.0, logsigmoid(above))
        log_below = torch.where(first, 0.0, logsigmoid(-below))
        return log_above + log_below + torch.where(first | last, 0.0, width)


class DiscretisedLogisticMixture(dist.TorchDistribution):
    """P(x) = sum_m w_m P_m(x) of M discretised logistics (Salimans et al. 2017, arXiv:1701.05517, sec. 2.1).

    Args:
        logits: of the weights, (..., M).
        loc: (..., M).
        scale: positive, (..., M).
        grid: the support.
        validate_args: see `torch.distributions.Distribution`.
    """

    arg_constraints = {  # noqa: RUF012 - torch's own spelling
        "logits": constraints.real_vector,
        "loc": constraints.real_vector,
        "scale": constraints.independent(constraints.positive, 1),
    }
    has_rsample = False

    def __init__(
        self, logits: Tensor, loc: Tensor, scale: Tensor, grid: Grid, *, validate_args: bool | None = None
    ) -> None:
        self.logits, self.loc, self.scale, self.grid = logits, loc, scale, grid
        super().__init__(loc.shape[:-1], validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> DiscretisedLogisticMixture:
        """The same distribution with the batch shape `batch_shape`."""
        new = copy.copy(self)
        new._batch_shape = torch.Size(batch_shape)
        new.logits, new.loc, new.scale = (part.expand(*batch_shape, -1) for part in (self.logits, self.loc, self.scale))
        return new

    @property
    def support(self) -> Grid:
        """The grid."""
        return self.grid

    def _components(self) -> DiscretisedLogistic:
        """The M of them, batch shape (..., M), which check what the mixture checks."""
        return DiscretisedLogistic(self.loc, self.scale, self.grid, validate_args=self._validate_args)

    def _moments(self) -> tuple[Tensor, Tensor]:
        weights = self.logits.softmax(-1)
        first, second = ((weights * part).sum(-1) for part in self._components().moments())
        return first, second

    @property
    def mean(self) -> Tensor:
        """E x, the batch shape."""
        return self._moments()[0]

    @property
    def variance(self) -> Tensor:
        """Var x, the batch shape."""
        first, second = self._moments()
        return (second - first.square()).clamp(min=0.0)

    def sample(self, sample_shape: Sequence[int] = NONE) -> Tensor:
        """Draws of a component each."""
        with torch.no_grad():
            draws = self._components().sample(sample_shape)
            which = dist.Categorical(logits=self.logits, validate_args=self._validate_args).sample(torch.Size(sample_shape))
            return draws.gather(-1, which[..., None]).squeeze(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        """log P(value), elementwise."""
        if self._validate_args:
            self._validate_sample(value)
        inside = self._components().log_prob(value[..., None])
        return torch.logsumexp(self.logits.log_softmax(-1) + inside, -1)
