"""Normal likelihoods whose noise is correlated between the numbers of a row; the same for all rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.model.component import out_features, positive_from
from pyro_vae.model.families import covariance as families
from pyro_vae.model.likelihoods.likelihood import Likelihood
from pyro_vae.model.scales import Learned
from pyro_vae.rows import positive


def _columns(decoder: nn.Module, features: int | None) -> int:
    """d, as given and as the decoder says.

    Raises:
        ValueError: neither says, or they differ.
    """
    columns, size = getattr(decoder, "out_features", None), out_features(decoder, features)
    if columns not in (None, size):
        raise ValueError(f"features={features} does not fit a decoder of {columns} columns: leave features out.")
    positive(features=size)
    return size


def _located(loc: Tensor, z: Tensor, features: int) -> Tensor:
    """`loc` as it is, (..., d) for z (..., D); refused is another shape, which a covariance would broadcast against."""
    if loc.shape != (*z.shape[:-1], features):
        found = tuple(loc.shape[z.dim() - 1 :])
        raise ValueError(f"the decoder returns rows of shape {found}, and features={features} needs ({features},)")
    return loc


class FullNormal(Likelihood):
    """x ~ N(f(z), L L'), rows (d,), L learned.

    With `missing`, the likelihood of a row is the marginal of the numbers that were seen, by one Cholesky factor a row,
    (N, d, d), and what is missing is imputed given z and them.

    Args:
        decoder: f, (..., D) -> (..., d).
        features: d, where the decoder has no attribute `out_features`.
        initial: the diagonal of L at the start, the rest being zero.
        minimum: what the diagonal never falls below.
        missing: whether NaN in x is a missing value.
    """

    def __init__(
        self,
        decoder: nn.Module,
        features: int | None = None,
        initial: float = 1.0,
        minimum: float = 1e-3,
        *,
        missing: bool = False,
    ) -> None:
        super().__init__(decoder, missing=missing)
        self.features = _columns(decoder, features)
        diagonal = Learned((self.features,), initial, minimum).raw.detach()
        self.initial, self.minimum = initial, minimum
        self.raw = nn.Parameter(torch.diag(diagonal))  # what is above the diagonal is not used

    def settings(self) -> dict[str, Any]:
        """See `Component.settings`."""
        return {
            "decoder": self.decoder,
            "features": self.features,
            "initial": self.initial,
            "minimum": self.minimum,
            "missing": self.missing,
        }

    def forward(self, z: Tensor, *given: Tensor) -> Any:
        """N(f(z), L L'), batch shape z.shape[:-1]."""
        loc = _located(self.decode(z, given), z, self.features)
        return families.FullNormal(loc, self.scale_tril(), missing=self.missing)

    def scale_tril(self) -> Tensor:
        """L, (d, d)."""
        return self.raw.tril(-1) + torch.diag(positive_from(self.raw.diagonal(), self.minimum))

    def check_training(self, x: Tensor) -> None:
        """Refuse constant columns, which have a density without bound."""
        Learned((self.features,)).check_training(x)


class LowRankNormal(Likelihood):
    """x ~ N(f(z), W W' + diag(s^2)), rows (d,), W and s learned: noise with r common factors.

    With `missing`, the likelihood of a row is the marginal of the numbers that were seen, by one Cholesky factor a row,
    (N, r, r), and what is missing is imputed given z and them.

    Args:
        decoder: f, (..., D) -> (..., d).
        rank: r.
        features: d, where the decoder has no attribute `out_features`.
        initial: s at the start; W starts at draws of N(0, (initial / 10)^2), so that its columns differ.
        minimum: what s never falls below.
        missing: whether NaN in x is a missing value.
    """

    def __init__(
        self,
        decoder: nn.Module,
        rank: int,
        features: int | None = None,
        initial: float = 1.0,
        minimum: float = 1e-3,
        *,
        missing: bool = False,
    ) -> None:
        super().__init__(decoder, missing=missing)
        self.features = _columns(decoder, features)
        positive(rank=rank)
        self.rank, self.initial, self.minimum = rank, initial, minimum
        self.scale = Learned((self.features,), initial, minimum)
        self.factor = nn.Parameter(0.1 * initial * torch.randn(self.features, rank))

    def settings(self) -> dict[str, Any]:
        """See `Component.settings`."""
        return {
            "decoder": self.decoder,
            "rank": self.rank,
            "features": self.features,
            "initial": self.initial,
            "minimum": self.minimum,
            "missing": self.missing,
        }

    def forward(self, z: Tensor, *given: Tensor) -> Any:
        """N(f(z), W W' + diag(s^2)), batch shape z.shape[:-1]."""
        loc = _located(self.decode(z, given), z, self.features)
        return families.LowRankNormal(loc, self.factor, self.scale(z), missing=self.missing)

    def check_training(self, x: Tensor) -> None:
        """Refuse constant columns, which have a density without bound."""
        self.scale.check_training(x)
