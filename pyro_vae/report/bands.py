"""How far the distribution function of N uniform numbers strays from the diagonal, at G points at once.

Of N independent uniform numbers on [0, 1] let C_i be how many are at most i / G, a Binomial(N, i / G). A count is judged by
its two-sided tail probability 2 min(P(C_i <= c), P(C_i >= c)), and all counts together by the smallest of them, gamma.

* The simultaneous band of Säilynoja, Bürkner & Vehtari 2022 (arXiv:2103.10522, sec. 2.2) holds the counts whose tail
  probability is above one level, the same at every point: the largest at which all G - 1 counts stay inside with the
  probability that is asked for.
* P(gamma <= the gamma that was found) is a p-value of uniformity: at most 5 % exactly where the curve leaves the 95 % band.

Both need P(every C_i in [a_i, b_i]). Given their sum, the numbers that fall between neighbouring points are independent
Poisson variables, so the probability is a chain of G convolutions, each cut to its interval: exact, no simulation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

MOST_POINTS = 100
"""Points at which a curve is judged; fewer than N of them, where N is small."""

HALVINGS = 40
"""Of the interval in which the band's level is sought."""

EQUAL = 1.0 + 1e-9
"""Tail probabilities within this factor are the same: those of a count and of its mirror image differ by rounding."""


@dataclass(frozen=True)
class Uniform:
    """The distribution function of `count` independent uniform numbers at G - 1 points inside (0, 1).

    Attributes:
        count: N, at least 2.
    """

    count: int

    @property
    def steps(self) -> int:
        """G, between 2 and 100."""
        return max(2, min(MOST_POINTS, self.count))

    @cached_property
    def points(self) -> Tensor:
        """i / G for i = 1 .. G - 1, (G - 1,), float64."""
        return torch.arange(1, self.steps, dtype=torch.float64) / self.steps

    @cached_property
    def tails(self) -> Tensor:
        """2 min(P(C_i <= c), P(C_i >= c)) for c = 0 .. N, (G - 1, N + 1), at most 1."""
        c = torch.arange(self.count + 1, dtype=torch.float64)
        p = self.points[:, None]
        ways = math.lgamma(self.count + 1) - torch.lgamma(c + 1) - torch.lgamma(self.count - c + 1)
        mass = torch.exp(ways + c * p.log() + (self.count - c) * torch.log1p(-p))
        return (2.0 * torch.minimum(mass.cumsum(1), mass.flip(1).cumsum(1).flip(1))).clamp_max(1.0)

    def curve(self, values: Tensor) -> Tensor:
        """How many of the numbers (N, Q) are at most each point: (G - 1, Q), integers."""
        return torch.stack([(values <= point).sum(0) for point in self.points.to(values)])

    def p_value(self, values: Tensor) -> Tensor:
        """P-value of uniformity of each column of the numbers (N, Q): (Q,), float64."""
        counts = self.curve(values).cpu()
        gamma = torch.gather(self.tails, 1, counts).amin(0)
        inside = [self._probability(self.tails > EQUAL * level) for level in gamma]
        return torch.tensor([1.0 - each for each in inside], dtype=torch.float64).clamp(0.0, 1.0)

    def band(self, probability: float = 0.95) -> tuple[Tensor, Tensor]:
        """The lowest and the highest count inside the band at each point, (G - 1,) each, integers."""
        low, high = 0.0, 1.0
        for _ in range(HALVINGS):
            middle = 0.5 * (low + high)
            if self._probability(self.tails > EQUAL * middle) >= probability:
                low = middle
            else:
                high = middle
        return _ends(self.tails > EQUAL * low)

    def _probability(self, inside: Tensor) -> float:
        """P(every count is inside), from boolean (G - 1, N + 1) with one run of True a line."""
        first, last = (end.numpy() for end in _ends(inside))
        step = _poisson(self.count / self.steps, self.count)
        start, mass = 0, np.ones(1)
        for low, high in zip(first, last, strict=True):
            low = max(low, start)  # counts do not fall
            if low > high:
                return 0.0
            whole = np.convolve(mass, step[: high - start + 1])
            mass, start = whole[low - start : high - start + 1], int(low)
        left = self.count - np.arange(start, start + len(mass))
        return float(mass @ step[left]) / float(_poisson(self.count, self.count)[-1])


def _ends(inside: Tensor) -> tuple[Tensor, Tensor]:
    """First and last True of each line; first > last where there is none."""
    some, width = inside.any(1), inside.shape[1]
    first = inside.to(torch.uint8).argmax(1)
    last = width - 1 - inside.flip(1).to(torch.uint8).argmax(1)
    return torch.where(some, first, width), torch.where(some, last, -1)


def _poisson(mean: float, most: int) -> Any:
    """P(0), .., P(most) of a Poisson variable, (most + 1,)."""
    k = torch.arange(most + 1, dtype=torch.float64)
    return torch.exp(k * math.log(mean) - mean - torch.lgamma(k + 1)).numpy()
