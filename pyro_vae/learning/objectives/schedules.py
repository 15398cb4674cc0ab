"""Schedules of beta: numbers that depend on how many gradient steps were taken."""

from __future__ import annotations

from collections.abc import Callable

from pyro_vae.rows import positive

Schedule = Callable[[int], float]
"""Number of gradient steps taken -> beta."""


def warm_up(steps: int, *, start: float = 0.0, end: float = 1.0) -> Schedule:
    """beta grows linearly from `start` to `end` over the first `steps` gradient steps, then stays (Bowman et al. 2016)."""
    positive(steps=steps)
    return _Line(steps, start, end)


def cyclic(steps: int, *, rise: float = 0.5, end: float = 1.0) -> Schedule:
    """beta rises from 0 to `end` in the first `rise` of every `steps` steps and stays there (Fu et al. 2019)."""
    positive(steps=steps)
    if not 0.0 < rise <= 1.0:
        raise ValueError(f"rise={rise} is the part of a cycle in which beta grows: give a number in (0, 1].")
    return _Cycle(steps, rise, end)


class _Line:
    def __init__(self, steps: int, start: float, end: float) -> None:
        self.steps, self.start, self.end = steps, start, end

    def __call__(self, step: int) -> float:
        return self.start + (self.end - self.start) * min(1.0, step / self.steps)

    def __repr__(self) -> str:
        return f"warm_up({self.steps}, start={self.start}, end={self.end})"


class _Cycle:
    def __init__(self, steps: int, rise: float, end: float) -> None:
        self.steps, self.rise, self.end = steps, rise, end

    def __call__(self, step: int) -> float:
        return self.end * min(1.0, (step % self.steps) / (self.rise * self.steps))

    def __repr__(self) -> str:
        return f"cyclic({self.steps}, rise={self.rise}, end={self.end})"
