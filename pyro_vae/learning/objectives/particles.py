"""What K draws of the guide are worth, row by row: log w_k = log p(x, z_k) - log q(z_k | x).

The weights of a row go through exponents, so they are unscaled; what the row counts (plates, `poutine.scale`) is kept
beside them and multiplies the row's bound. That has a meaning only if all sites of the row have one scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_vae.learning.objectives.objective import Pair
from pyro_vae.program import PARTICLES
from pyro_vae.sites import Site


@dataclass(frozen=True)
class Weights:
    """K weighted draws for each of N rows; masked sites count as log 1.

    Attributes:
        log_p: log p(x, z), (K, N), in nats.
        log_q: log q(z | x), (K, N), in nats.
        scale: what each row counts, a number or a tensor that broadcasts to (N,).
    """

    log_p: Tensor
    log_q: Tensor
    scale: float | Tensor

    @property
    def log_w(self) -> Tensor:
        """log p(x, z) - log q(z | x), (K, N), in nats."""
        return self.log_p - self.log_q

    @property
    def shares(self) -> Tensor:
        """w_k / sum_k w_k, (K, N), detached."""
        return self.log_w.detach().softmax(0)

    @property
    def bound(self) -> Tensor:
        """log (1/K) sum_k w_k, (N,), in nats (Burda et al. 2016, eq. 8)."""
        return log_mean_exp(self.log_w)


def log_mean_exp(values: Tensor) -> Tensor:
    """The log of the mean of exp over the particles, (K, N) -> (N,)."""
    return values.logsumexp(0) - math.log(len(values))


def weigh(pairs: list[Pair]) -> Weights:
    """The weights of all particles.

    Args:
        pairs: one run for all particles, or one for each.

    Raises:
        ValueError: a site that is not of one row, or sites of a row with different scales.
    """
    scale = one_scale([*pairs[0].q.values(), *pairs[0].p.values()])
    log_p = torch.cat([log_density(pair.p.values()) for pair in pairs])
    return Weights(log_p, torch.cat([log_density(pair.q.values()) for pair in pairs]), scale)


def log_density(sites: Iterable[Site]) -> Tensor:
    """The unscaled log-density of each row under all sites of one run, (K, N), or (1, N) outside the particles' plate."""
    total: Tensor | float = 0.0
    for site in sites:
        _require_row_site(site)
        total = total + scale_and_mask(site.distribution.log_prob(site.value), mask=site.mask)
    total = torch.as_tensor(total)
    return total if total.dim() == 2 else total[None]


def one_scale(sites: Sequence[Site]) -> float | Tensor:
    """The scale that all sites of a row have, a number or a tensor that broadcasts to (N,).

    Raises:
        ValueError: they have different ones; names two of them.
    """
    first = sites[0]
    for site in sites:
        if not _same(first.scale, site.scale):
            raise ValueError(
                f"Sites {first.name!r} and {site.name!r} of one row have the scales {first.scale} and {site.scale}, but a "
                "weight p(x, z) / q(z | x) has no parts that count differently: put poutine.scale around the whole model "
                "and guide, or use objectives.ELBO."
            )
    return first.scale


def _same(a: float | Tensor, b: float | Tensor) -> bool:
    return a is b or bool(torch.as_tensor(a == b).all())


def _require_row_site(site: Site) -> None:
    plates = [plate for plate in site.plates if plate.name != PARTICLES]
    if len(plates) != 1 or plates[0].dim != -1 or len(site.batch_shape) != len(site.plates):
        inside = ", ".join(repr(plate.name) for plate in plates) or "none"
        raise ValueError(
            f"Site {site.name!r} ({site.shapes}) is not one of each row (plates: {inside}), but weights belong to rows: "
            "sample it inside one plate over the rows, `with pyro.plate('data', len(x)):`, or use objectives.ELBO."
        )
