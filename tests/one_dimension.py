"""Programs small enough that every bound and gradient is a quadrature, each row with parameters of its own.

A loss is summed over rows, so the gradient of row i's copy of the parameters is one draw of the gradient's estimator: one
call gives as many as there are rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from programs import log_normal
from torch import Tensor

Normal = Callable[..., object]


def normal_without_rsample(loc: Tensor, scale: Tensor) -> object:
    """A Normal whose draws have no derivative, as those of many families."""
    return _Plain(loc, scale)


class _Plain(dist.Normal):
    has_rsample = False

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        raise AssertionError("asked for a reparametrised draw")

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> _Plain:
        return _Plain(self.loc.expand(batch_shape), self.scale.expand(batch_shape))


def nodes(dim: int, count: int) -> tuple[Tensor, Tensor]:
    """Product rule of Gauss and Hermite for N(0, I): points (count^dim, dim), weights (count^dim,)."""
    points, weights = np.polynomial.hermite_e.hermegauss(count)
    weights = weights / weights.sum()
    grid = np.array(list(itertools.product(points, repeat=dim)))
    return torch.tensor(grid), torch.tensor(np.array(list(itertools.product(weights, repeat=dim))).prod(-1))


class Line:
    """z ~ N(0.4, 1.3^2), x ~ N(a z + b, exp(s)^2); q(z | x) = N(c x + d, exp(e)^2). One latent number."""

    latents = 1
    THETA = (0.9, -0.3, -0.2)
    PHI = (0.3, 0.35, -0.5)

    def __init__(
        self,
        x: float = 1.7,
        copies: int = 1,
        *,
        phi: tuple[float, ...] | None = None,
        looped: bool = False,
        family: Normal = dist.Normal,
    ) -> None:
        self.x, self.looped, self.family = x, looped, family
        self.theta, self.phi = (
            torch.tensor(each, dtype=torch.float64).repeat(copies, 1).requires_grad_()
            for each in (self.THETA, phi or self.PHI)
        )
        self.rows = torch.full((copies,), x, dtype=torch.float64), torch.arange(copies)

    def model(self, x: Tensor, row: Tensor) -> None:
        a, b, s = self.theta[row].unbind(-1)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.full((), 0.4, dtype=x.dtype), 1.3))
            if self.looped and z.dim() > 1:
                raise ValueError("takes one particle")
            pyro.sample("x", dist.Normal(a * z + b, s.exp()), obs=x)

    def guide(self, x: Tensor, row: Tensor) -> None:
        c, d, e = self.phi[row].unbind(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.family(c * x + d, e.exp()))

    def draw(self, noise: Tensor, phi: Tensor) -> Tensor:
        """z (..., 1) from standard normal noise (..., 1)."""
        c, d, e = phi
        return c * self.x + d + e.exp() * noise

    def log_p(self, z: Tensor, theta: Tensor) -> Tensor:
        a, b, s = theta
        return log_normal(z[..., 0], 0.4, 1.3) + log_normal(torch.tensor(self.x), a * z[..., 0] + b, s.exp())

    def log_q(self, z: Tensor, phi: Tensor, x: Tensor | None = None) -> Tensor:
        c, d, e = phi
        return log_normal(z[..., 0], c * (self.x if x is None else x) + d, e.exp())

    def samples(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Draws of the gradient of minus the loss for theta and phi, (copies, P) each."""
        theta, phi = torch.autograd.grad(-loss, [self.theta, self.phi], materialize_grads=True)
        return theta, phi

    def leaves(self) -> tuple[Tensor, Tensor]:
        """One copy of the parameters, to differentiate by."""
        theta, phi = (each[0].detach().clone().requires_grad_() for each in (self.theta, self.phi))
        return theta, phi

    def log_weights(self, theta: Tensor, phi: Tensor, num_particles: int, count: int) -> tuple[Tensor, Tensor]:
        """log w at the nodes (M, K), reparametrised, and the nodes' weights (M,)."""
        noise, weights = nodes(num_particles * self.latents, count)
        z = self.draw(noise.reshape(-1, num_particles, self.latents), phi)
        return self.log_p(z, theta) - self.log_q(z, phi), weights

    def bound(
        self, theta: Tensor, phi: Tensor, num_particles: int, alpha: float = 0.0, count: int = 60
    ) -> tuple[Tensor, Tensor]:
        """The Renyi bound of K draws (alpha = 1: the ELBO) and the standard deviation of its estimate from one row."""
        log_w, weights = self.log_weights(theta, phi, num_particles, count)
        if alpha == 1.0:
            values = log_w.mean(-1)
        else:
            values = (((1.0 - alpha) * log_w).logsumexp(-1) - math.log(num_particles)) / (1.0 - alpha)
        mean = (weights * values).sum()
        return mean, (weights * (values - mean).square()).sum().sqrt()

    def posterior(self) -> tuple[float, float, float]:
        """(c, d, e) of the exact posterior."""
        a, b, s = self.THETA
        precision = 1.3**-2 + (a / math.exp(s)) ** 2
        gain = a * math.exp(-2.0 * s) / precision
        return gain, 0.4 * 1.3**-2 / precision - gain * b, -0.5 * math.log(precision)


class Chain(Line):
    """Two latents, the second given the first in model and guide.

    z1 ~ N(0, 1), z2 ~ N(a z1, 0.6^2), x ~ N(z2 + b z1, exp(s)^2);
    q(z1) = N(c x, exp(e)^2), q(z2 | z1) = N(f z1 + g x, exp(h)^2).
    """

    latents = 2
    THETA = (0.8, 0.5, -0.5)
    PHI = (0.5, -0.4, 0.2, 0.6, -0.6)

    def model(self, x: Tensor, row: Tensor) -> None:
        a, b, s = self.theta[row].unbind(-1)
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
            z2 = pyro.sample("z2", dist.Normal(a * z1, 0.6))
            if self.looped and z2.dim() > 1:
                raise ValueError("takes one particle")
            pyro.sample("x", dist.Normal(z2 + b * z1, s.exp()), obs=x)

    def guide(self, x: Tensor, row: Tensor) -> None:
        c, e, f, g, h = self.phi[row].unbind(-1)
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", self.family(c * x, e.exp()))
            pyro.sample("z2", self.family(f * z1 + g * x, h.exp()))

    def draw(self, noise: Tensor, phi: Tensor) -> Tensor:
        c, e, f, g, h = phi
        z1 = c * self.x + e.exp() * noise[..., 0]
        return torch.stack([z1, f * z1 + g * self.x + h.exp() * noise[..., 1]], -1)

    def log_p(self, z: Tensor, theta: Tensor) -> Tensor:
        a, b, s = theta
        z1, z2 = z.unbind(-1)
        return (
            log_normal(z1, 0.0, 1.0) + log_normal(z2, a * z1, 0.6) + log_normal(torch.tensor(self.x), z2 + b * z1, s.exp())
        )

    def log_q(self, z: Tensor, phi: Tensor, x: Tensor | None = None) -> Tensor:
        c, e, f, g, h = phi
        z1, z2 = z.unbind(-1)
        x = torch.tensor(self.x) if x is None else x
        return log_normal(z1, c * x, e.exp()) + log_normal(z2, f * z1 + g * x, h.exp())


def require_mean(draws: Tensor, expected: Tensor, deviations: float = 5.0) -> None:
    """The mean of `draws` (R, P) is `expected` (P,), within so many of its standard errors; some of them are noisy."""
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - expected).abs() <= deviations * error + 1e-9).all(), (draws.mean(0), expected, error)
    assert (error > 0.0).any()
