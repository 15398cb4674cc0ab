"""Counts on a scale that networks can read."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pyro_vae.model.component import Component, out_features


class Log1p(Component):
    """net(log(1 + x)), for an encoder of counts (Lopez et al. 2018, scVI): raw counts span orders of magnitude.

    Below zero, where a `VampPrior` may put its pseudo-inputs, it goes on as -log(1 - x).

    Args:
        net: (..., columns) -> (..., out_features).
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.out_features = net, out_features(net)

    def settings(self) -> dict[str, Any]:
        """See `Component.settings`."""
        return {"net": self.net}

    def forward(self, x: Tensor) -> Tensor:
        """(..., columns) -> (..., out_features)."""
        out: Tensor = self.net(x.sign() * x.abs().log1p())
        return out
