"""log p(x) of many rows: in blocks, each reduced to its `Estimate` before the next begins.

Blocks are of one size, cut by the number of rows and particles alone, and block b draws its random numbers from (seed, b).
So neither the byte budget, nor the order of the blocks, nor the process that works on one of them changes the answer beyond
rounding.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from pyro_vae.evidence.cascade import LEVELS, Block, Level
from pyro_vae.evidence.estimate import Estimate
from pyro_vae.evidence.observed import discrete_dimensions
from pyro_vae.memory import BLOCK_ROWS, BUDGET, block_rows
from pyro_vae.parameters import judging
from pyro_vae.posterior.engine import Engine
from pyro_vae.posterior.particles import Particles
from pyro_vae.program import Program
from pyro_vae.rows import Data, Rows, as_rows, even_blocks, positive, take
from pyro_vae.seeds import derive

Method = Callable[..., Particles | Estimate]

TARGET = 0.05
"""Default standard error of a row that the cascade aims at, in nats."""

INTERRUPTED = "interrupted before it was reached"

OnBlock = Callable[[str, int, int], None]
"""Called after each block with what is at work, the rows it has done and the rows it was given."""


def log_evidence(
    program: Program,
    x: Data,
    *,
    method: Method | None = None,
    num_particles: int | None = None,
    target: float | None = None,
    seed: int = 0,
    memory: int = BUDGET,
    on_block: OnBlock | None = None,
) -> Estimate:
    """log p(x) for each row, with its error.

    Args:
        program: a `VAE` or any `Program`.
        x: rows, (N, ...), or a tuple of tensors with N rows each.
        method: how: `posterior.from_guide`, `from_prior`, `laplace`, `annealed`, one of these with other settings
            (`posterior.Laplace(num_starts=16)`), `evidence.exact`, or a function of yours that takes (program, rows, seed=)
            and returns `Particles` or an `Estimate`. None for the cascade, `evidence.cascade`: the cheapest of them that a
            row's own diagnostics let pass.
        num_particles: K of a method; None for its default. The cascade chooses for itself.
        target: of the cascade, the standard error of a row to reach, in nats; None for 0.05.
        seed: of all draws.
        memory: byte budget.
        on_block: called with what is at work, rows done and rows given after each block.

    Returns:
        the estimate; that of discrete data knows its dimensions, for bits per dimension. Of a bare `Program`, a row
        outside the likelihood's support has -inf, a row with NaN has NaN; both are marked, with the reason, and disturb no
        other row. After Ctrl-C (KeyboardInterrupt) what is finished: rows that were not reached have NaN and the reason.

    Raises:
        ValueError: the program does not fit (see `check`), `x` is not usable, a `VAE` is given rows it cannot model.
        KeyboardInterrupt: before a block was finished.
    """
    rows = as_rows(x)
    positive(memory=memory)
    options = _options(method, num_particles, memory)
    aim = _aim(method, target)
    good, reasons = program.usable_rows(rows)
    index = good.nonzero().flatten()
    told = [INTERRUPTED if ok else reason for ok, reason in zip(good.tolist(), reasons, strict=True)]
    estimate = Estimate.nothing(told, good.device)
    if len(index) == 0:
        return estimate
    report = on_block or (lambda *_: None)
    with judging(program.modules_found()):
        dimensions = discrete_dimensions(program, rows, index)
        if method is None:
            estimate = _cascade(program, rows, index, estimate, aim, seed, memory, report)
        else:
            # Bad rows keep their place, filled with a good row's values, so that all others keep their random numbers.
            everything = torch.arange(len(good), device=good.device)
            filled = take(rows, torch.where(good, everything, index[0]))
            done, _ = _finished(_one_method(program, filled, method, options, seed, report))
            reached = index[index < len(done)]
            estimate = estimate.put(reached, done.take(reached))
    return replace(estimate, dimensions=dimensions)


def _cascade(
    program: Program,
    rows: Rows,
    left: Tensor,
    estimate: Estimate,
    target: float,
    seed: int,
    memory: int,
    report: OnBlock,
) -> Estimate:
    """The rows at `left` put into `estimate`, level by level."""
    for number, level in enumerate(LEVELS):

        def blocks(number: int = number, level: Level = level, left: Tensor = left) -> Iterator[Estimate]:
            done = 0
            for block, index in enumerate(even_blocks(left, BLOCK_ROWS)):
                key = derive(seed, number, block)
                one = Block(level, program, take(rows, index), target, seed=key, memory=memory)
                yield one.answer(last=number == len(LEVELS) - 1)
                done += len(index)
                report(level.engine.name, done, len(left))

        part, interrupted = _finished(blocks(), at_least=estimate if number else None)
        reached = left[: len(part)]
        before = estimate.evaluations[reached]
        estimate = estimate.put(reached, replace(part, evaluations=part.evaluations + before))
        left = left[~estimate.take(left).reliable]
        if interrupted or len(left) == 0:
            break
    return estimate


def _one_method(
    program: Program, rows: Rows, method: Method, options: dict[str, Any], seed: int, report: OnBlock
) -> Iterator[Estimate]:
    """Blocks of all rows by one method, the last one padded and cut again."""
    count, done, size = len(rows[0]), 0, 0
    most = block_rows(options.get("num_particles", 1), program.log_joint(take(rows, slice(1))).dim)
    for block, index in enumerate(even_blocks(torch.arange(count, device=rows[0].device), most)):
        size = max(size, len(index))
        padded = torch.cat([index, index[-1:].expand(size - len(index))])
        result = method(program, take(rows, padded), seed=(derive(seed), block), **options)
        estimate = Estimate.from_particles(result) if isinstance(result, Particles) else result
        done += len(index)
        yield estimate.rows(len(index))
        report(_name(method), done, count)


def _finished(blocks: Iterator[Estimate], at_least: Estimate | None = None) -> tuple[Estimate, bool]:
    """The blocks that were finished when Ctrl-C came, or all; and whether it came.

    Raises:
        KeyboardInterrupt: nothing was finished, and there is nothing from before, `at_least`.
    """
    parts: list[Estimate] = []
    try:
        for part in blocks:
            parts.append(part)
    except KeyboardInterrupt:
        if parts:
            return Estimate.cat(parts), True
        if at_least is None:
            raise
        return at_least.rows(0), True
    return Estimate.cat(parts), False


def _name(method: Method) -> str:
    """A method as progress and messages call it; a partial has no name of its own."""
    inner = getattr(method, "func", method)
    return str(getattr(inner, "name", None) or getattr(inner, "__name__", type(inner).__name__))


def _aim(method: Method | None, target: float | None) -> float:
    """The cascade's target.

    Raises:
        ValueError: it is no positive number, or is given along with a method.
    """
    if target is None:
        return TARGET
    if method is not None:
        raise ValueError(f"target={target} is for the cascade: leave it out, or leave out method={_name(method)}.")
    if isinstance(target, bool) or not isinstance(target, Real) or not 0.0 < target < math.inf:
        raise ValueError(f"target={target!r} must be a positive number of nats, such as 0.05.")
    return float(target)


def _options(method: Method | None, num_particles: int | None, memory: int) -> dict[str, Any]:
    """The arguments to hand on: K where it is given or the method has a default, and the budget."""
    if method is None:
        if num_particles is not None:
            raise ValueError(
                f"num_particles={num_particles}: without a method the cascade chooses the number for each row: "
                "give target=, or a method such as pv.posterior.laplace."
            )
        return {}
    if not callable(method):
        raise ValueError(
            f"method={method!r} is not a method: give an engine such as pv.posterior.laplace, pv.evidence.exact, or leave "
            "it out for the cascade."
        )
    accepted = inspect.signature(method).parameters
    options: dict[str, Any] = {"memory": memory} if "memory" in accepted else {}
    if "num_particles" in accepted:
        engine = getattr(method, "func", method)
        default = engine.default_particles if isinstance(engine, Engine) else accepted["num_particles"].default
        given = accepted["num_particles"].default if accepted["num_particles"].default is not None else default
        options["num_particles"] = given if num_particles is None else num_particles
        positive(num_particles=options["num_particles"])
    elif num_particles is not None:
        raise ValueError(f"num_particles={num_particles}: the method {_name(method)} draws no particles, leave it out.")
    return options
