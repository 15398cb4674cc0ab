"""Gradients along the path of z alone: STL and DReG.

With z_k = z(phi, eps_k), the derivative of log w_k for the guide's parameters phi is

    d log w_k / d phi = (d log w_k / d z_k) (d z_k / d phi) - (d log q / d phi at fixed z_k),

and the last term, the score, has expectation zero. `STL` drops it; `DReG` replaces it in the bound of `IWAE` by a second
reparametrisation. What is left is, with shares s_k = w_k / sum_k w_k and the coefficients c_k of the object,

    sum_k c_k (d log w_k / d z_k) (d z_k / d phi),

at the exact posterior, where log w does not depend on z, no noise at all. Far from it, and where log q bends sharply in z
(a spline flow), it may have more noise than what it replaces. The model's gradient is that of `IWAE`,
sum_k s_k d log p(x, z_k) / d theta. Parameters that model and guide share (a VampPrior's) get both.

Each latent is cut where it is drawn: the guide and the model go on with a leaf. So one run of each serves, whatever the
family, also where latents depend on each other or dropout is at work; a flow is inverted at the leaf.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from pyro_vae.learning.objectives.objective import Objective, require_reparametrised
from pyro_vae.learning.objectives.particles import Weights, weigh
from pyro_vae.rows import positive


class Path(Objective):
    """Minus the bound of `IWAE`, the guide's gradient along the path. To add one, implement `coefficients`."""

    @abstractmethod
    def coefficients(self, shares: Tensor) -> Tensor:
        """c_k from s_k, (K, N) -> (K, N)."""

    def loss_and_elbo(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """See `Objective.loss_and_elbo`."""
        cuts = _Cuts()
        pairs = self._pairs(model, guide, args, kwargs, hand_on=cuts)
        for pair in pairs:
            require_reparametrised(pair.q)
        weights = weigh(pairs)
        shares = weights.shares
        surrogate = (weights.scale * shares * weights.log_p).sum()
        total = (weights.scale * self.coefficients(shares) * weights.log_w).sum()
        surrogate = surrogate + cuts.path(total, len(pairs))
        return surrogate_loss(weights, surrogate), weights.log_w.detach().mean()


def surrogate_loss(weights: Weights, surrogate: Tensor) -> Tensor:
    """Minus the bound of `IWAE`, (), with minus the gradient of `surrogate`."""
    return surrogate.detach() - surrogate - (weights.scale * weights.bound.detach()).sum()


class _Cuts:
    """Cuts latents from what they were drawn from, and afterwards carries gradients across the cuts.

    Attributes:
        draws: latents with their graphs, in the order of the guide.
        leaves: what the run went on with.
    """

    def __init__(self) -> None:
        self.draws: list[Tensor] = []
        self.leaves: list[Tensor] = []

    def __call__(self, draw: Tensor) -> Tensor:
        leaf = draw.detach()
        if draw.requires_grad:
            leaf.requires_grad_()
            self.draws.append(draw)
            self.leaves.append(leaf)
        return leaf

    def path(self, total: Tensor, num_runs: int) -> Tensor:
        """A scalar with the gradient (d total / d leaves) (d draws / d parameters), along whole paths through the cuts.

        Args:
            total: a scalar of the leaves.
            num_runs: of the guide; latents of different runs do not depend on each other.
        """
        if not (self.leaves and total.requires_grad):  # none is asked for, no latent has one, or all of it is masked
            return total.new_zeros(())
        slopes = list(torch.autograd.grad(total, self.leaves, retain_graph=True, materialize_grads=True))
        latents = len(slopes) // num_runs
        # A later latent may have been drawn by way of earlier leaves: theirs is its slope too, from the last one backwards.
        for i in reversed(range(len(slopes))):
            run = slice(i - i % latents, i)
            if earlier := self.leaves[run]:
                through = torch.autograd.grad(self.draws[i], earlier, slopes[i], retain_graph=True, materialize_grads=True)
                slopes[run] = [slope + more for slope, more in zip(slopes[run], through, strict=True)]
        return torch.stack([(slope * draw).sum() for slope, draw in zip(slopes, self.draws, strict=True)]).sum()


class STL(Path):
    """Sticking the landing (Roeder et al. 2017, arXiv:1703.09194): c_k = s_k.

    For K = 1 the gradient of the ELBO, unbiased. For K > 1 it is the paper's version for the bound of `IWAE`, which is
    biased (Tucker et al. 2019, arXiv:1810.04152): use `DReG`.

    Args:
        num_particles: K.

    Examples:
        >>> STL()
        STL(num_particles=1)
    """

    def __init__(self, num_particles: int = 1) -> None:
        positive(num_particles=num_particles)
        super().__init__(num_particles=num_particles)

    def __repr__(self) -> str:
        """The call that makes it."""
        return f"STL(num_particles={self.num_particles})"

    def coefficients(self, shares: Tensor) -> Tensor:
        """See `Path.coefficients`."""
        return shares


class DReG(Path):
    """The doubly reparametrised gradient of `IWAE` (Tucker et al. 2019, arXiv:1810.04152, eq. 8): c_k = s_k^2, unbiased.

    Args:
        num_particles: K.

    Examples:
        >>> DReG()
        DReG(num_particles=8)
    """

    def __init__(self, num_particles: int = 8) -> None:
        positive(num_particles=num_particles)
        super().__init__(num_particles=num_particles)

    def __repr__(self) -> str:
        """The call that makes it."""
        return f"DReG(num_particles={self.num_particles})"

    def coefficients(self, shares: Tensor) -> Tensor:
        """See `Path.coefficients`."""
        return shares.square()
