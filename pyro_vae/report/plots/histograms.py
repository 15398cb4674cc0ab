"""Histograms of what the weights say about themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pyro_vae.report.plots.figure import axes, counted, looks, require

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pyro_vae.evidence.estimate import Estimate

LOWEST, HIGHEST, WIDTH = -1.0, 1.5, 0.1
"""k-hat beyond the ends is drawn in the last bin of its side."""

VARIANCE, TRUST = 0.5, 0.7
"""Above the first the weights have no variance, above the second no number of particles makes an estimate to be trusted."""


def pareto_k(estimate: Estimate, ax: Axes | None = None) -> Axes:
    """Histogram of k-hat over the rows, stacked by the engine that answered.

    Marked are 0.5 and 0.7, see `weights.pareto_k`; with fewer than 2,200 particles a row is refused from 1 - 1/log10(K)
    on, which is lower than 0.7: 0.5 with 100. Rows whose largest weights are all equal have no tail, and closed forms no
    weights; both are counted below the axis and not drawn.

    Raises:
        ValueError: no row has a k-hat.
    """
    require(estimate, "Estimate", "pv.log_evidence")
    k = estimate.pareto_k.cpu().numpy()
    if not np.isfinite(k).any():
        raise ValueError(f"None of the {len(k)} rows has a k-hat to draw: there were no weights, or no tail in them.")
    ax = axes(ax)
    edges = np.arange(round(LOWEST / WIDTH), round(HIGHEST / WIDTH) + 1) * WIDTH
    clipped = np.clip(k, LOWEST + 1e-9, HIGHEST - 1e-9)
    base = np.zeros(len(edges) - 1)
    engines = np.array(estimate.engine)
    for name, look in looks(engines[np.isfinite(k)]).items():
        mine = (engines == name) & np.isfinite(k)
        counts = np.histogram(clipped[mine], edges)[0]
        ax.bar(
            edges[:-1], counts, WIDTH, base, align="edge", facecolor=look.colour, edgecolor="white", linewidth=0.8,
            hatch=look.hatch, label=f"{name}: {counted(int(mine.sum()), 'row')}",
        )  # fmt: skip
        base += counts
    for value, dash, told in ((VARIANCE, ":", "no variance above"), (TRUST, "--", "not to be trusted above")):
        above = int((k[np.isfinite(k)] > value).sum())
        ax.axvline(value, color="black", linestyle=dash, linewidth=1.2, label=f"{value}: {told}, {counted(above, 'row')}")
    shown = np.flatnonzero(base)
    ax.set_xlim(min(edges[shown[0]], 0.0) - WIDTH, max(edges[shown[-1] + 1], TRUST + WIDTH) + WIDTH)
    ax.set_ylim(0.0, 1.4 * base.max())  # room for the legend
    none, flat = int(np.isnan(k).sum()), int(np.isneginf(k).sum())
    beyond = int((np.isfinite(k) & (clipped != k)).sum())
    apart = ((flat, "without a tail"), (none, "without a k-hat"), (beyond, "beyond the ends, in the outermost bins"))
    notes = [f"{counted(count, 'row')} {told}" for count, told in apart if count]
    ax.set(
        xlabel="k-hat of the weights" + (f"\n({', '.join(notes)})" if notes else ""),
        ylabel="rows",
        title=f"k-hat of {counted(len(k) - none - flat, 'row')}",
    )
    ax.legend(facecolor="white", edgecolor="none", framealpha=0.9)
    return ax
