"""Integrals over R^D on grids that reach far into the tails, and draws to weight against."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def grid(dim: int, points: int, reach: float = 7.0, centre: float = 0.0) -> tuple[Tensor, Tensor]:
    """Nodes (points^D, D) and log-weights of the trapezium rule in t, z = centre + sinh t, |t| <= reach; float64."""
    t = torch.linspace(-reach, reach, points, dtype=torch.float64)
    log_weight = torch.log(torch.cosh(t)) + torch.log(t[1] - t[0])
    nodes = torch.cartesian_prod(*[centre + torch.sinh(t)] * dim).reshape(-1, dim)
    return nodes, torch.cartesian_prod(*[log_weight] * dim).reshape(-1, dim).sum(-1)


def integral(density: Callable[[Tensor], Tensor], draws: Tensor, count: int = 60_000) -> tuple[Tensor, float]:
    """The integral of exp(density) and its error: a grid for D = 1 and 2, else weighted draws of a wide Student t.

    `draws` (M, D) of the density say where the Student t lies: wrong ones make the error large, not the integral wrong.
    """
    dim = draws.shape[-1]
    if dim <= 2:
        nodes, log_weight = grid(dim, 8001 if dim == 1 else 301, reach=7.0 if dim == 1 else 5.0)
        return (density(nodes) + log_weight).exp().sum(), 1e-3
    wide = torch.distributions.StudentT(3.0, draws.mean(0), 1.1 * draws.std(0))
    z = wide.sample((count,))
    ratio = (density(z) - wide.log_prob(z).sum(-1)).exp()
    return ratio.mean(), 4.5 * float(ratio.std()) / count**0.5
