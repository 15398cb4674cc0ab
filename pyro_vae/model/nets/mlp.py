"""Multi-layer perceptrons."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from pyro_vae.model.component import Component
from pyro_vae.rows import positive


class MLP(Component):
    """A multi-layer perceptron, (..., in_features) -> (..., out_features).

    Args:
        in_features: columns of the input.
        out_features: columns of the output; None ends in the last hidden layer and its activation (a body for heads).
        hidden: widths of the hidden layers, or the width of one.
        activation: a class of `torch.nn`, made anew after each hidden layer.

    Examples:
        >>> import torch
        >>> MLP(784, hidden=(400,)).out_features
        400
        >>> MLP(20, 784, hidden=(400,))(torch.zeros(5, 2, 20)).shape
        torch.Size([5, 2, 784])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int | None = None,
        hidden: int | Sequence[int] = (),
        activation: type[nn.Module] = nn.SiLU,
    ) -> None:
        super().__init__()
        hidden = (hidden,) if isinstance(hidden, int) else tuple(hidden)
        if out_features is None and not hidden:
            raise ValueError("An MLP without out_features needs at least one hidden layer: give hidden=(400,), say.")
        widths = (in_features, *hidden) if out_features is None else (in_features, *hidden, out_features)
        for width in widths:
            positive(width=width)
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(pairwise(widths)):
            layers.append(nn.Linear(before, after))
            if i < len(hidden):
                layers.append(activation())
        self.layers = nn.Sequential(*layers)
        self.in_features, self.out_features = in_features, widths[-1]
        self.hidden, self.activation = hidden, activation
        self._ends_hidden = out_features is None

    def settings(self) -> dict[str, Any]:
        """See `Component.settings`."""
        out = None if self._ends_hidden else self.out_features
        return {
            "in_features": self.in_features,
            "out_features": out,
            "hidden": self.hidden,
            "activation": self.activation,
        }

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"This MLP takes {self.in_features} columns, but was given shape {tuple(x.shape)}: "
                "flatten images to rows, or build it for the number of columns."
            )
        out: Tensor = self.layers(x)
        return out
