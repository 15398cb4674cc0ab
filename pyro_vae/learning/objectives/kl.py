"""KL(q(z | x) || p(z)) of one latent and of its dimensions: by formula, or from the draw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.distributions import Independent, kl_divergence

from pyro_vae.sites import Site
from pyro_vae.warn import warn

KL = Callable[[Site, Site], Tensor]
"""(guide site, model site) -> KL of one latent, of the sites' batch shape, in nats, differentiable."""


def sampled_kl(q: Site, p: Site) -> Tensor:
    """log q(z | x) - log p(z) at the drawn z, (N,): unbiased for the KL, and with its noise."""
    log_ratio: Tensor = q.distribution.log_prob(q.value) - p.distribution.log_prob(p.value)
    return log_ratio


def analytic_kl(q: Site, p: Site) -> Tensor:
    """The exact KL(q || p), (N,).

    Raises:
        NotImplementedError: torch has no formula for the pair; `ELBO` then takes `sampled_kl` and says so once.
    """
    return kl_divergence(q.distribution, p.distribution)


def split(q: Site, p: Site) -> tuple[Site, Site] | None:
    """Both sites with their dimensions told apart, batch shape (N, *event_shape); None if they hang together.

    They can be told apart where both are `Independent` over a family of single numbers, or are single numbers themselves.
    """
    factors = _factors(q.distribution), _factors(p.distribution)
    if factors[0] is None or factors[1] is None:
        return None
    return replace(q, distribution=factors[0]), replace(p, distribution=factors[1])


def _factors(distribution: Any) -> Any:
    if not distribution.event_shape:
        return distribution
    whole = isinstance(distribution, Independent) and not distribution.base_dist.event_shape
    return distribution.base_dist if whole else None


def tell_sampled(q: Site, p: Site) -> None:
    """Warn that the KL of this pair is sampled; whoever calls it counts how often, not Python's registry of warnings."""
    text = f"torch has no closed form for KL({q.family} || {p.family}) of latent {q.name!r}: it is sampled."
    warn(text, again=True)
