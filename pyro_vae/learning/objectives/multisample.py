"""Bounds from K draws for each row, by reparametrisation: IWAE and the Rényi family.

    L_K(x)       = E log (1/K) sum_k w_k                                  (Burda et al. 2016, arXiv:1509.00519, eq. 8)
    L_alpha,K(x) = E log ((1/K) sum_k w_k^(1 - alpha)) / (1 - alpha)      (Li & Turner 2016, arXiv:1602.02311, section 4)

L_1 is the ELBO, L_K grows with K to log p(x), and L_alpha for alpha = 0 is L_K. Pyro's `RenyiELBO` takes the scales of
plates and handlers into the exponent, where they do not belong, and the sum of the batch where a site is outside its plate.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

from torch import Tensor

from pyro_vae.learning.objectives.objective import Objective, require_reparametrised
from pyro_vae.learning.objectives.particles import Weights, log_mean_exp, weigh
from pyro_vae.rows import positive


class Multisample(Objective):
    """Minus a bound that is differentiated as it stands. To add one, implement `bound`."""

    @abstractmethod
    def bound(self, weights: Weights) -> Tensor:
        """The bound of each row, (N,), in nats, differentiable."""

    def loss_and_elbo(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """See `Objective.loss_and_elbo`."""
        pairs = self._pairs(model, guide, args, kwargs)
        for pair in pairs:
            require_reparametrised(pair.q)
        weights = weigh(pairs)
        return -(weights.scale * self.bound(weights)).sum(), weights.log_w.detach().mean()


class IWAE(Multisample):
    """Minus the importance-weighted bound.

    Args:
        num_particles: K; the bound rises with it, and the guide's gradient drowns in noise (Rainforth et al. 2018), which
            `DReG` mends.

    Examples:
        >>> IWAE()
        IWAE(num_particles=8)
    """

    def __init__(self, num_particles: int = 8) -> None:
        positive(num_particles=num_particles)
        super().__init__(num_particles=num_particles)

    def __repr__(self) -> str:
        """The call that makes it."""
        return f"IWAE(num_particles={self.num_particles})"

    def bound(self, weights: Weights) -> Tensor:
        """See `Multisample.bound`."""
        return weights.bound


class Renyi(Multisample):
    """Minus the variational Rényi bound: for alpha < 0 an upper bound of log p(x) as K grows, for alpha > 0 a lower one.

    Args:
        alpha: the order, any finite number but 1; 0 is `IWAE`. Above 1 it rests on the smallest weights.
        num_particles: K.

    Examples:
        >>> Renyi(0.5)
        Renyi(alpha=0.5, num_particles=8)
    """

    def __init__(self, alpha: float, num_particles: int = 8) -> None:
        positive(num_particles=num_particles)
        if alpha == 1.0 or not math.isfinite(alpha):
            raise ValueError(f"alpha={alpha} must be a finite number other than 1: for alpha = 1 use objectives.ELBO().")
        super().__init__(num_particles=num_particles)
        self.alpha = alpha

    def __repr__(self) -> str:
        """The call that makes it."""
        return f"Renyi(alpha={self.alpha}, num_particles={self.num_particles})"

    def bound(self, weights: Weights) -> Tensor:
        """See `Multisample.bound`."""
        order = 1.0 - self.alpha
        return log_mean_exp(order * weights.log_w) / order
