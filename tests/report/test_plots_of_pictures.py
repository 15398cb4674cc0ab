"""Figures of rows as pictures: each where it belongs, on a scale that is told, or one clear sentence."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba

from pyro_vae.learning.history import VERMILION
from pyro_vae.report import plots


@pytest.fixture
def ax() -> Iterator[Axes]:
    yield plt.subplots()[1]
    plt.close("all")


def test_images_are_laid_out_row_by_row(ax: Axes) -> None:
    x = torch.rand(7, 12)
    assert plots.images(x, (3, 4), ax, title="Seven", columns=3) is ax
    assert ax.get_title() == "Seven"
    grid = np.asarray(ax.get_images()[0].get_array())
    assert grid.shape == (3 * 4 + 1, 3 * 5 + 1)
    for i in range(7):
        top, left = 1 + 4 * (i // 3), 1 + 5 * (i % 3)
        assert np.array_equal(grid[top : top + 3, left : left + 4], x[i].reshape(3, 4).numpy())
    assert ax.get_images()[0].get_clim() == (0.0, 1.0)


@pytest.mark.parametrize("shape", [(3, 4), (1, 3, 4), (3, 4, 1)])
def test_images_take_flat_rows_pictures_and_one_channel(ax: Axes, shape: tuple[int, ...]) -> None:
    x = torch.rand(4, 3, 4)
    grids = [np.asarray(plots.images(rows, shape, ax).get_images()[-1].get_array()) for rows in (x, x.flatten(1))]
    assert np.array_equal(grids[0], grids[1])
    assert np.array_equal(grids[0][1:4, 1:5], x[0].numpy())


@pytest.mark.parametrize(
    ("x", "shape"),
    [
        (torch.zeros(2, 12), (3, 5)),
        (torch.zeros(2, 12), (12,)),
        (torch.zeros(2, 12), (3, 2, 2)),
        (torch.zeros(2, 12), ()),
        (torch.zeros(0, 12), (3, 4)),
    ],
)
def test_images_refuse_wrong_shapes(ax: Axes, x: torch.Tensor, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="pictures"):
        plots.images(x, shape, ax)


@pytest.mark.parametrize("count", [1, 10, 13])
def test_reconstructions_stand_below_their_originals(ax: Axes, count: int) -> None:
    x, means = torch.rand(count, 6), torch.rand(count, 6)
    assert plots.reconstructions(x, means, (2, 3), ax) is ax
    assert "reconstruction" in ax.get_title()
    grid = np.asarray(ax.get_images()[0].get_array())
    for i in range(count):
        top, left = 1 + 3 * (2 * (i // 10)), 1 + 4 * (i % 10)
        assert np.array_equal(grid[top : top + 2, left : left + 3], x[i].reshape(2, 3).numpy())
        assert np.array_equal(grid[top + 3 : top + 5, left : left + 3], means[i].reshape(2, 3).numpy())


@pytest.mark.parametrize(("scale", "shift"), [(255.0, 0.0), (40.0, -20.0)])
def test_pictures_far_outside_of_0_to_1_are_scaled_and_it_is_told(ax: Axes, scale: float, shift: float) -> None:
    x = scale * torch.linspace(0.0, 1.0, 24).reshape(2, 12) + shift
    drawn = plots.images(x, (3, 4), ax, title="Two").get_images()[0]
    assert drawn.get_clim() == (min(shift, 0.0), scale + shift)
    assert ax.get_title() == f"Two\nblack is {min(shift, 0.0):g}, white {scale + shift:g}"
    assert np.asarray(drawn.get_array())[0, 0] == scale + shift  # the lines between the pictures are white


def test_pictures_a_little_outside_are_clipped(ax: Axes) -> None:
    assert plots.images(torch.tensor([[-3.0, 4.4]]), (1, 2), ax, title="One").get_images()[0].get_clim() == (0.0, 1.0)
    assert ax.get_title() == "One"


def test_pixels_without_a_number_are_neither_black_nor_white(ax: Axes) -> None:
    drawn = plots.images(torch.tensor([[0.0, math.nan, 1.0]]), (1, 3), ax).get_images()[0]
    colours = drawn.cmap(drawn.norm(np.ma.masked_invalid(drawn.get_array())))
    assert tuple(colours[1, 2]) == to_rgba(VERMILION)


def test_reconstructions_take_arrays_of_other_ranges(ax: Axes) -> None:
    x, means = np.linspace(0.0, 200.0, 13 * 6).reshape(13, 2, 3), torch.full((13, 6), 255.0)
    drawn = plots.reconstructions(x, means, (2, 3), ax).get_images()[0]
    grid = np.asarray(drawn.get_array())
    assert drawn.get_clim() == (0.0, 255.0)
    assert np.allclose(grid[1:3, 1:4], x[0])
    assert (grid[7:9, 13:] == 255.0).all()  # where no picture stands it is white


@pytest.mark.parametrize(
    ("x", "means", "told"),
    [
        (torch.rand(3, 4), torch.rand(2, 4), "x has 3 originals and means has 2 reconstructions"),
        (torch.rand(3, 4)[:0], torch.rand(3, 4)[:0], r"x has shape \(0, 4\), that is no pictures"),
        (torch.rand(3, 4), torch.rand(3, 6), "Rows of 6 numbers are no pictures"),
    ],
)
def test_reconstructions_that_do_not_match_are_refused(ax: Axes, x: Any, means: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        plots.reconstructions(x, means, (2, 2), ax)


@pytest.mark.parametrize("shape", [8, "8x8", "22", (2.0, 2.0), (-2, -2), None])
def test_a_shape_of_no_picture_is_refused(ax: Axes, shape: Any) -> None:
    with pytest.raises(ValueError, match=r"is none of pictures: give shape=\(H, W\)"):
        plots.images(torch.rand(3, 4), shape, ax)


@pytest.mark.parametrize("columns", [0, -1, 1.5])
def test_columns_that_are_no_count_are_refused(ax: Axes, columns: Any) -> None:
    with pytest.raises(ValueError, match=r"columns=.* must be a whole number of at least 1"):
        plots.images(torch.rand(3, 4), (2, 2), ax, columns=columns)
