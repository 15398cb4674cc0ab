"""What a fit by Monte Carlo EM went through, epoch by epoch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from pyro_vae.evidence.estimate import Estimate
from pyro_vae.learning.history import BLUE, FEW, VERMILION, leave_out_the_start, over_epochs

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass
class Sums:
    """Estimates of many rows, added up.

    Attributes:
        rows: how many rows were weighed.
        valued: how many of these have a finite log p(x).
        log_p: its sum over them, in nats.
        variance: sum of its squared standard errors.
        bias: sum of its biases.
        reliable: how many rows may be believed.
        evaluations: passes through the decoder, for one particle each.
        reasons: why rows may not be believed, and how many.
    """

    rows: int = 0
    valued: int = 0
    log_p: float = 0.0
    variance: float = 0.0
    bias: float = 0.0
    reliable: int = 0
    evaluations: int = 0
    reasons: dict[str, int] = field(default_factory=dict)

    def add(self, estimate: Estimate, evaluations: int = 0) -> None:
        """Count the rows of one estimate, and what else was spent on each of them."""
        some = estimate.take(estimate.log_p.isfinite().nonzero().flatten())
        self.rows += len(estimate)
        self.valued += len(some)
        self.log_p += float(some.log_p.sum())
        self.variance += float(some.standard_error.square().sum())
        self.bias += float(some.bias.sum())
        self.reliable += int(estimate.reliable.sum())
        for reason in filter(None, estimate.reasons):
            self.reasons[reason] = self.reasons.get(reason, 0) + 1
        self.evaluations += int(estimate.evaluations.sum()) + evaluations * len(estimate)

    @property
    def mean(self) -> float:
        """Mean log p(x) of the rows that have a number."""
        return self.log_p / self.valued if self.valued else math.nan

    @property
    def standard_error(self) -> float:
        """Monte Carlo error of `mean`: rows are independent."""
        return math.sqrt(self.variance) / self.valued if self.valued else math.nan


@dataclass(repr=False)
class EMHistory:
    """One entry an epoch in each list; figures are those of a mean row, in nats.

    Attributes:
        epoch: 1, 2, ...
        log_p: log p(x) of the training rows from the weights of the E-steps, of the rows that have a number. Each batch is
            weighed before its M-step, so this is log p(x) while the parameters moved, not that of the last ones.
        standard_error: Monte Carlo error of `log_p`.
        bias: its estimated bias, the log of a mean being low.
        reliable: share of the training rows whose weights may be believed, see `evidence.Estimate`.
        doubt: the most frequent reason why others may not, or "".
        valid_log_p: log p(x) of the validation rows after the epoch, by the same engine; empty without such rows.
        valid_standard_error: Monte Carlo error of `valid_log_p`.
        valid_bias: its estimated bias.
        valid_reliable: share of the validation rows whose weights may be believed.
        evaluations: passes through the decoder a training row, forwards or backwards, for one particle, in both steps.
        learning_rate: of the first parameter group.
        seconds: wall-clock time since the start, resumed runs added up.
        stopped: why the run ended before its last epoch, or "".
    """

    epoch: list[int] = field(default_factory=list)
    log_p: list[float] = field(default_factory=list)
    standard_error: list[float] = field(default_factory=list)
    bias: list[float] = field(default_factory=list)
    reliable: list[float] = field(default_factory=list)
    doubt: list[str] = field(default_factory=list)
    valid_log_p: list[float] = field(default_factory=list)
    valid_standard_error: list[float] = field(default_factory=list)
    valid_bias: list[float] = field(default_factory=list)
    valid_reliable: list[float] = field(default_factory=list)
    evaluations: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    stopped: str = ""

    def note(self, sums: Sums, valid: Sums | None, learning_rate: float) -> None:
        """One more epoch, but for its time."""
        self.epoch.append(len(self.epoch) + 1)
        self.evaluations.append(sums.evaluations / sums.rows)
        self.learning_rate.append(learning_rate)
        self.doubt.append(max(sums.reasons, key=sums.reasons.__getitem__, default=""))
        for prefix, seen in (("", sums), ("valid_", valid)):
            if seen is not None:
                getattr(self, f"{prefix}log_p").append(seen.mean)
                getattr(self, f"{prefix}standard_error").append(seen.standard_error)
                getattr(self, f"{prefix}bias").append(seen.bias / seen.valued if seen.valued else math.nan)
                getattr(self, f"{prefix}reliable").append(seen.reliable / seen.rows)

    def __len__(self) -> int:
        """Number of epochs."""
        return len(self.epoch)

    def __repr__(self) -> str:
        """The last epoch in a line."""
        if not self.epoch:
            return "EMHistory: no epoch yet"
        told = f"log p(x) {self.log_p[-1]:.3f} ± {self.standard_error[-1]:.2g}"
        if self.valid_log_p:
            told += f", validation {self.valid_log_p[-1]:.3f} ± {self.valid_standard_error[-1]:.2g}"
        why = f"; {self.stopped}" if self.stopped else ""
        share = f"{100.0 * self.reliable[-1]:.0f} % of rows reliable"
        share += f" (others mostly: {self.doubt[-1]})" if self.doubt[-1] else ""
        return f"epoch {self.epoch[-1]}: {told} nats a row, {share}, {self.seconds[-1]:.1f} s{why}"

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, for JSON."""
        return asdict(self)

    def plot(self, ax: Axes | None = None) -> Axes:
        """The learning curve: log p(x) of a mean row, in nats, against the epoch; bars of two standard errors.

        The vertical axis leaves out the first steep part: it begins at the worst of the last nine tenths of the epochs.

        Args:
            ax: where to draw; None makes a figure.

        Returns:
            the Axes.

        Raises:
            ValueError: no epoch.
        """
        ax = over_epochs(ax, self.epoch, "log p(x) (nats per row)", "Monte Carlo EM")
        curves = [(self.log_p, self.standard_error, BLUE, "-", "o", "training, while it moves")]
        if self.valid_log_p:
            curves.append((self.valid_log_p, self.valid_standard_error, VERMILION, "--", "s", "validation"))
        ends: list[list[float]] = []
        for values, errors, colour, line, marker, label in curves:
            bars = [2.0 * error for error in errors]
            mark = marker if len(self) <= FEW else ""
            ax.errorbar(self.epoch, values, yerr=bars, color=colour, linestyle=line, marker=mark, label=label)
            ends += [values, *([v + sign * bar for v, bar in zip(values, bars, strict=True)] for sign in (-1.0, 1.0))]
        leave_out_the_start(ax, ends)
        ax.legend(frameon=False)
        return ax
