"""What every guide q(z | x) is.

`given` are the conditions, tensors (N, ...), see `pyro_vae.model.conditions`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from pyro_vae.model.component import Component
from pyro_vae.model.conditions import apply
from pyro_vae.rows import Rows

Density = Callable[[Tensor], Tensor]
"""z (N, D) -> log p(x, z) of the rows at hand, (N,), in nats."""


class Guide(Component):
    """q(z | x).

    To add one: subclass, set `latent_dim`, keep the encoder in `self.encoder`, return from `forward` a reparametrised
    distribution of batch shape (N,) and event shape (D,), and list the constructor's arguments in `settings`. Then add a
    line to the table in tests/model/components.py.
    """

    latent_dim: int
    encoder: nn.Module

    @abstractmethod
    def forward(self, x: Tensor, *given: Tensor) -> Any:
        """The distribution q(z | x), batch shape (N,), event shape (D,)."""

    def encode(self, x: Tensor, given: Rows) -> Tensor:
        """The encoder's features of x (N, *event_shape), told the conditions that it reads."""
        features: Tensor = apply(self.encoder, x, given=given)
        return features

    def refine(self, q: Any, log_joint: Density) -> Any:
        """What becomes of q(z | x) when log p(x, z) may be asked: nothing, unless the guide is semi-amortised."""
        return q

    def centre(self, q: Any) -> Tensor:
        """One point for a q(z | x) that `forward` returned, (N, D): its mean."""
        mean: Tensor = q.mean
        return mean
