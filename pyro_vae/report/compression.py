"""The rate-distortion curve of a model, from one annealed run, after Huang, Makhzani, Cao & Grosse 2020 (arXiv:2008.06653).

Send x by sending z: an encoder q(z | x) costs the rate KL(q || p(z)), and leaves the distortion E_q[-log p(x | z)]; both in
nats. For each b the best trade of one for the other is made by

    q_b(z | x) = p(z) p(x | z)^b / Z_b,     rate R = -b D - log Z_b,     slope dR/dD = -b.

These are the bridges that annealed importance sampling (AIS) from the prior passes on its way from b = 0, where nothing is
sent, to b = 1, the posterior, where R + D = -log p(x). K chains with weights w_k give at each b

    D-hat = sum_k w_k (-log p(x | z_k)) / sum_k w_k,     R-hat = -b D-hat - log (1/K) sum_k w_k.

What is bounded. Let q_AIS be the encoder that runs the chains and sends one of them with probability w_k / sum w. D-hat is
an unbiased estimate of its distortion. What it sends and what it throws away have together a divergence from the prior of
exactly E[R-hat], and throwing away makes a divergence smaller: E[R-hat] is at least its rate. So the expected point
(D-hat, R-hat) can be reached by an encoder: it lies on the model's curve or above, never below. Too few temperatures or
chains move it along (D-hat is too large where chains lag behind) and up. Where D is exact, R-hat is too high by the Jensen
gap of log Z_b alone. At b = 1 R-hat + D-hat = -log p-hat(x), at least -log p(x) in expectation, however bad the chains are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_vae.evidence import weights
from pyro_vae.memory import BUDGET, block_rows
from pyro_vae.parameters import judging
from pyro_vae.posterior.annealing import Annealed
from pyro_vae.posterior.hmc import Points
from pyro_vae.posterior.starts import at_prior
from pyro_vae.program import Program
from pyro_vae.rows import Data, Rows, as_rows, even_blocks, positive, take
from pyro_vae.seeds import Seed, derive

if TYPE_CHECKING:
    import pandas as pd

LONELY = 1.5
"""Effective chains: below this one chain stands for all of a row."""


@dataclass(frozen=True, repr=False)
class RateDistortion:
    """Distortion and rate of N rows at T temperatures; every tensor is float64, distortions and rates are in nats.

    Attributes:
        beta: b, (T,), ascending, the last is 1.
        distortion: D-hat, (T, N); NaN, as all else, where the row cannot be judged.
        distortion_standard_error: its Monte Carlo error, (T, N).
        rate: R-hat, (T, N), at least the rate of what was run, in expectation.
        rate_standard_error: its Monte Carlo error, (T, N); D-hat and R-hat come from the same chains.
        ess: effective number of chains, (T, N).
        num_chains: K.
    """

    beta: Tensor
    distortion: Tensor
    distortion_standard_error: Tensor
    rate: Tensor
    rate_standard_error: Tensor
    ess: Tensor
    num_chains: int

    def __len__(self) -> int:
        """T."""
        return len(self.beta)

    @property
    def known(self) -> Tensor:
        """Which rows have a number everywhere, boolean (N,)."""
        return torch.isfinite(self.rate + self.distortion).all(0)

    def mean(self, name: str) -> Tensor:
        """Mean of "distortion", "rate" or "ess" over the `known` rows, (T,)."""
        values: Tensor = getattr(self, name)[:, self.known]
        return values.mean(1)

    def mean_standard_error(self, name: str) -> Tensor:
        """Monte Carlo error of the mean of "distortion" or "rate", (T,): rows are independent."""
        errors: Tensor = getattr(self, f"{name}_standard_error")[:, self.known]
        return errors.square().sum(1).sqrt() / errors.shape[1]

    def data_standard_error(self, name: str) -> Tensor:
        """Error of the mean as one for other rows of the same kind, (T,): sd over the rows / sqrt(N); NaN for one row."""
        values: Tensor = getattr(self, name)[:, self.known]
        count = values.shape[1]
        return values.std(1) / math.sqrt(count) if count > 1 else torch.full_like(self.beta, torch.nan)

    def to_dataframe(self) -> pd.DataFrame:
        """One line a temperature: beta; means of distortion and rate with both errors; mean effective chains."""
        import pandas as pd

        columns = {"beta": self.beta}
        for name in ("distortion", "rate"):
            columns[name] = self.mean(name)
            columns[f"{name}_standard_error"] = self.mean_standard_error(name)
            columns[f"{name}_data_error"] = self.data_standard_error(name)
        columns["ess"] = self.mean("ess")
        return pd.DataFrame({name: column.cpu().numpy() for name, column in columns.items()})

    def __repr__(self) -> str:
        """Some points of the curve, what b = 1 says of log p(x), and how much the chains may be believed."""
        known, ess = self.known, self.ess[:, self.known]
        sizes = f"{int(known.sum())} rows, {len(self)} temperatures, {self.num_chains} chains"
        lines = [f"rate-distortion curve, nats a row ({sizes})"]
        for wanted in (0.01, 0.1, 1.0):
            at = int((self.beta - wanted).abs().argmin())
            told = [
                f"{name} {float(self.mean(name)[at]):.4g} (errors: chains "
                f"{float(self.mean_standard_error(name)[at]):.2g}, rows {float(self.data_standard_error(name)[at]):.2g})"
                for name in ("rate", "distortion")
            ]
            lines.append(f"  b = {float(self.beta[at]):.2g}: {', '.join(told)}")
        total = float(self.mean("rate")[-1] + self.mean("distortion")[-1])
        lines.append(f"  R + D at b = 1: {total:.4f}, in expectation at least -log p(x)")
        lines.append(f"  effective chains: median {float(ess.median()):.1f}, least {float(ess.min()):.1f}")
        if lonely := int((ess < LONELY).any(0).sum()):
            lines.append(f"  WARNING: one chain stands for all in {lonely} rows: give more temperatures")
        if missing := len(known) - int(known.sum()):
            lines.append(f"  WARNING: {missing} rows have no value and are in none of these numbers")
        return "\n".join(lines)


def rate_distortion(
    program: Program,
    x: Data,
    *,
    num_chains: int = 16,
    num_temperatures: int = 256,
    seed: Seed = 0,
    memory: int = BUDGET,
) -> RateDistortion:
    """The rate-distortion curve of the model's decoder and prior on the rows x; the guide has no part in it.

    Temperatures are b_t = (t / T)^3, dense at the prior, and the same for all rows. A chain costs some 4 T decoder
    evaluations a row, and so does each of the 16 of a pilot.

    Args:
        program: a `VAE` or any `Program`.
        x: rows, (N, ...), or a tuple of tensors with N rows each.
        num_chains: K, at least 2.
        num_temperatures: T.
        seed: of all draws.
        memory: byte budget of the evaluations.

    Returns:
        the curve: each point can be reached in expectation, see the module. Rows that cannot be judged have NaN.

    Raises:
        ValueError: the program does not fit (see `check`), no row of `x` can be judged, a `VAE` is given rows it cannot
            model, fewer than two chains.
    """
    positive(num_chains=num_chains, num_temperatures=num_temperatures, memory=memory)
    if num_chains < 2:
        raise ValueError(f"num_chains={num_chains} leaves no standard error: give at least 2.")
    rows = as_rows(x)
    good, reasons = program.usable_rows(rows)
    if not bool(good.any()):
        raise ValueError(f"None of the {len(good)} rows of x can be judged, the first because of {reasons[0]}.")
    index = good.nonzero().flatten()
    # The first number of temperatures is the last one, so that all rows have the same.
    engine = Annealed(start=at_prior, most_steps=num_temperatures, first_steps=num_temperatures)
    columns = torch.full((5, num_temperatures, len(good)), torch.nan, dtype=torch.float64, device=good.device)
    size = block_rows(num_chains, program.log_joint(take(rows, index[:1])).dim)
    with judging(program.modules_found()):
        for block, part in enumerate(even_blocks(index, size)):
            beta, columns[..., part] = _curve(engine, program, take(rows, part), num_chains, derive(seed, block), memory)
    distortion, distortion_error, rate, rate_error, ess = columns
    return RateDistortion(beta.to(good.device), distortion, distortion_error, rate, rate_error, ess, num_chains)


def _curve(
    engine: Annealed, program: Program, rows: Rows, num_chains: int, seed: int, memory: int
) -> tuple[Tensor, Tensor]:
    """b, (T,), and what `_point` says at each, (5, T, n), of one run."""
    betas: list[float] = []
    found: list[Tensor] = []

    def observe(beta: float, points: Points, log_weights: Tensor) -> None:
        betas.append(beta)
        # With the prior as the start, log p(x, u) - log r(u) is log p(x | z), the Jacobian being in both.
        found.append(_point(beta, points.log_r - points.log_p, log_weights))

    engine.prepare(program, rows, seed=derive(seed, 0), memory=memory).draw(num_chains, derive(seed, 1), observer=observe)
    return torch.tensor(betas, dtype=torch.float64), torch.stack(found, 1)


def _point(beta: float, loss: Tensor, log_weights: Tensor) -> Tensor:
    """D-hat, its error, R-hat, its error and the effective chains of n rows, (5, n).

    Args:
        beta: b.
        loss: -log p(x | z_k), (K, n).
        log_weights: log w_k so far, (K, n).

    The errors are those of the delta method: chain k moves D-hat by W_k (loss_k - D-hat), with W its share of the weights,
    and log Z_b by W_k - 1 / K. Both moves of a chain go together, so R-hat may be more certain than either.
    """
    count = len(loss)
    log_weights = torch.nan_to_num(log_weights, nan=-torch.inf, posinf=-torch.inf)
    share = torch.softmax(log_weights, 0)
    distortion = torch.where(share > 0.0, share * loss, 0.0).sum(0)
    rate = -beta * distortion - weights.log_mean_exp(log_weights)
    moves = torch.where(share > 0.0, share * (loss - distortion), 0.0)
    few = count / (count - 1)
    distortion_error = (few * moves.square().sum(0)).sqrt()
    rate_error = (few * (beta * moves + share - 1.0 / count).square().sum(0)).sqrt()
    return torch.stack([distortion, distortion_error, rate, rate_error, weights.ess(log_weights)])
