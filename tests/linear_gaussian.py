"""A linear-Gaussian program with everything known in closed form: the yardstick of many tests.

z ~ N(0, I_D), x = W z + b + s * noise with a scale for each dimension, all of it asymmetric. Then
x ~ N(b, W W' + diag s^2) and z | x ~ N(m(x), C) with C = (I + W' diag(s^-2) W)^-1 and m(x) = C W' diag(s^-2) (x - b).
"""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vae import Program


class LinearGaussian:
    """Model, guides and closed forms; the closed forms are computed in float64 whatever `dtype`."""

    def __init__(self, dim: int = 6, latent_dim: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(dim, latent_dim, generator=generator, dtype=torch.float64) * torch.linspace(
            0.3, 1.5, latent_dim, dtype=torch.float64
        )
        self.bias = torch.linspace(-1.0, 2.0, dim, dtype=torch.float64)
        self.scale = torch.linspace(0.4, 0.9, dim, dtype=torch.float64)
        self.dtype, self.latent_dim = dtype, latent_dim
        precision = self.weight.T / self.scale.square()
        self.covariance = torch.linalg.inv(torch.eye(latent_dim, dtype=torch.float64) + precision @ self.weight)
        self.gain = self.covariance @ precision

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            zero = torch.zeros(self.latent_dim, dtype=self.dtype)
            z = pyro.sample("z", dist.Normal(zero, 1.0).to_event(1))
            loc = z @ self.weight.T.to(self.dtype) + self.bias.to(self.dtype)
            pyro.sample("x", dist.Normal(loc, self.scale.to(self.dtype)).to_event(1), obs=x)

    def posterior_mean(self, x: Tensor) -> Tensor:
        return (x.double() - self.bias) @ self.gain.T

    def program(self, inflate: float = 1.0, shift: float = 0.0) -> Program:
        """The guide is the exact posterior with its covariance times inflate^2 and its mean moved by `shift` deviations."""
        factor = torch.linalg.cholesky(self.covariance)

        def guide(x: Tensor) -> None:
            mean = self.posterior_mean(x) + shift * factor.sum(-1)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.MultivariateNormal(mean.to(self.dtype), scale_tril=(inflate * factor).to(self.dtype)))

        return Program(self.model, guide)

    def marginal(self) -> torch.distributions.MultivariateNormal:
        return torch.distributions.MultivariateNormal(
            self.bias, self.weight @ self.weight.T + torch.diag(self.scale.square())
        )

    def log_p(self, x: Tensor) -> Tensor:
        """log p(x), (N,), float64."""
        return self.marginal().log_prob(x.double())

    def draw(self, size: int, seed: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(size, len(self.bias), generator=generator, dtype=torch.float64)
        return (self.bias + noise @ torch.linalg.cholesky(self.marginal().covariance_matrix).T).to(self.dtype)


def kl_normal(mean: Tensor, factor: Tensor, other_mean: Tensor, other_factor: Tensor) -> Tensor:
    """KL(N(mean, LL') || N(other_mean, MM')), written out by hand, (N,)."""
    dim = mean.shape[-1]
    precision = torch.cholesky_inverse(other_factor)
    delta = other_mean - mean
    trace = (precision @ (factor @ factor.mT)).diagonal(dim1=-2, dim2=-1).sum(-1)
    log_det = 2.0 * (other_factor.diagonal(dim1=-2, dim2=-1).log() - factor.diagonal(dim1=-2, dim2=-1).log()).sum(-1)
    return 0.5 * (trace + (delta @ precision * delta).sum(-1) - dim + log_det)


LOG_2PI = math.log(2.0 * math.pi)
