"""What a fit went through, epoch by epoch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, VERMILION = "#0072B2", "#D55E00"
"""Of Okabe & Ito (2008): colour-blind readers can tell them apart."""

FEW = 10
"""Points of a curve up to which each has a mark."""

COLLAPSED = 0.01
"""Nats a row under which the posterior is the prior whatever x is."""


@dataclass(repr=False)
class History:
    """One entry an epoch in each list; every figure is the mean of a row, in nats.

    Attributes:
        epoch: 1, 2, ...
        loss: the objective that was minimised, while the parameters moved.
        elbo: the true ELBO (beta = 1) of the training rows, while the parameters moved.
        valid_elbo: the true ELBO of the validation rows after the epoch; empty without such rows.
        learning_rate: of the first parameter group.
        seconds: wall-clock time since the start, resumed runs added up.
        stopped: why the run ended before its last epoch, or "".
        compiled_from: the step, counted from 0, from which whole batches go through a compiled graph; None: none did.
        why_eager: why a compilation was tried and given up, or "".
        kl: mean KL(q(z | x) || p(z)) of up to 1,024 rows at the end, validation rows if there are any; None before the end.
        precision_gap: with precision="tf32" or "bf16": mean ELBO of these rows in that precision, less the same in full
            precision with the same noise, at the end.
    """

    epoch: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    elbo: list[float] = field(default_factory=list)
    valid_elbo: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    stopped: str = ""
    compiled_from: int | None = None
    why_eager: str = ""
    kl: float | None = None
    precision_gap: float | None = None

    @property
    def collapsed(self) -> bool:
        """Whether the fit ended with latents that say nothing about x: a KL under 0.01 nats a row."""
        return self.kl is not None and self.kl < COLLAPSED

    def __len__(self) -> int:
        """Number of epochs."""
        return len(self.epoch)

    def __repr__(self) -> str:
        """The last epoch in a line."""
        if not self.epoch:
            return "History: no epoch yet"
        valid = f", validation {self.valid_elbo[-1]:.3f}" if self.valid_elbo else ""
        why = f"; {self.stopped}" if self.stopped else ""
        if self.kl is not None:
            why = f", KL {self.kl:.3g}{why}"
        if self.precision_gap is not None:
            why += f"; coarse arithmetic moves the ELBO by {self.precision_gap:+.2g} nats"
        if self.collapsed:
            why += "; WARNING: the posterior has collapsed onto the prior, z says nothing of x: try free bits, a warm-up"
        return f"epoch {self.epoch[-1]}: ELBO {self.elbo[-1]:.3f}{valid} nats a row, {self.seconds[-1]:.1f} s{why}"

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, for JSON."""
        return asdict(self)

    def plot(self, ax: Axes | None = None) -> Axes:
        """The learning curve: ELBO of a mean row, in nats, against the epoch.

        The vertical axis leaves out the first steep part: it begins at the worst of the last nine tenths of the epochs.

        Args:
            ax: where to draw; None makes a figure.

        Returns:
            the Axes.

        Raises:
            ValueError: no epoch.
        """
        ax = over_epochs(ax, self.epoch, "ELBO (nats per row)", "Learning curve")
        few = len(self) <= FEW
        ax.plot(self.epoch, self.elbo, color=BLUE, marker="o" if few else "", label="training, while it moves")
        if self.valid_elbo:
            marker = "s" if few else ""
            ax.plot(self.epoch, self.valid_elbo, color=VERMILION, linestyle="--", marker=marker, label="validation")
        leave_out_the_start(ax, [self.elbo, self.valid_elbo])
        ax.legend(frameon=False)
        return ax


def over_epochs(ax: Axes | None, epochs: Sequence[int], ylabel: str, title: str) -> Axes:
    """`ax`, or those of a new figure, with titles and whole numbers of epochs below.

    Raises:
        ValueError: no epoch.
    """
    from matplotlib.ticker import MaxNLocator

    if not epochs:
        raise ValueError("This history has no epoch to draw: fit for at least one.")
    if ax is None:
        from matplotlib import pyplot as plt

        ax = plt.subplots(layout="constrained")[1]
    ax.set(xlabel="epoch", ylabel=ylabel, title=title)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if len(epochs) == 1:
        ax.set_xlim(epochs[0] - 0.5, epochs[0] + 0.5)
    return ax


def leave_out_the_start(ax: Axes, curves: Sequence[Sequence[float]]) -> None:
    """Of ten epochs and more: the vertical axis from the worst of the last nine tenths of any curve to the best of all.

    An epoch whose numbers are not finite must not cost the figure.
    """
    every = [value for curve in curves for value in curve if math.isfinite(value)]
    late = [value for curve in curves for value in curve[len(curve) // 10 :] if math.isfinite(value)]
    if late and max(map(len, curves)) >= 10:
        top, bottom = max(every), min(late)
        room = 0.05 * (top - bottom) or 1.0
        ax.set_ylim(bottom - room, top + room)
