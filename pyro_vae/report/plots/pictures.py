"""Rows as pictures: originals, samples, reconstructions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import torch
from torch import Tensor

from pyro_vae.learning.history import VERMILION
from pyro_vae.rows import positive

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CLIPPED = 5.0
"""Grey levels at most this far outside of 0 to 1 are clipped."""


def images(x: Tensor, shape: Sequence[int], ax: Axes | None = None, *, title: str = "", columns: int | None = None) -> Axes:
    """Rows as pictures in a grid.

    Args:
        x: (N, H*W) or (N, H, W), grey levels from 0 to 1. Values a little outside are clipped; where some are far outside,
            such as those of 0 to 255, black and white are the ends of all values, which the title tells. Pixels that are no
            number are vermilion.
        shape: (H, W) of one picture.
        ax: where to draw.
        title: of the plot.
        columns: of the grid; None makes it square.

    Raises:
        ValueError: the rows have another size than `shape`, or columns that are no whole number of at least 1.
    """
    x = _plain(x)
    height, width = picture_size(shape, x)
    pictures = x.reshape(len(x), height, width).numpy()
    columns = math.ceil(math.sqrt(len(pictures))) if columns is None else columns
    positive(columns=columns)
    lines = math.ceil(len(pictures) / columns)
    black, white = _ends(x)
    grid = np.full((lines * (height + 1) + 1, columns * (width + 1) + 1), white)
    for i, picture in enumerate(pictures):
        top, left = 1 + (i // columns) * (height + 1), 1 + (i % columns) * (width + 1)
        grid[top : top + height, left : left + width] = picture
    told = f"black is {black:.4g}, white {white:.4g}" if (black, white) != (0.0, 1.0) else ""
    if ax is None:
        from matplotlib import pyplot as plt

        room = 0.7 if told else 0.4  # of the title, in inches
        ax = plt.subplots(figsize=(6.4, 6.4 * grid.shape[0] / grid.shape[1] + room), layout="constrained")[1]
    colours = mpl.colormaps["gray"].with_extremes(bad=VERMILION)
    ax.imshow(grid, cmap=colours, vmin=black, vmax=white, interpolation="nearest")
    ax.set_axis_off()
    ax.set_title("\n".join(filter(None, (title, told))))
    return ax


def _plain(x: Any) -> Tensor:
    return torch.as_tensor(x).detach().cpu().double()


def _ends(x: Tensor) -> tuple[float, float]:
    """What is black and what is white: 0 and 1, or the ends of all values where some are far outside."""
    values = x[x.isfinite()]
    if values.numel() == 0 or (values.min() >= -CLIPPED and values.max() <= 1.0 + CLIPPED):
        return 0.0, 1.0
    return min(0.0, float(values.min())), max(1.0, float(values.max()))


def picture_size(shape: Sequence[int], x: Tensor) -> tuple[int, int]:
    """(H, W) of the pictures that the rows x (N, ...) are; a shape of three may have one channel.

    Raises:
        ValueError: no rows, rows of another size, or a shape that is no two whole numbers.
    """
    if x.dim() == 0 or len(x) == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}, that is no pictures: give at least one row.")
    size = plane(shape)
    if x[0].numel() != math.prod(size):
        raise ValueError(f"Rows of {x[0].numel()} numbers are no pictures of shape {tuple(shape)}: give shape=(H, W).")
    return size


def plane(shape: Any) -> tuple[int, int]:
    """(H, W) of such a shape, of which one more number may be 1, for the channel.

    Raises:
        ValueError: anything else.
    """
    sizes = tuple(shape) if isinstance(shape, Iterable) else ()
    sizes = tuple(size for size in sizes if size != 1) if len(sizes) > 2 else sizes
    if len(sizes) != 2 or not all(isinstance(size, Integral) and int(size) > 0 for size in sizes):
        raise ValueError(f"shape={shape!r} is none of pictures: give shape=(H, W), two whole numbers.")
    return int(sizes[0]), int(sizes[1])


def reconstructions(x: Tensor, means: Tensor, shape: Sequence[int], ax: Axes | None = None) -> Axes:
    """Originals above their reconstructions E[x | z = E_q z], both (N, H*W), in pairs of lines of at most ten.

    Raises:
        ValueError: no row, another number of means than of originals, or rows of another size than `shape`.
    """
    x, means = _plain(x), _plain(means)
    for rows in (x, means):
        picture_size(shape, rows)
    if len(x) != len(means):
        raise ValueError(f"x has {len(x)} originals and means has {len(means)} reconstructions: give as many of each.")
    x, means = x.flatten(1), means.flatten(1)
    white = _ends(torch.cat([x, means]))[1]
    lines = []
    for start in range(0, len(x), 10):
        lines += [x[start : start + 10], means[start : start + 10]]
    count = min(10, len(x))
    even = [torch.cat([line, line.new_full((count - len(line), line.shape[1]), white)]) for line in lines]
    title = "Originals, and below each its reconstruction"
    return images(torch.cat(even), shape, ax, title=title, columns=count)
