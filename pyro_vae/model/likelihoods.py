"""Likelihoods p(x | z): `forward(z)` returns the distribution of one row given its latents; each owns its decoder.

With z of shape (..., D) the decoder returns (..., *event_shape) and the distribution has batch shape (...), so the same
object serves rows (N, D) and particles (K, N, D).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import pyro.distributions as dist
from torch import Tensor, nn

from pyro_vae.model.component import Component
from pyro_vae.model.normal import Normal as SharedNormal
from pyro_vae.model.scales import Fixed, FromNetwork, Learned, Scale
from pyro_vae.rows import row_blocks

__all__ = ["Bernoulli", "Fixed", "FromNetwork", "Learned", "Likelihood", "Normal", "Scale"]


class Likelihood(Component):
    """p(x | z).

    To add one: subclass, keep the decoder in `self.decoder`, return from `forward` a distribution whose event covers the
    whole row (`to_event`), say in `check` which data it refuses and how to mend them, and list the constructor's arguments
    in `settings`. Then add a line to the table in tests/model/components.py.
    """

    decoder: nn.Module

    @abstractmethod
    def forward(self, z: Tensor) -> Any:
        """The distribution p(x | z), batch shape z.shape[:-1]."""

    def check(self, x: Tensor) -> None:
        """Refuse rows (N, *event_shape) outside the support, with a ValueError that names a value and the mend."""

    def check_training(self, x: Tensor) -> None:
        """Refuse training data on which the likelihood has no finite maximum."""


class Normal(Likelihood):
    """x ~ N(f(z), s^2 I).

    Args:
        decoder: f, (..., D) -> (..., *event_shape).
        scale: s: a number (fixed), or a `Scale`: `Fixed`, `Learned` (shared or per dimension), `FromNetwork`.

    Examples:
        >>> import torch
        >>> from pyro_vae.model.nets import MLP
        >>> Normal(MLP(2, 5), scale=0.25)(torch.zeros(3, 2)).event_shape
        torch.Size([5])
    """

    def __init__(self, decoder: nn.Module, scale: float | Scale) -> None:
        super().__init__()
        self.decoder = decoder
        self.scale = scale if isinstance(scale, Scale) else Fixed(scale)
        columns = getattr(decoder, "out_features", None)
        if isinstance(self.scale, Learned) and len(self.scale.shape) == 1 and columns not in (None, *self.scale.shape):
            raise ValueError(f"Learned({self.scale.shape[0]}) does not fit a decoder of {columns} columns: give {columns}.")

    def settings(self) -> dict[str, Any]:
        """See `Component.settings`."""
        return {"decoder": self.decoder, "scale": self.scale}

    def forward(self, z: Tensor) -> Any:
        """N(f(z), s^2), the event being everything but the dimensions that z counts rows with."""
        loc = self.decoder(z)
        return SharedNormal(loc, self.scale(z)).to_event(loc.dim() - z.dim() + 1)

    def check_training(self, x: Tensor) -> None:
        """See `Scale.check_training`."""
        self.scale.check_training(x)


class Bernoulli(Likelihood):
    """x_j ~ Bernoulli(sigmoid(f(z)_j)), for data in {0, 1} only: grey levels have no Bernoulli likelihood.

    Args:
        decoder: f, the logits, (..., D) -> (..., *event_shape).
    """

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def settings(self) -> dict[str, Any]:
        """See `Component.settings`."""
        return {"decoder": self.decoder}

    def forward(self, z: Tensor) -> Any:
        """The distribution with logits f(z)."""
        logits = self.decoder(z)
        return dist.Bernoulli(logits=logits).to_event(logits.dim() - z.dim() + 1)

    def check(self, x: Tensor) -> None:
        """See `Likelihood.check`."""
        for part in row_blocks(len(x)):
            flat = x[part].reshape(len(x[part]), -1)
            outside = (flat != 0) & (flat != 1)
            if not bool(outside.any()):
                continue
            row, column = outside.nonzero()[0].tolist()
            raise ValueError(
                f"x has the value {float(flat[row, column]):.4g} in row {part.start + row}, column {column}, and Bernoulli "
                "takes 0 and 1 alone: binarise it (pv.data.binarise(x) draws, pv.data.threshold(x) cuts; in fit: "
                "transform=pv.data.binarise)."
            )
