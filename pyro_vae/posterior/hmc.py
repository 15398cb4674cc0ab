"""Hamiltonian Monte Carlo on a bridge between two densities, for all chains and rows at once.

The target at inverse temperature beta is log f = (1 - beta) log r(u) + beta log p(x, u), between a start r and the
posterior. A transition draws momenta, follows L leapfrog steps of size eps in coordinates whitened by the start's shape,
and accepts by Metropolis (Neal 2011, arXiv:1206.1901). Densities and gradients of the accepted points are kept, so that
each leapfrog step costs one forward and backward pass and nothing else does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from pyro_vae.memory import gradient_rows
from pyro_vae.posterior.shapes import Shape
from pyro_vae.program import Program
from pyro_vae.rows import Rows, take

Density = Callable[[Tensor], Tensor]
"""u (K, n, D) -> its log-density (K, n), float64, differentiable."""


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
        parts = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return Points(*(torch.where(accept[..., None] if a.dim() == 3 else accept, b, a) for a, b in parts))

    def log_f(self, beta: float) -> Tensor:
        """The bridge's log-density, (K, N); -inf where the joint has none."""
        value = (1.0 - beta) * self.log_r + beta * self.log_p
        return torch.nan_to_num(value, nan=-torch.inf, posinf=-torch.inf)

    def force(self, beta: float) -> Tensor:
        """Gradient of the bridge, (K, N, D), float64; 0 where it is not a number."""
        value = (1.0 - beta) * self.gradient_r.double() + beta * self.gradient_p.double()
        return torch.nan_to_num(value, nan=0.0, posinf=0.0, neginf=0.0)


class Bridge:
    """Both densities of N rows, evaluated with gradients in chunks of rows that fit a byte budget.

    Args:
        program: gives log p(x, u).
        rows: N rows.
        log_start: index of some rows -> the density r of these rows.
        like: points (K, N, D) of the size that will be evaluated.
        budget: bytes.
    """

    def __init__(
        self, program: Program, rows: Rows, log_start: Callable[[Tensor], Density], like: Tensor, budget: int
    ) -> None:
        step = gradient_rows(program, rows, like, budget)
        self._parts = [
            (index, program.log_joint(take(rows, index)), log_start(index))
            for index in torch.arange(like.shape[1], device=like.device).split(step)
        ]

    def __call__(self, u: Tensor) -> Points:
        """Densities and gradients at u (K, N, D)."""
        parts = []
        for index, log_joint, log_start in self._parts:
            with torch.enable_grad():
                point = u[:, index].detach().requires_grad_()
                log_p, log_r = log_joint(point), log_start(point)
                (gradient_p,) = torch.autograd.grad(log_p.sum(), point)
                (gradient_r,) = torch.autograd.grad(log_r.sum(), point)
            parts.append((log_p.detach(), log_r.detach(), gradient_p, gradient_r))
        return Points(u.detach(), *(torch.cat(column, dim=1) for column in zip(*parts, strict=True)))


def transition(
    bridge: Bridge, points: Points, beta: float, step: Tensor, shape: Shape, num_leapfrog: int
) -> tuple[Points, Tensor]:
    """One transition that leaves the bridge's density at `beta` as it is, and is its own reversal; ambient generator.

    Args:
        bridge: the densities.
        points: where the chains are.
        beta: inverse temperature, 0 to 1.
        step: eps of each row, (N,).
        shape: of each row, whitens the coordinates.
        num_leapfrog: L.

    Returns:
        where they are then, and the acceptance probabilities (K, N).
    """
    dtype, stride = points.u.dtype, step[:, None]
    momentum = torch.randn(points.u.shape, dtype=torch.float64, device=points.u.device)
    start_energy = points.log_f(beta) - 0.5 * momentum.square().sum(-1)
    end = points
    momentum = momentum + 0.5 * stride * shape.precondition(end.force(beta))
    for i in range(num_leapfrog):
        end = bridge(end.u + shape.colour(stride * momentum).to(dtype))
        momentum = momentum + (0.5 if i == num_leapfrog - 1 else 1.0) * stride * shape.precondition(end.force(beta))
    end_energy = end.log_f(beta) - 0.5 * momentum.square().sum(-1)
    probability = torch.exp((end_energy - start_energy).clamp_max(0.0)).nan_to_num(nan=0.0)
    return points.where(torch.rand_like(probability) < probability, end), probability
