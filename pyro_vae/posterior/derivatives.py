"""Derivatives of a log joint, for all rows and particles at once.

Rows and particles do not touch each other, so the gradient of the sum is every point's own gradient, and one more backward
pass through the gradient's graph multiplies every point's own Hessian by a vector: D of them give all Hessians, whatever
the number of points. Where the points are few, several vectors share a pass.
"""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor

from pyro_vae.log_joint import LogJoint

TOGETHER = 1024
"""Points times vectors of one backward pass, at most: with fewer it is Python that costs, with more it is memory."""


class Local:
    """The log joint around points u (K, N, D), as far as its second derivatives.

    Attributes:
        value: (K, N), float64, in nats.
        gradient: (K, N, D), float64.
    """

    def __init__(self, log_joint: LogJoint, u: Tensor) -> None:
        with torch.enable_grad():
            self._point = u.detach().requires_grad_()
            value = log_joint(self._point)
            (self._gradient,) = torch.autograd.grad(value.sum(), self._point, create_graph=True)
        self.value, self.gradient = value.detach(), self._gradient.detach().double()

    def hessian_times(self, vectors: Tensor) -> Tensor:
        """Each point's Hessian times its own vector, (K, N, D) -> (K, N, D), float64; one backward pass."""
        # A log joint that is linear in u has a gradient without a graph: its Hessian is zero.
        if not self._gradient.requires_grad:
            return torch.zeros_like(self.gradient)
        (product,) = torch.autograd.grad(
            self._gradient, self._point, vectors.to(self._gradient.dtype), retain_graph=True, materialize_grads=True
        )
        return product.double()

    def hessian(self) -> Tensor:
        """(K, N, D, D), float64, symmetric; D backward passes, or fewer of the same work."""
        together = max(1, TOGETHER // max(1, self.value.numel()))
        index = torch.arange(self.gradient.shape[-1], device=self.gradient.device)
        hessian = torch.cat([self._columns(part) for part in index.split(together)]).movedim(0, -1)
        return 0.5 * (hessian + hessian.mT)

    def _columns(self, index: Tensor) -> Tensor:
        """Columns of every point's Hessian: `index` (n,) -> (n, K, N, D), float64."""
        units = torch.nn.functional.one_hot(index, self.gradient.shape[-1])[:, None, None].expand(-1, *self.gradient.shape)
        if len(index) > 1 and self._gradient.requires_grad:
            # Not every function of a user's can be differentiated for several vectors at once.
            with suppress(RuntimeError):
                (columns,) = torch.autograd.grad(
                    self._gradient,
                    self._point,
                    units.to(self._gradient.dtype),
                    retain_graph=True,
                    materialize_grads=True,
                    is_grads_batched=True,
                )
                return columns.double()
        return torch.stack([self.hessian_times(unit) for unit in units])


def derivatives(log_joint: LogJoint, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value (K, N), gradient (K, N, D) and Hessian (K, N, D, D) of a log joint at u (K, N, D), float64; keeps no graph."""
    local = Local(log_joint, u)
    return local.value, local.gradient, local.hessian()


def value_and_gradient(log_joint: LogJoint, u: Tensor) -> tuple[Tensor, Tensor]:
    """The log joint at u (K, N, D) and its gradient: (K, N), float64, -inf where not a number; (K, N, D), 0 there."""
    with torch.enable_grad():
        point = u.detach().requires_grad_()
        value = log_joint(point)
        (gradient,) = torch.autograd.grad(value.sum(), point)
    good = torch.isfinite(value) & torch.isfinite(gradient).all(-1)
    return torch.where(good, value.detach(), -torch.inf), torch.where(good[..., None], gradient, 0.0)
