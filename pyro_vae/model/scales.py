"""Scales s of a likelihood such as N(f(z), s^2): fixed, learned, at their optimum, or given by a network.

A Gaussian density grows without bound as s -> 0 wherever the decoder hits the data, so every scale that is learned is
softplus(raw) + minimum. What data could still drive it there (constant columns, if each has a scale of its own) is refused
before training, see `Scale.check_training`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.model.component import Component, positive_from
from pyro_vae.model.conditions import apply
from pyro_vae.rows import positive, row_blocks
from pyro_vae.warn import warn


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


class Optimal(Scale):
    """The scale at which a Normal likelihood has its maximum, given f: no parameter (Rybkin, Daniilidis & Levine 2021).

    While x is seen in training,

        s^2 = mean over rows, particles and dimensions of (x - f(z))^2,

    arXiv:2006.13202, "optimal sigma-VAE". Judged, s is frozen: the root of the running mean of s^2 over training
    batches, an exponential mean after `window` batches and the plain mean before; so the density of one row never depends
    on the others. Before any training it is `initial`.

    No gradient goes through s. It need not: at the optimum the derivative of the batch's log-likelihood with respect to s
    is zero, so the gradient with s plugged in is the one with s held fixed (the envelope theorem). This holds for a sum
    over rows, as in the ELBO; with particles weighted unevenly (IWAE) it is an approximation.

    Args:
        shape: () for one scale shared by all dimensions, the event's shape for one scale each.
        initial: s before any training.
        minimum: what it never falls below.
        window: how many batches the running mean goes back.
    """

    squares: Tensor
    batches: Tensor

    def __init__(
        self, shape: int | Sequence[int] = (), initial: float = 1.0, minimum: float = 1e-3, window: int = 20
    ) -> None:
        super().__init__()
        self.shape = (shape,) if isinstance(shape, int) else tuple(shape)
        if not 0.0 < minimum < initial:
            raise ValueError(f"initial={initial} must lie above minimum={minimum}, and both above 0.")
        positive(window=window)
        self.initial, self.minimum, self.window = initial, minimum, window
        self.register_buffer("squares", torch.full(self.shape, initial**2))
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))

    def settings(self) -> dict[str, Any]:
        """See `Component.settings`."""
        return {"shape": self.shape, "initial": self.initial, "minimum": self.minimum, "window": self.window}

    def forward(self, z: Tensor, *given: Tensor) -> Tensor:
        """The frozen s, of shape `shape`."""
        return self.squares.sqrt().clamp(min=self.minimum)

    def seeing(self, residual: Tensor) -> Tensor:
        """The optimal s of these residuals, of shape `shape`, which the running mean takes note of.

        Args:
            residual: x - f(z), (..., N, *event_shape); NaN where x is missing.
        """
        with torch.no_grad():
            seen = ~residual.isnan()
            leading = list(range(residual.dim() - len(self.shape)))
            counts = seen.sum(leading) if leading else seen.long()
            sums = torch.where(seen, residual, 0.0).square()
            sums = sums.sum(leading) if leading else sums
            # Where a batch shows nothing of a dimension, its scale stays what it was.
            squares = torch.where(counts > 0, sums / counts.clamp(min=1), self.squares)
            self.batches += 1
            rate = 1.0 / self.batches.clamp(max=self.window).to(squares)
            self.squares += rate * (squares - self.squares)
            return squares.sqrt().clamp(min=self.minimum)

    def check_training(self, x: Tensor) -> None:
        """See `Scale.check_training`."""
        _check_constant_columns(x, shared=not self.shape)


def _check_constant_columns(x: Tensor, *, shared: bool) -> None:
    size = x[0].numel()
    least, most = x.new_full((size,), math.inf), x.new_full((size,), -math.inf)
    for part in row_blocks(len(x)):
        flat = x[part].reshape(len(x[part]), -1)
        missing = flat.isnan()
        least = torch.minimum(least, torch.where(missing, math.inf, flat).amin(0))
        most = torch.maximum(most, torch.where(missing, -math.inf, flat).amax(0))
    constant = least == most
    if len(x) < 2 or not bool(constant.any()):
        return
    columns = constant.nonzero().flatten().tolist()
    found = f"{len(columns)} of {len(constant)} columns of x are constant (the first is column {columns[0]})"
    if shared:
        warn(f"{found}: the model predicts them without error, so the learned scale is smaller than the others need.")
    else:
        raise ValueError(
            f"{found}: with a scale of its own such a column has a density without bound. Drop these columns, "
            "dequantise the data (pv.data.dequantise), or share one scale: Learned()."
        )
