"""Conditions: what a VAE is told beside the rows that it models, the y_1, y_2, ... of x = (rows, y_1, y_2, ...).

A part that reads some of them (a network, a prior, a likelihood with a library size) names their positions in that tuple by
its attribute `reads`: (1,) is the first tensor after the rows. Everything of a VAE is handed all conditions, and `apply`
gives each network those it reads.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pyro_vae.rows import Rows


class Reader(Protocol):
    """What a part that reads conditions has. User's own modules may leave out all but `reads`."""

    reads: tuple[int, ...]

    def example(self, like: Tensor) -> Tensor:
        """One row of its condition, on the device of `like`: what a VAE is tried with when it is built."""

    def check_given(self, given: Rows) -> None:
        """Refuse conditions that it cannot take, with a ValueError that names a value and the mend."""


def apply(part: Any, *inputs: Tensor, given: Rows) -> Any:
    """`part(*inputs, *those of given that it reads)`."""
    return part(*inputs, *(given[position - 1] for position in getattr(part, "reads", ())))


def beside(condition: Tensor, inputs: Tensor) -> Tensor:
    """`condition` (N, ...) for inputs (..., N, features): expanded to (..., N, ...): particles share their row's."""
    return condition.expand(*inputs.shape[: inputs.dim() - 2], *condition.shape)


def count_read(module: nn.Module) -> int:
    """How many tensors after the rows `module` and what is inside it read: the last position that any names."""
    return max((position for part in module.modules() for position in getattr(part, "reads", ())), default=0)


def examples(module: nn.Module, like: Tensor) -> Rows:
    """One row of each condition: by the `example` of a part that reads it, else the label 0."""
    parts: list[Any] = list(module.modules())
    readers = [part for part in parts if hasattr(part, "example") and hasattr(part, "reads") and part.reads]
    found = {part.reads[0]: part.example(like) for part in readers}
    label = torch.zeros(1, dtype=torch.long, device=like.device)
    return tuple(found.get(position, label) for position in range(1, count_read(module) + 1))


def check(module: nn.Module, given: Rows) -> None:
    """Refuse conditions that a part of `module` cannot take.

    Raises:
        ValueError: their number differs from what is read, or a part refuses a value.
    """
    if len(given) != count_read(module):
        needed = count_read(module)
        if needed == 0:
            raise ValueError(
                f"This VAE models one tensor of rows, but was given a tuple of {len(given) + 1}: give the first alone "
                "(of a data set: items that are rows, without labels)."
            )
        raise ValueError(
            f"This VAE reads {needed} tensor{'s' * (needed > 1)} beside its rows, and was given {len(given)}: give x as "
            f"a tuple of {needed + 1}, (rows, {', '.join(f'y{i + 1}' for i in range(needed))})."
        )
    parts: list[Any] = list(module.modules())
    for part in parts:
        if hasattr(part, "check_given"):
            part.check_given(given)
