"""What a VAE's decoder makes of chosen latents: samples, traversals, and the manifold of two dimensions.

These take a `VAE`, whose likelihood has a mean to show. A plain `Program` can only be simulated: draw it by
``images(program.simulate(x)[0][0], shape)``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import Independent

from pyro_vae.model import conditions
from pyro_vae.model.vae import VAE
from pyro_vae.parameters import evaluating
from pyro_vae.report.plots.figure import counted
from pyro_vae.report.plots.pictures import images, picture_size, plane
from pyro_vae.rows import Data, Rows, as_rows, positive
from pyro_vae.seeds import Seed, seeded

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PRIOR_DRAWS = 2**15
"""Draws whose quantiles stand for those of a prior without an inverse distribution function."""

MOST_TICKS = 10
"""Columns or lines that are named."""

WIDTH, LABELS = 6.4, 1.0
"""Of a figure, and what title and labels take of it, in inches."""

EDGE = 0.02
"""Traversals go from this quantile of the prior to its counterpart."""


def samples(
    vae: VAE,
    shape: Sequence[int],
    ax: Axes | None = None,
    *,
    num: int = 64,
    given: Data | None = None,
    noise: bool = False,
    seed: Seed = 0,
) -> Axes:
    """Pictures from the model: z ~ p(z), then E[x | z], or with `noise` a draw of p(x | z).

    Args:
        vae: a `VAE`.
        shape: (H, W) of one picture.
        ax: where to draw.
        num: how many.
        given: what a conditional VAE reads, `num` rows of it.
        noise: draw the pixels too.
        seed: of the draws.

    Raises:
        TypeError: no `VAE`.
        ValueError: as `VAE.generate`, or rows that are no pictures of that shape.
    """
    _require_vae(vae, "samples")
    positive(num=num)
    title = "Samples: x ~ p(x | z), z ~ p(z)" if noise else "Samples: E[x | z] at z ~ p(z)"
    return images(vae.generate(num, given, seed=seed, noise=noise), shape, ax, title=title)


def traversals(
    vae: VAE, x: Data, shape: Sequence[int], ax: Axes | None = None, *, dims: Sequence[int] | None = None, num: int = 9
) -> Axes:
    """E[x | z] of one row as one latent dimension after another goes through its prior, the others held at E_q[z | x].

    A line a dimension, from the prior's 2 % to its 98 % quantile in steps of equal probability; marginal quantiles where
    the prior's dimensions depend on each other. Beside each line stands its dimension, below the columns the quantile.

    Args:
        vae: a `VAE`.
        x: the row, (1, *event_shape), or a tuple of it and its conditions.
        shape: (H, W) of one picture.
        ax: where to draw.
        dims: which dimensions, from 0; None for the first ten. Those that carry most:
            ``diagnostics.latent_usage(vae, x_test).kl.argsort(descending=True)[:10]``.
        num: pictures a line.

    Raises:
        TypeError: no `VAE`.
        ValueError: more than one row, a dimension that there is not, rows that are no pictures of that shape.
    """
    _require_vae(vae, "traversals")
    positive(num=num)
    rows, latent_dim = as_rows(x), vae.prior.latent_dim
    if len(rows[0]) != 1:
        raise ValueError(f"x has {counted(len(rows[0]), 'row')}: give the one to begin at, x[:1].")
    chosen = [int(dim) for dim in (range(min(latent_dim, 10)) if dims is None else dims)]
    for dim in chosen or [-1]:
        if not 0 <= dim < latent_dim:
            raise ValueError(f"dims={chosen} must name dimensions from 0 to {latent_dim - 1}, at least one.")
    vae.usable_rows(rows)
    probabilities = torch.linspace(EDGE, 1.0 - EDGE, num, dtype=torch.float64) if num > 1 else torch.tensor([0.5])
    with torch.no_grad(), evaluating({"vae": vae}):
        z = vae.encoder.centre(vae.q_z(*rows)).expand(len(chosen) * num, -1).clone()
        quantiles = _prior_quantiles(vae, probabilities, rows[1:])
        for line, dim in enumerate(chosen):
            z[line * num : (line + 1) * num, dim] = quantiles[:, dim]
    means, title = _means(vae, z, rows[1:]), "Traversals: E[x | z], one latent dimension a line"
    ax = images(means, shape, _roomy(ax, picture_size(shape, means), len(chosen), num), title=title, columns=num)
    labels = [f"{p:.2g}" for p in probabilities.tolist()]
    return _labelled(ax, shape, labels, [f"z[{dim}]" for dim in chosen], "quantile of the prior", "latent dimension")


def manifold(vae: VAE, shape: Sequence[int], ax: Axes | None = None, *, num: int = 20, given: Data | None = None) -> Axes:
    """E[x | z] over the plane of two latents, on a grid of equal prior probability (Kingma & Welling 2014, fig. 4).

    The coordinates are the inverse of the prior's distribution function at (i + 1/2) / num, so that each picture stands for
    as much of the prior as any other; of the marginals where the two depend on each other.

    Args:
        vae: a `VAE` with two latent dimensions.
        shape: (H, W) of one picture.
        ax: where to draw.
        num: pictures a side.
        given: what a conditional VAE reads, one row of it.

    Raises:
        TypeError: no `VAE`.
        ValueError: another number of latent dimensions, conditions that the VAE refuses, rows that are no such pictures.
    """
    _require_vae(vae, "manifold")
    positive(num=num)
    if vae.prior.latent_dim != 2:
        dimensions = counted(vae.prior.latent_dim, "latent dimension")
        raise ValueError(f"This VAE has {dimensions}, a plane has 2: draw traversals instead.")
    told: Rows = () if given is None else tuple(torch.as_tensor(part) for part in _tuple(given))
    conditions.check(vae, told)
    for part in told:
        if part.dim() == 0 or len(part) != 1:
            raise ValueError(f"given has shape {tuple(part.shape)}: give the one condition of all pictures, (1, ...).")
    probabilities = (torch.arange(num, dtype=torch.float64) + 0.5) / num
    with torch.no_grad(), evaluating({"vae": vae}):
        quantiles = _prior_quantiles(vae, probabilities, told)
    across, up = quantiles[:, 0].repeat(num), quantiles[:, 1].flip(0).repeat_interleave(num)
    title = "Manifold: E[x | z], equal prior probability a picture"
    ax = images(_means(vae, torch.stack([across, up], -1), told), shape, ax, title=title, columns=num)
    labels = [[f"{value:.2f}" for value in column] for column in quantiles.T.tolist()]
    return _labelled(ax, shape, labels[0], labels[1][::-1], "z[0]", "z[1]")


def _require_vae(vae: object, name: str) -> None:
    if not isinstance(vae, VAE):
        raise TypeError(
            f"{name} takes a VAE, and was given a {type(vae).__name__}: of a plain Program draw "
            "plots.images(program.simulate(x)[0][0], shape)."
        )


def _tuple(given: Any) -> tuple[Any, ...]:
    return tuple(given) if isinstance(given, (tuple, list)) else (given,)


def _means(vae: VAE, z: Tensor, given: Rows) -> Tensor:
    """E[x | z] of latents (M, D), all told the same one row of conditions: (M, *event_shape)."""
    told = tuple(part.expand(len(z), *part.shape[1:]) for part in given)
    with torch.no_grad(), evaluating({"vae": vae}):
        mean: Tensor = vae.likelihood.centre(vae.p_x(z, *told))
    return mean


def _prior_quantiles(vae: VAE, probabilities: Tensor, given: Rows) -> Tensor:
    """Quantiles of each dimension of p(z): (M,) -> (M, D), in the dtype of the prior's draws.

    By the inverse distribution function where the dimensions are independent and have one, else of 32,768 draws.
    """
    prior, place = vae.p_z(*given), next(itertools.chain(vae.parameters(), vae.buffers()))
    wanted, dim = probabilities.to(place), vae.prior.latent_dim
    base = prior
    while isinstance(base, Independent):
        base = base.base_dist
    if not base.event_shape:  # the dimensions are independent
        with suppress(NotImplementedError):
            quantiles: Tensor = base.icdf(wanted[:, None].expand(-1, dim))
            return quantiles
    with seeded(0, place.device):
        draws = prior.sample((PRIOR_DRAWS,)).reshape(-1, dim)
    return torch.quantile(draws, wanted.to(draws), dim=0)


def _roomy(ax: Axes | None, picture: tuple[int, int], lines: int, columns: int) -> Axes:
    """`ax`, or those of a new figure with room for the labels of a grid, however few its lines are."""
    if ax is not None:
        return ax
    from matplotlib import pyplot as plt

    height, width = picture
    size = WIDTH, (WIDTH - LABELS) * lines * (height + 1) / (columns * (width + 1)) + LABELS
    return plt.subplots(figsize=size, layout="constrained")[1]


def _labelled(
    ax: Axes, shape: Sequence[int], columns: Sequence[str], lines: Sequence[str], xlabel: str, ylabel: str
) -> Axes:
    """Names of the columns and lines of a grid of pictures; of some where there are many."""
    height, width = plane(shape)
    ax.set_axis_on()
    for spine in ax.spines.values():
        spine.set_visible(False)
    for axis, names, size in ((ax.xaxis, columns, width), (ax.yaxis, lines, height)):
        shown = sorted({round(i) for i in torch.linspace(0, len(names) - 1, min(len(names), MOST_TICKS)).tolist()})
        place = [i * (size + 1) + 0.5 + size / 2.0 for i in shown]  # pixel 0 is the grid's edge, and 0 its middle
        axis.set_ticks(place, labels=[names[i] for i in shown], fontsize="small")
        axis.set_tick_params(length=0)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    return ax
