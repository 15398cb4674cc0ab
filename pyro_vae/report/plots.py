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

from pyro_vae.learning.history import BLUE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pyro_vae.learning.history import History


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
