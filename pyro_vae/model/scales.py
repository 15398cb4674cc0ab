"""Scales s of a likelihood such as N(f(z), s^2): fixed, learned, or given by a network.

A Gaussian density grows without bound as s -> 0 wherever the decoder hits the data, so every scale that is learned is
softplus(raw) + minimum. What data could still drive it there (constant columns, if each has a scale of its own) is refused
before training, see `Scale.check_training`.
"""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.model.component import Component, positive_from
from pyro_vae.model.conditions import apply
from pyro_vae.rows import row_blocks


class Scale(Component):
    """s as a function of the latents; add one by subclassing."""

    @abstractmethod
    def forward(self, z: Tensor, *given: Tensor) -> Tensor:
        """The scale at z (..., D): broadcasts against the decoder's output (..., *event_shape)."""

    def check_training(self, x: Tensor) -> None:
        """Refuse or warn of training data on which this scale has no finite optimum; `x` (N, *event_shape)."""


class Fixed(Scale):
    """A scale that is not learned.

    Args:
        value: positive, one number or one for each dimension of the event.
    """

    value: Tensor

    def __init__(self, value: float | Sequence[float] | Tensor) -> None:
        super().__init__()
        # Read on the CPU: a tensor on the default device may have no values to read ("meta").
        numbers = torch.as_tensor(value, device="cpu")
        if not bool(((numbers > 0) & torch.isfinite(numbers)).all()):
            raise ValueError(f"scale={value} must be positive and finite.")
        self.given = float(value) if isinstance(value, (int, float)) else numbers.tolist()
        self.register_buffer("value", torch.as_tensor(value, dtype=torch.get_default_dtype()))

    def settings(self) -> dict[str, Any]:
        """See `Component.settings`."""
        return {"value": self.given}

    def forward(self, z: Tensor, *given: Tensor) -> Tensor:
        """The value, whatever z."""
        return self.value


class Learned(Scale):
    """A free positive parameter.

    Args:
        shape: () for one scale shared by all dimensions, the event's shape for one scale each.
        initial: where it starts.
        minimum: what it never falls below.
    """

    def __init__(self, shape: int | Sequence[int] = (), initial: float = 1.0, minimum: float = 1e-3) -> None:
        super().__init__()
        self.shape = (shape,) if isinstance(shape, int) else tuple(shape)
        if not 0.0 < minimum < initial:
            raise ValueError(f"initial={initial} must lie above minimum={minimum}, and both above 0.")
        self.initial, self.minimum = initial, minimum
        # The inverse of the softplus, in the form that does not overflow.
        raw = initial - minimum + math.log(-math.expm1(minimum - initial))
        self.raw = nn.Parameter(torch.full(self.shape, raw))

    def settings(self) -> dict[str, Any]:
        """See `Component.settings`."""
        return {"shape": self.shape, "initial": self.initial, "minimum": self.minimum}

    def forward(self, z: Tensor, *given: Tensor) -> Tensor:
        """softplus(raw) + minimum, of shape `shape`."""
        return positive_from(self.raw, self.minimum)

    def check_training(self, x: Tensor) -> None:
        """See `Scale.check_training`."""
        _check_constant_columns(x, shared=not self.shape)


class FromNetwork(Scale):
    """A scale that a network computes from z, one for each dimension of the event.

    Args:
        net: (..., D) -> (..., *event_shape), before the softplus.
        minimum: what it never falls below.
    """

    def __init__(self, net: nn.Module, minimum: float = 1e-3) -> None:
        super().__init__()
        if minimum <= 0.0:
            raise ValueError(f"minimum={minimum} must be above 0: a density with scale 0 has no bound.")
        self.net, self.minimum = net, minimum

    def settings(self) -> dict[str, Any]:
        """See `Component.settings`."""
        return {"net": self.net, "minimum": self.minimum}

    def forward(self, z: Tensor, *given: Tensor) -> Tensor:
        """softplus(net(z)) + minimum, (..., *event_shape)."""
        return positive_from(apply(self.net, z, given=given), self.minimum)

    def check_training(self, x: Tensor) -> None:
        """See `Scale.check_training`."""
        _check_constant_columns(x, shared=False)


def _check_constant_columns(x: Tensor, *, shared: bool) -> None:
    constant = torch.ones(x[0].numel(), dtype=torch.bool, device=x.device)
    for part in row_blocks(len(x)):
        constant &= (x[part].flatten(1) == x[:1].flatten(1)).all(0) if x.dim() > 1 else (x[part] == x[0]).all()
    if len(x) < 2 or not bool(constant.any()):
        return
    columns = constant.nonzero().flatten().tolist()
    found = f"{len(columns)} of {len(constant)} columns of x are constant (the first is column {columns[0]})"
    if shared:
        warnings.warn(
            f"{found}: the model predicts them without error, so the learned scale is smaller than the others need.",
            stacklevel=2,
        )
    else:
        raise ValueError(
            f"{found}: with a scale of its own such a column has a density without bound. Drop these columns, "
            "dequantise the data (pv.data.dequantise), or share one scale: Learned()."
        )
