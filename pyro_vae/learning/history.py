"""What a fit went through, epoch by epoch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass
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
    """

    epoch: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    elbo: list[float] = field(default_factory=list)
    valid_elbo: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    stopped: str = ""

    def __len__(self) -> int:
        """Number of epochs."""
        return len(self.epoch)

    def __str__(self) -> str:
        """The last epoch in a line."""
        if not self.epoch:
            return "History: no epoch yet"
        valid = f", validation {self.valid_elbo[-1]:.3f}" if self.valid_elbo else ""
        why = f"; {self.stopped}" if self.stopped else ""
        return f"epoch {self.epoch[-1]}: ELBO {self.elbo[-1]:.3f}{valid} nats a row, {self.seconds[-1]:.1f} s{why}"

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, for JSON."""
        return asdict(self)

    def plot(self, ax: Axes | None = None) -> Axes:
        """The learning curve; returns the Axes."""
        from pyro_vae.report.plots import learning_curve

        return learning_curve(self, ax=ax)
