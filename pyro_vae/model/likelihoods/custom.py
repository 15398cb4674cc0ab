"""A likelihood that is a module of the user's own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pyro_vae.model.likelihoods.likelihood import Likelihood


class Custom(Likelihood):
    """Any module whose `forward(z)` returns p(x | z), batch shape z.shape[:-1]. `VAE` makes one of a plain module.

    Args:
        decoder: owns the parameters.
    """

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__(decoder)

    def settings(self) -> dict[str, Any]:
        """See `Component.settings`."""
        return {"decoder": self.decoder}

    def forward(self, z: Tensor, *given: Tensor) -> Any:
        """What the module returns."""
        return self.decode(z, given)
