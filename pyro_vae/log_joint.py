"""log p(x, z) of fixed rows as a function of one unconstrained vector u.

The latents of a program may be several and constrained. u in R^D holds them one after the other, each carried to its
support by ``z = biject_to(support)(u)``; the density of u is p(x, z(u)) |det dz/du|, so that integrals over u are integrals
over z. This is what modes, Hamiltonian Monte Carlo and quadrature work on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import biject_to

from pyro_vae.layouts import Layout, Run, Values
from pyro_vae.sites import Sites

Place = Callable[[str, Any], tuple[Tensor, Tensor | float]]
"""Decides a latent: (site name, distribution) -> its value and the log-Jacobian that belongs to it."""


@dataclass(frozen=True)
class Slot:
    """Where one latent lives in u: columns start to stop, seen as `shape` before the bijection."""

    start: int
    stop: int
    shape: tuple[int, ...]


Slots = dict[str, Slot]


class Layouts(NamedTuple):
    """How particles go through a program's model, guide and prior (the model up to its latents); where latents lie in u."""

    model: Layout
    guide: Layout
    prior: Layout
    slots: Slots


def make_slots(latents: Sites) -> Slots:
    """One slot a latent, in the order of the model."""
    slots: Slots = {}
    start = 0
    for name, site in latents.items():
        shape = tuple(biject_to(site.distribution.support).inverse_shape(torch.Size(site.event_shape)))
        size = int(torch.Size(shape).numel())
        slots[name] = Slot(start, start + size, shape)
        start += size
    return slots


def place_values(values: Values) -> Place:
    """Latents given in their own support: no Jacobian."""
    return lambda name, _: (values[name], 0.0)


class LogJoint:
    """log p(x, z(u)) + log |det dz/du| for the N rows it was made for; differentiable in u.

    Attributes:
        dim: D, the length of u.
        num_rows: N.
        take: index (n,) -> the same of n of the rows, each as often as it is named.
    """

    def __init__(
        self,
        densities: Callable[..., Run],
        slots: Slots,
        num_rows: int,
        rows_at: Callable[[Tensor], LogJoint],
    ) -> None:
        self._densities, self._slots, self.num_rows, self.take = densities, slots, num_rows, rows_at
        self.dim = max(slot.stop for slot in slots.values())

    def __call__(self, u: Tensor) -> Tensor:
        """The log-density of u per row: (K, N, D) -> (K, N), float64."""
        run = self._densities({"u": self._checked(u)}, self._place_unconstrained)
        return run.latent + run.observed

    def prior(self, u: Tensor) -> Tensor:
        """log p(z(u)) + log |det dz/du|, the prior alone: (K, N, D) -> (K, N), float64; the decoder is not run."""
        return self._densities({"u": self._checked(u)}, self._place_unconstrained, frozenset(self._slots)).latent

    def of_sites(self, z: Values) -> Tensor:
        """log p(x, z) of named latents (K, N, *event_shape) in their own support, no Jacobian: (K, N), float64."""
        run = self._densities(z, place_values)
        return run.latent + run.observed

    def likelihood_of_sites(self, z: Values) -> Tensor:
        """log p(x | z) of named latents (K, N, *event_shape): (K, N), float64."""
        return self._densities(z, place_values).observed

    def unflatten(self, u: Tensor) -> Values:
        """The named latents z(u), each (K, N, *event_shape), from u (K, N, D); the decoder is not run."""
        return self._densities({"u": self._checked(u)}, self._place_unconstrained, frozenset(self._slots)).values

    def flatten(self, z: Values) -> Tensor:
        """The vector u (K, N, D) of named latents z, each (K, N, *event_shape); the decoder is not run."""
        parts: dict[str, list[Tensor]] = {name: [] for name in self._slots}  # one part a run of the model

        def recorder(values: Values) -> Place:
            def place(name: str, distribution: Any) -> tuple[Tensor, float]:
                parts[name].append(biject_to(distribution.support).inv(values[name]))
                return values[name], 0.0

            return place

        self._densities(z, recorder, frozenset(self._slots))
        shape = next(iter(z.values())).shape[:2]
        return torch.cat([torch.cat(part).reshape(*shape, -1) for part in parts.values()], dim=-1)

    def _place_unconstrained(self, particles: Values) -> Place:
        u = particles["u"]

        def place(name: str, distribution: Any) -> tuple[Tensor, Tensor]:
            slot = self._slots[name]
            free = u[..., slot.start : slot.stop].reshape(*u.shape[:-1], *slot.shape)
            bijection = biject_to(distribution.support)
            value = bijection(free)
            return value, bijection.log_abs_det_jacobian(free, value).double()

        return place

    def _checked(self, u: Tensor) -> Tensor:
        if u.dim() != 3 or u.shape[1:] != (self.num_rows, self.dim):
            raise ValueError(f"u has shape {tuple(u.shape)}, this log joint takes (K, {self.num_rows}, {self.dim}).")
        return u
