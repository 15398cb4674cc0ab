"""Several fits against the clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_vae.em.record import EMHistory
from pyro_vae.learning.history import History
from pyro_vae.report.plots.figure import axes, curve_look

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Pair = tuple[Sequence[float], Sequence[float]]
"""Seconds and nats of as many moments."""


def nats_against_seconds(
    curves: Mapping[str, History | EMHistory | Pair],
    ax: Axes | None = None,
    *,
    truth: float | None = None,
    what: str | None = None,
) -> Axes:
    """What each fit had reached after how many seconds, in nats of a mean row; one curve a fit.

    Seconds are on a logarithmic axis, because fits differ by factors. The vertical axis leaves out the steep first part: it
    begins at the worst of the last nine tenths of any curve. What a curve ended with stands in the legend.

    Args:
        curves: by name: a `History`, whose validation ELBO is drawn, or that of the training rows where there is no other;
            an `EMHistory`, with its log p(x) likewise; or (seconds, nats), such as log p(x) after some epochs.
        ax: where to draw.
        truth: a number to compare with, in nats a row: a dashed line.
        what: the nats are of, such as "held-out log p(x)"; None tells what is known of histories.

    Raises:
        TypeError: what is no curve.
        ValueError: no curve, or one that is empty, has seconds that are not above zero, or not as many as nats.
    """
    from matplotlib.ticker import LogFormatter

    if not isinstance(curves, Mapping):
        raise TypeError(f"curves is {type(curves).__name__}: give curves by name, such as {{'SVI': history}}.")
    if not curves:
        raise ValueError("curves is empty: give at least one, such as {'SVI': history}.")
    drawn = {name: _points(name, curve) for name, curve in curves.items()}
    kinds = {name: _kind(curve) for name, curve in curves.items()} if what is None else {}
    several = len(set(kinds.values())) > 1  # then the legend tells each
    if kinds and all(kinds.values()):
        what = " and ".join(dict.fromkeys(kinds.values()))
    ax = axes(ax)
    for number, (name, (seconds, nats)) in enumerate(drawn.items()):
        look = curve_look(number)
        told = f"{name}, {kinds[name]}" if several and kinds[name] else name
        ax.plot(
            seconds, nats, color=look.colour, linestyle=look.dash, marker=look.marker, markersize=4,
            markevery=max(1, len(nats) // 8), label=f"{told}: {nats[-1]:.2f} after {seconds[-1]:.3g} s",
        )  # fmt: skip
    if truth is not None:
        ax.axhline(truth, color="black", linestyle=(0, (4, 2)), linewidth=1.0, label=f"to compare with: {truth:.2f}")
    _leave_out_the_start(ax, [nats for _, nats in drawn.values()], truth)
    ax.set_xscale("log")
    for choose in (ax.xaxis.set_major_formatter, ax.xaxis.set_minor_formatter):
        choose(LogFormatter(labelOnlyBase=False))  # "20", which is short enough not to touch its neighbour
    ax.set(xlabel="wall-clock time (s)", ylabel=f"{what} (nats per row)" if what else "nats per row")
    ax.set_title(f"{what or 'Nats'} against seconds")
    ax.legend(facecolor="white", edgecolor="none", framealpha=0.9, fontsize="small")
    return ax


def _leave_out_the_start(ax: Axes, curves: Sequence[Any], truth: float | None) -> None:
    """The vertical axis from the worst of the last nine tenths of any curve to the best of all."""
    later = np.concatenate([nats[len(nats) // 10 :] for nats in curves])
    later = np.append(later[np.isfinite(later)], [] if truth is None else truth)
    if len(later):
        low, high = float(later.min()), float(later.max())
        room = 0.05 * (high - low) or 1.0
        ax.set_ylim(low - room, high + room)


def _kind(curve: object) -> str:
    """What the nats of a history are; "" for pairs."""
    return "ELBO" if isinstance(curve, History) else "log p(x)" if isinstance(curve, EMHistory) else ""


def _points(name: str, curve: History | EMHistory | Pair) -> tuple[Any, Any]:
    """Seconds and nats of a curve, as arrays of as many numbers."""
    pair: Any = curve
    if isinstance(curve, History):
        pair = curve.seconds, curve.valid_elbo or curve.elbo
    elif isinstance(curve, EMHistory):
        pair = curve.seconds, curve.valid_log_p or curve.log_p
    if not hasattr(pair, "__len__") or len(pair) != 2:
        raise TypeError(f"curves[{name!r}] is {type(pair).__name__}: give a History, an EMHistory or (seconds, nats).")
    seconds, nats = (np.asarray(part, dtype=float) for part in pair)
    if seconds.ndim != 1 or seconds.shape != nats.shape or not len(seconds):
        raise ValueError(
            f"curves[{name!r}] has seconds of shape {seconds.shape} and nats of shape {nats.shape}: give as many of each, "
            "at least one."
        )
    if not (seconds > 0.0).all():
        raise ValueError(f"curves[{name!r}] has {seconds.min():g} seconds, which a logarithmic axis lacks: leave it out.")
    return seconds, nats
