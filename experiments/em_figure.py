"""The figure of em_vs_svi.py: held-out log p(x) against seconds and against passes over the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LOOKS = {
    "exact EM": ("#000000", "x", "-"),
    "EM, Hamiltonian E-step": ("#D55E00", "^", "-"),
    "EM, Laplace E-step": ("#E69F00", "D", "-"),
    "SVI": ("#0072B2", "o", "--"),
    "IWAE, 8 particles": ("#009E73", "s", "--"),
}
"""Okabe & Ito (2008): colour, marker and line of a method."""

AXES = {"seconds": "seconds (log scale)", "passes": "passes over the training images (log scale)"}
ROOM = 0.5
"""Room below the worst end of a fit, in the distance from there to the best: the rest is the first steep part."""


def draw(fits: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One row of axes for each decoder and number of images; bars: two Monte Carlo errors, where they can be seen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    cases = list(dict.fromkeys((fit["decoder"], fit["rows"]) for fit in fits))
    figure, axes = plt.subplots(len(cases), 2, figsize=(11, 3.6 * len(cases)), layout="constrained", squeeze=False)
    for row, (decoder, rows) in zip(axes, cases, strict=True):
        mine = [fit for fit in fits if (fit["decoder"], fit["rows"]) == (decoder, rows)]
        known = next((fit["log_p"] for fit in mine if fit["method"] == "closed form"), None)
        ends = {fit["method"]: fit["log_p"] for fit in mine}
        best, worst = max(fit["log_p"] for fit in mine), min(ends.values())
        for ax, (key, label) in zip(row, AXES.items(), strict=True):
            for method, (colour, marker, line) in LOOKS.items():
                curve = [fit for fit in mine if fit["method"] == method and fit[key] > 0]
                if curve:
                    ax.errorbar(
                        [fit[key] for fit in curve],
                        [fit["log_p"] for fit in curve],
                        yerr=[2.0 * fit["monte_carlo_error"] for fit in curve],
                        color=colour,
                        marker=marker,
                        linestyle=line,
                        markersize=4,
                        linewidth=1.2,
                        label=method,
                    )
            if known is not None:
                ax.axhline(known, color="0.5", linewidth=0.8, label="maximum likelihood, closed form")
            ax.set_xscale("log")
            ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            ax.xaxis.set_minor_formatter(NullFormatter())
            ax.set_ylim(worst - ROOM * (best - worst), best + 0.05 * (best - worst))
            ax.set(xlabel=label, title=f"{decoder} decoder, {rows:,} images")
            ax.grid(color="0.9", linewidth=0.6)
        row[0].set_ylabel("held-out log p(x) (nats an image)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
