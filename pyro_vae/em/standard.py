"""Rows in the units that EM iterates in: centred, with columns of about unit variance, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from pyro_vae.em.linear import LinearGaussian
from pyro_vae.em.steps import CompleteRows, PartialRows, Pool, State, Step, each, shared
from pyro_vae.rows import Data, as_rows, require_finite, row_blocks
from pyro_vae.warn import warn


@dataclass(frozen=True)
class Standard:
    """Rows (x - mean) / unit in float64, or what is needed of them.

    Attributes:
        x: those of which something was seen, with NaN, (n, d); None where nothing is missing.
        covariance: of complete rows, dividing by their number, (d, d); None where something is missing.
        mean: of the values seen, (d,).
        unit: (d,).
        num_rows: N, rows of which nothing was seen included.
        log_units: sum of log unit over the values seen, a row: what the log-likelihood differs by.
        dtype: of the rows as they were given.
    """

    x: Tensor | None
    covariance: Tensor | None
    mean: Tensor
    unit: Tensor
    num_rows: int
    log_units: float
    dtype: torch.dtype

    def step(self, latent_dim: int, pool: Pool, floor: float, *, expand: bool) -> Step:
        """An iteration of EM on these rows."""
        if self.covariance is not None:
            return CompleteRows(self.covariance, pool, floor, expand=expand)
        assert self.x is not None
        return PartialRows(self.x, latent_dim, pool, floor, expand=expand)

    def filled(self) -> Tensor:
        """The covariance with the mean in place of what is missing, (d, d): good enough to start from."""
        assert self.x is not None
        x = self.x.nan_to_num(0.0)
        return x.mT @ x / len(x) + 1e-3 * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)

    def state(self, initial: LinearGaussian, latent_dim: int) -> State:
        """The parameters of `initial` in these units."""
        if initial.weight.shape != (len(self.mean), latent_dim):
            raise ValueError(
                f"initial has weight {tuple(initial.weight.shape)} and here it is {(len(self.mean), latent_dim)}: give a "
                "result for the same columns and latent_dim."
            )
        weight, mean, noise = (p.detach().to(self.mean) for p in (initial.weight, initial.mean, initial.noise))
        mean = torch.zeros_like(mean) if self.covariance is not None else (mean - self.mean) / self.unit
        return State(weight / self.unit[:, None], mean, (noise / self.unit).square())

    def program(self, state: State, path: Tensor, *, scalar: bool, converged: bool = True) -> LinearGaussian:
        """The program in the units of the rows as they were given; `scalar` for one noise that all columns share."""
        noise = state.variance.sqrt() * self.unit
        seen = 1.0 if self.x is None else len(self.x) / self.num_rows
        return LinearGaussian(
            (state.weight * self.unit[:, None]).to(self.dtype),
            (state.mean * self.unit + self.mean).to(self.dtype),
            (noise[0] if scalar else noise).to(self.dtype),
            log_likelihood=path * seen - self.log_units,
            converged=converged,
        )


def standardise(x: Data, latent_dim: int, pool: Pool) -> Standard:
    """Check the rows, and put them in units of each column's deviation (`each`) or of a common one (`shared`).

    Raises:
        ValueError: see `pyro_vae.em.exact.ppca`.
    """
    rows = as_rows(x)
    if len(rows) != 1 or rows[0].dim() != 2:
        raise ValueError(
            f"x has {len(rows)} tensor(s) of shape {', '.join(str(tuple(part.shape)) for part in rows)}: give one of shape "
            "(N, d), as x.flatten(1)."
        )
    given, size = rows[0].detach(), rows[0].shape[1]
    if size < 2:
        raise ValueError(f"x has {size} column: latent variables explain what columns have in common, give at least 2.")
    if isinstance(latent_dim, bool) or not isinstance(latent_dim, Integral) or not 1 <= latent_dim < size:
        raise ValueError(
            f"latent_dim={latent_dim!r} must be a whole number from 1 to {size - 1}, one less than the {size} columns of x."
        )
    require_finite((given,), missing=True)
    missing = bool(given.isnan().any())
    something = given[~given.isnan().all(-1)] if missing else given
    if len(something) < latent_dim + 2:
        raise ValueError(
            f"x has {len(something)} rows with values and latent_dim={latent_dim} needs at least {latent_dim + 2}, or the "
            "noise would be zero: use a smaller latent_dim or more rows."
        )
    mean, variance, counts = _moments(something)
    _refuse_constant(mean, variance, counts, pool)
    unit = (variance if pool is each else variance.mean().expand_as(variance)).sqrt()
    log_units = float((unit.log() * counts).sum() / len(given))
    if missing:
        return Standard((something.double() - mean) / unit, None, mean, unit, len(given), log_units, given.dtype)
    covariance = variance.new_zeros(size, size)
    for at in row_blocks(len(given)):
        part = (given[at].double() - mean) / unit
        covariance += part.mT @ part
    return Standard(None, covariance / len(given), mean, unit, len(given), log_units, given.dtype)


def _moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and number of the values seen in each column, each (d,), float64; a block of rows at a time."""
    counts = sum(((~x[at].isnan()).sum(0) for at in row_blocks(len(x))), x.new_zeros(x.shape[1], dtype=torch.long))
    least = counts.clamp(min=1)
    mean = (
        sum((x[at].double().nansum(0) for at in row_blocks(len(x))), torch.zeros_like(counts, dtype=torch.float64)) / least
    )
    squares = sum(((x[at].double() - mean).square().nansum(0) for at in row_blocks(len(x))), torch.zeros_like(mean))
    return mean, squares / least, counts


def _refuse_constant(mean: Tensor, variance: Tensor, counts: Tensor, pool: Pool) -> None:
    unseen = (counts == 0).nonzero().flatten().tolist()
    if unseen:
        raise ValueError(f"No value of column {unseen[0]} of x was seen ({len(unseen)} such columns): drop it.")
    # Not `== 0`: the mean of equal numbers is rounded.
    constant = (variance <= (8.0 * torch.finfo(mean.dtype).eps * mean.abs()).square()).nonzero().flatten().tolist()
    if not constant:
        return
    found = f"{len(constant)} of {len(mean)} columns of x are constant (the first is column {constant[0]})"
    if len(constant) == len(mean):
        raise ValueError(f"{found}: the noise would be zero and the density without bound.")
    if pool is shared:
        warn(f"{found}: the model predicts them without error, so the noise is smaller than the others need.")
    else:
        raise ValueError(
            f"{found}: the noise of such a column would be zero and the density without bound. Drop these columns, "
            "dequantise the data (pv.data.dequantise), or use pv.em.ppca, whose columns share one noise."
        )
