"""Counts on a scale that networks can read."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pyro_vae.model.component import Component, out_features


class Log1p(Component):
    """net(log(1 + x)), for an encoder of counts (Lopez et al. 2018, scVI): raw counts span orders of magnitude.

    Below zero, where a `VampPrior` may put its pseudo-inputs, it goes on as -log(1 - x). A condition that `net` reads goes
    to it unchanged.

    Args:
        net: (..., columns) -> (..., out_features).
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.out_features = net, out_features(net)
        self.reads: tuple[int, ...] = getattr(net, "reads", ())
        if isinstance(inputs := getattr(net, "in_features", None), int):
            self.in_features = inputs

    def settings(self) -> dict[str, Any]:
        """See `Component.settings`."""
        return {"net": self.net}

    def forward(self, x: Tensor, *given: Tensor) -> Tensor:
        """(..., columns), and what `net` reads, -> (..., out_features)."""
        out: Tensor = self.net(x.sign() * x.abs().log1p(), *given)
        return out
