"""log p(x) of many rows: in blocks, each reduced to its `Estimate` before the next begins.

Blocks are of one size, cut by the number of rows and particles alone, and block b draws its random numbers from (seed, b).
So neither the byte budget, nor the order of the blocks, nor the process that works on one of them changes the answer beyond
rounding: the ranks of a team share them, see `sharing`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from pyro_vae.captured import CapturedProgram
from pyro_vae.evidence.cascade import LEVELS, Block, Level
from pyro_vae.evidence.estimate import Estimate
from pyro_vae.evidence.observed import discrete_dimensions
from pyro_vae.evidence.sharing import Sharing
from pyro_vae.graph import Compile, compile_mode
from pyro_vae.memory import BLOCK_ROWS, BUDGET, block_rows
from pyro_vae.parameters import judging
from pyro_vae.posterior.chains import Hamiltonian
from pyro_vae.posterior.engine import Engine
from pyro_vae.posterior.particles import Particles
from pyro_vae.program import Program
from pyro_vae.rows import Data, Rows, as_rows, even_blocks, positive, take
from pyro_vae.seeds import derive
from pyro_vae.team import ALONE, Team

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
    compile: Compile = "auto",
    on_block: OnBlock | None = None,
    team: Team = ALONE,
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
        compile: whether the densities of draws go through graphs that are captured once and compiled, see
            `pyro_vae.captured`: True from the first one on; "auto", with a method, once the rows that are left pay for it,
            by what the first ones took; False never. Draws are the same in any case, results the same up to rounding. A
            program that cannot be captured, or whose graph could not be checked (a single row, or all alike), is evaluated
            as it is; True says so.
        on_block: called with what is at work, rows done and rows given after each block; of a team each rank's own.
        team: processes that share the blocks, see `pyro_vae.team.joined`: each is given the same arguments, and each
            returns the estimate of all rows. Without it a process works alone, under `torchrun` as well.

    Returns:
        the estimate; that of discrete data knows its dimensions, for bits per dimension. Of a bare `Program`, a row
        outside the likelihood's support has -inf, a row with NaN has NaN; both are marked, with the reason, and disturb no
        other row. After Ctrl-C (KeyboardInterrupt) what is finished: rows that were not reached have NaN and the reason.

    Raises:
        ValueError: the program does not fit (see `check`), `x` is not usable, a `VAE` is given rows it cannot model.
        KeyboardInterrupt: before a block was finished.
        Lost: another process of the team has ended.
    """
    mode = compile_mode(compile)
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
        # The cascade spends its time on many other things than weights: there a compilation hardly pays for itself.
        captured = CapturedProgram(program, False if method is None and mode == "auto" else mode, memory)
        if method is None:
            estimate = _cascade(captured, rows, index, estimate, aim, seed, memory, report, Sharing(team))
        else:
            # Bad rows keep their place, filled with a good row's values, so that all others keep their random numbers.
            everything = torch.arange(len(good), device=good.device)
            filled = take(rows, torch.where(good, everything, index[0]))
            most = block_rows(options.get("num_particles", 1), program.log_joint(take(filled, slice(1))).dim)
            parts, sharing = list(even_blocks(everything, most)), Sharing(team)
            judged = captured if isinstance(getattr(method, "func", method), Engine) else program
            reached, done, _ = sharing.finished(
                _one_method(judged, captured, filled, parts, method, options, seed, report, sharing), parts
            )
            usable = good[reached].nonzero().flatten()
            estimate = estimate.put(reached[usable], done.take(usable))
    return replace(estimate, dimensions=dimensions)


def _cascade(
    program: CapturedProgram,
    rows: Rows,
    left: Tensor,
    estimate: Estimate,
    target: float,
    seed: int,
    memory: int,
    report: OnBlock,
    sharing: Sharing,
) -> Estimate:
    """The rows at `left` put into `estimate`, level by level."""
    for number, level in enumerate(LEVELS):
        parts = list(even_blocks(left, BLOCK_ROWS))

        def blocks(
            number: int = number, level: Level = level, parts: list[Tensor] = parts
        ) -> Iterator[tuple[int, Estimate]]:
            mine = sharing.turns(len(parts))
            done, given = 0, sum(len(parts[block]) for block in mine)
            for block in mine:
                key = derive(seed, number, block)
                one = Block(level, program, take(rows, parts[block]), target, seed=key, memory=memory)
                yield block, one.answer(last=number == len(LEVELS) - 1)
                done += len(parts[block])
                program.reached(done, given)
                report(level.engine.name, done, given)

        try:
            reached, part, interrupted = sharing.finished(blocks(), parts)
        except KeyboardInterrupt:
            if number == 0:
                raise
            break
        before = estimate.evaluations[reached]
        estimate = estimate.put(reached, replace(part, evaluations=part.evaluations + before))
        left = left[~estimate.take(left).reliable]
        if interrupted or len(left) == 0:
            break
    return estimate


def _one_method(
    judged: Program,
    captured: CapturedProgram,
    rows: Rows,
    parts: Sequence[Tensor],
    method: Method,
    options: dict[str, Any],
    seed: int,
    report: OnBlock,
    sharing: Sharing,
) -> Iterator[tuple[int, Estimate]]:
    """This rank's blocks of all rows by one method, a short one padded and cut again."""
    mine, size = sharing.turns(len(parts)), len(parts[0])
    done, given = 0, sum(len(parts[block]) for block in mine)
    for block in mine:
        index = parts[block]
        padded = torch.cat([index, index[-1:].expand(size - len(index))])
        result = method(judged, take(rows, padded), seed=(derive(seed), block), **options)
        estimate = Estimate.from_particles(result) if isinstance(result, Particles) else result
        done += len(index)
        yield block, estimate.rows(len(index))
        captured.reached(done, given)
        report(_name(method), done, given)


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
    if isinstance(getattr(method, "func", method), Hamiltonian):
        raise ValueError(
            "method=hamiltonian makes chains, which have no weights and so no log p(x): give pv.posterior.laplace or "
            "pv.posterior.annealed."
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
