"""Curvature of densities with kinks: secants across the width of the posterior instead of derivatives at a point.

Where log p(x, u) has kinks (a Laplace likelihood, a network of ReLUs), its Hessian at a point knows nothing of them: each
kink turns the gradient at one place, and between kinks the log joint may be flat. What a Gaussian must be as narrow as is
the turn of the gradient over its own width,

    H e_i = ( g(m - a_i) - g(m + a_i) ) / 2,    a_i one standard deviation along axis i,

in whitened coordinates, where H is I for the right Gaussian. Taken as the new precision, a few times over, this finds the
width at which it agrees with itself. For a smooth log joint, whose turn grows with the step where it is not linear, it
would see bends of the posterior as narrowness; so it is asked only where a tenth of the step shows the same.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pyro_vae.log_joint import LogJoint
from pyro_vae.posterior.derivatives import value_and_gradient
from pyro_vae.posterior.modes import LARGEST_DENSE, Modes
from pyro_vae.posterior.shapes import Dense, positive

NARROWER = 2.0
"""A mean turn of the gradient this many times that of the Gaussian says that the Hessian has missed something."""

SMALL = 0.1
"""The smaller step, of the same directions: at it a bend shows a hundredth of its turn, a kink all of it or more."""

ROUNDS = 8
"""Secants in turn, at most."""

CLOSE = 1.5
"""Rounds end when no curvature changes by a larger factor."""


def turn(log_joint: LogJoint, modes: Modes, noise: Tensor, dtype: torch.dtype, step: float = 1.0) -> Tensor:
    """Mean curvature over that of the Gaussian, (P,): 1 if the Gaussian fits; from antithetic pairs at m +- step noise.

    Args:
        log_joint: of the rows of the modes, in their order.
        modes: P modes.
        noise: standard normal, (K, P, D), float64.
        dtype: of the networks.
        step: how far to go, in standard deviations.
    """
    away = step * modes.shape.colour(noise)
    plus, minus = (_gradient(log_joint, modes.u + side * away, dtype) for side in (1.0, -1.0))
    difference = modes.shape.precondition(minus - plus)
    return (difference * noise).sum((0, -1)) / (2.0 * step * noise.square().sum((0, -1)))


def with_kinks(
    log_joint: LogJoint, modes: Modes, turned: Tensor, noise: Tensor, dtype: torch.dtype
) -> tuple[Modes, Tensor]:
    """The modes with the shapes of those that lie among kinks found by secants; which they are, boolean (P,).

    Args:
        log_joint: as for `turn`.
        modes: P modes, their shapes from Hessians.
        turned: `turn` of a whole step, (P,).
        noise: as for `turn`.
        dtype: of the networks.
    """
    kinked = torch.zeros_like(turned, dtype=torch.bool)
    if modes.u.shape[-1] > LARGEST_DENSE or not isinstance(modes.shape, Dense):
        return modes, kinked
    doubtful = (turned > NARROWER).nonzero().flatten()
    if len(doubtful) == 0:
        return modes, kinked
    some = modes.take(doubtful)
    near = turn(log_joint.take(doubtful), some, noise[:, doubtful], dtype, SMALL)
    kinked[doubtful] = near > torch.maximum(0.5 * turned[doubtful], torch.full_like(near, NARROWER))
    index = kinked.nonzero().flatten()
    if len(index) == 0:
        return modes, kinked
    shape = _secants(log_joint.take(index), modes.take(index), dtype)
    factor, inverse = modes.shape.factor.clone(), modes.shape.inverse.clone()
    factor[index], inverse[index] = shape.factor, shape.inverse
    return replace(modes, shape=Dense(factor, inverse)), kinked


def _secants(log_joint: LogJoint, modes: Modes, dtype: torch.dtype) -> Dense:
    """Precisions that agree with the turn of the gradient over their own widths."""
    assert isinstance(modes.shape, Dense)
    shape, (count, dim) = modes.shape, modes.u.shape
    factor, inverse = shape.factor.clone(), shape.inverse.clone()
    going = torch.arange(count, device=factor.device)
    axes = torch.eye(dim, dtype=torch.float64, device=factor.device)[:, None, :]
    least = torch.full((1,), 1.0 / CLOSE, dtype=torch.float64, device=factor.device)
    for _ in range(ROUNDS):
        here, there = Dense(factor[going], inverse[going]), log_joint.take(going)
        away = here.colour(axes.expand(dim, len(going), dim))
        plus, minus = (_gradient(there, modes.u[going] + side * away, dtype) for side in (1.0, -1.0))
        turns = 0.5 * here.precondition(minus - plus).transpose(0, 1)  # (n, D, D), row i the turn along axis i
        turned = positive(0.5 * (turns + turns.mT), least)
        new = Dense.of(here.factor @ turned.factor)
        factor[going], inverse[going] = new.factor, new.inverse
        size = torch.linalg.eigvalsh(turned.factor @ turned.factor.mT)
        going = going[(size.amax(-1) > CLOSE) & torch.isfinite(size).all(-1)]
        if len(going) == 0:
            break
    return Dense(factor, inverse)


def _gradient(log_joint: LogJoint, u: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient at u (K, P, D), float64; a few particles at a time, as many as keep the networks in the cache."""
    return torch.cat([value_and_gradient(log_joint, part.to(dtype))[1] for part in u.split(8)]).double()
