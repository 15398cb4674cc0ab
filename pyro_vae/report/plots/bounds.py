"""Bounds of log p(x), row by row: the gap below it, and the sandwich around it."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING

import numpy as np

from pyro_vae.learning.history import BLUE, VERMILION
from pyro_vae.report.plots.figure import axes, counted, require

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pyro_vae.evidence.bounds import Sandwich
    from pyro_vae.report.gap import InferenceGap

MOST_WHISKERS = 500
"""More rows than this are points alone."""

STANDS_OUT = 10.0
"""Rows that reach this many times as far as the middling one need a logarithmic axis."""

CHARACTERS = 60
"""Of a line above or below Axes of five inches."""


def inference_gap(result: InferenceGap, ax: Axes | None = None) -> Axes:
    """Both gaps of each row in nats, stacked, rows sorted by their sum; a negative gap hangs below zero.

    Rows without a number are left out. For up to 60 rows points show the sum, with bars of one standard error.

    Raises:
        ValueError: no row has a number.
    """
    require(result, "InferenceGap", "pv.diagnostics.inference_gap")
    known = result.inference.isfinite()
    if not bool(known.any()):
        raise ValueError(f"None of the {len(result)} rows has an inference gap to draw: see the reasons in the result.")
    ax = axes(ax)
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


def sandwich(box: Sandwich, ax: Axes | None = None) -> Axes:
    """Both bounds of each row in nats, relative to the row's own midpoint, against the midpoint.

    log p(x) itself differs by tens of nats from row to row, the bounds by hundredths: so the midpoint is taken away, and
    what is seen is how sure the bounds are, of how many rows, and of which. Where some rows reach more than ten times as
    far as the middling one, the vertical axis is linear near zero and logarithmic beyond. Whiskers, drawn for up to 500
    rows, are one standard error of each side; where a lower bound lies above zero, chance was larger than the width. Rows
    that lack a side are counted in the title and not drawn.

    Raises:
        ValueError: no row has both sides.
    """
    require(box, "Sandwich", "pv.evidence.sandwich")
    known = box.width.isfinite()
    if not bool(known.any()):
        raise ValueError(f"None of the {len(box)} rows has both bounds to draw.")
    ax = axes(ax)
    half, middle, low_error, high_error = (
        value[known].cpu().numpy()
        for value in (0.5 * box.width, box.lower + 0.5 * box.width, box.lower_standard_error, box.upper_standard_error)
    )
    errors = np.maximum(low_error, high_error)
    reach = np.abs(half) + np.where(np.isfinite(errors), errors, 0.0)
    middling, top = max(float(np.median(reach)), 1e-9), max(float(reach.max()), 1e-9)
    if top > STANDS_OUT * middling:
        # The linear part holds the middling rows, the logarithmic one those that stand out.
        ax.set_yscale("symlog", linthresh=10.0 ** round(math.log10(middling)))
        top *= 3.0  # room for the legend, as below
    else:
        top *= 1.3
    few = len(half) <= MOST_WHISKERS
    for name, side, error, colour, marker in (
        ("upper bound", half, high_error, VERMILION, "^"),
        ("lower bound", -half, low_error, BLUE, "v"),
    ):
        if few:
            ax.vlines(middle, side - error, side + error, color=colour, linewidth=0.8, alpha=0.4)
        ax.plot(middle, side, marker, color=colour, markersize=4 if few else 2, linestyle="", label=name)
    ax.axhline(0.0, color="black", linewidth=0.8)
    ax.set_ylim(-top, top)
    missing = len(box) - len(half)
    doubt = f" ± {box.mean_width_standard_error:.1g}" if len(half) > 1 else ""
    title = [
        f"Bounds of log p(x), {counted(len(half), f'{box.kind} row')}, {box.engine}:",
        f"mean width {box.mean_width:.2g}{doubt} nats",
        *([f"{counted(missing, 'more row')} without a side"] if missing else []),
    ]
    ax.set_title("\n".join(textwrap.fill(line, CHARACTERS) for line in title), fontsize="medium")
    told = textwrap.fill(f"({box.covers})", CHARACTERS)
    ax.set(xlabel=f"midpoint of both bounds (nats)\n{told}", ylabel="bound - midpoint (nats)")
    ax.legend(frameon=False, loc="upper left", ncols=2)
    return ax
