"""The inference gap: why the ELBO is below log p(x), after Cremer, Li & Duvenaud 2018 (arXiv:1801.03558).

With L[q] = E_q[log p(x, z) - log q(z)], the guide q(z | x) and q* the best member of a Gaussian family for that one row,

    log p(x) - L[q]  =  (log p(x) - L[q*])  +  (L[q*] - L[q]),
     inference gap       approximation gap     amortisation gap

the first term is what the family cannot express, the second what the encoder does not reach. All in nats. Gaussians are of
the unconstrained vector u; L is the same there as in z, because the Jacobian belongs to both densities.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_vae.evidence.blocks import log_evidence
from pyro_vae.evidence.estimate import Estimate
from pyro_vae.memory import BUDGET, in_chunks
from pyro_vae.posterior.particles import rounding_error
from pyro_vae.posterior.proposals import from_guide
from pyro_vae.program import Program
from pyro_vae.report.gaussians import FactorisedNormal, Gaussian, fit, rows_that_fit
from pyro_vae.report.measured import Measured, mean_of
from pyro_vae.rows import Data, Rows, as_rows, positive, take
from pyro_vae.seeds import Seed, derive, seeded

if TYPE_CHECKING:
    import pandas as pd

BLOCK_ROWS, BLOCK_NUMBERS = 512, 2**22
"""Rows of a block, and numbers (rows x draws x D) it holds at most: set by sizes, so that no byte budget changes a draw."""

CLEAR = 4.0
"""So many standard errors below zero count as a negative gap: fewer come by chance in thousands of rows."""

EVIDENCE, GUIDE, FIT, BEST = range(4)
"""Sub-streams of the seed."""


@dataclass(frozen=True, repr=False)
class InferenceGap:
    """Three values a row, and the gaps between them; every tensor is (N,), float64, in nats.

    Attributes:
        log_p: log p(x); NaN, as all else, where the row cannot be judged.
        log_p_standard_error: zero where `log_p` was given as a tensor.
        best: L[q*].
        best_standard_error: its Monte Carlo error, rounding included.
        elbo: L[q] of the guide.
        elbo_standard_error: its Monte Carlo error, rounding included.
        family: of q*.
        reasons: N texts, why log p(x) of a row is not reliable; empty where it is.
    """

    log_p: Tensor
    log_p_standard_error: Tensor
    best: Tensor
    best_standard_error: Tensor
    elbo: Tensor
    elbo_standard_error: Tensor
    family: str
    reasons: tuple[str, ...]

    @property
    def approximation(self) -> Tensor:
        """log p(x) - L[q*], (N,)."""
        return self.log_p - self.best

    @property
    def amortisation(self) -> Tensor:
        """L[q*] - L[q], (N,)."""
        return self.best - self.elbo

    @property
    def inference(self) -> Tensor:
        """log p(x) - L[q], (N,), the sum of both gaps."""
        return self.log_p - self.elbo

    @property
    def approximation_standard_error(self) -> Tensor:
        """(N,); the three values come from independent draws."""
        return torch.hypot(self.log_p_standard_error, self.best_standard_error)

    @property
    def amortisation_standard_error(self) -> Tensor:
        """(N,)."""
        return torch.hypot(self.best_standard_error, self.elbo_standard_error)

    @property
    def inference_standard_error(self) -> Tensor:
        """(N,)."""
        return torch.hypot(self.log_p_standard_error, self.elbo_standard_error)

    def __len__(self) -> int:
        """N."""
        return len(self.log_p)

    def mean(self, name: str) -> Measured:
        """Mean of a gap ("approximation", "amortisation", "inference") over the rows that have all three, and its error."""
        known = ~self.inference.isnan()
        return mean_of(getattr(self, name)[known], getattr(self, f"{name}_standard_error")[known])

    def to_dataframe(self) -> pd.DataFrame:
        """One line a row: log_p, best, elbo, the three gaps, each with its standard error, and the reason."""
        import pandas as pd

        names = ["log_p", "best", "elbo", "approximation", "amortisation", "inference"]
        columns = [column for name in names for column in (name, f"{name}_standard_error")]
        frame = pd.DataFrame({column: getattr(self, column).cpu().numpy() for column in columns})
        frame.insert(0, "row", range(len(self)))
        return frame.assign(reason=self.reasons)

    def __repr__(self) -> str:
        """The mean gaps with their errors, and what to doubt."""
        whole, first, second = (self.mean(name) for name in ("inference", "approximation", "amortisation"))
        known = ~self.inference.isnan()
        lines = [
            f"inference gap {whole} nats a row: log p(x) {float(self.log_p[known].mean()):.4g}, "
            f"ELBO {float(self.elbo[known].mean()):.4g} ({int(known.sum())} of {len(self)} rows)",
            f"  approximation gap {first}: what a {self.family} cannot express",
            f"  amortisation gap {second}: what the guide misses of the best {self.family}",
        ]
        below, low = (
            int((getattr(self, name) < -CLEAR * getattr(self, f"{name}_standard_error")).sum())
            for name in ("amortisation", "approximation")
        )
        lines.append(
            f"  negative amortisation gap, the guide beats that {self.family}: {below} rows (by {CLEAR:.0f} errors)"
        )
        if low:
            lines.append(
                f"  WARNING: log p(x) is {CLEAR:.0f} errors below its own bound L[q*] in {low} rows: it is too low there"
            )
        if told := Counter(filter(None, self.reasons)):
            causes = "; ".join(f"{count} x {reason}" for reason, count in told.items())
            lines.append(f"  WARNING: log p(x) of {told.total()} of {len(self)} rows is not reliable: {causes}")
        return "\n".join(lines)


def inference_gap(
    program: Program,
    x: Data,
    *,
    log_p: Estimate | Tensor | None = None,
    family: Callable[[Tensor], Gaussian] = FactorisedNormal,
    num_samples: int = 500,
    steps: int = 200,
    seed: Seed = 0,
    memory: int = BUDGET,
) -> InferenceGap:
    """Approximation and amortisation gap of each row.

    q* begins at the guide's own moments in u, is fitted to each row, and is judged on fresh draws. A fit that stops short
    makes L[q*] too low: the approximation gap is then too large and the amortisation gap too small by the same amount, and
    their sum stays. A guide outside the family (a flow, a mixture, a full covariance against a factorised q*) may be
    better than q*: the amortisation gap is then negative, and the printed result counts such rows. log p(x) from particles
    is a lower bound in expectation, so the approximation gap is if anything too small.

    Args:
        program: a `VAE` or any `Program`.
        x: rows, (N, ...), or a tuple of tensors with N rows each.
        log_p: log p(x), an `Estimate` of these rows or values (N,) without error; None asks `log_evidence`.
        family: of q*, `FactorisedNormal` or `FullNormal`; anything that makes a `Gaussian` of draws (K, N, D).
        num_samples: draws a row of the guide, and as many of q*.
        steps: of the fit, each with 8 evaluations a row and their gradients. A factorised q* of 30 dimensions was 0.02 nats
            from its best after 200 (MNIST, Bernoulli); a full one needs more, 800 from a factorised guide.
        seed: of all draws.
        memory: byte budget of the evaluations.

    Returns:
        the gaps, in nats. Rows that a bare `Program` cannot judge have NaN and a reason, and disturb no other row.

    Raises:
        ValueError: the program does not fit (see `check`), no row of `x` can be judged, a `VAE` is given rows it cannot
            model, `log_p` has another length than `x`, fewer than two samples.
    """
    positive(num_samples=num_samples, steps=steps, memory=memory)
    if num_samples < 2:
        raise ValueError(f"num_samples={num_samples} leaves no standard error: give at least 2.")
    rows = as_rows(x)
    good, reasons = program.usable_rows(rows)
    if not bool(good.any()):
        raise ValueError(f"None of the {len(good)} rows of x can be judged, the first because of {reasons[0]}.")
    if log_p is None:
        log_p = log_evidence(program, x, seed=derive(seed, EVIDENCE), memory=memory)
    values, error, doubts = _known(log_p, len(good), rows[0].device)
    index = torch.arange(len(good), device=good.device)
    # Bad rows keep their place, filled with a good row's values, so that all other rows keep their random numbers.
    filled = take(rows, torch.where(good, index, index[good][0]))
    dim = program.log_joint(take(filled, slice(1))).dim
    size = max(1, min(BLOCK_ROWS, BLOCK_NUMBERS // (num_samples * dim)))
    parts = [
        torch.stack(_bounds(program, take(filled, part), family, num_samples, steps, (derive(seed), block), memory))
        for block, part in enumerate(index.split(size))
    ]
    values, error, best, best_error, elbo, elbo_error = (
        torch.where(good, column, torch.nan) for column in (values, error, *torch.cat(parts, dim=1))
    )
    name = getattr(family, "name", getattr(family, "__name__", type(family).__name__))
    reasons = [own or told for own, told in zip(reasons, doubts, strict=True)]
    return InferenceGap(values, error, best, best_error, elbo, elbo_error, name, tuple(reasons))


def _known(log_p: Estimate | Tensor, count: int, device: torch.device) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """log p(x), its error and why it is not reliable, for `count` rows."""
    if isinstance(log_p, Estimate):
        values, error, reasons = log_p.log_p, log_p.standard_error, log_p.reasons
    else:
        values = torch.as_tensor(log_p, dtype=torch.float64, device=device)
        error, reasons = torch.zeros_like(values), ("",) * count
    if values.shape != (count,):
        raise ValueError(f"log_p has shape {tuple(values.shape)}, x has {count} rows: give one value a row, ({count},).")
    return values.to(device), error.to(device), reasons


def _bounds(
    program: Program,
    rows: Rows,
    family: Callable[[Tensor], Gaussian],
    num_samples: int,
    steps: int,
    seed: tuple[int, ...],
    memory: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """L[q*] and L[q] of a block of rows with their errors, (n,) each: best, its error, elbo, its error."""
    guide = from_guide(program, rows, num_particles=num_samples, seed=(*seed, GUIDE), memory=memory)
    with torch.no_grad():
        start = program.log_joint(rows).flatten(dict(guide.z))
    # A draw that underflows to the edge of its support lies at infinity in u and would take the moments with it.
    start = torch.where(start.isfinite(), start, start.median(0).values.nan_to_num())
    step = rows_that_fit(program, rows, start, family(start[:, :1]), memory)
    with seeded((*seed, BEST), rows[0].device):
        noise = torch.randn(start.shape, dtype=torch.float64, device=start.device)
    u, log_q = torch.empty_like(start), noise.new_empty(start.shape[:2])
    for part in torch.arange(start.shape[1], device=start.device).split(step):
        q = family(start[:, part])
        fit(program, take(rows, part), q, steps, (seed[0], FIT))
        with torch.no_grad():
            u[:, part] = q.place(noise[:, part]).to(u.dtype)
            log_q[:, part] = q.log_density_of(noise[:, part])
    log_p = in_chunks(program, rows, {"u": u}, lambda joint, values: joint(values["u"]), memory)
    best, best_error = _mean(log_p - log_q, rounding_error(log_p, log_q, u.dtype))
    elbo, error = _mean(guide.log_weights, guide.rounding)
    return best, best_error, elbo, error


def _mean(log_weights: Tensor, rounding: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over draws and its standard error, (K, n) -> (n,); the mean is -inf where a draw is impossible."""
    mean, spread = log_weights.mean(0), log_weights.std(0)
    error = torch.hypot(spread / math.sqrt(len(log_weights)), rounding)
    return mean, torch.where(error.isnan(), torch.inf, error)
