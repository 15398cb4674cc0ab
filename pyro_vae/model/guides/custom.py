"""A guide that is a module of the user's own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pyro_vae.model.guides.guide import Guide


class Custom(Guide):
    """Any module whose `forward(x)` returns q(z | x), batch shape (N,), event shape (D,). `VAE` makes it of a plain one.

    Args:
        encoder: owns the parameters.
        latent_dim: D.
    """

    def __init__(self, encoder: nn.Module, latent_dim: int) -> None:
        super().__init__()
        self.encoder, self.latent_dim = encoder, latent_dim

    def settings(self) -> dict[str, Any]:
        """See `Component.settings`."""
        return {"encoder": self.encoder, "latent_dim": self.latent_dim}

    def forward(self, x: Tensor, *given: Tensor) -> Any:
        """What the module returns."""
        return self.encode(x, given)
