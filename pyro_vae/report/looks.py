"""One draw of a row's latents, and what the distributions it came from say about KL(q(z | x) || p(z)).

The KL of all latents is a sum over sites, each given those before it (the chain rule). A site's KL falls apart further
where both q and p have independent factors given the earlier sites: one part a dimension, and they add up to the site's. A
full-covariance Normal against independent Normals has a part for each dimension too, the KL of the marginals
q(z_d | x) || p(z_d), but q's own dependence comes on top of their sum (its total correlation). Any other pair, such as a
Dirichlet or a flow, has one part, the site as a whole. Parts are exact where torch has a formula, else log q - log p at
the draw. Everything is in nats.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import (
    Distribution,
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    biject_to,
    constraints,
    kl_divergence,
)

from pyro_vae.layouts import Values
from pyro_vae.model import kl  # noqa: F401 - registers the exact KL of a full-covariance Normal
from pyro_vae.parameters import judging
from pyro_vae.program import Program, record
from pyro_vae.rows import Rows
from pyro_vae.seeds import Seed, seeded
from pyro_vae.sites import Site, Sites, score


class Parts(NamedTuple):
    """KL of one site: its parts (N, G), their sum and whatever no part has (N,), and one name a part."""

    parts: Tensor
    whole: Tensor
    names: tuple[str, ...]


class Look(NamedTuple):
    """One draw for N rows; nats, float64.

    Attributes:
        z: latents by name, each (N, *event_shape).
        u: the same, unconstrained, (N, D).
        mean: E[u] given the earlier sites where the site's distribution knows it, else u itself, (N, D).
        variance: the variance that goes with `mean`: zero where that is u, (N, D).
        log_q: log q(z | x), (N,).
        log_p: log p(z), (N,).
        kl: parts of the KL, (N, G).
        kl_whole: KL of all latents, (N,).
        names: G names, such as "z[3]".
        part: which part each of the D dimensions belongs to, (D,), integer.
    """

    z: Values
    u: Tensor
    mean: Tensor
    variance: Tensor
    log_q: Tensor
    log_p: Tensor
    kl: Tensor
    kl_whole: Tensor
    names: tuple[str, ...]
    part: Tensor


def look(program: Program, rows: Rows, seed: Seed, *, at_prior: bool = False) -> Look:
    """One draw of the guide, or of the prior with both q and p the prior; one run of the model for all N rows."""
    with torch.no_grad(), seeded(seed, rows[0].device), judging(program.modules_found()):
        if at_prior:
            p = {name: site for name, site in record(program.model, rows).items() if not site.observed}
            q = p
        else:
            q = record(program.guide, rows)
            model = record(program.model, rows, {name: site.value for name, site in q.items()})
            p = {name: site for name, site in model.items() if not site.observed}
        # A formula given earlier sites is right only if these are the same in both; log q - log p always is.
        exact = list(q) == list(p)
        shares = [parts_of(q[name], site, exact=exact) for name, site in p.items()]
        columns = [_columns(q[name], site.distribution.support) for name, site in p.items()]
        log_q, log_p = _log_prob(q), _log_prob(p)
    u, mean, variance = (torch.cat(column, dim=-1) for column in zip(*columns, strict=True))
    sizes = [column[0].shape[-1] for column in columns]
    first = [0, *itertools.accumulate(len(share.names) for share in shares)]
    part = [
        start + torch.arange(size) * (len(share.names) > 1)
        for start, size, share in zip(first, sizes, shares, strict=False)
    ]
    return Look(
        {name: site.value for name, site in p.items()}, u, mean, variance, log_q, log_p,
        torch.cat([share.parts for share in shares], dim=-1), torch.stack([share.whole for share in shares]).sum(0),
        tuple(name for share in shares for name in share.names), torch.cat(part),
    )  # fmt: skip


def parts_of(q: Site, p: Site, *, exact: bool = True) -> Parts:
    """KL(q || p) of one latent, part by part.

    Args:
        q: the guide's site.
        p: the model's, at the same draw.
        exact: use formulas where there are any; False takes log q - log p at the draw.
    """
    factors_q, factors_p = _factors(q.distribution), _factors(p.distribution)
    if factors_p is not None and factors_q is not None:
        parts = _divergence(factors_q, factors_p, q.value, exact=exact).reshape(len(q.value), -1)
        whole = parts.sum(-1)
    else:
        whole = _divergence(q.distribution, p.distribution, q.value, exact=exact)
        parts = whole[:, None]
        dependent = isinstance(q.distribution, (MultivariateNormal, LowRankMultivariateNormal))
        if exact and dependent and isinstance(factors_p, Normal):
            parts = kl_divergence(Normal(q.distribution.mean, q.distribution.stddev), factors_p).double()
    parts, whole = (scale_and_mask(value.movedim(0, -1), mask=p.mask).movedim(-1, 0) for value in (parts, whole))
    return Parts(parts, whole, _names(p.name, p.event_shape, parts.shape[-1]))


def _names(name: str, event_shape: tuple[int, ...], count: int) -> tuple[str, ...]:
    if count != torch.Size(event_shape).numel() or not event_shape:
        return (name,)
    places = itertools.product(*(range(size) for size in event_shape))
    return tuple(f"{name}[{', '.join(map(str, place))}]" for place in places)


def _factors(distribution: Distribution) -> Distribution | None:
    """The distribution of batch shape (N, *event_shape) whose factors this one is made of; None if they are dependent."""
    inner: Distribution = distribution
    while isinstance(inner, Independent):
        inner = inner.base_dist
    return None if inner.event_shape else inner


def _divergence(q: Distribution, p: Distribution, value: Tensor, *, exact: bool) -> Tensor:
    """KL(q || p) by a formula, else log q - log p at `value`; of the batch shape, float64."""
    if exact:
        try:
            return kl_divergence(q, p).double()
        except NotImplementedError:
            pass
    difference: Tensor = q.log_prob(value).double() - p.log_prob(value).double()
    return difference


def _log_prob(sites: Sites) -> Tensor:
    """Log-density of all sites at their values, (N,), masks honoured; -inf outside of a support."""
    total = [torch.where(inside, value, -torch.inf) for value, inside in
             (score(site.distribution, site.value, site.mask) for site in sites.values())]  # fmt: skip
    return torch.stack(total).sum(0)


def _columns(site: Site, support: constraints.Constraint) -> tuple[Tensor, Tensor, Tensor]:
    """u, its mean and its variance, (N, d) each, of one site; `support` is the model's, as everywhere."""
    count = len(site.value)
    u = biject_to(support).inv(site.value).double().reshape(count, -1)
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if support is constraints.real:
        try:
            mean, variance = (
                getattr(site.distribution, name).double().expand(site.value.shape).reshape(count, -1)
                for name in ("mean", "variance")
            )
        except NotImplementedError:  # a flow
            return u, u, torch.zeros_like(u)
        if bool(mean.isfinite().all() & variance.isfinite().all()):
            return u, mean, variance
    return u, u, torch.zeros_like(u)
