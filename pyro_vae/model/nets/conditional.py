"""Networks that are told a condition y beside their input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.model.component import Component
from pyro_vae.model.conditions import beside
from pyro_vae.rows import Rows, finite_rows, positive


class Conditional(Component):
    """net([h, y]): the condition, one-hot where it is a class, put behind the columns of the input (Sohn et al. 2015).

    As a decoder, `Conditional(MLP(20 + 10, 784, hidden=(400,)), classes=10)` reads z in R^20 and a label; as an encoder,
    `Conditional(MLP(784 + 10, hidden=(400,)), classes=10)` reads a row and its label.

    Args:
        net: (..., columns + classes) -> (..., out_features); without `in_features` it is trusted to fit.
        classes: y is a whole number from 0 to classes - 1, shape (N,); or
        columns: y is `columns` numbers, shape (N, columns), or (N,) where columns is 1.
        position: which tensor of the tuple x = (rows, y_1, y_2, ...) is y.
    """

    def __init__(
        self, net: nn.Module, *, classes: int | None = None, columns: int | None = None, position: int = 1
    ) -> None:
        super().__init__()
        positive(position=position)
        if (classes is None) == (columns is None):
            raise ValueError(f"classes={classes} and columns={columns}: give one of them, what y is.")
        self.net, self.classes, self.columns, self.position = net, classes, columns, position
        self.width = int(classes or columns or 0)
        positive(**({"columns": self.width} if classes is None else {"classes": self.width}))
        self.reads = (position,)
        if isinstance(inputs := getattr(net, "in_features", None), int):
            if inputs <= self.width:
                raise ValueError(f"{net!r} takes {inputs} columns: none is left beside the {self.width} of y.")
            self.in_features = inputs - self.width
        if isinstance(outputs := getattr(net, "out_features", None), int):
            self.out_features = outputs

    def settings(self) -> dict[str, Any]:
        """See `Component.settings`."""
        return {"net": self.net, "classes": self.classes, "columns": self.columns, "position": self.position}

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        """h (..., N, columns) and y (N,) or (N, columns of y) -> (..., N, out_features)."""
        if self.classes is None:
            told = y.reshape(-1, self.width).to(h)
        else:
            # Compared and not scattered: twice differentiable beside h, and the same on every device.
            # As floating point: torch compares no unsigned integers but those of 8 bits.
            told = (y.reshape(-1, 1).float() == torch.arange(self.classes, device=y.device)).to(h)
        out: Tensor = self.net(torch.cat([h, beside(told, h)], dim=-1))
        return out

    def example(self, like: Tensor) -> Tensor:
        """See `conditions.Reader`."""
        if self.classes is None:
            return like.new_zeros(1, self.width)
        return torch.zeros(1, dtype=torch.long, device=like.device)

    def check_given(self, given: Rows) -> None:
        """See `conditions.Reader`.

        Raises:
            ValueError: a label that is no class, another number of columns, or numbers that are not finite.
        """
        y = given[self.position - 1]
        if self.classes is None:
            if tuple(y.shape[1:]) != (self.width,) and not (self.width == 1 and y.dim() == 1):
                raise ValueError(f"x[{self.position}] has shape {tuple(y.shape)}: the network reads {self.width} columns.")
            if not bool((good := finite_rows((y,))).all()):
                raise ValueError(
                    f"x[{self.position}] has NaN or infinite values, first in row {int((~good).nonzero()[0])}: the network "
                    "reads finite numbers, remove these rows or fill the values in."
                )
            return
        y = y.double()
        wrong = (y < 0) | (y >= self.classes) | (y != y.round())
        if y.numel() != len(y) or bool(wrong.any()):
            found = f"shape {tuple(y.shape)}" if y.numel() != len(y) else f"the value {y[wrong].flatten()[0].item():g}"
            raise ValueError(
                f"x[{self.position}] has {found}, and the network reads one of {self.classes} classes a row: give whole "
                f"numbers from 0 to {self.classes - 1}, shape (N,)."
            )
