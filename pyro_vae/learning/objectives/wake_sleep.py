"""Reweighted wake-sleep: the guide learns to cover the posterior, without reparametrised draws.

With z_k ~ q(z | x) held fixed and shares s_k = w_k / sum_k w_k (Bornschein & Bengio 2015, arXiv:1406.2751; Le et al. 2020,
arXiv:1805.10469):

    wake, theta:  sum_k s_k d log p(x, z_k) / d theta            the gradient of the bound of `IWAE`
    wake, phi:    sum_k s_k d log q(z_k | x) / d phi             lowers KL(p(z | x) || q(z | x)), biased as 1 / K
    sleep, phi:   d log q(z | x) / d phi,  (x, z) ~ p(x, z)      lowers the same on rows that the model dreams, unbiased
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from pyro_vae.learning.objectives.objective import Objective
from pyro_vae.learning.objectives.particles import log_density, one_scale, weigh
from pyro_vae.learning.objectives.paths import surrogate_loss
from pyro_vae.program import Program, record
from pyro_vae.rows import as_rows, positive


class ReweightedWakeSleep(Objective):
    """Minus the bound of `IWAE`, with the gradients of reweighted wake-sleep.

    Args:
        num_particles: K.
        wake_phi: the share of the wake gradient in the guide's, in [0, 1]; the sleep gradient has the rest. Sleep draws as
            many rows as there are, in `eval()`, and needs a model that observes its arguments unchanged.

    Examples:
        >>> ReweightedWakeSleep(wake_phi=0.5)
        ReweightedWakeSleep(num_particles=8, wake_phi=0.5)
    """

    def __init__(self, num_particles: int = 8, wake_phi: float = 1.0) -> None:
        positive(num_particles=num_particles)
        if not 0.0 <= wake_phi <= 1.0:
            raise ValueError(f"wake_phi={wake_phi} is a share: give a number in [0, 1].")
        super().__init__(num_particles=num_particles)
        self.wake_phi = wake_phi

    def __repr__(self) -> str:
        """The call that makes it."""
        return f"ReweightedWakeSleep(num_particles={self.num_particles}, wake_phi={self.wake_phi})"

    def loss_and_elbo(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """See `Objective.loss_and_elbo`."""
        weights = weigh(self._pairs(model, guide, args, kwargs, hand_on=torch.Tensor.detach))
        surrogate = (weights.scale * weights.shares * (weights.log_p + self.wake_phi * weights.log_q)).sum()
        if self.wake_phi < 1.0 and torch.is_grad_enabled():
            surrogate = surrogate + (1.0 - self.wake_phi) * _sleep(model, guide, args, kwargs)
        return surrogate_loss(weights, surrogate), weights.log_w.detach().mean()


def _sleep(model: Any, guide: Any, args: Any, kwargs: Any) -> Tensor:
    """log q(z | x) of rows and latents that the model draws, summed with the guide's scales, ()."""
    dreaming = functools.partial(model, **kwargs) if kwargs else model
    seed = int(torch.randint(2**62, ()))  # a call of its own randomness, from the ambient one
    dreamt, latents = Program(dreaming, guide).simulate(as_rows(args), seed)
    q = record(guide, dreamt, latents, kwargs)
    return (one_scale(list(q.values())) * log_density(q.values())).sum()
