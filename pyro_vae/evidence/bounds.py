"""Two-sided bounds of log p(x): a sandwich, on data simulated from the model and on real data.

The log of an unbiased estimate of p(x) lies below log p(x) in expectation (Jensen). From above there are two ways.

* Data simulated from the model come with the latents they were made from, and these are a draw of the posterior. Put
  among K - 1 ordinary draws (for annealing: run backwards), it makes the density of all of them that of the ordinary ones
  times the mean weight over p(x), and the expected log of the mean weight lies above log p(x) (Grosse, Ghahramani & Adams
  2015, arXiv:1511.02543; Wu et al. 2017, arXiv:1611.04273). It knows every mode; of other rows it says nothing.
* On real data nobody hands out posterior draws. The bound E[Z-hat log Z-hat] / p(x) of the same estimator is estimated
  without bias by coupled chains, see `coupling`. A mode that no run visits is beyond both of its sides.

Both sides are bounds in expectation; each comes with the standard error of what was computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_vae.evidence import weights
from pyro_vae.evidence.coupling import coupled
from pyro_vae.memory import BUDGET, block_rows
from pyro_vae.parameters import judging
from pyro_vae.posterior.engine import Engine, Sampler
from pyro_vae.posterior.local import laplace
from pyro_vae.program import Program
from pyro_vae.rows import Data, Rows, as_rows, even_blocks, positive, probe, take
from pyro_vae.seeds import derive

if TYPE_CHECKING:
    import pandas as pd

SIMULATED, REAL = "simulated", "real"
COVERS = {
    SIMULATED: "both sides know every mode of these rows; nothing is said of rows unlike those the model draws",
    REAL: "a mode that no run has visited is beyond both sides",
}

REPLICATES, RUNS, MOST_RUNS = 6, 6, 96
"""Of coupled chains: how many pairs a row, runs of each at first, and at most."""


@dataclass(frozen=True, repr=False)
class Sandwich:
    """A lower and an upper bound of log p(x) for each row, in nats.

    Attributes:
        x: the rows: simulated, or as given (a tensor, or a tuple of them).
        lower: at most log p(x) in expectation, (N,), float64.
        upper: at least log p(x) in expectation, (N,), float64; infinite where coupled chains did not meet.
        lower_standard_error: Monte Carlo error of `lower`, (N,).
        upper_standard_error: Monte Carlo error of `upper`, (N,).
        kind: "simulated" or "real".
        engine: what drew.
    """

    x: Tensor | Rows
    lower: Tensor
    upper: Tensor
    lower_standard_error: Tensor
    upper_standard_error: Tensor
    kind: str
    engine: str

    def __len__(self) -> int:
        """N."""
        return len(self.lower)

    @property
    def covers(self) -> str:
        """What the bounds do not cover."""
        return COVERS[self.kind]

    @property
    def width(self) -> Tensor:
        """upper - lower, (N,); its expectation is not negative, its value may be, by chance."""
        return self.upper - self.lower

    @property
    def mean_width(self) -> float:
        """Mean of `width` over the rows that have both sides, nats."""
        return float(self.width[self._both].mean())

    @property
    def mean_width_standard_error(self) -> float:
        """Of `mean_width`, from the scatter of the rows, which are independent."""
        width = self.width[self._both]
        return float(width.std() / math.sqrt(len(width))) if len(width) > 1 else math.nan

    @property
    def median_width(self) -> float:
        """Median of `width` over the rows that have both sides, nats: one row without overlap may decide the mean."""
        return float(self.width[self._both].quantile(0.5)) if bool(self._both.any()) else math.nan

    @property
    def _both(self) -> Tensor:
        return torch.isfinite(self.width)

    def to_dataframe(self) -> pd.DataFrame:
        """One line a row: row, lower, upper and their standard errors."""
        import pandas as pd

        names = ("lower", "upper", "lower_standard_error", "upper_standard_error")
        frame = pd.DataFrame({name: getattr(self, name).cpu().numpy() for name in names})
        frame.insert(0, "row", range(len(self)))
        return frame

    def __repr__(self) -> str:
        """Both means, the width, and what is not covered."""
        both = self._both
        lower, upper = float(self.lower[both].mean()), float(self.upper[both].mean())
        lines = [
            f"log p(x) between {lower:.4f} and {upper:.4f} nats a row ({self.kind} data, {len(self)} rows, {self.engine})",
            f"  mean width {self.mean_width:.4f}"
            + (f" +- {self.mean_width_standard_error:.2g}" if int(both.sum()) > 1 else "")
            + (
                f", median {self.median_width:.4f}, largest {float(self.width[both].max()):.3f}" if bool(both.any()) else ""
            ),
        ]
        if missing := len(self) - int(both.sum()):
            lines.append(f"  WARNING: {missing} rows lack a side and are in none of these numbers")
        return "\n".join([*lines, f"  {self.covers}"])


def sandwich(
    program: Program,
    x: Data | None = None,
    *,
    method: Engine = laplace,
    num_simulated: int | None = None,
    num_particles: int | None = None,
    like: Data | None = None,
    seed: int = 0,
    memory: int = BUDGET,
) -> Sandwich:
    """A lower and an upper bound of log p(x) for each row.

    Args:
        program: model and guide.
        x: real rows, (N, ...), or None for rows simulated from the model.
        method: an engine, e.g. `posterior.laplace`, `posterior.annealed`, `posterior.Laplace(num_starts=16)`.
        num_simulated: N where `x` is None; None for 200.
        num_particles: K of each estimate; None for 500 on simulated data, and for 100 a run on real data.
        like: rows with the shapes to simulate and with whatever the model is conditioned on, repeated as needed; a `VAE`
            needs none.
        seed: of everything.
        memory: byte budget.

    Returns:
        the bounds, each in expectation.

    Raises:
        ValueError: arguments that do not go together, a program that does not fit, rows it cannot model.
    """
    if not isinstance(method, Engine):
        raise ValueError(f"method={method!r} is no engine: give pv.posterior.laplace, annealed, from_guide or from_prior.")
    if x is not None and (num_simulated is not None or like is not None):
        raise ValueError(
            "x was given along with num_simulated or like, which are for simulated rows: leave x out, or these."
        )
    if x is None:
        count = 200 if num_simulated is None else num_simulated
        positive(num_simulated=count)
        shapes = program.template(count) if like is None else probe(as_rows(like, "like"), count)
        rows, exact = program.simulate(shapes, seed=derive(seed, 0))
        program.check(rows)
    else:
        rows, exact = as_rows(x), None
    count = (500 if x is None else 100) if num_particles is None else num_particles
    positive(num_particles=count, memory=memory)
    good, _ = program.usable_rows(rows)
    index = good.nonzero().flatten()
    columns = torch.full((4, len(good)), torch.nan, dtype=torch.float64, device=good.device)
    size = block_rows(count, program.log_joint(take(rows, index[:1])).dim)
    with judging(program.modules_found()):
        for block, part in enumerate(even_blocks(index, size)):
            key = derive(seed, 1, block)
            sampler = _ready(method, program, take(rows, part), key, memory)
            if exact is None:
                columns[:, part] = _from_coupled_chains(sampler, count, key)
            else:
                columns[:, part] = _from_exact_draws(sampler, {k: v[part] for k, v in exact.items()}, count, key)
    kind = SIMULATED if exact is not None else REAL
    lower, upper, lower_error, upper_error = columns
    return Sandwich(rows if len(rows) > 1 else rows[0], lower, upper, lower_error, upper_error, kind, method.name)


def _ready(method: Engine, program: Program, rows: Rows, key: int, memory: int) -> Sampler:
    sampler = method.prepare(program, rows, seed=derive(key, 0), memory=memory)
    if method.pilot_particles:
        sampler = sampler.adapt(sampler.draw(method.pilot_particles, derive(key, 1)))
    return sampler


def _estimates(sampler: Sampler, count: int, key: int, exact: dict[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """log p-hat of K draws and its standard error, (N,) each."""
    particles = sampler.draw(count, key, exact)
    log_weights = torch.nan_to_num(particles.log_weights, nan=-torch.inf, posinf=-torch.inf)
    error = torch.hypot(weights.standard_error(log_weights, particles.strata), particles.rounding)
    return weights.log_mean_exp(log_weights), error


def _from_exact_draws(sampler: Sampler, exact: dict[str, Tensor], count: int, key: int) -> Tensor:
    """Lower, upper and their standard errors, (4, N), with a posterior draw (N, ...) for each row."""
    lower, lower_error = _estimates(sampler, count, derive(key, 2))
    upper, upper_error = _estimates(sampler, count, derive(key, 3), exact)
    return torch.stack([lower, upper, lower_error, upper_error])


def _from_coupled_chains(sampler: Sampler, count: int, key: int) -> Tensor:
    """Lower, upper and their standard errors, (4, N), from independent runs of K draws."""
    num_rows = len(sampler.cost)
    device = sampler.cost.device
    log_z = torch.empty(0, REPLICATES, num_rows, dtype=torch.float64, device=device)
    out = torch.full((4, num_rows), torch.nan, dtype=torch.float64, device=device)
    left, runs = torch.arange(num_rows, device=device), RUNS
    while len(left):
        new = [_estimates(sampler, count, derive(key, 4, t))[0] for t in range(len(log_z) * REPLICATES, runs * REPLICATES)]
        log_z = torch.cat([log_z, torch.stack(new).unflatten(0, (-1, REPLICATES))])
        generator = torch.Generator(device=device).manual_seed(derive(key, 5))
        uniform = torch.rand(MOST_RUNS, REPLICATES, num_rows, generator=generator, dtype=torch.float64, device=device)
        chains = coupled(log_z, uniform[: len(log_z), :, left].log(), RUNS - 1)
        met, last = chains.met.all(0), 2 * runs > MOST_RUNS
        done = met | last
        first = log_z[:RUNS].flatten(0, 1)
        lower, upper = weights.log_mean_exp(first), chains.value.mean(0)
        columns = torch.stack([lower, upper, weights.standard_error(first), chains.value.std(0) / math.sqrt(REPLICATES)])
        # No bound is better than one that was cut off where the chains had not met.
        columns[1, ~met], columns[3, ~met] = torch.inf, torch.inf
        out[:, left[done]] = columns[:, done]
        again = (~done).nonzero().flatten()
        if len(again) == 0:
            break
        left, sampler, log_z, runs = left[again], sampler.take(again), log_z[..., again], 2 * runs
    return out
