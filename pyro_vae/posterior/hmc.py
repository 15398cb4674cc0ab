"""Hamiltonian Monte Carlo on a bridge between two densities, for all chains and rows at once.

The target at inverse temperature beta is log f = (1 - beta) log r(u) + beta log p(x, u), between a start r and the
posterior. A transition draws momenta, follows L leapfrog steps of size eps in coordinates scaled by the start's standard
deviations, and accepts by Metropolis (Neal 2011, arXiv:1206.1901). Densities and gradients of the accepted points are kept,
so that each leapfrog step costs one forward and backward pass and nothing else does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae.memory import bytes_needed
from pyro_vae.program import Program
from pyro_vae.rows import Rows, take

LogStart = Callable[[Tensor, slice], Tensor]
"""log r at u (K, n, D) of the rows in the slice: (K, n), float64, differentiable."""


@dataclass(frozen=True)
class Points:
    """Where chains are: u (K, N, D), both log-densities (K, N) and their gradients (K, N, D)."""

    u: Tensor
    log_p: Tensor
    log_r: Tensor
    gradient_p: Tensor
    gradient_r: Tensor

    def where(self, accept: Tensor, other: Points) -> Points:
        """These points, and `other` where `accept` (K, N)."""
        wide = accept[..., None]
        return Points(
            torch.where(wide, other.u, self.u),
            torch.where(accept, other.log_p, self.log_p),
            torch.where(accept, other.log_r, self.log_r),
            torch.where(wide, other.gradient_p, self.gradient_p),
            torch.where(wide, other.gradient_r, self.gradient_r),
        )

    def log_f(self, beta: float) -> Tensor:
        """The bridge's log-density, (K, N); -inf where the joint has none."""
        value = (1.0 - beta) * self.log_r + beta * self.log_p
        return torch.nan_to_num(value, nan=-torch.inf, posinf=-torch.inf)

    def force(self, beta: float) -> Tensor:
        """Gradient of the bridge, (K, N, D); 0 where it is not a number."""
        value = (1.0 - beta) * self.gradient_r + beta * self.gradient_p
        return torch.nan_to_num(value, nan=0.0, posinf=0.0, neginf=0.0)


class Bridge:
    """Both densities of N rows, evaluated with gradients in chunks of rows that fit a byte budget.

    Args:
        program: gives log p(x, u).
        rows: N rows.
        log_start: gives log r(u).
        like: points (K, N, D) of the size that will be evaluated.
        budget: bytes.
    """

    def __init__(self, program: Program, rows: Rows, log_start: LogStart, like: Tensor, budget: int) -> None:
        each, _ = bytes_needed(program, rows, {"u": like}, lambda joint, values: joint(values["u"]))
        step = max(1, budget // (3 * each * len(like)))  # the graph, and as much again for the backward pass
        self._slices = [slice(at, min(at + step, like.shape[1])) for at in range(0, like.shape[1], step)]
        self._joints = [program.log_joint(take(rows, part)) for part in self._slices]
        self._log_start = log_start

    def __call__(self, u: Tensor) -> Points:
        """Densities and gradients at u (K, N, D)."""
        parts = []
        for part, joint in zip(self._slices, self._joints, strict=True):
            with torch.enable_grad():
                point = u[:, part].detach().requires_grad_()
                log_p, log_r = joint(point), self._log_start(point, part)
                (gradient_p,) = torch.autograd.grad(log_p.sum(), point)
                (gradient_r,) = torch.autograd.grad(log_r.sum(), point)
            parts.append((log_p.detach(), log_r.detach(), gradient_p, gradient_r))
        return Points(u.detach(), *(torch.cat(column, dim=1) for column in zip(*parts, strict=True)))


def transition(
    bridge: Bridge, points: Points, beta: float, step: Tensor, scale: Tensor, num_leapfrog: int
) -> tuple[Points, Tensor]:
    """One transition that leaves the bridge's density at `beta` as it is; torch's ambient generator.

    Args:
        bridge: the densities.
        points: where the chains are.
        beta: inverse temperature, 0 to 1.
        step: eps of each row, (N,).
        scale: standard deviations that precondition, (N, D).
        num_leapfrog: L.

    Returns:
        where they are then, and the acceptance probabilities (K, N).
    """
    stride = (step[:, None] * scale).to(points.u.dtype)
    momentum = torch.randn_like(points.u)
    start_energy = points.log_f(beta) - 0.5 * momentum.double().square().sum(-1)
    end = points
    momentum = momentum + 0.5 * stride * end.force(beta)
    for i in range(num_leapfrog):
        end = bridge(end.u + stride * momentum)
        momentum = momentum + (0.5 if i == num_leapfrog - 1 else 1.0) * stride * end.force(beta)
    end_energy = end.log_f(beta) - 0.5 * momentum.double().square().sum(-1)
    probability = torch.exp((end_energy - start_energy).clamp_max(0.0)).nan_to_num(nan=0.0)
    return points.where(torch.rand_like(probability) < probability, end), probability
