"""Where rows lie in the latent space, and what its dimensions carry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import torch
from torch import Tensor

from pyro_vae.learning.history import BLUE, VERMILION
from pyro_vae.report.plots.figure import axes, counted, require

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pyro_vae.report.latents import LatentUsage


def latent_space(means: Tensor, labels: Tensor | Sequence[Any] | None = None, ax: Axes | None = None) -> Axes:
    """Posterior means (N, D) in the plane of their first two principal components, coloured by class (N,).

    Of one latent the height has no meaning: a line a class, and chance within it, so that points can be told apart.

    Raises:
        ValueError: means that are no (N, D), or another number of labels.
    """
    points = torch.as_tensor(means).detach().cpu().double().numpy()
    if points.ndim != 2 or 0 in points.shape:
        raise ValueError(f"means has shape {points.shape}: give one line a row, (N, D).")
    classes = None if labels is None else np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    if classes is not None and classes.shape != (len(points),):
        raise ValueError(
            f"labels has shape {classes.shape} and means has {counted(len(points), 'row')}: give one label a row, (N,)."
        )
    ax = axes(ax)
    names = [f"E[z[{i}] | x]" for i in range(points.shape[1])]
    if points.shape[1] > 2:
        centred = points - points.mean(0)
        points = centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T
        names = ["first principal component of E[z | x]", "second principal component"]
    if points.shape[1] == 1:
        line = 0 if classes is None else np.unique(classes, return_inverse=True)[1]
        points = np.column_stack([points, line + np.random.default_rng(0).uniform(-0.4, 0.4, len(points))])
        names = [names[0], "" if classes is None else "class"]
        ax.set_yticks([])
    if classes is None:
        ax.scatter(points[:, 0], points[:, 1], s=6, color=BLUE, linewidths=0)
    else:
        _coloured(ax, points, classes)
    ax.set(xlabel=names[0], ylabel=names[1], title="Latent space, posterior means")
    return ax


def _coloured(ax: Axes, points: Any, labels: Any) -> None:
    classes = np.unique(labels)
    colours = mpl.colormaps["viridis"](np.linspace(0.0, 0.95, len(classes)))
    for colour, label in zip(colours, classes, strict=True):
        mine = points[labels == label]
        ax.scatter(mine[:, 0], mine[:, 1], s=8, color=colour, linewidths=0)
        # The class is written where it lies, so that no reader depends on the colours.
        ax.annotate(
            str(label),
            np.median(mine, axis=0),
            ha="center",
            va="center",
            fontweight="bold",
            bbox={"boxstyle": "circle,pad=0.2", "facecolor": "white", "edgecolor": colour},
        )


def latent_usage(result: LatentUsage, ax: Axes | None = None) -> Axes:
    """KL of each latent dimension in nats, mean over rows, in descending order; inactive ones are hollow and hatched.

    Dimensions whose KL is not told apart share the bar of their part. Error bars are one Monte Carlo standard error; a KL
    in closed form has none. Up to 40 bars are named.
    """
    require(result, "LatentUsage", "pv.diagnostics.latent_usage")
    ax = axes(ax)
    order = result.kl.argsort(descending=True).cpu().numpy()
    kl, error, active = (value.cpu().numpy()[order] for value in (result.kl, result.kl_standard_error, result.active_parts))
    place = np.arange(1, len(kl) + 1)
    if active.any():
        ax.bar(
            place[active],
            kl[active],
            color=BLUE,
            label=f"active: {int(result.active.sum())} of {counted(len(result.part), 'dimension')}",
        )
    if not active.all():
        label = f"inactive: {int((~result.active).sum())} of {len(result.part)}"
        ax.bar(place[~active], kl[~active], facecolor="white", edgecolor=VERMILION, hatch="////", label=label)
        # A collapsed bar has no height to see: its foot is marked as well.
        ax.plot(place[~active], np.zeros((~active).sum()), "x", color=VERMILION, clip_on=False)
    noisy = error > 0.0
    ax.errorbar(place[noisy], kl[noisy], error[noisy], fmt="none", ecolor="black", elinewidth=1.0)
    if len(kl) <= 40:
        ax.set_xticks(place, [result.names[i] for i in order], rotation=90 if len(kl) > 8 else 0)
    total = f"{result.mean_kl.value:.4g} nats"
    what = "dimension" if len(kl) == len(result.part) else "part"
    ax.set(xlabel=f"latent {what}", ylabel="KL (nats per row)", title=f"KL(q(z | x) || p(z)) by {what}: {total} in all")
    ax.margins(y=0.3)  # room for the legend, which limits that are set would leave to no other Axes that shares them
    ax.legend(frameon=False, loc="upper right")
    return ax
