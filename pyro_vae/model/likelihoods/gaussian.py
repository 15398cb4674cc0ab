"""Normal likelihoods whose dimensions are independent given z."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pyro_vae.model.families.normal import Normal as SharedNormal
from pyro_vae.model.likelihoods.likelihood import Elementwise
from pyro_vae.model.scales import Fixed, Learned, Scale


class Normal(Elementwise):
    """x ~ N(f(z), s^2 I).

    Args:
        decoder: f, (..., D) -> (..., *event_shape).
        scale: s: a number (fixed), or a `Scale`: `Fixed`, `Learned` (shared or per dimension), `FromNetwork`.
        missing: whether NaN in x is a missing value.

    Examples:
        >>> import torch
        >>> from pyro_vae.model.nets import MLP
        >>> Normal(MLP(2, 5), scale=0.25)(torch.zeros(3, 2)).event_shape
        torch.Size([5])
    """

    def __init__(self, decoder: nn.Module, scale: float | Scale, *, missing: bool = False) -> None:
        super().__init__(decoder, missing=missing)
        self.scale = scale if isinstance(scale, Scale) else Fixed(scale)
        columns = getattr(decoder, "out_features", None)
        if isinstance(self.scale, Learned) and len(self.scale.shape) == 1 and columns not in (None, *self.scale.shape):
            raise ValueError(f"Learned({self.scale.shape[0]}) does not fit a decoder of {columns} columns: give {columns}.")

    def settings(self) -> dict[str, Any]:
        """See `Component.settings`."""
        return {"decoder": self.decoder, "scale": self.scale, "missing": self.missing}

    def elements(self, z: Tensor, *given: Tensor) -> Any:
        """N(f(z), s^2)."""
        return SharedNormal(self.decode(z, given), self.scale(z, *given))

    def check_training(self, x: Tensor) -> None:
        """See `Scale.check_training`."""
        self.scale.check_training(x)
