"""The score-function gradient of the ELBO, which needs no derivative of the draws (Williams 1992; Ranganath et al. 2014).

For z_k ~ q(z | x) held fixed,

    d ELBO / d phi = E (1/K) sum_k (log w_k - b_k) d log q(z_k | x) / d phi

for any baseline b_k that does not depend on z_k: unbiased, with far more variance than the reparametrised gradient has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_vae.learning.objectives.objective import Objective
from pyro_vae.learning.objectives.particles import weigh
from pyro_vae.rows import positive

Baseline = Callable[[Tensor], Tensor]
"""log w, (K, N) -> b, (K, N); b_k may depend on all log w but log w_k."""


def no_baseline(log_w: Tensor) -> Tensor:
    """b_k = 0."""
    return torch.zeros_like(log_w)


def leave_one_out(log_w: Tensor) -> Tensor:
    """b_k = the mean of the other log w (Kool et al. 2019); 0 for K = 1."""
    return (log_w.sum(0) - log_w) / max(1, len(log_w) - 1)


class ScoreFunction(Objective):
    """Minus the ELBO with KL from the draw, and the score-function gradient for the guide.

    Args:
        num_particles: K.
        baseline: `leave_one_out` or `no_baseline`.

    Examples:
        >>> ScoreFunction(num_particles=4)
        ScoreFunction(num_particles=4, baseline=leave_one_out)
    """

    def __init__(self, num_particles: int = 1, baseline: Baseline = leave_one_out) -> None:
        positive(num_particles=num_particles)
        super().__init__(num_particles=num_particles)
        self.baseline = baseline

    def __repr__(self) -> str:
        """The call that makes it."""
        baseline = getattr(self.baseline, "__name__", repr(self.baseline))
        return f"ScoreFunction(num_particles={self.num_particles}, baseline={baseline})"

    def loss_and_elbo(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """See `Objective.loss_and_elbo`."""
        weights = weigh(self._pairs(model, guide, args, kwargs, hand_on=torch.Tensor.detach))
        log_w = weights.log_w.detach()
        surrogate = weights.log_p + (log_w - self.baseline(log_w)) * weights.log_q
        loss = -(weights.scale * (log_w + surrogate - surrogate.detach()).mean(0)).sum()
        return loss, log_w.mean()
