"""The paired difference of two programs on the same rows.

log p(x) differs from row to row by far more than two programs differ on one row, so that the difference of two means, taken
row by row, has a much smaller error than either mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae.evidence.estimate import Estimate


@dataclass(frozen=True, repr=False)
class Difference:
    """log p(x) of a first program minus that of a second, in nats, row by row. Tensors are (N,).

    The rows that enter the mean and its errors have a finite value in both programs. The others are counted:
    `num_impossible` have no probability in one of them or in both, `num_missing` have no number in one of them or in both.

    Attributes:
        first: name of a program.
        second: name of the other.
        values: the difference; infinite where one gives the row no probability, NaN where both do or one has no number.
        standard_errors: Monte Carlo error of each, from both estimates, whose draws are independent.
        reliable: whether both estimates are, boolean.
        impossible: whether one of them or both give the row no probability, boolean.
    """

    first: str
    second: str
    values: Tensor
    standard_errors: Tensor
    reliable: Tensor
    impossible: Tensor

    @classmethod
    def of(cls, first: str, one: Estimate, second: str, other: Estimate) -> Difference:
        """Of two estimates of the same rows; on the first one's device."""
        device = one.log_p.device
        log_p, error, reliable = (value.to(device) for value in (other.log_p, other.standard_error, other.reliable))
        impossible = (one.log_p == -torch.inf) | (log_p == -torch.inf)
        values = one.log_p - log_p
        if first == second:  # the same draws: no difference, and no error of it
            return cls(first, second, values, torch.zeros_like(error), reliable, impossible)
        return cls(
            first, second, values, torch.hypot(one.standard_error, error), one.reliable & reliable, impossible
        )  # fmt: skip

    def __len__(self) -> int:
        """N."""
        return len(self.values)

    @property
    def paired(self) -> Tensor:
        """Which rows enter, boolean (N,)."""
        return self.values.isfinite()

    @property
    def num_paired(self) -> int:
        """How many rows enter."""
        return int(self.paired.sum())

    @property
    def num_impossible(self) -> int:
        """How many rows have no probability in a program; they do not enter."""
        return int(self.impossible.sum())

    @property
    def num_missing(self) -> int:
        """How many other rows do not enter, because a program has no number for them."""
        return len(self) - self.num_paired - self.num_impossible

    @property
    def num_unreliable(self) -> int:
        """How many of the rows that enter are not reliable in both programs."""
        return int((self.paired & ~self.reliable).sum())

    @property
    def mean(self) -> float:
        """Mean over the rows that enter, nats; NaN where there are none."""
        return float(self.values[self.paired].mean())

    @property
    def mean_standard_error(self) -> float:
        """Monte Carlo error of `mean`, nats: how far another seed would move it."""
        errors = self.standard_errors[self.paired]
        return float(errors.square().sum().sqrt() / len(errors)) if len(errors) else math.nan

    @property
    def data_standard_error(self) -> float:
        """Error of `mean` as an estimate for other rows of the same kind, nats: sd / sqrt(rows).

        The scatter of the rows holds that of the draws: the Monte Carlo error is in it already and is not to be added.
        """
        values = self.values[self.paired]
        return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan

    def where(self, rows: Tensor) -> Difference:
        """The same, of the rows that `rows`, boolean (N,), chooses."""
        parts = (part[rows] for part in (self.values, self.standard_errors, self.reliable, self.impossible))
        return Difference(self.first, self.second, *parts)

    def __repr__(self) -> str:
        """Value, errors, rows, and the warning where there is one."""
        told = [
            f"log p(x) of {self.first!r} minus {self.second!r}: {self.mean:.4g} nats a row "
            f"(data error {self.data_standard_error:.2g}, of this Monte Carlo {self.mean_standard_error:.2g}; "
            f"{self.num_paired} rows)"
        ]
        if self.num_unreliable:
            told.append(f"  WARNING: {self.num_unreliable} of these rows are not reliable in both")
        if self.num_impossible:
            told.append(f"  {self.num_impossible} more rows have no probability in one of them and are not in the mean")
        if self.num_missing:
            told.append(f"  {self.num_missing} more rows have no number in one of them and are not in the mean")
        return "\n".join(told)
