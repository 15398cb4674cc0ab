"""Gaussian families over the unconstrained vector u, one member for each row, fitted to the posterior.

A member is written from where it begins, the moments c and B B' of some draws:

    u = c + B (shift + T e),   e ~ N(0, I),

with shift = 0 and T = I at the start, so that all rows are fitted on the same scale. Its evidence lower bound
L = E[log p(x, u) - log q*(u)] is climbed by reparametrised gradients (Kingma & Welling 2014), with log q* taken at fixed
parameters (Roeder, Wu & Duvenaud 2017, arXiv:1703.09194): the gradient then has no noise where q* is the posterior.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from pyro_vae.memory import bytes_needed
from pyro_vae.program import Program
from pyro_vae.rows import Rows
from pyro_vae.seeds import Seed, seeded

DRAWS = 8
"""Draws of a gradient step: four and their mirror images, which leave no noise in the mean's gradient near the optimum."""

RATE = 0.1
"""First learning rate of Adam, in standard deviations of the start; it falls to 0 along a cosine."""


class Gaussian(ABC):
    """Gaussians of u for N rows, all float64.

    To add a family: subclass, call this constructor, set `base` and `raw`, where raw = 0 stands for T = I, and implement
    `_scale`, `_unscale` and `_log_det`.

    Args:
        draws: (K, N, D), whose moments are the start.
    """

    name: str
    raw: Tensor

    def __init__(self, draws: Tensor) -> None:
        self.centre = draws.double().mean(0)
        self.shift = torch.zeros_like(self.centre, requires_grad=True)

    @property
    def parameters(self) -> list[Tensor]:
        """What is fitted, (N, ...) each; all zero at the start."""
        return [self.shift, self.raw]

    def place(self, noise: Tensor) -> Tensor:
        """u of standard normal noise (S, N or 1, D): (S, N, D), differentiable in the parameters."""
        return self.centre + self._scale(noise)

    def log_density(self, u: Tensor) -> Tensor:
        """log q*(u), (S, N, D) -> (S, N): differentiable in u, the parameters held fixed."""
        return self.log_density_of(self._unscale(u.double() - self.centre))

    def log_density_of(self, noise: Tensor) -> Tensor:
        """log q* where `place` puts the noise (S, N or 1, D), (S, N).

        To be used where bounds are judged: `log_density` at a u that was rounded makes much of a scale below the rounding.
        """
        constant = 0.5 * math.log(2.0 * math.pi) * noise.shape[-1]
        return -0.5 * noise.square().sum(-1) - constant - self._log_det()

    @abstractmethod
    def _scale(self, noise: Tensor) -> Tensor:
        """B (shift + T noise)."""

    @abstractmethod
    def _unscale(self, delta: Tensor) -> Tensor:
        """The noise that `_scale` makes `delta` of, the parameters detached."""

    @abstractmethod
    def _log_det(self) -> Tensor:
        """log |B T|, (N,), detached."""


class FactorisedNormal(Gaussian):
    """N(m, diag s^2), the fully factorised Gaussian of Cremer et al. 2018."""

    name = "factorised Normal"

    def __init__(self, draws: Tensor) -> None:
        super().__init__(draws)
        self.base = draws.double().std(0).clamp_min(torch.finfo(draws.dtype).tiny)
        self.raw = torch.zeros_like(self.centre, requires_grad=True)

    def _scale(self, noise: Tensor) -> Tensor:
        return self.base * (self.shift + self.raw.exp() * noise)

    def _unscale(self, delta: Tensor) -> Tensor:
        return (delta / self.base - self.shift.detach()) * torch.exp(-self.raw.detach())

    def _log_det(self) -> Tensor:
        return (self.base.log() + self.raw.detach()).sum(-1)


class FullNormal(Gaussian):
    """N(m, L L') with any lower triangular L: D (D + 1) / 2 numbers a row."""

    name = "full Normal"

    def __init__(self, draws: Tensor) -> None:
        super().__init__(draws)
        delta = draws.double() - self.centre
        covariance = torch.einsum("knd,kne->nde", delta, delta) / (len(draws) - 1)
        variance = covariance.diagonal(dim1=-2, dim2=-1).clamp_min(torch.finfo(draws.dtype).tiny)
        # Fewer draws than dimensions give a singular matrix: a part of its diagonal makes it regular.
        self.base = torch.linalg.cholesky(0.9 * covariance + 0.1 * torch.diag_embed(variance))
        self.raw = torch.zeros_like(covariance, requires_grad=True)

    def _factor(self, raw: Tensor) -> Tensor:
        return torch.tril(raw, -1) + torch.diag_embed(raw.diagonal(dim1=-2, dim2=-1).exp())

    def _scale(self, noise: Tensor) -> Tensor:
        inner = self.shift + torch.einsum("nde,kne->knd", self._factor(self.raw), noise.expand(-1, len(self.raw), -1))
        return torch.einsum("nde,kne->knd", self.base, inner)

    def _unscale(self, delta: Tensor) -> Tensor:
        inner = torch.linalg.solve_triangular(self.base, delta.permute(1, 2, 0), upper=False)
        inner = inner - self.shift.detach()[..., None]
        return torch.linalg.solve_triangular(self._factor(self.raw.detach()), inner, upper=False).permute(2, 0, 1)

    def _log_det(self) -> Tensor:
        diagonals = (self.base.diagonal(dim1=-2, dim2=-1).log(), self.raw.detach().diagonal(dim1=-2, dim2=-1))
        return (diagonals[0] + diagonals[1]).sum(-1)


def rows_that_fit(program: Program, rows: Rows, u: Tensor, one: Gaussian, memory: int) -> int:
    """How many rows can be fitted at once within `memory` bytes, at least one; u (K, N, D), `one` the family for a row."""
    each, _ = bytes_needed(program, rows, {"u": u}, lambda joint, values: joint(values["u"]))
    own = 8 * 8 * sum(part.numel() for part in one.parameters)  # gradients, Adam's moments, what the parameters make
    # A gradient keeps what the density allocated and makes as much again.
    return max(1, memory // (3 * each * DRAWS + own))


def fit(program: Program, rows: Rows, q: Gaussian, steps: int, seed: Seed) -> None:
    """Climb the evidence lower bound of all rows at once, in place; a row that ends below its start is put back there.

    The noise is the same for all rows, so that a row's fit does not depend on which others are fitted beside it.

    Args:
        program: gives log p(x, u).
        rows: N rows.
        q: Gaussians of these rows.
        steps: of Adam.
        seed: of the noise.
    """
    log_joint, device = program.log_joint(rows), rows[0].device

    def noise(count: int) -> Tensor:
        half = torch.randn(count // 2, 1, log_joint.dim, dtype=torch.float64, device=device)
        return torch.cat([half, -half])

    def judge(points: Tensor) -> Tensor:
        with torch.no_grad():
            log_p = torch.cat([log_joint(q.place(part).to(rows[0].dtype)) for part in points.split(DRAWS)])
            return torch.nan_to_num(log_p - q.log_density_of(points), nan=-torch.inf, posinf=-torch.inf).mean(0)

    with seeded(seed, device):
        pilot = noise(8 * DRAWS)
        before = judge(pilot)
        adam = torch.optim.Adam(q.parameters, lr=RATE, maximize=True)
        for step in range(steps):
            adam.param_groups[0]["lr"] = 0.5 * RATE * (1.0 + math.cos(math.pi * step / steps))
            with torch.enable_grad():
                u = q.place(noise(DRAWS)).to(rows[0].dtype)
                total = (log_joint(u) - q.log_density(u)).sum() / DRAWS
                gradients = torch.autograd.grad(total, q.parameters)
            for parameter, gradient in zip(q.parameters, gradients, strict=True):
                parameter.grad = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)
            adam.step()
        worse = judge(pilot) < before
        with torch.no_grad():
            for parameter in q.parameters:
                parameter[worse] = 0.0
