"""A likelihood of classes."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pyro_vae.model.families import levels as families
from pyro_vae.model.families.elements import innermost
from pyro_vae.model.likelihoods.levels import require_multiple
from pyro_vae.model.likelihoods.likelihood import Elementwise


class Categorical(Elementwise):
    """P(x_j = c | z) = softmax(f(z)_j)_c for classes c = 0, ..., C - 1, which x holds as floating point numbers.

    Args:
        decoder: f, the logits: C for each number of x, side by side in the last dimension, (..., D) -> (..., d * C) for
            rows (d,), in general (..., D) -> (..., *event_shape[:-1], event_shape[-1] * C).
        num_classes: C, at least 2.
        missing: whether NaN in x is a missing value.
    """

    discrete: ClassVar[bool] = True

    def __init__(self, decoder: nn.Module, num_classes: int, *, missing: bool = False) -> None:
        super().__init__(decoder, missing=missing)
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 2:
            raise ValueError(f"num_classes={num_classes!r} must be a whole number of at least 2.")
        require_multiple(decoder, num_classes, f"num_classes={num_classes}")
        self.num_classes = num_classes
        self.takes = f"the classes 0, 1, ..., {num_classes - 1} alone"
        self.mend = "number the classes from 0, or give a larger num_classes"

    def settings(self) -> dict[str, Any]:
        """See `Component.settings`."""
        return {"decoder": self.decoder, "num_classes": self.num_classes, "missing": self.missing}

    def elements(self, z: Tensor, *given: Tensor) -> Any:
        """Categorical with C logits for each number."""
        return families.Categorical(logits=self.decode(z, given).unflatten(-1, (-1, self.num_classes)))

    def centre(self, distribution: Any) -> Tensor:
        """The most probable class: classes have no mean."""
        logits: Tensor = innermost(distribution).logits
        return logits.argmax(-1).to(logits)

    def inside(self, x: Tensor) -> Tensor:
        """See `Likelihood.inside`."""
        return (x >= 0) & (x < self.num_classes) & (x == torch.floor(x))
