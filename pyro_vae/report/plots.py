"""Figures: each function draws on one Axes and returns it, takes `ax=`, and names its units.

Colours are Okabe & Ito's (2008), which colour-blind readers can tell apart; classes are named in the plot as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from torch import Tensor

from pyro_vae.learning.history import BLUE, VERMILION

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pyro_vae.learning.history import History
    from pyro_vae.report.gap import InferenceGap
    from pyro_vae.report.latents import LatentUsage


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    from matplotlib import pyplot as plt

    return plt.subplots(layout="constrained")[1]


def learning_curve(history: History, ax: Axes | None = None) -> Axes:
    """ELBO of a mean row, in nats, against the epoch; see `History.plot`."""
    return history.plot(ax)


def images(x: Tensor, shape: Sequence[int], ax: Axes | None = None, *, title: str = "", columns: int | None = None) -> Axes:
    """Rows as pictures in a grid.

    Args:
        x: (N, H*W) or (N, H, W), grey levels from 0 to 1; values outside are clipped.
        shape: (H, W) of one picture.
        ax: where to draw.
        title: of the plot.
        columns: of the grid; None makes it square.

    Raises:
        ValueError: the rows have another size than `shape`.
    """
    height, width = _picture(shape, x)
    pictures = x.detach().cpu().reshape(len(x), height, width).numpy()
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    lines = math.ceil(len(pictures) / columns)
    grid = np.ones((lines * (height + 1) + 1, columns * (width + 1) + 1))
    for i, picture in enumerate(pictures):
        top, left = 1 + (i // columns) * (height + 1), 1 + (i % columns) * (width + 1)
        grid[top : top + height, left : left + width] = picture
    if ax is None:
        from matplotlib import pyplot as plt

        ax = plt.subplots(figsize=(6.4, 6.4 * grid.shape[0] / grid.shape[1] + 0.4), layout="constrained")[1]
    ax.imshow(grid, cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
    ax.set_axis_off()
    ax.set_title(title)
    return ax


def _picture(shape: Sequence[int], x: Tensor) -> tuple[int, int]:
    if len(x) == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}, that is no pictures: give at least one row.")
    plane = tuple(size for size in shape if size > 1) if len(shape) > 2 else tuple(shape)
    if len(plane) != 2 or x[0].numel() != math.prod(plane):
        raise ValueError(f"Rows of {x[0].numel()} numbers are no pictures of shape {tuple(shape)}: give shape=(H, W).")
    return int(plane[0]), int(plane[1])


def reconstructions(x: Tensor, means: Tensor, shape: Sequence[int], ax: Axes | None = None) -> Axes:
    """Originals above their reconstructions E[x | z = E_q z], both (N, H*W), in pairs of lines of at most ten."""
    lines = []
    for start in range(0, len(x), 10):
        lines += [x[start : start + 10], means[start : start + 10]]
    import torch

    count = min(10, len(x))
    even = [torch.cat([line, line.new_ones(count - len(line), *line.shape[1:])]) for line in lines]
    title = "Originals, and below each its reconstruction"
    return images(torch.cat(even), shape, ax, title=title, columns=count)


def latent_space(means: Tensor, labels: Tensor | None = None, ax: Axes | None = None) -> Axes:
    """Posterior means (N, D) in the plane of their first two principal components, coloured by class (N,)."""
    ax = _axes(ax)
    points = means.detach().cpu().double().numpy()
    names = [f"E[z{i + 1} | x]" for i in range(points.shape[1])]
    if points.shape[1] > 2:
        centred = points - points.mean(0)
        points = centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T
        names = ["first principal component of E[z | x]", "second principal component"]
    if points.shape[1] == 1:
        points, names = np.column_stack([points, np.zeros(len(points))]), [names[0], ""]
    if labels is None:
        ax.scatter(points[:, 0], points[:, 1], s=6, color=BLUE, linewidths=0)
    else:
        _coloured(ax, points, labels.cpu().numpy())
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


def inference_gap(result: InferenceGap, ax: Axes | None = None) -> Axes:
    """Both gaps of each row in nats, stacked, rows sorted by their sum; a negative gap hangs below zero.

    Rows without a number are left out. For up to 60 rows points show the sum, with bars of one standard error.

    Raises:
        ValueError: no row has a number.
    """
    known = result.inference.isfinite()
    if not bool(known.any()):
        raise ValueError(f"None of the {len(result)} rows has an inference gap to draw: see the reasons in the result.")
    ax = _axes(ax)
    total, first, second, error = (
        value[known].cpu().numpy()
        for value in (result.inference, result.approximation, result.amortisation, result.inference_standard_error)
    )
    order = np.argsort(-total)
    total, first, second, error = total[order], first[order], second[order], error[order]
    edges = np.arange(len(total) + 1) + 0.5
    # The second stands on the first where both have one sign; otherwise each has its own side of zero.
    base = np.where(first * second > 0.0, first, 0.0)
    means = [result.mean(name) for name in ("approximation", "amortisation", "inference")]
    ax.stairs(first, edges, baseline=0.0, fill=True, color=BLUE, label=f"approximation: mean {means[0]}")
    label = f"amortisation: mean {means[1]}"
    ax.stairs(
        base + second, edges, baseline=base, fill=True, facecolor=VERMILION, edgecolor="white", hatch="///", label=label
    )
    if len(total) <= 60:
        ax.errorbar(edges[:-1] + 0.5, total, error, fmt=".", color="black", markeredgecolor="white", elinewidth=1.0)
    ax.axhline(0.0, color="black", linewidth=0.8)
    ax.set(xlabel="row, by its inference gap", ylabel="gap (nats)", title=f"Inference gap: mean {means[2]} nats")
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.2 * (high - low))  # room for the legend
    ax.legend(frameon=False, loc="upper right")
    return ax


def latent_usage(result: LatentUsage, ax: Axes | None = None) -> Axes:
    """KL of each latent dimension in nats, mean over rows, in descending order; inactive ones are hollow and hatched.

    Error bars are one Monte Carlo standard error; a KL in closed form has none. Up to 40 dimensions are named.
    """
    ax = _axes(ax)
    order = result.kl.argsort(descending=True).cpu().numpy()
    kl, error, active = (value.cpu().numpy()[order] for value in (result.kl, result.kl_standard_error, result.active_parts))
    place = np.arange(1, len(kl) + 1)
    if active.any():
        ax.bar(
            place[active],
            kl[active],
            color=BLUE,
            label=f"active: {int(result.active.sum())} of {len(result.part)} dimensions",
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
    ax.set(
        xlabel="latent dimension", ylabel="KL (nats per row)", title=f"KL(q(z | x) || p(z)) by dimension: {total} in all"
    )
    ax.legend(frameon=False)
    return ax


def save(ax: Axes, path: str | Path) -> None:
    """Write the figure of `ax` to a PNG file in one atomic step, and close it."""
    import io

    from matplotlib import pyplot as plt

    from pyro_vae.files import write_bytes

    buffer = io.BytesIO()
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.savefig(buffer, format="png", dpi=150)
    plt.close(figure)
    write_bytes(Path(path), buffer.getvalue())
