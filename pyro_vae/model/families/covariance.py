"""Normals of whole rows, one covariance for all of them, of which numbers may be missing.

With o the numbers of a row that were seen, log p(x_o) is the density of N(m_o, S_oo): the rows and columns of the others
are left out of S. This is done with shapes that do not depend on the data: their residuals are zero, and S has there

* a full covariance: the rows and columns of the identity, so that one batch of Cholesky factors (N, d, d) serves;
* W W' + diag(s^2): rows of W that are zero, so that the Woodbury identity needs Cholesky factors (N, r, r) alone.

What is missing is drawn given what was seen by Matheron's rule: y ~ N(m, S), then y + S_.o S_oo^-1 (x_o - y_o).
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_vae.model.families.partial import OrMissing

NONE = torch.Size()
LOG_TWO_PI = math.log(2.0 * math.pi)


class CovarianceNormal(dist.TorchDistribution):
    """N(loc, S) of rows, S the same for all; to add one, implement what is abstract.

    Args:
        loc: m, (..., d).
        missing: whether NaN in a value is a number that was not seen.
        validate_args: see `torch.distributions.Distribution`.
    """

    has_rsample = True

    def __init__(self, loc: Tensor, *, missing: bool, validate_args: bool | None = None) -> None:
        self.loc, self.missing = loc, missing
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=validate_args)

    @property
    @abstractmethod
    def covariance_matrix(self) -> Tensor:
        """S, (d, d)."""

    @abstractmethod
    def noise(self, shape: Sequence[int]) -> Tensor:
        """Draws of N(0, S), (*shape, d)."""

    @abstractmethod
    def quadratic(self, residual: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor]:
        """log det S_oo and r' S_oo^-1 r.

        Args:
            residual: r, (..., d), zero where a number is missing.
            seen: which are not, boolean, (..., d) without some of the leading dimensions of `residual`; None for all.

        Returns:
            Both broadcast against residual.shape[:-1].
        """

    @abstractmethod
    def regress(self, residual: Tensor, seen: Tensor) -> Tensor:
        """S_.o S_oo^-1 r, (..., d), of residuals (..., d) with `seen` of the same shape."""

    @property
    def support(self) -> constraints.Constraint:
        """Real vectors, with NaN where that is allowed."""
        return constraints.independent(OrMissing(constraints.real), 1) if self.missing else constraints.real_vector

    @property
    def mean(self) -> Tensor:
        """m, (..., d)."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """The diagonal of S, (..., d)."""
        return self.covariance_matrix.diagonal().expand_as(self.loc)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> CovarianceNormal:
        """The same distribution with the batch shape `batch_shape`."""
        new = copy.copy(self)
        new._batch_shape = torch.Size(batch_shape)
        new.loc = self.loc.expand(*batch_shape, -1)
        return new

    def rsample(self, sample_shape: Sequence[int] = NONE) -> Tensor:
        """Complete rows."""
        return self.loc + self.noise((*sample_shape, *self._batch_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """log p of the numbers that were seen, (...)."""
        if self._validate_args:
            self._validate_sample(value)
        if not self.missing:
            log_det, squares = self.quadratic(value - self.loc, None)
            return -0.5 * (log_det + squares + value.shape[-1] * LOG_TWO_PI)
        value = value.expand(torch.broadcast_shapes(value.shape, self.loc.shape[-value.dim() :]))
        seen = ~value.isnan()
        residual = torch.where(seen, torch.where(seen, value, 0.0) - self.loc, 0.0)
        log_det, squares = self.quadratic(residual, seen)
        return -0.5 * (log_det + squares + seen.sum(-1).to(residual) * LOG_TWO_PI)

    def complete(self, x: Tensor) -> Tensor:
        """`x` (..., d) with its missing values drawn given z and those that were seen."""
        with torch.no_grad():
            draws = self.rsample()
            x = x.expand(draws.shape)
            seen = ~x.isnan()
            return torch.where(seen, x, draws + self.regress(torch.where(seen, x - draws, 0.0), seen))


def side_by_side(residual: Tensor, lead: torch.Size) -> Tensor:
    """Residuals (K..., *lead, d) as columns (*lead, d, K), so that factors (*lead, d, d) are not copied for K particles."""
    extra = residual.dim() - 1 - len(lead)
    residual = residual.expand(*residual.shape[:extra], *lead, residual.shape[-1])
    return residual.reshape(-1, *residual.shape[extra:]).movedim(0, -1)


def apart(values: Tensor, shape: torch.Size) -> Tensor:
    """Numbers (*lead, K) back in the order (K..., *lead) of `shape`."""
    return values.movedim(-1, 0).reshape(shape)


class FullNormal(CovarianceNormal):
    """S = L L'.

    Args:
        loc: m, (..., d).
        scale_tril: L, (d, d), lower triangular with a positive diagonal.
        missing: see `CovarianceNormal`.
        validate_args: see `torch.distributions.Distribution`.
    """

    arg_constraints = {"loc": constraints.real_vector, "scale_tril": constraints.lower_cholesky}  # noqa: RUF012

    def __init__(
        self, loc: Tensor, scale_tril: Tensor, *, missing: bool = False, validate_args: bool | None = None
    ) -> None:
        self.scale_tril = scale_tril
        super().__init__(loc, missing=missing, validate_args=validate_args)

    @property
    def covariance_matrix(self) -> Tensor:
        """S, (d, d)."""
        return self.scale_tril @ self.scale_tril.mT

    def noise(self, shape: Sequence[int]) -> Tensor:
        """Draws of N(0, S), (*shape, d)."""
        return torch.randn(*shape, *self._event_shape, dtype=self.loc.dtype, device=self.loc.device) @ self.scale_tril.mT

    def quadratic(self, residual: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `CovarianceNormal.quadratic`."""
        factor = self.scale_tril if seen is None else self._factors(seen)
        columns = side_by_side(residual, factor.shape[:-2])
        squares = torch.linalg.solve_triangular(factor, columns, upper=False).square().sum(-2)
        shape = torch.broadcast_shapes(residual.shape[:-1], factor.shape[:-2])
        return 2.0 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1), apart(squares, shape)

    def _factors(self, seen: Tensor) -> Tensor:
        """Cholesky factors of S with the identity's rows and columns for what is missing, (..., d, d)."""
        both = seen[..., :, None] & seen[..., None, :]
        identity = torch.eye(seen.shape[-1], dtype=self.loc.dtype, device=seen.device)
        factors: Tensor = torch.linalg.cholesky(torch.where(both, self.covariance_matrix, identity))
        return factors

    def regress(self, residual: Tensor, seen: Tensor) -> Tensor:
        """See `CovarianceNormal.regress`."""
        solved = torch.cholesky_solve(residual[..., None], self._factors(seen))[..., 0]
        return solved @ self.covariance_matrix


class LowRankNormal(CovarianceNormal):
    """S = W W' + diag(s^2), as in factor analysis.

    Args:
        loc: m, (..., d).
        factor: W, (d, r).
        scale: s, positive, (d,).
        missing: see `CovarianceNormal`.
        validate_args: see `torch.distributions.Distribution`.
    """

    arg_constraints = {  # noqa: RUF012 - torch's own spelling
        "loc": constraints.real_vector,
        "factor": constraints.independent(constraints.real, 2),
        "scale": constraints.independent(constraints.positive, 1),
    }

    def __init__(
        self, loc: Tensor, factor: Tensor, scale: Tensor, *, missing: bool = False, validate_args: bool | None = None
    ) -> None:
        self.factor, self.scale = factor, scale
        super().__init__(loc, missing=missing, validate_args=validate_args)

    @property
    def covariance_matrix(self) -> Tensor:
        """S, (d, d)."""
        return self.factor @ self.factor.mT + torch.diag(self.scale.square())

    def noise(self, shape: Sequence[int]) -> Tensor:
        """Draws of N(0, S), (*shape, d)."""
        common = torch.randn(*shape, self.factor.shape[-1], dtype=self.loc.dtype, device=self.loc.device)
        own = torch.randn(*shape, *self._event_shape, dtype=self.loc.dtype, device=self.loc.device)
        return common @ self.factor.mT + own * self.scale

    def _capacitance(self, seen: Tensor | None) -> tuple[Tensor, Tensor]:
        """B = W / s with zero rows for what is missing, (..., d, r), and the Cholesky factors of I + B' B, (..., r, r)."""
        scaled = self.factor / self.scale[:, None]
        scaled = scaled if seen is None else scaled * seen[..., None]
        identity = torch.eye(self.factor.shape[-1], dtype=self.loc.dtype, device=self.loc.device)
        return scaled, torch.linalg.cholesky(identity + scaled.mT @ scaled)

    def quadratic(self, residual: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `CovarianceNormal.quadratic`."""
        scaled, factor = self._capacitance(seen)
        standard = residual / self.scale
        columns = scaled.mT @ side_by_side(standard, factor.shape[:-2])
        explained = torch.linalg.solve_triangular(factor, columns, upper=False).square().sum(-2)
        shape = torch.broadcast_shapes(residual.shape[:-1], factor.shape[:-2])
        log_scale = self.scale.log() if seen is None else self.scale.log() * seen
        log_det = 2.0 * (log_scale.sum(-1) + factor.diagonal(dim1=-2, dim2=-1).log().sum(-1))
        return log_det, standard.square().sum(-1) - apart(explained, shape)

    def regress(self, residual: Tensor, seen: Tensor) -> Tensor:
        """See `CovarianceNormal.regress`."""
        scaled, factor = self._capacitance(seen)
        standard = (residual / self.scale)[..., None]
        solved = (standard - scaled @ torch.cholesky_solve(scaled.mT @ standard, factor))[..., 0] / self.scale
        return (solved @ self.factor) @ self.factor.mT + self.scale.square() * solved
