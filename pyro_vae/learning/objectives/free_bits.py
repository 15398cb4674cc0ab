"""Free bits (Kingma et al. 2016, arXiv:1606.04934, eq. 15-16): no group of latent dimensions gains by a KL below them.

With KL_j the part of a group j, the KL term of a batch of N rows is

    N sum_j max(free_bits, (1/N) sum_n KL_j(x_n)).

Groups are single dimensions of a latent where both q and p are `Independent` over a family of single numbers; else the
whole latent of D dimensions, which then has D `free_bits`. With scales and masks the mean over the rows is weighted by
them, and N is the sum of these weights. Where the KL is sampled, the maximum is taken of a noisy mean and lies above the
formula's.
"""

from __future__ import annotations

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_vae.learning.objectives.kl import KL, split
from pyro_vae.learning.objectives.objective import Pair
from pyro_vae.sites import Site


def freed(kl: KL, pairs: list[Pair], free_bits: float) -> Tensor:
    """The KL term with free bits, summed over all particles and latents, (), in nats.

    Args:
        kl: of one latent, or of single numbers.
        pairs: runs for one particle each, or for all.
        free_bits: nats a dimension.
    """
    total: Tensor | float = 0.0
    for name, site in pairs[0].q.items():
        found = zip(*(_groups(kl, pair.q[name], pair.p[name]) for pair in pairs), strict=True)
        sums, weight = (torch.stack(parts).sum(0) for parts in found)
        dimensions = torch.Size(site.event_shape).numel() / len(sums)
        total = total + torch.maximum(sums, free_bits * dimensions * weight).sum()
    return torch.as_tensor(total)


def _groups(kl: KL, q: Site, p: Site) -> tuple[Tensor, Tensor]:
    """The KL of each group, (G,), and the number of rows, (), both summed over the batch with scale and mask."""
    each = kl(*(split(q, p) or (q, p))).reshape(*q.batch_shape, -1).movedim(-1, 0)
    kls, weights = (scale_and_mask(part, scale=p.scale, mask=p.mask) for part in (each, torch.ones_like(each[0])))
    return kls.flatten(1).sum(-1), weights.sum()
