"""Ascent to posterior modes for many rows and starts at once: limited-memory BFGS.

Every (row, start) is a problem of its own with its own history, step length and convergence; one gradient of all of them is
one call (Nocedal & Wright 2006, algorithm 7.5, with the two-loop recursion 7.4). A step that does not raise the log joint
is taken back and tried again at a quarter of its length. Problems that have converged leave the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from pyro_vae.log_joint import LogJoint
from pyro_vae.posterior.derivatives import value_and_gradient

MEMORY = 6
"""Pairs of steps and gradient changes that are kept."""

SUFFICIENT, SHORTER = 1e-4, 0.25

CONVERGED = 1e-2
"""A problem is done when its next step promises to gain fewer nats."""

LOOK = 3
"""Converged problems are looked for every so many steps."""


@dataclass
class _State:
    """P problems: point, value, gradient, what the last steps taught, and the share of a full step that is tried next."""

    at: Tensor  # (P,) which problem of the caller
    u: Tensor  # (P, D)
    value: Tensor  # (P,)
    gradient: Tensor  # (P, D)
    gamma: Tensor  # (P,) scale of the initial inverse Hessian
    share: Tensor  # (P,)
    gain: Tensor  # (P,) nats that the last direction promised
    steps: Tensor  # (P, MEMORY, D)
    changes: Tensor  # (P, MEMORY, D)
    rho: Tensor  # (P, MEMORY), 0 where there is no pair

    def keep(self, index: Tensor) -> _State:
        """The problems at `index`."""
        return _State(**{f.name: getattr(self, f.name)[index] for f in fields(self)})


def ascend(log_joint: LogJoint, row: Tensor, starts: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Climb the log joint from each start.

    Args:
        log_joint: of N rows.
        row: of which row each problem is, (P,), integers.
        starts: (P, D), unconstrained.
        steps: at most; each costs one gradient.

    Returns:
        the ends (P, D), the log joint there (P,), float64 in nats, -inf where no density was found; gradients spent, (P,).
    """
    count, dim = starts.shape
    value, gradient = _evaluate(log_joint, row, starts)
    one = torch.ones_like(starts[:, 0])
    past = starts.new_zeros(count, MEMORY, dim)
    state = _State(
        at=torch.arange(count, device=starts.device),
        u=starts.detach().clone(),
        value=value,
        gradient=gradient,
        gamma=1.0 / gradient.norm(dim=-1).clamp_min(1.0),
        share=one,
        gain=torch.inf * one,
        steps=past,
        changes=past.clone(),
        rho=past[..., 0].clone(),
    )
    ends, values, spent = state.u.clone(), value.clone(), torch.ones_like(state.at)
    for step in range(steps):
        _step(state, log_joint, row, step)
        spent[state.at] += 1
        if step % LOOK == LOOK - 1 or step == steps - 1:
            ends[state.at], values[state.at] = state.u, state.value
            noise = 50.0 * torch.finfo(starts.dtype).eps * state.value.abs()
            going = (state.gain > torch.maximum(noise, torch.full_like(noise, CONVERGED))) & state.value.isfinite()
            if not bool(going.any()):
                break
            if not bool(going.all()):
                state = state.keep(going.nonzero().flatten())
    return ends, values, spent


def _step(state: _State, log_joint: LogJoint, row: Tensor, step: int) -> None:
    """One step of all problems, in place."""
    direction = _direction(state, step)
    slope = (direction * state.gradient).sum(-1)
    state.gain = 0.5 * slope
    # Posteriors are rarely wider than a unit ball: longer steps come from curvature that is not yet known.
    longest = 2.0 * direction.shape[-1] ** 0.5 / direction.norm(dim=-1).clamp_min(1e-12)
    length = state.share * longest.clamp_max(1.0)
    u = state.u + length[:, None] * direction
    value, gradient = _evaluate(log_joint, row[state.at], u)
    better = value > state.value + SUFFICIENT * (length * slope).double()
    moved, change = u - state.u, state.gradient - gradient
    curvature = (moved * change).sum(-1)
    good = better & (curvature > 1e-8 * moved.norm(dim=-1) * change.norm(dim=-1))
    slot, wide = step % MEMORY, better[:, None]
    state.steps[:, slot] = torch.where(good[:, None], moved, 0.0)
    state.changes[:, slot] = torch.where(good[:, None], change, 0.0)
    state.rho[:, slot] = torch.where(good, 1.0 / curvature.clamp_min(1e-30), 0.0)
    state.gamma = torch.where(good, curvature / change.square().sum(-1).clamp_min(1e-30), state.gamma)
    state.u, state.gradient = torch.where(wide, u, state.u), torch.where(wide, gradient, state.gradient)
    state.value = torch.where(better, value, state.value)
    state.share = torch.where(better, (2.0 * state.share).clamp_max(1.0), SHORTER * state.share)


def _direction(state: _State, step: int) -> Tensor:
    """The inverse Hessian that the history implies, times the gradient; the gradient itself where that leads down."""
    slots = [(step - 1 - i) % MEMORY for i in range(min(step, MEMORY))]
    q, alphas = state.gradient, []
    for slot in slots:
        alpha = state.rho[:, slot] * (state.steps[:, slot] * q).sum(-1)
        q = q - alpha[:, None] * state.changes[:, slot]
        alphas.append(alpha)
    q = q * state.gamma[:, None]
    for slot, alpha in zip(reversed(slots), reversed(alphas), strict=True):
        beta = state.rho[:, slot] * (state.changes[:, slot] * q).sum(-1)
        q = q + (alpha - beta)[:, None] * state.steps[:, slot]
    upward = (q * state.gradient).sum(-1, keepdim=True) > 0.0
    return torch.where(upward, q, state.gradient * state.gamma[:, None])


def _evaluate(log_joint: LogJoint, row: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    value, gradient = value_and_gradient(log_joint.take(row), u[None])
    return value[0], gradient[0]
