"""A prior that is a module of the user's own."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.model import conditions
from pyro_vae.model.priors.prior import Prior
from pyro_vae.parameters import evaluating


class Custom(Prior):
    """Any module whose `forward()` returns p(z), batch shape (), event shape (D,). `VAE` makes one of a plain module.

    One that reads conditions names them in `reads`, and its `forward(y)` returns p(z | y), batch shape (N,).

    Args:
        module: owns the parameters.

    Raises:
        TypeError: its `forward()` needs other arguments, or returns no distribution.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.reads: tuple[int, ...] = getattr(module, "reads", ())
        like = next(itertools.chain(module.parameters(), module.buffers()), torch.zeros(()))
        try:
            with torch.no_grad(), evaluating({"prior": module}):
                p = conditions.apply(module, given=conditions.examples(module, like))
            self.latent_dim = int(p.event_shape[-1])
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            call = "forward(y)" if self.reads else "forward()"
            raise TypeError(
                f"prior is a {type(module).__name__}: give a pv.priors.Prior, or a module whose {call} returns a "
                f"distribution of event shape (D,) ({error})."
            ) from error

    def settings(self) -> dict[str, Any]:
        """See `Component.settings`."""
        return {"module": self.module}

    def forward(self, *given: Tensor) -> Any:
        """What the module returns, told the conditions that it reads."""
        return self.module(*given)
