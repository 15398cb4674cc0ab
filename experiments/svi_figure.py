"""The figure of svi_speed.py: bars of milliseconds a step and seconds to quality, lines of how cost grows."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from svi_peers import FLOOR

COLOURS = {"Pyro": "#D55E00", "PyTorch": "#0072B2", "NumPyro": "#009E73", "pythae": "#CC79A7", "pyro_vae": "#E69F00"}
"""Okabe & Ito (2008), by the first word of a name; the floor is black."""
MARKERS = {"Pyro": "o", "PyTorch": "s", "NumPyro": "^", "pyro_vae": "D"}
AXES = {"batch": "rows a step", "hidden": "width of the hidden layers", "latent": "latent dimensions"}


def family(name: str) -> str:
    """The first word of a contestant's name, which gives its colour."""
    return name.replace(",", " ").split()[0]


def bars(
    ax: Any,
    rows: Mapping[str, tuple[float, float, float]],
    missing: list[str],
    unit: str,
    marks: Mapping[str, float] | None = None,
) -> None:
    """Horizontal bars of medians with least and most, the fastest at the bottom, and a mark for some."""
    marks = marks or {}
    edge = 1.2 * max([*marks.values(), *(middle for middle, _, _ in rows.values())])  # whiskers of a crowd are cut there
    names = sorted(rows, key=lambda name: rows[name][0])
    places = range(len(names), 0, -1)
    for place, name in zip(places, reversed(names), strict=True):
        middle, least, most = rows[name]
        ax.barh(
            place,
            middle,
            xerr=[[middle - least], [min(most, edge) - middle]],
            color=COLOURS.get(family(name), "0.5"),
            hatch="//" if family(name) == "pyro_vae" else None,
            edgecolor="black" if family(name) == "pyro_vae" else None,
            error_kw={"capsize": 2, "linewidth": 0.8},
        )
        if name in marks:
            ax.plot(marks[name], place, color="0.35", marker="|", markersize=10)
        ax.annotate(
            f"{middle:.3g}",
            (min(max(most, marks.get(name, 0.0)), edge), place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    ax.set_yticks(list(places), list(reversed(names)), fontsize=8)
    ax.set_xlim(0.0, 1.1 * edge)
    ax.set_xlabel(unit + (f"\nnot installed: {', '.join(missing)}" if missing else ""))


def draw_steps(ax: Any, size: str, found: Mapping[str, Any]) -> None:
    """Milliseconds a step of one size, the floor as a line."""
    rows = {name: (row["ms"], row["least"], row["most"]) for name, row in found.items() if "ms" in row}
    missing = [name for name, row in found.items() if "missing" in row]
    floor = rows.pop(FLOOR, None)
    bars(ax, rows, missing, "milliseconds a step")
    if floor is not None:
        ax.axvline(floor[0], color="black", linestyle="--", linewidth=1, label=f"{FLOOR}: {floor[0]:.3g}")
        ax.legend(loc="lower right", fontsize=8)
    ax.set_title(size)


def draw_quality(ax: Any, found: Mapping[str, Any]) -> None:
    """Seconds to the target, training alone; all in all as a mark where compilation adds to it."""
    done = {name: row for name, row in found["contestants"].items() if "missing" not in row}
    missing = [name for name, row in found["contestants"].items() if "missing" in row]
    spans = {name: row["training_seconds"] for name, row in done.items()}
    rows = {name: (statistics.median(values), min(values), max(values)) for name, values in spans.items()}
    whole = {name: statistics.median(row["seconds"]) for name, row in done.items()}
    bars(ax, rows, missing, "seconds of training (|: and compilation)", whole)
    ax.set_title(f"To an ELBO of {found['target']:g} nats, MNIST")


def draw_growth(ax: Any, axis: str, found: Mapping[str, Any]) -> None:
    """Steps a second against one size, both logarithmic."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    names = dict.fromkeys(name for row in found.values() for name, each in row.items() if "ms" in each)
    for name in names:
        points = [(int(value), 1e3 / row[name]["ms"]) for value, row in found.items() if "ms" in row.get(name, {})]
        floor = name == FLOOR
        ax.plot(
            *zip(*points, strict=True),
            color="black" if floor else COLOURS.get(family(name), "0.5"),
            marker=None if floor else MARKERS.get(family(name), "v"),
            linestyle="--" if floor else "-",
            markersize=4,
            label=name,
        )
    ax.set(xscale="log", yscale="log", xlabel=AXES[axis], ylabel="steps a second")
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticks([int(value) for value in found], list(found))
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.grid(visible=True, which="major", alpha=0.3)


def draw(result: Mapping[str, Any], path: Path) -> None:
    """All parts that there are."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = {part: result[part]["found"] for part in ("steps", "quality", "growth") if part in result}
    upper = [*(("steps", size) for size in found.get("steps", ())), *(("quality", "") for _ in range("quality" in found))]
    lower = list(found.get("growth", ()))
    if not upper and not lower:
        return
    columns = max(len(upper), len(lower))
    figure, grid = plt.subplots(
        bool(upper) + bool(lower), columns, figsize=(6.0 * columns, 4.2 * (bool(upper) + bool(lower))), squeeze=False
    )
    figure.set_layout_engine("constrained")
    for ax, (part, size) in zip(grid[0], upper, strict=False):
        draw_quality(ax, found[part]) if part == "quality" else draw_steps(ax, size, found[part][size])
    for ax, axis in zip(grid[-1], lower, strict=False):
        draw_growth(ax, axis, found["growth"][axis])
    if lower:
        grid[-1][0].legend(fontsize=8, loc="upper right")
    for ax in grid.flat:
        if not ax.has_data():
            ax.set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
