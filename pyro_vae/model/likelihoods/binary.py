"""A likelihood of yes and no."""

from __future__ import annotations

from typing import Any, ClassVar

import pyro.distributions as dist
from torch import Tensor

from pyro_vae.model.likelihoods.likelihood import Elementwise


class Bernoulli(Elementwise):
    """x_j ~ Bernoulli(sigmoid(f(z)_j)), for data in {0, 1} only: grey levels have no Bernoulli likelihood.

    Args:
        decoder: f, the logits, (..., D) -> (..., *event_shape).
        missing: whether NaN in x is a missing value.
    """

    discrete: ClassVar[bool] = True
    takes = "0 and 1 alone"
    mend = (
        "binarise it (pv.data.binarise(x) draws, pv.data.threshold(x) cuts; in fit: transform=pv.data.binarise), or take "
        "ContinuousBernoulli for grey levels in [0, 1]"
    )

    def settings(self) -> dict[str, Any]:
        """See `Component.settings`."""
        return {"decoder": self.decoder, "missing": self.missing}

    def elements(self, z: Tensor, *given: Tensor) -> Any:
        """Bernoulli with logits f(z)."""
        return dist.Bernoulli(logits=self.decode(z, given))

    def inside(self, x: Tensor) -> Tensor:
        """See `Likelihood.inside`."""
        return (x == 0) | (x == 1)
