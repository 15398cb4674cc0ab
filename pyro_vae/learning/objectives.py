"""Objectives: Pyro ELBO objects that know each row's terms.

For row x with z ~ q(z | x)

    ELBO_beta(x) = log p(x | z) - beta KL(q(z | x) || p(z)),

for beta = 1 the evidence lower bound (Kingma & Welling 2014, eq. 3), in expectation at most log p(x); beta > 1 and warm-up
from 0: Higgins et al. 2017, Bowman et al. 2016. A latent's KL is exact (`analytic_kl`) or from the draw (`sampled_kl`).

For fixed s, |x - f(z)|^2 + beta KL equals -2 s^2 ELBO with beta = 2 s^2, up to the constant d s^2 log(2 pi s^2).

Objects of this file work as the loss of `pyro.infer.SVI` and of `pv.fit`.
"""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import pyro.infer
import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_vae.program import record
from pyro_vae.rows import positive
from pyro_vae.sites import Site

KL = Callable[[Site, Site], Tensor]
"""(guide site, model site) -> KL of one latent, (N,), in nats, differentiable."""

Schedule = Callable[[int], float]
"""Number of gradient steps taken -> beta."""


def sampled_kl(q: Site, p: Site) -> Tensor:
    """log q(z | x) - log p(z) at the drawn z, (N,): unbiased for the KL, and with its noise."""
    log_ratio: Tensor = q.distribution.log_prob(q.value) - p.distribution.log_prob(p.value)
    return log_ratio


def analytic_kl(q: Site, p: Site) -> Tensor:
    """The exact KL(q || p), (N,), where torch has a formula for the pair; else `sampled_kl`, said once."""
    try:
        return kl_divergence(q.distribution, p.distribution)
    except NotImplementedError:
        warnings.warn(
            f"torch has no closed form for KL({q.family} || {p.family}) of latent {q.name!r}: it is sampled.",
            stacklevel=2,
        )
        return sampled_kl(q, p)


def warm_up(steps: int, *, start: float = 0.0, end: float = 1.0) -> Schedule:
    """beta grows linearly from `start` to `end` over the first `steps` gradient steps, then stays (Bowman et al. 2016)."""
    positive(steps=steps)
    return _Line(steps, start, end)


def cyclic(steps: int, *, rise: float = 0.5, end: float = 1.0) -> Schedule:
    """beta rises from 0 to `end` in the first `rise` of every `steps` steps and stays there (Fu et al. 2019)."""
    positive(steps=steps)
    if not 0.0 < rise <= 1.0:
        raise ValueError(f"rise={rise} is the part of a cycle in which beta grows: give a number in (0, 1].")
    return _Cycle(steps, rise, end)


class _Line:
    def __init__(self, steps: int, start: float, end: float) -> None:
        self.steps, self.start, self.end = steps, start, end

    def __call__(self, step: int) -> float:
        return self.start + (self.end - self.start) * min(1.0, step / self.steps)

    def __repr__(self) -> str:
        return f"warm_up({self.steps}, start={self.start}, end={self.end})"


class _Cycle:
    def __init__(self, steps: int, rise: float, end: float) -> None:
        self.steps, self.rise, self.end = steps, rise, end

    def __call__(self, step: int) -> float:
        return self.end * min(1.0, (step % self.steps) / (self.rise * self.steps))

    def __repr__(self) -> str:
        return f"cyclic({self.steps}, rise={self.rise}, end={self.end})"


class Objective(pyro.infer.ELBO):
    """A loss for a model and guide that also reports the true ELBO. To add one, implement `loss_and_elbo`.

    Attributes:
        steps_taken: gradient steps so far, what schedules go by; `pv.fit` sets it, `loss_and_grads` counts it.
    """

    steps_taken: int = 0

    @abstractmethod
    def loss_and_elbo(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The loss to be minimised, summed over the rows with Pyro's scales, and the detached mean ELBO of a row."""

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The loss as a tensor with a graph."""
        return self.loss_and_elbo(model, guide, *args, **kwargs)[0]

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The loss as a number."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The loss as a number; its gradients are added to the parameters' `.grad`."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        loss.backward()
        self.steps_taken += 1
        return float(loss.detach())

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        raise TypeError(f"{type(self).__name__} reads sites, not traces: use it as the loss of SVI or pv.fit.")


class ELBO(Objective):
    """Minus the ELBO, with beta.

    Args:
        kl: `analytic_kl` or `sampled_kl`.
        beta: a number, or a schedule such as `warm_up(2000)`; the reported ELBO always has beta = 1.
        num_particles: draws of z averaged for each row.

    Examples:
        >>> ELBO(beta=warm_up(500))
        ELBO(kl=analytic_kl, beta=warm_up(500, start=0.0, end=1.0), num_particles=1)
    """

    def __init__(self, kl: KL = analytic_kl, beta: float | Schedule = 1.0, num_particles: int = 1) -> None:
        positive(num_particles=num_particles)
        if not callable(beta) and not (math.isfinite(beta) and beta >= 0.0):
            raise ValueError(f"beta={beta} must be a finite number of at least 0, or a schedule.")
        super().__init__(num_particles=num_particles)
        self.kl, self.beta = kl, beta

    def __repr__(self) -> str:
        """The call that makes it."""
        kl = getattr(self.kl, "__name__", repr(self.kl))
        return f"ELBO(kl={kl}, beta={self.beta!r}, num_particles={self.num_particles})"

    def loss_and_elbo(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """See `Objective.loss_and_elbo`."""
        beta = self.beta(self.steps_taken) if callable(self.beta) else self.beta
        losses, elbos = [], []
        for _ in range(self.num_particles):
            q, p = sites_of(model, guide, args, kwargs)
            _require_reparametrised(q)
            terms = self._terms(q, p)
            losses.append(sum(-_scaled(site, value, beta).sum() for site, value in terms))
            elbos.append(sum(_masked(site, value).detach() for site, value in terms))
        loss = torch.as_tensor(sum(losses)) / self.num_particles
        return loss, torch.as_tensor(sum(elbos)).mean() / self.num_particles

    def rows(self, model: Any, guide: Any, *args: Any) -> Tensor:
        """The ELBO of each row with beta = 1, (N,), whatever the scales; masks are honoured."""
        q, p = sites_of(model, guide, args, {})
        return torch.as_tensor(sum(_masked(site, value) for site, value in self._terms(q, p)))

    def _terms(self, q: Mapping[str, Site], p: Mapping[str, Site]) -> list[tuple[Site, Tensor]]:
        """log p(x | z) of what is observed and -KL of what is latent, (N,) each, beside its site."""
        order = [name for name, site in p.items() if not site.observed]
        # E_q of an exact KL term is right if its prior depends on no latent drawn later in the guide: the same order in
        # both guarantees it. Otherwise the draw itself is used, which is always right.
        kl = self.kl if order == list(q) else sampled_kl
        return [
            (site, site.distribution.log_prob(site.value) if site.observed else -kl(q[name], site))
            for name, site in p.items()
        ]


def sites_of(model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[dict[str, Site], dict[str, Site]]:
    """One run of the guide, and of the model at the guide's draws: the sites of both."""
    q = record(guide, args, kwargs=kwargs)
    return q, record(model, args, {name: site.value for name, site in q.items()}, kwargs=kwargs)


def _require_reparametrised(q: Mapping[str, Site]) -> None:
    """Refuse a latent that cannot be reparametrised: the gradient of this estimator would miss it."""
    for site in q.values():
        if not getattr(site.distribution, "has_rsample", False):
            raise ValueError(
                f"Latent {site.name!r} of the guide ({site.family}) cannot be reparametrised: "
                "use pyro.infer.Trace_ELBO() as the objective."
            )


def _scaled(site: Site, value: Tensor, beta: float) -> Tensor:
    value = value if site.observed else beta * value
    scaled: Tensor = scale_and_mask(value, scale=site.scale, mask=site.mask)
    return scaled


def _masked(site: Site, value: Tensor) -> Tensor:
    masked: Tensor = scale_and_mask(value, mask=site.mask)
    return masked
