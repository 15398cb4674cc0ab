"""EM from a start to its maximum: iterations that never lose log-likelihood, mixed, and when to stop.

EM t -> F(t) converges slowly where rows say little about z, and slower than any geometric series where a noise falls to
zero. Anderson's mixing (Anderson 1965; for EM: Henderson & Varadhan 2019, J. Comput. Graph. Statist. 28:834) reads from the
last iterations how the residuals f = F(t) - t change with t, and goes where the linear rule that fits them best has f = 0,

    t_new = F(t) - (dT + dF) g,    g = argmin |f - dF g|,

with the differences of the last t and f in the columns of dT and dF. It is kept only if the log-likelihood rises, else F(t)
is taken and the memory begins anew.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from pyro_vae.em.steps import State, Step

ROUNDING = 1e-9
"""A loss of log-likelihood below this, relative, is rounding; so is 10 units of rounding of sums of 1 / psi."""

MEMORY = 10
"""Iterations that are mixed, and by which is judged how far the maximum is."""

REST = 1e3
"""How much more there may be to gain than mixed iterations gained while they rested."""

SINGULAR = 1e-8
"""Directions whose singular value is below this, relative to the largest, are not mixed."""


@dataclass(frozen=True)
class Climb:
    """Where EM ended.

    Attributes:
        state: the last state.
        path: mean log-likelihood of a row in nats at the start and after each iteration, (T + 1,), float64.
        converged: whether it stopped by itself.
        ahead: how much higher the maximum is, an estimate in nats a row.
    """

    state: State
    path: Tensor
    converged: bool
    ahead: float


def climb(step: Step, start: State, *, tolerance: float, max_iterations: int, accelerate: bool) -> Climb:
    """Iterate `step` until the maximum is estimated to be less than `tolerance` nats a row ahead.

    Args:
        step: one iteration.
        start: the first state.
        tolerance: in nats a row; 0 goes on until rounding stops it.
        max_iterations: T at most.
        accelerate: mix.

    Raises:
        ArithmeticError: an iteration lost more log-likelihood than rounding explains.
    """
    here = start
    value, after = step(here)
    path = [value]
    points: deque[Tensor] = deque(maxlen=MEMORY + 1)
    residuals: deque[Tensor] = deque(maxlen=MEMORY + 1)
    while len(path) <= max_iterations:
        points.append(here.flat())
        residuals.append(after.flat() - points[-1])
        if (ahead := _ahead(path, residuals, accelerate=accelerate)) < tolerance:
            return Climb(here, _as_path(path), converged=True, ahead=ahead)
        if accelerate and len(points) > 1:
            mixed = here.like(_mix(points, residuals), step.floor)
            mixed_value, mixed_after = step(mixed)
            if mixed_value > value:
                here, value, after = mixed, mixed_value, mixed_after
                path.append(value)
                continue
            points.clear()
            residuals.clear()
        next_value, next_after = step(after)
        if not next_value > value:
            _require_rounding(value, next_value, len(path), here)
            return Climb(here, _as_path(path), converged=True, ahead=0.0)
        here, value, after = after, next_value, next_after
        path.append(value)
    return Climb(here, _as_path(path), converged=False, ahead=_ahead(path, residuals, accelerate=accelerate))


def _require_rounding(before: float, after: float, iteration: int, state: State) -> None:
    sums = 10.0 * torch.finfo(state.variance.dtype).eps * float(state.variance.reciprocal().sum())
    if not before - after <= ROUNDING * (1.0 + abs(before)) + sums:
        raise ArithmeticError(
            f"Iteration {iteration} of EM took the log-likelihood from {before:.10g} to {after:.10g} nats a row, which "
            "exact arithmetic rules out: columns of x may be copies of each other up to rounding, drop these."
        )


def _ahead(path: list[float], residuals: deque[Tensor], *, accelerate: bool) -> float:
    """How much higher the maximum is, an estimate in nats a row.

    Mixed iterations rest now and then before they find a new direction: what the last `MEMORY` gained, if all were kept,
    times `REST`. Plain ones that gain g and move by |f|,
    q times the |f| before, promise a further g (q^2 + q^4 + ...), as the log-likelihood is quadratic near its maximum; at
    least g is taken, and the largest q in memory.
    """
    if accelerate:
        return REST * (path[-1] - path[-1 - MEMORY]) if len(residuals) > MEMORY else float("inf")
    squares = [float(residual.square().sum()) for residual in residuals]
    if len(squares) <= 2:
        return float("inf")
    ratio = max(after / before for before, after in pairwise(squares))
    return (path[-1] - path[-2]) * max(1.0, ratio / (1.0 - ratio)) if ratio < 1.0 else float("inf")


def _mix(points: deque[Tensor], residuals: deque[Tensor]) -> Tensor:
    moved, changed = (torch.stack(list(each), -1).diff(dim=-1) for each in (points, residuals))
    share = torch.linalg.pinv(changed, rtol=SINGULAR) @ residuals[-1]
    return points[-1] + residuals[-1] - (moved + changed) @ share


def _as_path(path: list[float]) -> Tensor:
    return torch.tensor(path, dtype=torch.float64)
