"""Likelihoods of numbers between 0 and 1."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pyro_vae.model.families import bounded as families
from pyro_vae.model.likelihoods.likelihood import Elementwise
from pyro_vae.model.likelihoods.scaled import as_scale, require_columns
from pyro_vae.model.scales import Optimal, Scale


class ContinuousBernoulli(Elementwise):
    """p(x_j | z) = l exp(l x_j) / (exp(l) - 1), l = f(z)_j, on [0, 1].

    This is the density that "binary cross-entropy on grey levels" is not: a Bernoulli's formula with its normaliser,
    log C = log(l / tanh(l / 2)) (Loaiza-Ganem & Cunningham 2019, arXiv:1907.06845). Grey levels n / 255 are no
    draws of a density either: compare with other models after pv.data.dequantise.

    Args:
        decoder: f, the logits, (..., D) -> (..., *event_shape).
        missing: whether NaN in x is a missing value.
    """

    takes = "numbers in [0, 1] alone"
    mend = "rescale it (grey levels: divide by 255)"

    def settings(self) -> dict[str, Any]:
        """See `Component.settings`."""
        return {"decoder": self.decoder, "missing": self.missing}

    def elements(self, z: Tensor, *given: Tensor) -> Any:
        """Continuous Bernoulli with logits f(z)."""
        return families.ContinuousBernoulli(self.decode(z, given))

    def inside(self, x: Tensor) -> Tensor:
        """See `Likelihood.inside`."""
        return (x >= 0) & (x <= 1)


class Beta(Elementwise):
    """x_j ~ Beta(m k, (1 - m) k), m = sigmoid(f(z)_j), on the open interval (0, 1) (Ferrari & Cribari-Neto 2004).

    The mean is m, the variance m (1 - m) / (k + 1).

    Args:
        decoder: f, the logits of the mean, (..., D) -> (..., *event_shape).
        concentration: k: a number (fixed), or a `Scale`: `Fixed`, `Learned` (shared or per dimension), `FromNetwork`.
        missing: whether NaN in x is a missing value.
    """

    takes = "numbers strictly between 0 and 1 alone"
    mend = (
        "squeeze it, (x * (n - 1) + 0.5) / n with n the number of rows, or take ContinuousBernoulli, which allows 0 and 1"
    )

    def __init__(self, decoder: nn.Module, concentration: float | Scale, *, missing: bool = False) -> None:
        super().__init__(decoder, missing=missing)
        self.concentration = as_scale(concentration, "concentration")
        if isinstance(self.concentration, Optimal):
            raise ValueError(f"concentration={self.concentration!r} is the optimal scale of a Normal: give Learned().")
        require_columns("concentration", self.concentration, decoder)

    def settings(self) -> dict[str, Any]:
        """See `Component.settings`."""
        return {"decoder": self.decoder, "concentration": self.concentration, "missing": self.missing}

    def elements(self, z: Tensor, *given: Tensor) -> Any:
        """Beta by the logits of its mean."""
        return families.Beta(self.decode(z, given), self.concentration(z, *given))

    def inside(self, x: Tensor) -> Tensor:
        """See `Likelihood.inside`."""
        return (x > 0) & (x < 1)

    def check_training(self, x: Tensor) -> None:
        """See `Scale.check_training`: a constant column is fitted by a concentration without bound."""
        self.concentration.check_training(x)
