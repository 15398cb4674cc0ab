"""Local shapes of posteriors: precision matrices P of Gaussians, one for each of n points.

Everything that a proposal, a Newton step or a Hamiltonian transition asks of a covariance is a product with a square root
P = R R':

* e ~ N(0, I)  ->  R'^-1 e ~ N(0, P^-1)            `colour`
* deviation d  ->  R' d, whose square is d' P d      `whiten`
* gradient g   ->  R^-1 g, the gradient in whitened coordinates   `precondition`

`Dense` has the Cholesky factor. `LowRank` has r eigenvectors and one curvature for all other directions, and holds nothing
of size D^2.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class Shape(ABC):
    """n precision matrices of size D x D, float64. Vectors are (K, n, D): K for each of them."""

    @abstractmethod
    def whiten(self, delta: Tensor) -> Tensor:
        """R' d, (K, n, D)."""

    @abstractmethod
    def colour(self, noise: Tensor) -> Tensor:
        """R'^-1 e, (K, n, D)."""

    @abstractmethod
    def precondition(self, gradient: Tensor) -> Tensor:
        """R^-1 g, (K, n, D)."""

    @property
    @abstractmethod
    def half_log_det(self) -> Tensor:
        """log |P| / 2, (n,)."""

    @abstractmethod
    def take(self, index: Tensor) -> Shape:
        """The matrices at `index`."""

    @classmethod
    @abstractmethod
    def join(cls, parts: Sequence[Shape]) -> Shape:
        """The matrices of all parts, which are of this class."""


@dataclass(frozen=True)
class Dense(Shape):
    """P = L L'.

    Attributes:
        factor: Cholesky factors L, (n, D, D).
        inverse: L^-1, (n, D, D): batches of products are many times faster than batches of triangular solutions.
    """

    factor: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, factor: Tensor) -> Dense:
        """From Cholesky factors (n, D, D)."""
        unit = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
        return cls(factor, torch.linalg.solve_triangular(factor, unit, upper=False))

    def whiten(self, delta: Tensor) -> Tensor:
        """See `Shape`."""
        return (delta.transpose(0, 1) @ self.factor).transpose(0, 1)

    def colour(self, noise: Tensor) -> Tensor:
        """See `Shape`."""
        return (noise.transpose(0, 1) @ self.inverse).transpose(0, 1)

    def precondition(self, gradient: Tensor) -> Tensor:
        """See `Shape`."""
        return (gradient.transpose(0, 1) @ self.inverse.mT).transpose(0, 1)

    @property
    def half_log_det(self) -> Tensor:
        """See `Shape`."""
        return self.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def take(self, index: Tensor) -> Dense:
        """See `Shape`."""
        return Dense(self.factor[index], self.inverse[index])

    @classmethod
    def unit(cls, count: int, dim: int, device: torch.device) -> Dense:
        """P = I, `count` times."""
        unit = torch.eye(dim, dtype=torch.float64, device=device).repeat(count, 1, 1)
        return cls(unit, unit.clone())

    @classmethod
    def join(cls, parts: Sequence[Shape]) -> Dense:
        """See `Shape`."""
        dense = [part for part in parts if isinstance(part, Dense)]
        return cls(torch.cat([part.factor for part in dense]), torch.cat([part.inverse for part in dense]))


@dataclass(frozen=True)
class LowRank(Shape):
    """P = b I + V diag(a - b) V', of which R = R' is the symmetric square root.

    Attributes:
        vectors: orthonormal V, (n, D, r).
        curvature: a along them, (n, r), positive.
        rest: b in every direction that is orthogonal to them, (n,), positive.
    """

    vectors: Tensor
    curvature: Tensor
    rest: Tensor

    def _power(self, exponent: float, vector: Tensor) -> Tensor:
        """P^exponent times vectors (K, n, D)."""
        rest = self.rest**exponent
        along = torch.einsum("ndr,knd->knr", self.vectors, vector)
        extra = torch.einsum("ndr,knr->knd", self.vectors, along * (self.curvature**exponent - rest[:, None]))
        return rest[:, None] * vector + extra

    def whiten(self, delta: Tensor) -> Tensor:
        """See `Shape`."""
        return self._power(0.5, delta)

    def colour(self, noise: Tensor) -> Tensor:
        """See `Shape`."""
        return self._power(-0.5, noise)

    def precondition(self, gradient: Tensor) -> Tensor:
        """See `Shape`."""
        return self._power(-0.5, gradient)

    @property
    def half_log_det(self) -> Tensor:
        """See `Shape`."""
        others = self.vectors.shape[1] - self.vectors.shape[2]
        return 0.5 * (self.curvature.log().sum(-1) + others * self.rest.log())

    def take(self, index: Tensor) -> LowRank:
        """See `Shape`."""
        return LowRank(self.vectors[index], self.curvature[index], self.rest[index])

    @classmethod
    def unit(cls, count: int, dim: int, rank: int, device: torch.device) -> LowRank:
        """P = I, `count` times."""
        vectors = torch.eye(dim, rank, dtype=torch.float64, device=device).repeat(count, 1, 1)
        one = torch.ones(count, dtype=torch.float64, device=device)
        return cls(vectors, one[:, None].repeat(1, rank), one)

    @classmethod
    def join(cls, parts: Sequence[Shape]) -> LowRank:
        """See `Shape`."""
        low = [part for part in parts if isinstance(part, LowRank)]
        return cls(*(torch.cat([getattr(part, name) for part in low]) for name in ("vectors", "curvature", "rest")))


def positive(matrix: Tensor, least: Tensor) -> Dense:
    """Dense precisions from symmetric matrices (n, D, D), curvatures made positive and at least `least`.

    Negative curvature keeps its size with the other sign. A direction in which the log joint is flat at the mode (along a
    ring, say) would otherwise get a Gaussian of any width; no posterior is much wider than the prior.
    """
    matrix = torch.nan_to_num(matrix, nan=0.0, posinf=0.0, neginf=0.0)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    unit = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    shape = Dense.of(torch.where(failed[:, None, None] > 0, unit, factor))
    bad = ((failed > 0) | (shape.inverse.square().sum(-2).amax(-1) * least > 1.0)).nonzero().flatten()
    if len(bad):
        values, vectors = torch.linalg.eigh(matrix[bad])
        size = torch.maximum(values.abs(), least)
        mended = Dense.of(torch.linalg.cholesky(vectors @ torch.diag_embed(size) @ vectors.mT))
        shape.factor[bad], shape.inverse[bad] = mended.factor, mended.inverse
    return shape
