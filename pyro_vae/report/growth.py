"""How the estimate of log p(x) grows with the number of particles k.

E[log p-hat_k] rises with k towards log p(x) and never passes it (Burda, Grosse & Salakhutdinov 2016, arXiv:1509.00519); for
the guide it begins at the ELBO. A curve that still rises at its right end has not arrived. One that is flat has arrived, or
draws from a proposal that misses a mode: no number of its own particles can tell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pyro_vae.evidence import weights
from pyro_vae.memory import BUDGET, block_rows
from pyro_vae.parameters import judging
from pyro_vae.posterior.engine import Engine, Sampler
from pyro_vae.posterior.local import laplace
from pyro_vae.posterior.particles import Particles
from pyro_vae.posterior.proposals import from_guide
from pyro_vae.program import Program
from pyro_vae.rows import Data, Rows, as_rows, even_blocks, positive, take
from pyro_vae.seeds import Seed, derive

if TYPE_CHECKING:
    import pandas as pd

NUMBERS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
"""Numbers of particles, unless told."""

METHODS: dict[str, Engine] = {"guide": from_guide, "laplace": laplace}

PREPARED, PILOT, DRAWN = 0, 1, 2
"""Sub-streams of a block's seed."""


class Curve(NamedTuple):
    """One engine: k (M,), the mean of log p-hat_k over the rows (M,) and its error (M,), in nats."""

    num_particles: Tensor
    log_p: Tensor
    standard_error: Tensor


@dataclass(frozen=True, repr=False)
class Convergence:
    """log p-hat_k of some engines, mean of N rows, in nats.

    Attributes:
        curves: by name of the engine. `log_p` is below the mean of log p(x) in expectation. `standard_error` is that of one
            estimate with k particles a row; where draws are independent `log_p` is the mean of several and more certain.
        num_rows: N.
    """

    curves: Mapping[str, Curve]
    num_rows: int

    def to_dataframe(self) -> pd.DataFrame:
        """One line an engine and k: method, num_particles, log_p, standard_error."""
        import pandas as pd

        parts = [
            pd.DataFrame({name: column.cpu().numpy() for name, column in curve._asdict().items()}).assign(method=method)
            for method, curve in self.curves.items()
        ]
        return pd.concat(parts, ignore_index=True)[["method", *Curve._fields]]

    def __repr__(self) -> str:
        """The first and the last point of each curve, and the last step."""
        lines = [f"log p-hat with k particles, mean of {self.num_rows} rows, nats"]
        for method, (count, log_p, error) in self.curves.items():
            last = f"{float(log_p[-1]):.4f} +- {float(error[-1]):.2g} with {int(count[-1])}"
            step = f", {float(log_p[-1] - log_p[-2]):+.2g} since {int(count[-2])}" if len(count) > 1 else ""
            lines.append(f"  {method}: {float(log_p[0]):.4f} with {int(count[0])}, {last}{step}")
        return "\n".join(lines)


def convergence(
    program: Program,
    x: Data,
    *,
    methods: Mapping[str, Engine] | None = None,
    ks: Sequence[int] = NUMBERS,
    seed: Seed = 0,
    memory: int = BUDGET,
) -> Convergence:
    """The mean over rows of log p-hat_k against k.

    Where an engine's draws are independent and alike, max(ks) are drawn once and cut into disjoint groups of k: each group
    is an estimate with k draws, and which draws come first makes no difference. Draws in strata (`laplace`) are not alike,
    so k of many are no estimate with k: they are drawn anew for each k.

    Args:
        program: a `VAE` or any `Program`.
        x: rows, (N, ...), or a tuple of tensors with N rows each; those a bare `Program` cannot judge are left out.
        methods: engines by name; None for the guide and laplace.
        ks: numbers of particles.
        seed: of all draws.
        memory: byte budget of the evaluations.

    Returns:
        a curve for each engine.

    Raises:
        ValueError: no number of particles or one below 1, no row can be judged, something that is no engine.
    """
    methods = METHODS if methods is None else methods
    _check(methods, ks)
    numbers = sorted(set(ks))
    rows = as_rows(x)
    good, reasons = program.usable_rows(rows)
    if not bool(good.any()):
        raise ValueError(f"None of the {len(good)} rows of x can be judged, the first because of {reasons[0]}.")
    rows = take(rows, good.nonzero().flatten())
    curves = {}
    with judging(program.modules_found()):
        for number, (name, engine) in enumerate(methods.items()):
            curves[name] = _curve(engine, program, rows, numbers, derive(seed, number), memory)
    return Convergence(curves, len(rows[0]))


def _check(methods: Mapping[str, Engine], ks: Sequence[int]) -> None:
    if not ks:
        raise ValueError("ks is empty: give numbers of particles such as (1, 10, 100).")
    for k in ks:
        positive(ks=k)
    for name, engine in methods.items():
        if not isinstance(engine, Engine):
            raise ValueError(f"methods[{name!r}]={engine!r} is no engine: give one such as pv.posterior.laplace.")


def _curve(engine: Engine, program: Program, rows: Rows, numbers: list[int], seed: int, memory: int) -> Curve:
    """The curve of one engine over all rows, block by block."""
    size = block_rows(numbers[-1], program.log_joint(take(rows, slice(1))).dim)
    parts = []
    for block, index in enumerate(even_blocks(torch.arange(len(rows[0]), device=rows[0].device), size)):
        key = derive(seed, block)
        sampler = engine.prepare(program, take(rows, index), seed=derive(key, PREPARED), memory=memory)
        if engine.pilot_particles:
            sampler = sampler.adapt(sampler.draw(engine.pilot_particles, derive(key, PILOT)))
        parts.append(_rows_of(sampler, numbers, key))
    log_p, variance = torch.cat(parts, dim=-1)
    return Curve(torch.tensor(numbers), log_p.mean(1), variance.sum(1).sqrt() / log_p.shape[1])


def _rows_of(sampler: Sampler, numbers: list[int], key: int) -> Tensor:
    """log p-hat_k and its variance for one estimate, (2, M, n)."""
    most = numbers[-1]
    whole = sampler.draw(most, derive(key, DRAWN, most))
    if whole.strata is None:
        points = [_grouped(whole.log_weights, k) for k in numbers]
    else:
        points = [_single(whole if k == most else sampler.draw(k, derive(key, DRAWN, k))) for k in numbers]
    return torch.stack(points, 1)


def _single(particles: Particles) -> Tensor:
    """Of one draw of K, (2, n); the variance by the delta method."""
    log_weights = torch.nan_to_num(particles.log_weights, nan=-torch.inf, posinf=-torch.inf)
    return torch.stack([weights.log_mean_exp(log_weights), weights.relative_variance(log_weights, particles.strata)])


def _grouped(log_weights: Tensor, k: int) -> Tensor:
    """Mean and variance over disjoint groups of k draws, (K, n) -> (2, n); by the delta method where there is but one."""
    log_weights = torch.nan_to_num(log_weights, nan=-torch.inf, posinf=-torch.inf)
    groups = len(log_weights) // k
    if groups == 1:
        return torch.stack([weights.log_mean_exp(log_weights[:k]), weights.relative_variance(log_weights[:k])])
    each = weights.log_mean_exp(log_weights[: groups * k].unflatten(0, (groups, k)).transpose(0, 1))
    return torch.stack([each.mean(0), each.var(0)])
