"""Several programs on the same rows, by log p(x): did the swap help?

The rows are paired: what counts is the mean over rows of log p_a(x) - log p_b(x), whose error is much smaller than that of
either mean. Two errors are told apart, see `Difference`: that of the draws, which more particles or a smaller target make
smaller, and that of the rows, which only more rows do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from rich import box as boxes
from rich.table import Table
from rich.text import Text
from torch import Tensor

from pyro_vae.evidence.estimate import Estimate
from pyro_vae.report.difference import Difference
from pyro_vae.report.stacking import stacking_weights
from pyro_vae.report.tables import text_of
from pyro_vae.report.versions import before_arviz_one

if TYPE_CHECKING:
    import pandas as pd

UNSEEN = (
    "Not seen: whether some of these rows were used for fitting or choosing; give rows that were not.",
    "Not in the errors: what another training seed would change; fit each program with several seeds.",
)
UNIT = "Not seen: whether every program was fitted to x in the unit that these rows have; a density depends on it."
LEVELS = "The bits depend on how x was rounded: those of other work compare only if its x has the same levels."


@dataclass(frozen=True, repr=False)
class Comparison:
    """log p(x) of several programs on the same N rows, in nats.

    Attributes:
        estimates: by name, in the order in which the programs were given; each has N rows.
        remarks: what was seen besides, one sentence each.
    """

    estimates: dict[str, Estimate]
    remarks: tuple[str, ...] = ()

    def __len__(self) -> int:
        """N."""
        return len(next(iter(self.estimates.values())))

    @property
    def log_p(self) -> Tensor:
        """log p(x) of each row in each program, (N, M), in the order of `estimates`."""
        device = next(iter(self.estimates.values())).log_p.device
        return torch.stack([estimate.log_p.to(device) for estimate in self.estimates.values()], -1)

    @property
    def common(self) -> Tensor:
        """Which rows have a number, -inf included, in every program that has any, boolean (N,): all means are theirs."""
        missing = self.log_p.isnan()
        return ~missing[:, ~missing.all(0)].any(-1) & ~missing.all(-1)

    @cached_property
    def ranking(self) -> tuple[str, ...]:
        """Names by the mean of log p(x) over the common rows, best first.

        A program that gives rows no probability has the mean -inf: of several such, the one with fewer of these rows, then
        with the higher mean of the others. Programs without a number are last.
        """
        values = self.log_p[self.common]
        keys = {}
        for name, column in zip(self.estimates, values.unbind(-1), strict=True):
            possible = column[column.isfinite()]
            mean = float(possible.mean()) if len(possible) else -math.inf
            keys[name] = (bool(column.isnan().any()), int((column == -torch.inf).sum()), -mean)
        return tuple(sorted(keys, key=keys.__getitem__))

    @property
    def best(self) -> str:
        """The name that is ranked first."""
        return self.ranking[0]

    @property
    def discrete(self) -> bool:
        """Whether x is discrete, so that there are bits per dimension."""
        return any(estimate.discrete for estimate in self.estimates.values())

    @cached_property
    def weights(self) -> dict[str, float]:
        """Stacking weights by name, see `stacking_weights`; NaN for a program without a number."""
        values = self.log_p[self.common]
        known = ~self.log_p.isnan().all(0)
        weights = torch.full_like(known, torch.nan, dtype=torch.float64)
        if bool(known.any()):
            weights[known] = stacking_weights(values[:, known])
        return dict(zip(self.estimates, weights.tolist(), strict=True))

    def difference(self, first: str, second: str) -> Difference:
        """log p(x) of `first` minus that of `second`, row by row, with both errors of its mean.

        Raises:
            ValueError: a name that no program has.
        """
        for name in (first, second):
            if name not in self.estimates:
                raise ValueError(
                    f"{name!r} is no program of this comparison: give two of {', '.join(map(repr, self.estimates))}."
                )
        return Difference.of(first, self.estimates[first], second, self.estimates[second])

    def to_best(self, name: str) -> Difference:
        """`difference` of a program to the best on the common rows."""
        return self.difference(name, self.best).where(self.common)

    def to_dataframe(self) -> pd.DataFrame:
        """One line a program, best first; means over the common rows, nats a row.

        Columns: rank (from 1), name, log_p, standard_error (Monte Carlo), data_standard_error, bias, difference (to the
        best), difference_standard_error (Monte Carlo), difference_data_standard_error, weight (stacking), rows (with a
        number), paired (common rows that are possible in it and in the best), impossible, reliable; of discrete data also
        bits_per_dimension.
        A program that gives common rows no probability has the log_p and the difference -inf; `to_best(name)` has the
        difference on the others.
        """
        import pandas as pd

        weights, lines = self.weights, []
        for rank, name in enumerate(self.ranking, 1):
            whole, difference = self.estimates[name], self.to_best(name)
            part = whole.take(self.common.to(whole.log_p.device).nonzero().flatten())
            far = difference.num_impossible > 0
            line = {
                "rank": rank,
                "name": name,
                "log_p": part.mean,
                "standard_error": part.mean_standard_error,
                "data_standard_error": part.data_standard_error,
                "bias": float(part.bias.mean()),
                "difference": part.mean - self._mean_of_best if far else difference.mean,
                "difference_standard_error": math.nan if far else difference.mean_standard_error,
                "difference_data_standard_error": math.nan if far else difference.data_standard_error,
                "weight": weights[name],
                "rows": int((~whole.log_p.isnan()).sum()),
                "paired": difference.num_paired,
                "impossible": int((whole.log_p == -torch.inf).sum()),
                "reliable": int(whole.reliable.sum()),
            }
            if self.discrete:
                line["bits_per_dimension"] = part.mean_bits_per_dimension if part.discrete else math.nan
            lines.append(line)
        return pd.DataFrame(lines)

    @property
    def _mean_of_best(self) -> float:
        values: Tensor = self.log_p[self.common][:, list(self.estimates).index(self.best)]
        return float(values.mean())

    def to_arviz(self) -> pd.DataFrame:
        """The table that ArviZ's `compare` makes and its `plot_compare` draws, index the names, best first.

        elpd is the sum of log p(x) over the common rows; they were not used for fitting, so that there is no effective
        number of parameters p (NaN). Errors are those of the rows. The installed ArviZ decides on names and signs: before
        1.0 elpd and p are called elpd_loo and p_loo (nothing was left out here), and elpd_diff is the best minus the rest.
        """
        frame = self.to_dataframe().set_index("name")
        count, old = int(self.common.sum()), before_arviz_one()
        best = frame.index == self.best
        table = frame.assign(
            rank=frame["rank"] - 1,
            elpd=frame["log_p"] * count,
            p=math.nan,
            elpd_diff=frame["difference"].where(~best, 0.0) * count,
            se=frame["data_standard_error"] * count,
            dse=frame["difference_data_standard_error"].where(~best, 0.0) * count,
            warning=frame["reliable"] < len(self),
            scale="log",
        )[["rank", "elpd", "p", "elpd_diff", "weight", "se", "dse", "warning", "scale"]]
        table.index.name = None
        if old:
            table["elpd_diff"] = 0.0 - table["elpd_diff"]
            table = table.rename(columns={"elpd": "elpd_loo", "p": "p_loo"})
        return table

    @property
    def notes(self) -> tuple[str, ...]:
        """What the table leaves out, one sentence each: rows without a number, doubts, and what cannot be seen."""
        told = [*self.remarks]
        for name in self.ranking:
            told += self._doubts(name)
        others = {name: self.to_best(name) for name in self.ranking[1:]}
        if near := [repr(name) for name, one in others.items() if _within(one)]:
            told.append(f"Within 1.96 data errors of the best, {self.best!r}: {', '.join(near)}.")
        if noisy := [repr(n) for n, one in others.items() if one.mean_standard_error > 0.5 * one.data_standard_error]:
            told.append(f"Much of the data error comes from the draws, which a smaller target reduces: {', '.join(noisy)}.")
        return (*told, LEVELS if self.discrete else UNIT, *UNSEEN)

    def _doubts(self, name: str) -> list[str]:
        """What speaks against the numbers of one program."""
        estimate, told = self.estimates[name], []
        missing, impossible = estimate.log_p.isnan(), estimate.log_p == -torch.inf
        if count := int(missing.sum()):
            row = int(missing.nonzero()[0])
            told.append(
                f"{name!r} has no number for {count} of {len(self)} rows, first row {row} ({estimate.reasons[row]}): "
                + ("it is not compared." if count == len(self) else "they are in no mean, of any program.")
            )
        difference = self.to_best(name)
        if count := int(impossible.sum()):
            row = int(impossible.nonzero()[0])
            told.append(
                f"{name!r} gives no probability to {count} of {len(self)} rows, first row {row}: its mean is -inf"
                f"{_on_the_others(difference)}."
            )
        unsure = ~estimate.reliable & ~missing & ~impossible
        if count := int(unsure.sum()):
            row, sure = int(unsure.nonzero()[0]), difference.where(difference.reliable)
            told.append(
                f"{name!r} is not reliable on {count} of {len(self)} rows, first row {row} ({estimate.reasons[row]})"
                f"{'' if name == self.best else _on_the_others(sure, 'that are reliable in both')}."
            )
        return told

    def __repr__(self) -> str:
        """The ranked table and the notes."""
        frame = self.to_dataframe()
        table = Table(box=boxes.SIMPLE_HEAD, padding=(0, 1))
        bits = ("bits/dim",) if self.discrete else ()
        heads = ("", "program", "log p(x)", *bits, "to best", "data error", "Monte Carlo", "weight", "reliable")
        for head in heads:
            table.add_column(
                head, justify="left" if head == "program" else "right", no_wrap=head != "program", overflow="fold"
            )
        for line in frame.to_dict("records"):
            table.add_row(
                f"{line['rank']}",
                Text(line["name"]),
                f"{line['log_p']:.4f}",
                *((f"{line['bits_per_dimension']:.4f}",) if self.discrete else ()),
                *_told(line, best=line["name"] == self.best),
                f"{line['weight']:.2f}",
                f"{line['reliable']:,} of {len(self):,}",
            )
        head = f"log p(x) in nats a row, mean of {int(self.common.sum())} rows; differences are paired, row by row"
        return "\n".join([head, text_of(table), *(f"* {note}" for note in self.notes)])


def _told(line: dict[str, Any], *, best: bool) -> tuple[str, ...]:
    """Difference to the best, its data error and its Monte Carlo error, as the table has them."""
    if best:
        return "", "", ""
    data, draws = line["difference_data_standard_error"], line["difference_standard_error"]
    return f"{line['difference']:.4f}", *("" if math.isnan(error) else f"{error:.2g}" for error in (data, draws))


def _on_the_others(difference: Difference, which: str = "that are possible in both") -> str:
    """The difference to the best on some of the rows; nothing where there are none, or the program is the best."""
    if difference.first == difference.second or difference.num_paired == 0:
        return ""
    return (
        f"; on the {difference.num_paired} rows {which} its difference to {difference.second!r} is {difference.mean:.4g} "
        f"(data error {difference.data_standard_error:.2g})"
    )


def _within(difference: Difference) -> bool:
    return difference.num_impossible == 0 and abs(difference.mean) < 1.96 * difference.data_standard_error
