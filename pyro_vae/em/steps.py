"""One iteration of EM for x ~ N(W z + m, Psi), z ~ N(0, I): the log-likelihood where it starts, and where it leads.

With Ez = E[z | x_i] = M^-1 W' Psi^-1 (x_i - m) and E[z z' | x_i] = M^-1 + Ez Ez', M = I + W' Psi^-1 W, the M-step regresses
each column of x on z,

    (w_j, m_j) = (sum_i E[z~ z~'])^-1 sum_i E[z~] x_ij,      z~ = (z, 1),
    psi_j      = mean_i E (x_ij - w_j'z - m_j)^2,

the sums over the rows in which x_ij was seen: Rubin & Thayer 1982, "EM algorithms for ML factor analysis", Psychometrika
47:69; for one psi that all columns share, Tipping & Bishop 1999, JRSS B 61:611, eq. 29-30. Without missing values m is the
mean of the rows, and the sums need nothing but their covariance S: an iteration costs O(d^2 D), whatever N.

`expand` is the parameter expansion of Liu, Rubin & Wu 1998, "Parameter expansion to accelerate EM", Biometrika 85:755:
z ~ N(a, R) with a and R fitted as well, then brought back to N(0, I) by m + W a and W R^(1/2). It is as monotone.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Pool = Callable[[Tensor, Tensor], Tensor]
"""(sums of squared residuals (d,), how many were seen (d,)) -> psi, (d,)."""

ELEMENTS = 2**22
"""Numbers in the tensors (rows, D, D) of a block of rows."""

LOG_TWO_PI = math.log(2.0 * math.pi)


@dataclass(frozen=True)
class State:
    """The parameters, in float64.

    Attributes:
        weight: W, (d, D).
        mean: m, (d,).
        variance: psi, (d,).
    """

    weight: Tensor
    mean: Tensor
    variance: Tensor

    def flat(self) -> Tensor:
        """As one vector without bounds, (d D + 2 d,)."""
        return torch.cat([self.weight.flatten(), self.mean, self.variance.log()])

    def like(self, flat: Tensor, floor: float) -> State:
        """The state that `flat` stands for, no psi below `floor`."""
        weight, mean, log_variance = flat.split([self.weight.numel(), len(self.mean), len(self.mean)])
        return State(weight.view_as(self.weight), mean, log_variance.exp().clamp(min=floor))


def each(sums: Tensor, counts: Tensor) -> Tensor:
    """A psi for each column: factor analysis."""
    return sums / counts


def shared(sums: Tensor, counts: Tensor) -> Tensor:
    """One psi for all columns: probabilistic PCA."""
    return (sums.sum() / counts.sum()).expand_as(sums)


class Step(ABC):
    """What rows have to say, in the form that an iteration needs.

    Args:
        pool: `each` or `shared`.
        floor: least psi. It is where the M-step's psi is cut off, which keeps the iteration monotone: the expected
            log-likelihood has a single peak in each psi.
        expand: see above.
    """

    def __init__(self, pool: Pool, floor: float, *, expand: bool) -> None:
        self.pool, self.floor, self.expand = pool, floor, expand

    @abstractmethod
    def __call__(self, state: State) -> tuple[float, State]:
        """The mean log-likelihood of a row at `state` in nats, and the state after one iteration."""

    def _state(self, weight: Tensor, mean: Tensor, sums: Tensor, counts: Tensor, second: Tensor, first: Tensor) -> State:
        """From the M-step's W and m, the residuals' sums, and the means over the rows of E[z z'] and E[z]."""
        variance = self.pool(sums, counts).clamp(min=self.floor)
        if self.expand:
            mean = mean + weight @ first
            weight = weight @ torch.linalg.cholesky_ex(second - torch.outer(first, first))[0]
        return State(weight, mean, variance)


class CompleteRows(Step):
    """Rows without missing values, by their covariance.

    Args:
        covariance: S about the mean of the rows, dividing by their number, (d, d), float64.
        pool: see `Step`.
        floor: see `Step`.
        expand: see `Step`.
    """

    def __init__(self, covariance: Tensor, pool: Pool, floor: float, *, expand: bool) -> None:
        super().__init__(pool, floor, expand=expand)
        self.covariance = covariance

    def __call__(self, state: State) -> tuple[float, State]:
        """See `Step`; the mean of `state` is that of the rows, where it stays."""
        own, scaled = self.covariance.diagonal(), state.weight / state.variance[:, None]
        identity = torch.eye(scaled.shape[1], dtype=scaled.dtype, device=scaled.device)
        # Mixed iterations may lead anywhere: a matrix without a factor gives NaN, which is refused, and no exception.
        factor = torch.linalg.cholesky_ex(identity + state.weight.mT @ scaled)[0]
        gain = torch.cholesky_solve(scaled.mT, factor)
        cross = self.covariance @ gain.mT
        second = torch.cholesky_inverse(factor) + gain @ cross
        log_det = state.variance.log().sum() + 2.0 * factor.diagonal().log().sum()
        squares = (own / state.variance).sum() - (scaled * cross).sum()
        log_likelihood = -0.5 * (len(own) * LOG_TWO_PI + log_det + squares)
        weight = torch.linalg.solve_ex(second, cross.mT)[0].mT
        sums, first = own - (weight * cross).sum(-1), torch.zeros_like(second[0])
        return float(log_likelihood), self._state(weight, state.mean, sums, torch.ones_like(own), second, first)


@dataclass(frozen=True)
class _Block:
    """Rows with few patterns of what is missing.

    Attributes:
        x: (B, d), zero where missing.
        seen: which are not, (B, d), zeros and ones.
        patterns: the different rows of `seen`, (P, d).
        group: which of them each row has, (B,).
    """

    x: Tensor
    seen: Tensor
    patterns: Tensor
    group: Tensor


@dataclass
class _Sums:
    """Sums over rows, see the module's docstring: of log p, x z~, E[z~ z~'] by column, E[z~ z~']."""

    log_p: Tensor
    cross: Tensor
    by_column: Tensor
    moments: Tensor


class PartialRows(Step):
    """Rows of which values are missing, each by what was seen of it.

    Args:
        x: (N, d), float64, NaN where missing; not all of a row.
        latent_dim: D.
        pool: see `Step`.
        floor: see `Step`.
        expand: see `Step`.
    """

    def __init__(self, x: Tensor, latent_dim: int, pool: Pool, floor: float, *, expand: bool) -> None:
        super().__init__(pool, floor, expand=expand)
        self.num_rows, self.blocks = len(x), []
        group = torch.unique(~x.isnan(), dim=0, return_inverse=True)[1]
        # Rows of the same pattern next to each other: a block then has as few as can be.
        for rows in x[group.argsort(stable=True)].split(max(1, ELEMENTS // (latent_dim + 1) ** 2)):
            seen = (~rows.isnan()).to(x.dtype)
            patterns, inverse = torch.unique(seen, dim=0, return_inverse=True)
            self.blocks.append(_Block(rows.nan_to_num(0.0), seen, patterns, inverse))
        self.counts = sum((block.seen.sum(0) for block in self.blocks), x.new_zeros(x.shape[1]))
        self.squares = sum((block.x.square().sum(0) for block in self.blocks), x.new_zeros(x.shape[1]))

    def __call__(self, state: State) -> tuple[float, State]:
        """See `Step`."""
        size, dim = state.weight.shape
        new = state.weight.new_zeros
        sums = _Sums(new(()), new(size, dim + 1), new(size, (dim + 1) ** 2), new(dim + 1, dim + 1))
        for block in self.blocks:
            _add(sums, block, state)
        joint = torch.linalg.solve_ex(sums.by_column.unflatten(-1, (dim + 1, dim + 1)), sums.cross[..., None])[0][..., 0]
        residuals = self.squares - (joint * sums.cross).sum(-1)
        moments = sums.moments / self.num_rows
        after = self._state(joint[:, :-1], joint[:, -1], residuals, self.counts, moments[:-1, :-1], moments[:-1, -1])
        return float(sums.log_p / self.num_rows), after


def _add(sums: _Sums, block: _Block, state: State) -> None:
    """The E-step of a block of rows: adds its part to `sums`."""
    dim, scaled = state.weight.shape[1], state.weight / state.variance[:, None]
    identity = torch.eye(dim, dtype=scaled.dtype, device=scaled.device)
    products = (state.weight[:, :, None] * scaled[:, None, :]).flatten(1)
    factor = torch.linalg.cholesky_ex(identity + (block.patterns @ products).unflatten(-1, identity.shape))[0]
    covariance = torch.cholesky_inverse(factor)
    residual = (block.x - state.mean) * block.seen
    told = residual @ scaled
    z = (covariance[block.group] @ told[..., None])[..., 0]
    log_det = 2.0 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)[block.group]
    # r' C^-1 r at its minimum in z, where errors of z do not count, rather than as a difference of large numbers.
    left = residual - (z @ state.weight.mT) * block.seen
    squares = (left.square() / state.variance).sum(-1) + z.square().sum(-1)
    constant = block.seen @ (state.variance.log() + LOG_TWO_PI)
    sums.log_p += -0.5 * (constant + log_det + squares).sum()

    z = torch.nn.functional.pad(z, (0, 1), value=1.0)
    outer = (z[:, :, None] * z[:, None, :]).flatten(1)
    moments = outer.new_zeros(len(factor), outer.shape[1]).index_add_(0, block.group, outer)
    moments = moments.unflatten(-1, (dim + 1, dim + 1))
    moments[:, :-1, :-1] += torch.bincount(block.group, minlength=len(factor))[:, None, None] * covariance
    sums.moments += moments.sum(0)
    sums.by_column += block.patterns.mT @ moments.flatten(1)
    sums.cross += block.x.mT @ z
