"""What a Bayesian checks: ranks of simulated latents, and statistics of replicated data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_vae.learning.history import BLUE, VERMILION
from pyro_vae.report.plots.figure import axes, counted, curve_look, require
from pyro_vae.report.ranks import SMALLEST

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pyro_vae.report.ranks import Calibration
    from pyro_vae.report.replicates import PosteriorPredictive

MOST_NAMED, GREY = 6, "0.55"
"""Curves that are named, with a look of their own; the colour of the others."""


def calibration(result: Calibration, ax: Axes | None = None) -> Axes:
    """ECDF of the PIT of each quantity less the diagonal, with the simultaneous 95 % band (Säilynoja et al. 2022, fig. 2).

    A calibrated quantity stays inside of the grey band from end to end, with 95 % probability. Draws that are too narrow
    make an S that first rises, draws that are too wide one that first falls; draws that are too high a hill, too low a
    valley. The six quantities outside that have the smallest p-values are named; the others are grey and counted.

    Args:
        result: of `diagnostics.calibration`.
        ax: where to draw.
    """
    require(result, "Calibration", "pv.diagnostics.calibration")
    ax = axes(ax)
    points = np.concatenate([[0.0], result.expected.points.cpu().numpy(), [1.0]])
    lower, upper = (_with_ends(end.cpu().numpy()) for end in result.band)
    ax.fill_between(points, lower, upper, color="0.88", linewidth=0, label="95 % band, simultaneous")
    for end in (lower, upper):
        ax.plot(points, end, color="0.6", linewidth=0.8)
    ax.axhline(0.0, color="black", linewidth=0.8)
    curves, p_value = result.difference.cpu().numpy(), result.p_value.cpu().numpy()
    order = result.order.tolist()
    outside = int(result.outside.sum())
    named = order[: min(outside, MOST_NAMED)]
    more = outside - len(named)
    label = f"{len(order) - outside} inside" + (f", {more} more outside" if more else "")
    for index in order[len(named) :]:
        ax.plot(points, _with_ends(curves[:, index]), color=GREY, linewidth=0.8, label=label)
        label = ""
    for number, index in enumerate(named):
        look = curve_look(number)
        ax.plot(
            points, _with_ends(curves[:, index]), color=look.colour, linestyle=look.dash, marker=look.marker, markersize=4,
            markevery=max(1, len(points) // 10), label=f"{result.names[index]}: p {_told(p_value[index])}",
        )  # fmt: skip
    low, high = ax.get_ylim()
    entries = len(ax.get_legend_handles_labels()[0])
    ax.set_ylim(low, high + 0.09 * -(-entries // 2) * (high - low))  # room for the legend, in two columns
    ax.set_xlim(0.0, 1.0)
    ax.set(
        xlabel="PIT: share of the draws below the simulated truth",
        ylabel="ECDF - uniform (probability)",
        title=f"Calibration of {result.engine}: {outside} of {len(result.names)} quantities outside,\n"
        f"{counted(result.expected.count, 'simulated row')}, {counted(result.num_draws, 'draw')} each",
    )
    ax.title.set_fontsize("medium")
    ax.legend(frameon=False, fontsize="small", ncols=2, loc="upper center")
    return ax


def _with_ends(curve: Any) -> Any:
    """At 0 and 1 every distribution function is on the diagonal."""
    return np.concatenate([[0.0], curve, [0.0]])


def _told(p_value: float) -> str:
    return f"= {p_value:.2g}" if p_value >= SMALLEST else f"< {SMALLEST:g}"


def predictive_check(result: PosteriorPredictive, name: str | None = None, ax: Axes | None = None) -> Axes:
    """One statistic of the data against its replications, in the statistic's own units.

    A statistic of the whole data: a histogram of T(x_rep), and a line at T(x). One of each row: the median of the
    replications against T(x), with whiskers from their 2.5 % to their 97.5 % quantile; rows whose two-sided p-value is at
    most 0.05 are hollow triangles. Numbers that are not finite are not drawn.

    Args:
        result: of `diagnostics.posterior_predictive`.
        name: of the statistic; None for the only or the first one.
        ax: where to draw.

    Raises:
        ValueError: no statistic of that name.
    """
    require(result, "PosteriorPredictive", "pv.diagnostics.posterior_predictive")
    name = next(iter(result.observed)) if name is None else name
    if name not in result.observed:
        raise ValueError(f"name={name!r} is no statistic of this result: give one of {', '.join(result.observed)}.")
    ax = axes(ax)
    observed = result.observed[name].cpu().numpy()
    replicated, p = result.replicated[name].cpu().numpy(), result.p_value(name).cpu().numpy()
    (_by_row if observed.ndim else _of_all)(ax, name, observed, replicated, p)
    ax.title.set_fontsize("medium")
    return ax


def _of_all(ax: Axes, name: str, observed: Any, replicated: Any, p: Any) -> None:
    finite = replicated[np.isfinite(replicated)]
    ax.hist(
        finite, bins=min(30, max(5, len(finite) // 10)), facecolor=BLUE, edgecolor="white", linewidth=0.8,
        label=f"{counted(len(finite), 'replication')}, T(x_rep)",
    )  # fmt: skip
    ax.axvline(observed, color=VERMILION, linestyle="--", linewidth=2.0, label=f"observed, T(x) = {observed:.4g}")
    ax.set_ylim(0.0, 1.35 * ax.get_ylim()[1])  # room for the legend
    ax.set(xlabel=f"{name} of the data", ylabel="replications", title=f"Posterior predictive check: two-sided p = {p:.2g}")
    ax.legend(frameon=False, loc="upper center")


def _by_row(ax: Axes, name: str, observed: Any, replicated: Any, p: Any) -> None:
    known = np.isfinite(observed) & np.isfinite(replicated).all(0)
    observed, p = observed[known], p[known]
    low, middle, high = np.quantile(replicated[:, known], [0.025, 0.5, 0.975], axis=0)
    odd = p <= 0.05
    for mine, colour, marker, fill, told in (
        (~odd, BLUE, "o", BLUE, "p above 0.05"),
        (odd, VERMILION, "^", "white", "p at most 0.05"),
    ):
        ax.vlines(observed[mine], low[mine], high[mine], color=colour, linewidth=0.8, alpha=0.4)
        ax.plot(
            observed[mine], middle[mine], marker, color=colour, markerfacecolor=fill, markersize=4, linestyle="",
            label=f"{told}: {counted(int(mine.sum()), 'row')}",
        )  # fmt: skip
    ends = np.array([min(observed.min(), low.min()), max(observed.max(), high.max())])
    ax.plot(ends, ends, color="black", linestyle=":", linewidth=1.2, label="equal")
    count = counted(len(observed), "row")
    ax.set(
        xlabel=f"{name}, observed (one point a row)",
        ylabel=f"{name}, replicated (median, 95 % interval)",
        title=f"Posterior predictive check of {count}:\ntwo-sided p at most 0.05 in {int(odd.sum())}",
    )
    ax.legend(frameon=False, fontsize="small")
