"""What every prior p(z) is."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from pyro_vae.model.component import Component


class Prior(Component):
    """p(z).

    To add one: subclass, set `latent_dim`, return from `forward` a distribution of batch shape () and event shape (D,)
    made of the module's own parameters and buffers, and list the constructor's arguments in `settings`. Then add a line to
    the table in tests/model/components.py. A prior p(z | y) that reads conditions names them in `reads` and is called with
    them; its batch shape is (N,).

    Attributes:
        latent_dim: D.
        reads_guide: whether `forward` is handed the VAE's guide (`VampPrior`): no parameter of it is registered twice.
    """

    latent_dim: int
    reads_guide: ClassVar[bool] = False

    @abstractmethod
    def forward(self) -> Any:
        """The distribution p(z), batch shape (), event shape (D,)."""
