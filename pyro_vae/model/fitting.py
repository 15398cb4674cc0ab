"""Whether a prior, a likelihood and a guide go together: tried when a VAE is built, on one row.

What is refused names both objects.
"""

from __future__ import annotations

from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyro_vae.model import guides, likelihoods, priors
from pyro_vae.model.conditions import count_read
from pyro_vae.model.guides import Guide
from pyro_vae.model.likelihoods import Likelihood
from pyro_vae.model.priors import Prior
from pyro_vae.parameters import evaluating
from pyro_vae.rows import Rows


def as_parts(prior: Any, likelihood: Any, guide: Any) -> tuple[Prior, Likelihood, Guide]:
    """The three parts, plain modules made `Custom` ones; refused are other kinds, and latent sizes that differ.

    Raises:
        TypeError: a part is neither a `Prior`, `Likelihood` or `Guide` nor a module that could stand for one.
        ValueError: the parts disagree on the number of latent dimensions.
    """
    for name, part, kinds in (
        ("prior", prior, (Prior,)),
        ("likelihood", likelihood, (Likelihood,)),
        ("guide", guide, (Guide,)),
    ):
        if not isinstance(part, (nn.Module, *kinds)) or isinstance(part, _OTHERS[name]):
            raise TypeError(f"{name} is a {type(part).__name__}: {_wanted(name)}.")
    prior = prior if isinstance(prior, Prior) else priors.Custom(prior)
    likelihood = likelihood if isinstance(likelihood, Likelihood) else likelihoods.Custom(likelihood)
    guide = guide if isinstance(guide, Guide) else guides.Custom(guide, prior.latent_dim)
    sizes = {f"prior {prior!r}": prior.latent_dim, f"guide {guide!r}": guide.latent_dim}
    decoder_size = getattr(likelihood.decoder, "in_features", None)
    if isinstance(decoder_size, int):
        sizes[f"decoder {likelihood.decoder!r}"] = decoder_size
    if len(set(sizes.values())) > 1:
        told = "; ".join(f"{part} has {size}" for part, size in sizes.items())
        raise ValueError(f"The parts disagree on the number of latent dimensions: {told}.")
    return prior, likelihood, guide


_OTHERS = {"prior": (Likelihood, Guide), "likelihood": (Prior, Guide), "guide": (Prior, Likelihood)}
_CALLS = {"prior": "forward()", "likelihood": "forward(z)", "guide": "forward(x)"}


def _wanted(name: str) -> str:
    return f"give a pv.{name}s.{name.capitalize()}, or a module whose {_CALLS[name]} returns a distribution"


def row_shape(latent_dim: int, likelihood: Likelihood, like: Tensor, given: Rows) -> tuple[int, ...]:
    """Shape of one row, as the likelihood draws it.

    Args:
        latent_dim: D.
        likelihood: p(x | z).
        like: a tensor of the parameters' device and dtype.
        given: one row of each condition.

    Raises:
        ValueError: the likelihood cannot be computed from such latents, or is not one distribution for each of them.
    """
    z = like.new_zeros(1, latent_dim)
    try:
        with torch.no_grad(), evaluating({"likelihood": likelihood}), pyro.validation_enabled(is_validate=False):
            p = likelihood(z, *given)
    except _UNFIT as error:
        told = _told(error, likelihood)
        raise ValueError(f"The likelihood {likelihood!r} cannot take latents of shape {tuple(z.shape)}: {told}.") from error
    batch, event = (tuple(shape) for shape in _shapes(p, likelihood))
    if batch != (1,):
        raise ValueError(
            f"The likelihood {likelihood!r} returns batch shape {batch} and event shape {event} for latents of shape "
            f"{tuple(z.shape)}: the batch shape must be (1,), one distribution for each latent. All dimensions of a row "
            "are the event, by .to_event(1) for rows of one dimension, and a scale has no more dimensions than a row."
        )
    return event


def require_fit(vae: Any, x: Tensor, given: Rows) -> None:
    """Refuse a guide that cannot read the likelihood's rows, and distributions without the densities that are needed.

    The objective needs p(z) at draws of the guide, the evidence q(z | x) at points that were not drawn from it.

    Args:
        vae: with `prior`, `likelihood`, `encoder` and the distributions `p_z`, `q_z`.
        x: a row, (1, *event_shape).
        given: one row of each condition.

    Raises:
        ValueError: names both parts, or the part and what it cannot do.
    """
    rows = f"rows of shape {tuple(x.shape[1:])} that the likelihood {vae.likelihood!r} models"
    with pyro.validation_enabled(is_validate=False):
        try:
            q = vae.q_z(x, *given)
        except _UNFIT as error:
            told = _told(error, vae.encoder)
            raise ValueError(f"The guide {vae.encoder!r} cannot read the {rows}: {told}.") from error
        try:
            p = vae.p_z(*given)
        except _UNFIT as error:
            told = _told(error, vae.prior)
            raise ValueError(f"The prior {vae.prior!r} does not go with the guide {vae.encoder!r}: {told}.") from error
        _distribution(q, "guide", vae.encoder.encoder)
        _distribution(p, "prior", getattr(vae.prior, "module", vae.prior))
        if vae.prior.reads_guide and (made := getattr(vae.prior, "shape", x.shape[1:])) != tuple(x.shape[1:]):
            raise ValueError(f"The prior {vae.prior!r} makes up rows of shape {made}, other than the {rows}.")
        size = vae.prior.latent_dim
        for part, distribution in ((vae.prior, p), (vae.encoder, q)):
            if tuple(distribution.event_shape) != (size,):
                raise ValueError(
                    f"{part!r} returns a distribution of event shape {tuple(distribution.event_shape)} for {size} latent "
                    f"dimensions: it must be ({size},), by .to_event(1)."
                )
        _require_density(vae.prior, p, "at the draws of the guide", f"the guide {vae.encoder!r}")
        _require_density(vae.encoder, q, "at points that it did not draw", f"the prior {vae.prior!r}")


_UNFIT = (RuntimeError, ValueError, IndexError, TypeError)
"""What a part raises that is handed what it cannot read; a `TypeError` if it misses its condition."""


def _told(error: Exception, part: nn.Module) -> str:
    """What the error says and, where something inside of `part` was not handed its condition, the mend."""
    told = str(error).rstrip(".")
    if isinstance(error, TypeError) and count_read(part):
        told += (
            "; a network that reads conditions, such as nets.Conditional, must be the outermost one, or the modules around "
            "it must have its attribute `reads` and hand the conditions on"
        )
    return told


def _shapes(p: Any, likelihood: Likelihood) -> tuple[Any, Any]:
    p = _distribution(p, "likelihood", likelihood.decoder)
    return p.batch_shape, p.event_shape


def _distribution(found: Any, name: str, part: nn.Module) -> Any:
    if not hasattr(found, "event_shape"):
        raise TypeError(f"{name} is a {type(part).__name__}, which returns a {type(found).__name__}: {_wanted(name)}.")
    if not callable(found):  # pyro.sample calls it
        raise TypeError(
            f"{name} is a {type(part).__name__}, which returns a {type(found).__name__} of torch.distributions, and Pyro "
            "draws from its own alone: make it from pyro.distributions, whose names are the same."
        )
    return found


def _require_density(part: Any, distribution: Any, where: str, other: str) -> None:
    """Refuse a distribution that cannot be drawn from, or has no density at a point that it did not draw."""
    try:
        # A copy: some flows remember the densities of their own draws, and have no others.
        distribution.log_prob(distribution.sample().clone())
    except (NotImplementedError, KeyError) as error:  # torch's word for it, and that of Pyro's planar and radial flows
        raise ValueError(
            f"{part!r} cannot go with {other}: it has no density {where}, or cannot be drawn from "
            f"({type(distribution).__name__}: {error or 'not implemented'}); give a flow that runs in both directions."
        ) from error
