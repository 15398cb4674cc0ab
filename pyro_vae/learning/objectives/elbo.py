"""The evidence lower bound, with beta and free bits.

For row x with z ~ q(z | x)

    ELBO_beta(x) = log p(x | z) - beta KL(q(z | x) || p(z)),

for beta = 1 the evidence lower bound (Kingma & Welling 2014, eq. 3), in expectation at most log p(x); beta > 1 and warm-up
from 0: Higgins et al. 2017, Bowman et al. 2016. A latent's KL is exact (`analytic_kl`) or from the draw (`sampled_kl`).

For fixed s, |x - f(z)|^2 + beta KL equals -2 s^2 ELBO with beta = 2 s^2, up to the constant d s^2 log(2 pi s^2).

Free bits: see `pyro_vae.learning.objectives.free_bits`.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_vae.learning.objectives.free_bits import freed
from pyro_vae.learning.objectives.kl import KL, analytic_kl, sampled_kl, tell_sampled
from pyro_vae.learning.objectives.objective import Objective, Pair, require_reparametrised, sites_of
from pyro_vae.learning.objectives.schedules import Schedule
from pyro_vae.rows import positive
from pyro_vae.sites import Site


class ELBO(Objective):
    """Minus the ELBO, with beta and free bits.

    Args:
        kl: `analytic_kl` or `sampled_kl`. A pair without a closed form is sampled, and this object says so once.
        beta: a number, or a schedule such as `warm_up(2000)`; the reported ELBO always has beta = 1.
        num_particles: draws of z averaged for each row.
        free_bits: nats of KL a latent dimension that cost nothing more; the reported ELBO has none.

    Examples:
        >>> ELBO(kl=sampled_kl, beta=0.5, free_bits=0.1)
        ELBO(kl=sampled_kl, beta=0.5, num_particles=1, free_bits=0.1)
    """

    def __init__(
        self, kl: KL = analytic_kl, beta: float | Schedule = 1.0, num_particles: int = 1, free_bits: float = 0.0
    ) -> None:
        positive(num_particles=num_particles)
        if not callable(kl):
            raise TypeError(f"kl={kl!r} is no function: give pv.objectives.analytic_kl or pv.objectives.sampled_kl.")
        if not callable(beta) and not _at_least_zero(beta):
            raise ValueError(f"beta={beta!r} must be a finite number of at least 0, or a schedule.")
        if not _at_least_zero(free_bits):
            raise ValueError(f"free_bits={free_bits!r} must be a finite number of nats of at least 0.")
        super().__init__(num_particles=num_particles)
        self.kl, self.beta, self.free_bits = kl, beta, free_bits
        self._told: set[tuple[str, str, str]] = set()

    def __repr__(self) -> str:
        """The call that makes it; without free bits as it was before there were any, so that older runs resume."""
        kl = getattr(self.kl, "__name__", repr(self.kl))
        free_bits = f", free_bits={self.free_bits}" if self.free_bits else ""
        return f"ELBO(kl={kl}, beta={self.beta!r}, num_particles={self.num_particles}{free_bits})"

    def schedules(self) -> dict[str, Schedule]:
        """See `Objective.schedules`."""
        return {"beta": self.beta} if callable(self.beta) else {}

    def loss_and_elbo(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """See `Objective.loss_and_elbo`."""
        beta = self.scheduled("beta") if callable(self.beta) else self.beta
        pairs = self._pairs(model, guide, args, kwargs)
        for pair in pairs:
            require_reparametrised(pair.q)
        terms = [self._terms(pair, tell=True) for pair in pairs]
        elbo = sum(torch.as_tensor(sum(_masked(site, value).detach() for site, value in each)).mean() for each in terms)
        if self.free_bits > 0.0:
            terms = [[(site, value) for site, value in each if site.observed] for each in terms]
        cost = sum(-_scaled(site, value, beta).sum() for each in terms for site, value in each)
        if self.free_bits > 0.0:
            cost = cost + beta * freed(self._kl(pairs[0], tell=False), pairs, self.free_bits)
        return torch.as_tensor(cost) / self.num_particles, torch.as_tensor(elbo) / len(pairs)

    def rows(self, model: Any, guide: Any, *args: Any) -> Tensor:
        """The ELBO of each row with beta = 1, (N,), whatever the scales; masks are honoured."""
        pair = sites_of(model, guide, args, {})
        return torch.as_tensor(sum(_masked(site, value) for site, value in self._terms(pair)))

    def kl_rows(self, model: Any, guide: Any, *args: Any) -> Tensor:
        """The KL of each row, all latents together, (N,), in nats; sampled where there is no closed form."""
        pair = sites_of(model, guide, args, {})
        return -torch.as_tensor(sum(_masked(site, value) for site, value in self._terms(pair) if not site.observed))

    def _terms(self, pair: Pair, *, tell: bool = False) -> list[tuple[Site, Tensor]]:
        """log p(x | z) of what is observed and -KL of what is latent, of the sites' batch shape, beside its site."""
        kl = self._kl(pair, tell=tell)
        return [
            (site, site.distribution.log_prob(site.value) if site.observed else -kl(pair.q[name], site))
            for name, site in pair.p.items()
        ]

    def _kl(self, pair: Pair, *, tell: bool) -> KL:
        """The KL that is right for this program.

        E_q of an exact KL term is right if its prior depends on no latent drawn later in the guide: the same order in both
        guarantees it. Otherwise the draw itself is used, which is always right.
        """
        order = [name for name, site in pair.p.items() if not site.observed]
        return functools.partial(self._exact_or_sampled, tell=tell) if order == list(pair.q) else sampled_kl

    def _exact_or_sampled(self, q: Site, p: Site, *, tell: bool) -> Tensor:
        try:
            return self.kl(q, p).expand(q.batch_shape)
        except NotImplementedError:
            pair = (q.name, q.family, p.family)
            if tell and pair not in self._told:
                self._told.add(pair)
                tell_sampled(q, p)
            return sampled_kl(q, p)


def _at_least_zero(value: Any) -> bool:
    try:
        return math.isfinite(value) and bool(value >= 0.0)
    except TypeError:  # no number
        return False


def _scaled(site: Site, value: Tensor, beta: float | Tensor = 1.0) -> Tensor:
    value = value if site.observed else beta * value
    scaled: Tensor = scale_and_mask(value, scale=site.scale, mask=site.mask)
    return scaled


def _masked(site: Site, value: Tensor) -> Tensor:
    masked: Tensor = scale_and_mask(value, mask=site.mask)
    return masked
