"""A number with its standard error, as the reports give it."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor


class Measured(NamedTuple):
    """A number and its standard error."""

    value: float
    standard_error: float

    def __str__(self) -> str:
        """Both, short."""
        return f"{self.value:.4g} (error {self.standard_error:.2g})"


def mean_of(values: Tensor, errors: Tensor | None = None) -> Measured:
    """Mean of independent rows (N,) without those that are NaN; NaN where there is no other, infinite if one is.

    Args:
        values: (N,).
        errors: the Monte Carlo error of each, (N,): the mean's error is theirs. None takes sd / sqrt(N), the error of the
            mean as one for other rows of the same kind.
    """
    known = ~values.isnan()
    if not bool(known.any()):
        return Measured(math.nan, math.nan)
    values, count = values[known], int(known.sum())
    if errors is not None:
        error = float(errors[known].square().sum().sqrt()) / count
    else:
        error = float(values.std()) / math.sqrt(count) if count > 1 else math.nan  # NaN beside an infinite mean
    return Measured(float(values.mean()), error)
