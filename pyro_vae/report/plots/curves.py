"""Curves: learning, convergence in the number of particles, rate against distortion."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from pyro_vae.learning.history import BLUE, VERMILION
from pyro_vae.report.plots.figure import axes, counted, looks, require

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pyro_vae.em.record import EMHistory
    from pyro_vae.evidence.estimate import Estimate
    from pyro_vae.learning.history import History
    from pyro_vae.report.compression import RateDistortion
    from pyro_vae.report.growth import Convergence


def learning_curve(history: History | EMHistory, ax: Axes | None = None) -> Axes:
    """ELBO of a mean row, in nats, against the epoch, or log p(x) of a fit by EM; see `History.plot`, `EMHistory.plot`."""
    require(history, "History or EMHistory", "pv.fit or pv.em.fit")
    return history.plot(ax)


def convergence(result: Convergence, ax: Axes | None = None, *, truth: float | Estimate | None = None) -> Axes:
    """The mean over rows of log p-hat_k in nats against k, one curve an engine.

    Bands are one standard error of an estimate with k particles a row, of the draws and not of the choice of rows. Every
    curve lies below the truth in expectation and rises towards it.

    Args:
        result: of `diagnostics.convergence`.
        ax: where to draw.
        truth: log p(x), mean of the same rows: a number, or an `Estimate` whose mean is drawn. A dashed line.
    """
    require(result, "Convergence", "pv.diagnostics.convergence")
    ax = axes(ax)
    styles = looks(result.curves)
    for name, (count, log_p, error) in result.curves.items():
        look, k, middle = styles[name], count.cpu().numpy(), log_p.cpu().numpy()
        band = np.where(np.isfinite(error.cpu().numpy()), error.cpu().numpy(), 0.0)
        ax.fill_between(k, middle - band, middle + band, color=look.colour, alpha=0.25, linewidth=0)
        label = f"{name}: {middle[-1]:.3f} with {k[-1]:,}"
        ax.plot(k, middle, color=look.colour, linestyle=look.dash, marker=look.marker, markersize=4, label=label)
    if truth is not None:
        value = truth if isinstance(truth, float | int) else truth.mean
        told = "" if isinstance(truth, float | int) else f" ± {truth.mean_standard_error:.2g}"
        ax.axhline(value, color="black", linestyle=(0, (4, 2)), linewidth=1.0, label=f"log p(x): {value:.3f}{told}")
    ax.set_xscale("log")
    ax.set(
        xlabel="particles a row, k",
        ylabel="log p-hat with k particles (nats per row)",
        title=f"Convergence, mean of {counted(result.num_rows, 'row')}",
    )
    ax.legend(frameon=False, loc="lower right")
    return ax


def rate_distortion(curve: RateDistortion, ax: Axes | None = None) -> Axes:
    """Rate against distortion in nats, means over the rows, from the prior (b near 0, right) to the posterior (b = 1).

    Bands are one standard error of the rate over the chains. The expected points lie on the model's curve or above it.
    """
    require(curve, "RateDistortion", "pv.diagnostics.rate_distortion")
    ax = axes(ax)
    rate, distortion, error = (
        value.cpu().numpy() for value in (curve.mean("rate"), curve.mean("distortion"), curve.mean_standard_error("rate"))
    )
    ax.fill_between(distortion, rate - error, rate + error, color=BLUE, alpha=0.25, linewidth=0)
    ax.plot(distortion, rate, color=BLUE)
    for wanted in (0.01, 0.1, 1.0):
        at = int((curve.beta - wanted).abs().argmin())
        if math.isclose(float(curve.beta[at]), wanted, rel_tol=0.2):
            ax.plot(distortion[at], rate[at], "o", color=VERMILION)
            ax.annotate(f"b = {wanted:g}", (distortion[at], rate[at]), (8, 4), textcoords="offset points")
    ax.set(
        xlabel="distortion E[-log p(x | z)] (nats per row)",
        ylabel="rate KL(q || p(z)) (nats per row)",
        title=f"Rate-distortion curve: R + D = {rate[-1] + distortion[-1]:.2f} nats at b = 1",
    )
    return ax
