"""Programs against the best of them."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_vae.learning.history import BLUE, VERMILION
from pyro_vae.report.plots.figure import axes, counted, require

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pyro_vae.report.comparison import Comparison

NORMAL_95 = 1.96
"""Standard errors either side of a 95 % interval."""

SPREAD = 50.0
"""Differences that differ by more than this factor are drawn on an axis that is logarithmic away from zero."""


def comparison(result: Comparison, ax: Axes | None = None, *, bits: bool = False) -> Axes:
    """The paired difference of each program to the best, mean over the rows, best at the top.

    Two bars of 1.96 standard errors: on the point the error for other rows of the same kind (the draws are in it), below
    it that of the draws alone. Where differences are of very different size the axis is linear near zero and logarithmic
    beyond. A program that gives rows no probability, or has no number, has words in place of a point.

    Args:
        result: of `pv.compare`.
        ax: where to draw.
        bits: in bits per dimension, where less is better, in place of nats a row; for discrete data.

    Raises:
        ValueError: bits of densities.
    """
    require(result, "Comparison", "pv.compare")
    if bits and not result.discrete:
        raise ValueError("bits=True is for discrete data, and these programs give x a density: leave it out for nats.")
    ax = axes(ax)
    frame = result.to_dataframe()
    unit = _nats_of_a_bit(result) if bits else 1.0
    place = -np.arange(len(frame))
    columns = ("difference", "difference_data_standard_error", "difference_standard_error")
    middle, data, draws = (frame[name].to_numpy(dtype=float) / abs(unit) for name in columns)
    middle = middle * math.copysign(1.0, unit)
    known = np.isfinite(middle)
    others = known & (place < 0)  # the best has no difference to itself, and no error of it
    _bars(ax, middle[others], place[others], data[others], draws[others])
    if known[0]:
        ax.plot(0.0, 0.0, "o", color=BLUE)
    for y, line in zip(place[~known], frame[~known].to_dict("records"), strict=True):
        ax.annotate(
            _words(line, len(result)),
            (0.0, y),
            (-6, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize="small",
        )
    ax.axvline(0.0, color="black", linewidth=0.8)
    _scale(ax, middle[others], NORMAL_95 * np.where(np.isfinite(data), data, 0.0)[others])
    ax.set_yticks(place, _labels(result, bits=bits))
    ax.set_ylim(place[-1] - 0.5 - 0.25 * len(frame), 0.5)  # room for the legend
    better = "bits per dimension, less is better" if bits else "nats per row, more is better"
    ax.set(
        xlabel=f"difference to the best ({better})",
        title=f"Difference of log p(x) to the best, {counted(int(result.common.sum()), 'paired row')}",
    )
    ax.legend(facecolor="white", edgecolor="none", framealpha=0.9, loc="lower center", fontsize="small")
    return ax


def _bars(ax: Axes, middle: Any, place: Any, data: Any, draws: Any) -> None:
    """Points with the bars of the data, and those of the draws below them; infinite bars are left out and counted."""
    for values, error, shift, colour, marker, told in (
        (middle, data, 0.0, BLUE, "o", "error for other rows like these (the draws are in it), 95 %"),
        (middle, draws, -0.2, VERMILION, "", "of it from the draws (Monte Carlo), 95 %"),
    ):
        finite = np.isfinite(error)
        missing = "" if finite.all() else f"; {int((~finite).sum())} without a finite error"
        ax.errorbar(
            values[finite], place[finite] + shift, xerr=NORMAL_95 * error[finite], fmt=marker or "none", color=colour,
            ecolor=colour, capsize=4, elinewidth=1.6, linestyle="", label=told + missing,
        )  # fmt: skip
        if marker:
            ax.plot(values[~finite], place[~finite], marker, color=colour, fillstyle="none")


def _scale(ax: Axes, middle: Any, half: Any) -> None:
    """Logarithmic beyond the smallest program's reach where the programs are too far apart for one linear axis."""
    reach = np.abs(middle) + half
    if not len(reach) or reach.min() <= 0.0 or np.abs(middle).max() <= SPREAD * reach.min():
        return
    inner = 10.0 ** math.floor(math.log10(reach.min()))
    ax.set_xscale("symlog", linthresh=inner)
    ax.tick_params(axis="x", labelsize="small")
    low, high = min((middle - half).min(), 0.0), max((middle + half).max(), 0.0)
    ax.set_xlim(3.0 * min(low, -inner), 3.0 * max(high, inner))


def _labels(result: Comparison, *, bits: bool) -> list[str]:
    """Rank, name and mean of each program."""
    frame = result.to_dataframe()
    means = frame["bits_per_dimension"].map("{:.4f}".format) if bits else frame["log_p"].map("{:.3f}".format)
    names = [textwrap.fill(name, 24) for name in frame["name"]]
    return [f"{rank}  {name}\n{mean}" for rank, name, mean in zip(frame["rank"], names, means, strict=True)]


def _nats_of_a_bit(result: Comparison) -> float:
    """Nats a row that are one bit per dimension less: minus the mean number of dimensions times ln 2; NaN if that is 0."""
    known = next(estimate for estimate in result.estimates.values() if estimate.discrete)
    dimensions = known.dimensions[result.common.to(known.dimensions.device)].double().mean()
    return -float(dimensions) * math.log(2.0) or math.nan


def _words(line: dict[str, Any], count: int) -> str:
    return f"no probability in {line['impossible']} of {counted(count, 'row')}" if line["impossible"] else "no number"
