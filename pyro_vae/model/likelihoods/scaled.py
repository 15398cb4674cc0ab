"""Likelihoods with a location f(z) and a scale, and what they refuse."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from pyro_vae.model.likelihoods.likelihood import Elementwise
from pyro_vae.model.scales import Fixed, Optimal, Scale


def as_scale(scale: float | Scale, name: str = "scale") -> Scale:
    """A scale as it is, a number (or one for each dimension) as one that is not learned.

    Raises:
        TypeError: anything else, by the argument's `name`.
    """
    if isinstance(scale, Scale):
        return scale
    if not isinstance(scale, (Real, Sequence, Tensor, np.ndarray)) or isinstance(scale, str):
        raise TypeError(
            f"{name}={scale!r} is no scale: give a number, Learned(), FromNetwork(net) or, for a Normal, Optimal()."
        )
    return Fixed(scale)


def require_columns(name: str, scale: Scale, decoder: nn.Module) -> None:
    """Refuse a scale for each of n columns where the decoder returns another number of them.

    Raises:
        ValueError: names both numbers.
    """
    columns = getattr(decoder, "out_features", None)
    shape: tuple[int, ...] = getattr(scale, "shape", ())
    if len(shape) == 1 and columns not in (None, 1, *shape):
        kind = type(scale).__name__
        raise ValueError(f"{name}={kind}({shape[0]}) does not fit a decoder of {columns} columns: give {kind}({columns}).")


class Scaled(Elementwise):
    """p(x | z) = prod_j p(x_j; f(z)_j, s_j): to add one, implement `elements`.

    Args:
        decoder: f, (..., D) -> (..., *event_shape).
        scale: s: a number (fixed), or a `Scale`: `Fixed`, `Learned` (shared or per dimension), `FromNetwork`.
        missing: whether NaN in x is a missing value.

    Attributes:
        takes_optimal: whether `Optimal`, the optimum of a Normal, is this likelihood's optimum too.
    """

    takes_optimal: ClassVar[bool] = False

    def __init__(self, decoder: nn.Module, scale: float | Scale, *, missing: bool = False) -> None:
        super().__init__(decoder, missing=missing)
        self.scale = as_scale(scale)
        if isinstance(self.scale, Optimal) and not self.takes_optimal:
            raise ValueError(
                f"scale={self.scale!r} is the optimum of a Normal, and this is a {type(self).__name__}: give Learned()."
            )
        require_columns("scale", self.scale, decoder)

    def settings(self) -> dict[str, Any]:
        """See `Component.settings`."""
        return {"decoder": self.decoder, "scale": self.scale, "missing": self.missing}

    def check_training(self, x: Tensor) -> None:
        """See `Scale.check_training`: a density has no bound where a scale can go to zero, a probability has."""
        if not self.discrete:
            self.scale.check_training(x)
