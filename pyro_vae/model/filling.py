"""What an encoder sees in place of missing values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Filling(nn.Module):
    """A learned constant for each number of a row, put where x is NaN (zero imputation, Nazabal et al. 2020, learned).

    The guide q(z | x_seen) need not be right about what is missing: the evidence is exact for any guide, which only
    decides how many particles that takes.

    Args:
        shape: of a row.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(tuple(shape)))

    def forward(self, x: Tensor) -> Tensor:
        """Rows (N, *shape) with the constant in place of NaN."""
        return torch.where(x.isnan(), self.value, x)
