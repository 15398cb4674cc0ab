"""Rows as pictures: originals, samples, reconstructions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
    height, width = picture_size(shape, x)
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


def picture_size(shape: Sequence[int], x: Tensor) -> tuple[int, int]:
    """(H, W) of the pictures that the rows x (N, ...) are; a shape of three may have one channel.

    Raises:
        ValueError: no rows, or rows of another size.
    """
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
    count = min(10, len(x))
    even = [torch.cat([line, line.new_ones(count - len(line), *line.shape[1:])]) for line in lines]
    title = "Originals, and below each its reconstruction"
    return images(torch.cat(even), shape, ax, title=title, columns=count)
