"""log p(x) of many rows: in blocks, each reduced to its `Estimate` before the next begins.

Blocks are of one size, cut by the number of rows and particles alone (the last is padded), and block b draws its random
numbers from (seed, b). So neither the byte budget, nor the order of the blocks, nor the process that works on one of them
changes the answer beyond rounding.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from pyro_vae.evidence.estimate import Estimate
from pyro_vae.memory import BUDGET
from pyro_vae.posterior.particles import Particles
from pyro_vae.posterior.proposals import from_guide
from pyro_vae.program import Program
from pyro_vae.rows import Data, Rows, as_rows, positive, take
from pyro_vae.seeds import derive

Method = Callable[..., Particles | Estimate]

BLOCK_ROWS = 512
BLOCK_NUMBERS = 2**22
"""Particles of a block hold at most this many numbers (rows x K x D), or one row's."""


def log_evidence(
    program: Program,
    x: Data,
    *,
    method: Method = from_guide,
    num_particles: int | None = None,
    seed: int = 0,
    memory: int = BUDGET,
    on_block: Callable[[int], None] | None = None,
) -> Estimate:
    """log p(x) for each row, with its error.

    Args:
        program: a `VAE` or any `Program`.
        x: rows, (N, ...), or a tuple of tensors with N rows each.
        method: how: `posterior.from_guide`, `posterior.from_prior`, `evidence.exact`.
        num_particles: K; None for the method's default.
        seed: of all draws.
        memory: byte budget.
        on_block: called with the number of rows done after each block.

    Returns:
        the estimate. Of a bare `Program`, a row outside the likelihood's support has -inf, a row with NaN has NaN; both
        are marked, with the reason, and disturb no other row.

    Raises:
        ValueError: the program does not fit (see `check`), `x` is not usable, a `VAE` is given rows it cannot model.
    """
    rows = as_rows(x)
    options = _options(method, num_particles, memory)
    good, reasons = program.usable_rows(rows)
    if not bool(good.any()):
        return _without_a_value(len(good), reasons, rows)
    if not bool(good.all()):
        # Bad rows keep their place, filled with a good row's values, so that all other rows keep their random numbers.
        index = torch.arange(len(good), device=good.device)
        rows = take(rows, torch.where(good, index, index[good][0]))
    count, size = len(rows[0]), _block_size(program, rows, options.get("num_particles", 1))
    parts = []
    for block, start in enumerate(range(0, count, size)):
        part = take(rows, torch.arange(start, start + size, device=good.device).clamp_max(count - 1))
        result = method(program, part, seed=(derive(seed), block), **options)
        estimate = Estimate.from_particles(result) if isinstance(result, Particles) else result
        parts.append(estimate.rows(min(size, count - start)))
        if on_block is not None:
            on_block(min(start + size, count))
    estimate = Estimate.cat(parts)
    return estimate if bool(good.all()) else _mark(estimate, reasons)


def _options(method: Method, num_particles: int | None, memory: int) -> dict[str, Any]:
    """The arguments to hand on: K where it is given or the method has a default, and the budget."""
    positive(memory=memory)
    if not callable(method):
        raise ValueError(
            f"method={method!r} is not a method: give a function such as pv.posterior.from_guide, "
            "pv.posterior.from_prior or pv.evidence.exact."
        )
    accepted = inspect.signature(method).parameters
    options: dict[str, Any] = {"memory": memory} if "memory" in accepted else {}
    if "num_particles" in accepted:
        options["num_particles"] = accepted["num_particles"].default if num_particles is None else num_particles
        positive(num_particles=options["num_particles"])
    elif num_particles is not None:
        name = getattr(getattr(method, "func", method), "__name__", type(method).__name__)  # a partial has none of its own
        raise ValueError(f"num_particles={num_particles}: the method {name} draws no particles, leave it out.")
    return options


def _block_size(program: Program, rows: Rows, num_particles: int) -> int:
    """Rows a block: as many as their particles allow, evened out so that little is padded."""
    dim = program.log_joint(take(rows, slice(1))).dim
    most = max(1, min(BLOCK_ROWS, BLOCK_NUMBERS // (num_particles * dim)))
    blocks = -(-len(rows[0]) // most)
    return -(-len(rows[0]) // blocks)


def _mark(estimate: Estimate, reasons: list[str]) -> Estimate:
    """The estimate with the rows that have a reason taken out."""
    none = _without_a_value(len(reasons), reasons, (estimate.log_p,))
    bad = torch.tensor([bool(reason) for reason in reasons], device=estimate.log_p.device)
    names = ("log_p", "standard_error", "bias", "ess", "pareto_k", "lower", "upper", "evaluations")
    merged: dict[str, Any] = {name: torch.where(bad, getattr(none, name), getattr(estimate, name)) for name in names}
    told = tuple(reason or own for reason, own in zip(reasons, estimate.reasons, strict=True))
    return replace(estimate, **merged, reasons=told)


def _without_a_value(count: int, reasons: list[str], rows: Rows) -> Estimate:
    """Rows that were not evaluated: -inf outside the support, NaN where the row itself is not a number."""
    impossible = torch.tensor(["support" in reason for reason in reasons], device=rows[0].device)
    nothing = torch.full((count,), torch.nan, dtype=torch.float64, device=rows[0].device)
    log_p = torch.where(impossible, -torch.inf, nothing)
    zero = torch.zeros_like(nothing)
    error = torch.where(impossible, zero, torch.full_like(nothing, torch.inf))
    return Estimate(
        log_p=log_p,
        standard_error=error,
        bias=zero,
        ess=zero,
        pareto_k=nothing,
        lower=log_p,
        upper=log_p,
        evaluations=zero.long(),
        engine="none",
        reasons=tuple(reasons),
    )
