"""Gradient and Hessian of a log joint, for all rows and particles at once.

Rows and particles do not touch each other, so the gradient of the sum is every point's own gradient, and column j of all
Hessians comes from one more backward pass: D passes whatever the number of points.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_vae.log_joint import LogJoint


def derivatives(log_joint: LogJoint, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value, gradient and Hessian of the log joint at u.

    Args:
        log_joint: of N rows.
        u: (K, N, D).

    Returns:
        value (K, N), gradient (K, N, D) and Hessian (K, N, D, D), all float64; no graph is kept.
    """
    with torch.enable_grad():
        point = u.detach().requires_grad_()
        value = log_joint(point)
        (gradient,) = torch.autograd.grad(value.sum(), point, create_graph=True)
        columns = []
        for j in range(u.shape[-1]):
            # A log joint that is linear in u has a gradient without a graph: its Hessian is zero.
            if gradient.requires_grad:
                (column,) = torch.autograd.grad(gradient[..., j].sum(), point, retain_graph=True)
            else:
                column = torch.zeros_like(point)
            columns.append(column)
    hessian = torch.stack(columns, dim=-1).double()
    return value.detach(), gradient.detach().double(), 0.5 * (hessian + hessian.mT)
