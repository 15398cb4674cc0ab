"""A prior that is a module of the user's own."""

from __future__ import annotations

from typing import Any

from torch import nn

from pyro_vae.model.priors.prior import Prior


class Custom(Prior):
    """Any module whose `forward()` returns p(z), batch shape (), event shape (D,). `VAE` makes one of a plain module.

    Args:
        module: owns the parameters.

    Raises:
        TypeError: its `forward()` needs arguments, or returns no distribution.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        try:
            self.latent_dim = int(module().event_shape[-1])
        except (AttributeError, IndexError, TypeError) as error:
            raise TypeError(
                f"prior is a {type(module).__name__}: give a pv.priors.Prior, or a module whose forward() returns a "
                f"distribution of event shape (D,) ({error})."
            ) from error

    def settings(self) -> dict[str, Any]:
        """See `Component.settings`."""
        return {"module": self.module}

    def forward(self) -> Any:
        """What the module returns."""
        return self.module()
