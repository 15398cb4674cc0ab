"""Posterior predictive checks: does the model, told the data, draw data like them?

For M draws z ~ q(z | x), or of an engine's posterior, all N rows are drawn again, x_rep ~ p(x | z), and a statistic T of
the replicated rows is compared with T(x) (Rubin 1984; Gelman, Meng & Stern 1996, sec. 2.3). The latents have seen the very
rows that they are to predict, so under a right model two-sided p-values are not uniform but crowd towards 1: a small one
says that the model does not draw such data, a large one says little. With the guide's draws a small one may be the guide's
fault instead, which `calibration` judges on data where the model is right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_vae.evidence.observed import observed_sites
from pyro_vae.layouts import COPIED, Values
from pyro_vae.memory import BUDGET
from pyro_vae.posterior.engine import Engine
from pyro_vae.program import Program
from pyro_vae.report.posterior_draws import by_guide, by_particles
from pyro_vae.report.predictive import draw_observed, observed_values
from pyro_vae.rows import Data, Rows, as_rows, positive
from pyro_vae.seeds import Seed, derive

if TYPE_CHECKING:
    import pandas as pd

Statistic = Callable[[Tensor], Tensor]
"""Rows (N, *event_shape) -> one number of the whole data, (), or one of each row, (N,)."""

LATENTS, REPLICATED = 0, 1
"""Sub-streams of the seed."""


def smallest(x: Tensor) -> Tensor:
    """Of all numbers that are not NaN, ()."""
    return x[~x.isnan()].min()


def largest(x: Tensor) -> Tensor:
    """Of all numbers that are not NaN, ()."""
    return x[~x.isnan()].max()


def mean(x: Tensor) -> Tensor:
    """Of all numbers that are not NaN, ()."""
    return x.nanmean()


def deviation(x: Tensor) -> Tensor:
    """Standard deviation of all numbers that are not NaN, ()."""
    return x[~x.isnan()].std()


STATISTICS: dict[str, Statistic] = {
    "mean": mean,
    "standard deviation": deviation,
    "minimum": smallest,
    "maximum": largest,
}
"""Of all numbers of the data together, unless told."""


@dataclass(frozen=True, repr=False)
class PosteriorPredictive:
    """Statistics of the data and of M replications of them.

    Attributes:
        observed: T(x) by name, () or (N,), float64.
        replicated: T(x_rep) by name, (M,) or (M, N), float64.
        num_rows: N.
        site: what the program observes there.
        engine: what drew the latents.
    """

    observed: Mapping[str, Tensor]
    replicated: Mapping[str, Tensor]
    num_rows: int
    site: str
    engine: str

    @property
    def num_draws(self) -> int:
        """M."""
        return len(next(iter(self.replicated.values())))

    def p_value(self, name: str) -> Tensor:
        """Two-sided Bayesian p-value of a statistic, () or (N,): min(1, 2 (1 + min(n_low, n_high)) / (M + 1)).

        n_low and n_high count the replications that are at most, and at least, what was observed; NaN where that is NaN.
        """
        observed, replicated = self.observed[name], self.replicated[name]
        low, high = (replicated <= observed).sum(0), (replicated >= observed).sum(0)
        p = (2.0 * (1.0 + torch.minimum(low, high).double()) / (self.num_draws + 1.0)).clamp_max(1.0)
        return torch.where(observed.isnan(), torch.nan, p)

    def to_dataframe(self) -> pd.DataFrame:
        """One line a statistic and, of those by row, a row: statistic, row (-1 for all), observed, mean, sd, p_value."""
        import pandas as pd

        lines = []
        for name, observed in self.observed.items():
            replicated = self.replicated[name]
            columns = {
                "observed": observed, "mean": replicated.mean(0), "sd": replicated.std(0), "p_value": self.p_value(name)
            }  # fmt: skip
            frame = pd.DataFrame({key: value.reshape(-1).cpu().numpy() for key, value in columns.items()})
            frame.insert(0, "row", range(len(frame)) if observed.dim() else -1)
            frame.insert(0, "statistic", name)
            lines.append(frame)
        return pd.concat(lines, ignore_index=True)

    def __repr__(self) -> str:
        """The first eight statistics: observed, replicated, p-value."""
        lines = [
            f"posterior predictive check of {self.site!r}: {self.num_draws} replications of {self.num_rows} rows, "
            f"latents by {self.engine}"
        ]
        for name, observed in list(self.observed.items())[:8]:
            replicated, p = self.replicated[name], self.p_value(name)
            if observed.dim():
                few = int((p <= 0.05).sum())
                lines.append(f"  {name}, by row: two-sided p at most 0.05 in {few} of {int((~p.isnan()).sum())} rows")
                continue
            lines.append(
                f"  {name}: observed {float(observed):.4g}, replicated {float(replicated.mean()):.4g} "
                f"(sd {float(replicated.std()):.2g}), two-sided p {float(p):.2g}"
            )
        if more := len(self.observed) - 8:
            lines += [f"  and {more} more"] if more > 0 else []
        return "\n".join(lines)


def posterior_predictive(
    program: Program,
    x: Data,
    statistics: Mapping[str, Statistic] | None = None,
    *,
    site: str | None = None,
    num_draws: int = 200,
    method: Engine | None = None,
    seed: Seed = 0,
    memory: int = BUDGET,
) -> PosteriorPredictive:
    """Statistics of the data against those of data that the model draws from the latents of the same rows.

    Where a value of x is missing, NaN, it is NaN in the replications too, so that both sides see the same numbers.

    Args:
        program: a `VAE` or any `Program`.
        x: rows, (N, ...), or a tuple of tensors with N rows each.
        statistics: by name, functions of rows (N, *event_shape) that return one number, or one for each row (N,): such as
            ``{"ink": lambda x: x.mean(-1)}``. None for mean, standard deviation, minimum and maximum of all numbers.
        site: what is replicated; needed where the program observes several.
        num_draws: M.
        method: an engine, whose particles are drawn again by their weights; None for the guide's draws.
        seed: of all draws.
        memory: byte budget of the densities.

    Returns:
        T(x), T(x_rep) and p-values.

    Raises:
        ValueError: the program does not fit, a row cannot be judged, a statistic of another shape, no statistic, a site
            that the program does not observe.
        TypeError: `method` is no engine.
    """
    positive(num_draws=num_draws, memory=memory)
    statistics = STATISTICS if statistics is None else statistics
    if not statistics:
        raise ValueError("statistics is empty: give functions by name, or leave it out for mean, deviation and extremes.")
    if method is not None and not isinstance(method, Engine):
        raise TypeError(f"method={method!r} is no engine: give None for the guide, or one such as pv.posterior.laplace.")
    rows = as_rows(x)
    good, reasons = program.usable_rows(rows)
    if not bool(good.all()):
        bad = int((~good).nonzero()[0])
        raise ValueError(f"Row {bad} of x cannot be judged ({reasons[bad]}): leave it out.")
    site = _site(program, rows, site)
    if method is None:
        latents = by_guide(program, rows, num_draws, derive(seed, LATENTS), memory)
    else:
        latents = by_particles(method, program, rows, num_draws, derive(seed, LATENTS), memory)
    z = {name: value[0] for name, value in latents.z.items()}
    data = observed_values(program, rows, {name: value[0] for name, value in z.items()}, [site])[site]
    observed = {name: _number(name, statistic, data) for name, statistic in statistics.items()}
    replicated = _replicated(program, rows, z, data, site, statistics, derive(seed, REPLICATED))
    return PosteriorPredictive(observed, replicated, len(rows[0]), site, latents.method)


def _site(program: Program, rows: Rows, name: str | None) -> str:
    """The observed site to replicate."""
    names = [site.name for site in observed_sites(program, rows) if site.family != "Unit"]
    if name is None and len(names) == 1:
        return names[0]
    if name is None or name not in names:
        told = f"site={name!r} is none that the program observes" if name else "The program observes several sites"
        raise ValueError(f"{told}: give one of {', '.join(map(repr, names))}.")
    return name


def _replicated(
    program: Program, rows: Rows, z: Values, data: Tensor, site: str, statistics: Mapping[str, Statistic], seed: int
) -> dict[str, Tensor]:
    """T(x_rep) for each draw, (M,) or (M, N); so many replications at a time as shapes allow, none is kept."""
    num_draws, missing = len(next(iter(z.values()))), data.isnan()
    holes = bool(missing.any())
    step = max(1, COPIED // 4 // data.numel())
    found: dict[str, list[Tensor]] = {name: [] for name in statistics}
    for first in range(0, num_draws, step):
        part = {name: value[first : first + step] for name, value in z.items()}
        for copy in draw_observed(program, rows, part, [site], derive(seed, first))[site]:
            for name, statistic in statistics.items():
                found[name].append(_number(name, statistic, copy.masked_fill(missing, torch.nan) if holes else copy))
    return {name: torch.stack(values) for name, values in found.items()}


def _number(name: str, statistic: Statistic, data: Tensor) -> Tensor:
    value = torch.as_tensor(statistic(data)).detach().double()
    if value.shape not in ((), (len(data),)):
        raise ValueError(
            f"statistics[{name!r}] returned shape {tuple(value.shape)} of rows {tuple(data.shape)}: return one number, (), "
            f"or one for each row, ({len(data)},)."
        )
    return value
