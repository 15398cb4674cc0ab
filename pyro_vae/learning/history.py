"""What a fit went through, epoch by epoch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, VERMILION = "#0072B2", "#D55E00"
"""Of Okabe & Ito (2008): colour-blind readers can tell them apart."""

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
        """
        ax = over_epochs(ax, "ELBO (nats per row)", "Learning curve")
        ax.plot(self.epoch, self.elbo, color=BLUE, label="training, while it moves")
        if self.valid_elbo:
            ax.plot(self.epoch, self.valid_elbo, color=VERMILION, linestyle="--", label="validation")
        if len(self) >= 10:
            # An epoch whose validation broke down must not cost the figure.
            epochs = [
                list(filter(math.isfinite, both)) for both in zip(self.elbo, self.valid_elbo or self.elbo, strict=True)
            ]
            top, bottom = max(map(max, epochs)), min(map(min, epochs[len(self) // 10 :]))
            room = 0.05 * (top - bottom) or 1.0
            ax.set_ylim(bottom - room, top + room)
        ax.legend(frameon=False)
        return ax


def over_epochs(ax: Axes | None, ylabel: str, title: str) -> Axes:
    """`ax`, or those of a new figure, with titles and whole numbers of epochs below."""
    from matplotlib.ticker import MaxNLocator

    if ax is None:
        from matplotlib import pyplot as plt

        ax = plt.subplots(layout="constrained")[1]
    ax.set(xlabel="epoch", ylabel=ylabel, title=title)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return ax
