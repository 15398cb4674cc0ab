"""What the latent dimensions are used for: active units, KL of each, posterior collapse, and the aggregate posterior.

* A dimension is *active* if its posterior mean moves with the data: Var_x E_q[u | x] above 0.01 of the prior's variance.
  For a prior of unit variance this is the criterion of Burda, Grosse & Salakhutdinov 2016 (arXiv:1509.00519).
* It has *collapsed* if its KL, averaged over rows, is under 0.01 nats: q(z | x) is then the prior whatever x is.
* The decoder *ignores the latents* if log p(x | z) hardly varies over draws of the prior.

Dimensions are those of the unconstrained vector u: the latents one after the other, each as `biject_to` sees it. What a
KL "of a dimension" is where dimensions depend on each other, `looks` says; all KL are in nats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_vae.log_joint import LogJoint
from pyro_vae.memory import BUDGET, in_chunks
from pyro_vae.program import Program
from pyro_vae.report.aggregate import Aggregate, aggregate_of
from pyro_vae.report.looks import Look, look
from pyro_vae.report.measured import Measured, mean_of
from pyro_vae.rows import Data, Rows, as_rows, positive, take
from pyro_vae.seeds import Seed, derive, seeded

if TYPE_CHECKING:
    import pandas as pd

ACTIVE = 0.01
"""Share of the prior's variance that the posterior mean of an active dimension exceeds."""

COLLAPSED = 0.01
"""Nats: a dimension under so much KL, or a decoder that varies by less, carries nothing."""

BLOCK_ROWS = 512
"""Rows of a run of model and guide: set by itself, so that no byte budget changes a draw."""

CHOICE, GUIDE, SOME, PRIOR = range(4)
"""Sub-streams of the seed."""


@dataclass(frozen=True, repr=False)
class LatentUsage:
    """D unconstrained dimensions in G parts, a part being a dimension or a site that does not fall apart; float64.

    Attributes:
        names: of the parts, G texts.
        part: which part a dimension belongs to, (D,), integer.
        kl: mean KL of each part over the rows, nats, (G,).
        kl_standard_error: its Monte Carlo error, zero where the KL is exact, (G,).
        row_kl: KL of all latents together, nats, (N,).
        row_kl_standard_error: its Monte Carlo error, (N,).
        activity: Var_x E_q[u | x] over the prior's variance, (D,); unbiased, so it may fall a little below zero.
        aggregate: q(z) against p(z), on M of the rows.
        decoder_spread: standard deviation of log p(x | z) over draws of the prior, in nats, mean of those M rows.
    """

    names: tuple[str, ...]
    part: Tensor
    kl: Tensor
    kl_standard_error: Tensor
    row_kl: Tensor
    row_kl_standard_error: Tensor
    activity: Tensor
    aggregate: Aggregate
    decoder_spread: float

    @property
    def active(self) -> Tensor:
        """Which dimensions are active, boolean (D,)."""
        return self.activity > ACTIVE

    @property
    def active_parts(self) -> Tensor:
        """Which parts have an active dimension, boolean (G,)."""
        return torch.zeros_like(self.kl).index_add_(0, self.part, self.active.to(self.kl)) > 0.0

    @property
    def collapsed(self) -> Tensor:
        """Which parts carry under 0.01 nats, boolean (G,); a part of several dimensions only if all of them do."""
        return self.kl < COLLAPSED

    @property
    def mean_kl(self) -> Measured:
        """Mean KL of all latents together, with its Monte Carlo error."""
        return mean_of(self.row_kl, self.row_kl_standard_error)

    @property
    def dependence(self) -> float:
        """What `mean_kl` has beyond the sum of the parts: the dependence of dimensions within q(z | x), nats.

        NaN where a part has several dimensions: their KL and their dependence are then not told apart.
        """
        return math.nan if self._undivided else self.mean_kl.value - float(self.kl.sum())

    @property
    def _undivided(self) -> tuple[int, ...]:
        """Which parts have several dimensions."""
        return tuple((self.part.bincount(minlength=len(self.names)) > 1).nonzero().flatten().tolist())

    @property
    def decoder_ignores_latents(self) -> bool:
        """Whether log p(x | z) varies by less than 0.01 nats over the prior."""
        return self.decoder_spread < COLLAPSED

    def to_dataframe(self) -> pd.DataFrame:
        """One line a dimension: its part with KL and error, activity, and moments under q(z) and p(z).

        A part of several dimensions stands in the line of each, with the KL of all of them.
        """
        index = self.part.cpu()
        frame = self.aggregate.to_dataframe()
        frame.insert(1, "part", [self.names[i] for i in index])
        frame.insert(2, "kl", self.kl.cpu()[index].numpy())
        frame.insert(3, "kl_standard_error", self.kl_standard_error.cpu()[index].numpy())
        frame.insert(4, "activity", self.activity.cpu().numpy())
        frame.insert(5, "active", self.active.cpu().numpy())
        return frame

    def __repr__(self) -> str:
        """How many dimensions carry how much, what has collapsed, and the aggregate posterior."""
        order = self.kl.argsort(descending=True).tolist()
        largest = ", ".join(f"{self.names[i]} {float(self.kl[i]):.3g}" for i in order[:6])
        dead = self.collapsed.nonzero().flatten().tolist()
        told = ", ".join(self.names[i] for i in dead[:6]) + (" ..." if len(dead) > 6 else "")
        undivided = ", ".join(self.names[i] for i in self._undivided[:6]) + (" ..." if len(self._undivided) > 6 else "")
        share = f"not told apart by dimension within {undivided}"
        what = f"{len(self.names)}{' parts' if self._undivided else ''}"
        lines = [
            f"{int(self.active.sum())} of {len(self.part)} latent dimensions are active ({len(self.row_kl)} rows)",
            f"  mean KL(q(z | x) || p(z)) {self.mean_kl} nats, "
            + (share if self._undivided else f"{max(self.dependence, 0.0):.3g} of it in dependence within q"),
            f"  largest: {largest}{' ...' if len(order) > 6 else ''}",
            f"  collapsed, under {COLLAPSED} nats: {len(dead)} of {what}{': ' if dead else ''}{told}"
            + (f"; single dimensions within {undivided} are not seen" if self._undivided else ""),
            *(f"  {line}" for line in repr(self.aggregate).split("\n")),
            f"  log p(x | z) varies by {self.decoder_spread:.3g} nats over the prior"
            + (": THE DECODER IGNORES THE LATENTS" if self.decoder_ignores_latents else ""),
        ]
        return "\n".join(lines)


def latent_usage(
    program: Program, x: Data, *, num_particles: int = 16, num_rows: int = 256, seed: Seed = 0, memory: int = BUDGET
) -> LatentUsage:
    """Active units, KL of each dimension, collapse, and the aggregate posterior against the prior.

    KL is exact where guide and prior have a formula, which needs no more than a few draws; else a mean over the draws. The
    information I_q(x; z) needs the guides of all M rows at the draws of each, M^2 K densities. If the prior depends on x (a
    conditional model), KL(q(z) || p(z)) compares q(z) with each row's own prior.

    Args:
        program: a `VAE` or any `Program`.
        x: rows, (N, ...), or a tuple of tensors with N rows each; at least two.
        num_particles: K, draws a row; at least two.
        num_rows: M, rows of the aggregate posterior, chosen by chance; all where there are fewer.
        seed: of all draws.
        memory: byte budget of the densities.

    Raises:
        ValueError: the program does not fit (see `check`), a row cannot be judged, fewer than two rows, of either kind, or
            draws.
    """
    positive(num_particles=num_particles, num_rows=num_rows, memory=memory)
    rows, seed = as_rows(x), derive(seed)
    count = len(rows[0])
    _require_two(x=count, num_rows=num_rows, num_particles=num_particles)
    _require_usable(program, rows)
    blocks = [
        _reduced([look(program, take(rows, part), (seed, GUIDE, block, k)) for k in range(num_particles)])
        for block, part in enumerate(torch.arange(count, device=rows[0].device).split(BLOCK_ROWS))
    ]
    means, within, kl, kl_variance, whole, whole_variance = (torch.cat(part) for part in zip(*blocks, strict=True))
    with seeded((seed, CHOICE), rows[0].device):
        chosen = take(rows, torch.randperm(count, device=rows[0].device)[:num_rows].sort().values)
    draws = [look(program, chosen, (seed, SOME, k)) for k in range(num_particles)]
    prior = [look(program, chosen, (seed, PRIOR, k), at_prior=True) for k in range(num_particles)]
    return LatentUsage(
        names=draws[0].names,
        part=draws[0].part.to(kl.device),
        kl=kl.mean(0),
        kl_standard_error=kl_variance.sum(0).sqrt() / count,
        row_kl=whole,
        row_kl_standard_error=whole_variance.sqrt(),
        # The scatter that means of K draws have by chance is taken off: it would make every dimension look active.
        activity=(means.var(0) - within.mean(0)) / _prior_variance(prior),
        aggregate=aggregate_of(program, chosen, draws, prior, _dimensions(draws[0]), memory),
        decoder_spread=_decoder_spread(program, chosen, prior, memory),
    )


def _require_two(**counts: int) -> None:
    for name, value in counts.items():
        if value < 2:
            what = "x has 1 row" if name == "x" else f"{name}={value}"
            raise ValueError(f"{what}, which has no variance: give at least 2.")


def _require_usable(program: Program, rows: Rows) -> None:
    good, reasons = program.usable_rows(rows)
    if not bool(good.all()):
        bad = (~good).nonzero().flatten().tolist()
        raise ValueError(
            f"{len(bad)} of {len(good)} rows of x cannot be judged, the first is row {bad[0]} ({reasons[bad[0]]}): "
            "leave them out."
        )


def _reduced(looks: Sequence[Look]) -> tuple[Tensor, ...]:
    """E[u] (n, D), KL of the parts (n, G) and of all latents (n,) from K looks, each before its Monte Carlo variance."""
    columns = (torch.stack(column) for column in zip(*((one.mean, one.kl, one.kl_whole) for one in looks), strict=True))
    return tuple(value for column in columns for value in (column.mean(0), column.var(0) / len(looks)))


def _prior_variance(looks: Sequence[Look]) -> Tensor:
    """Of each dimension, (D,): the mean variance within sites and the variance of their means."""
    return torch.cat([one.variance for one in looks]).mean(0) + torch.cat([one.mean for one in looks]).var(0)


def _dimensions(one: Look) -> tuple[str, ...]:
    """D names: that of the part, numbered where it has several dimensions."""
    part = one.part.tolist()
    return tuple(one.names[g] if part.count(g) == 1 else f"{one.names[g]} u{d - part.index(g)}" for d, g in enumerate(part))


def _decoder_spread(program: Program, rows: Rows, prior: Sequence[Look], memory: int) -> float:
    """Standard deviation of log p(x | z) over the prior's draws, mean of the rows; infinite where some are impossible."""
    z = {name: torch.stack([one.z[name] for one in prior]) for name in prior[0].z}
    spread = in_chunks(program, rows, z, LogJoint.likelihood_of_sites, memory).std(0)
    return float(torch.nan_to_num(spread, nan=torch.inf).mean())
