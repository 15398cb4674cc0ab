"""The cascade: log p(x) by the cheapest engine that a row's own diagnostics let pass.

All rows start with the guide; those it does not serve go on to `laplace` with few starts, with many, and to `annealed`. In
each level a row is judged on pilot draws: k-hat below its threshold, enough effective particles, two independent halves
that agree, and a standard error that reaches the target with a number of particles that can be had. Where a pilot fails,
`laplace` learns from it (`posterior.refinement`) and a larger one is drawn. What is reported are as many fresh draws as
the pilot asks for: an engine chosen by the weights that it reports would report the lucky ones. A row whose fresh draws
fail the same tests goes on as well; one that fails the last level is reported with the reason.

Weights are blind to modes that the draws have missed, and perfect where a guide covers one of two. So modes are sought from
several starts, and where these do not agree, or the guide alone has answered, fresh starts must find nothing that the draws
do not cover; nor may some draws of the guide and the prior (`posterior.coverage`). What they find is added.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_vae.evidence import weights
from pyro_vae.evidence.estimate import Estimate
from pyro_vae.memory import block_rows
from pyro_vae.posterior.annealing import Annealed
from pyro_vae.posterior.coverage import light_tailed, thin, uncovered
from pyro_vae.posterior.engine import Engine, Sampler
from pyro_vae.posterior.local import Laplace, many
from pyro_vae.posterior.mixture import SHARES
from pyro_vae.posterior.particles import Particles
from pyro_vae.posterior.proposals import FromGuide, Proposal
from pyro_vae.posterior.refinement import MOST_PEAKS
from pyro_vae.posterior.starts import at_modes
from pyro_vae.program import Program
from pyro_vae.rows import Rows, take
from pyro_vae.seeds import Seed, derive

REFINED_FROM = 256
"""Draws that a pilot must have for peaks to be moved by it; fewer tune the shares alone."""

SAFETY = 1.3
"""More particles than the pilot says the target needs, because pilots err."""

STARTS_TO_CHECK_GUIDE, STARTS_TO_CHECK = 8, 16
"""Fresh starts that look for modes that a sampler does not cover."""

APART = 4.0
"""Standard errors by which two halves of the draws may differ."""

PREPARED, PILOT, REPORTED, CHECKED = 0, 1, 2, 3
"""Sub-streams of a block's seed."""

RETRIED, TRIES = 100, 3
"""Added to the number of a report when it is made again; how often it is made at most."""


@dataclass(frozen=True)
class Level:
    """One engine of the cascade.

    Attributes:
        engine: makes the sampler.
        pilots: draws of each pilot; a row that fails one is tried with the next, larger one.
        least: reported draws at least.
        most: at most: a row that needs more goes on.
        patience: a row that needs so many times more than that is not tried with a larger pilot: 1 where the sampler does
            not learn from pilots.
    """

    engine: Engine
    pilots: tuple[int, ...]
    least: int
    most: int
    patience: float = 32.0


# Eight draws tell the hopeless from the rest; larger pilots judge. Few starts serve most rows, 64 the most rugged ones.
LEVELS = (
    Level(FromGuide(), (8, 64, 256), 128, 2**11, patience=1.0),
    Level(Laplace(num_starts=4), (64, 256, 1024, 1024, 2048), 100, 2**13),
    Level(Laplace(num_starts=16), (256, 1024, 1024, 2048, 4096), 256, 2**16),
    Level(Laplace(num_starts=64), (1024, 1024, 2048, 4096), 1024, 2**16),
    Level(Annealed(start=functools.partial(at_modes, num_starts=64)), (32,), 64, 2**10),
)


class Judgement:
    """What some draws say about their engine, row by row.

    Attributes:
        estimate: the draws' own, with the sampler's doubts.
        passed: whether nothing speaks against the draws themselves, boolean (N,).
        broken: whether some have a density that is no number, which more draws will not mend, boolean (N,).
        needed: how many draws would bring the standard error to the target, (N,), float64.
    """

    def __init__(self, particles: Particles, target: float) -> None:
        log_weights = torch.nan_to_num(particles.log_weights, nan=-torch.inf, posinf=-torch.inf)
        apart = weights.halves(log_weights, particles.strata) > APART
        count = len(apart)
        draws = Estimate.from_particles(replace(particles, info={**particles.info, "doubts": ("",) * count}))
        draws = draws.doubted(["two halves of the draws disagree" if far else "" for far in apart.tolist()])
        self.passed = draws.reliable
        self.broken = (particles.log_weights.isnan() | particles.log_weights.isposinf()).any(0)
        self.estimate = draws.doubted(particles.info.get("doubts", ("",) * count))
        variance = weights.relative_variance(log_weights, particles.strata) * len(log_weights)
        self.needed = torch.nan_to_num(variance, nan=torch.inf) / target**2

    def reported(self, target: float) -> Estimate:
        """The estimate, doubted where its standard error is above the target."""
        above = (self.estimate.standard_error > target).tolist()
        return self.estimate.doubted([f"standard error above {target:g}" if high else "" for high in above])


@dataclass(frozen=True)
class Left:
    """Rows of a block that have not passed: which, (n,), their sampler, the draws they seem to need, (n,), next pilot."""

    index: Tensor
    sampler: Sampler
    counts: Tensor
    number: int

    def take(self, part: Tensor) -> Left:
        """Some of them; without a sampler where there are none."""
        sampler = self.sampler.take(part) if len(part) else self.sampler
        return Left(self.index[part], sampler, self.counts[part], self.number)


class Block:
    """Some rows at one level.

    Attributes:
        estimate: where the rows are; those that have not been reported carry their last pilot's numbers and a reason.
        spent: decoder evaluations, (N,).
    """

    def __init__(self, level: Level, program: Program, rows: Rows, target: float, *, seed: Seed, memory: int) -> None:
        self.level, self.program, self.rows = level, program, rows
        self.target, self.seed, self.memory = target, seed, memory
        self.dim = program.log_joint(rows).dim
        self.sampler = level.engine.prepare(program, rows, seed=derive(seed, PREPARED), memory=memory)
        self.spent = self.sampler.cost.clone()
        self.estimate = Estimate.nothing([""] * len(rows[0]), rows[0].device)

    def answer(self, *, last: bool) -> Estimate:
        """All rows judged, those that pass reported, and where this level is the `last`, the others too."""
        everyone = torch.arange(len(self.rows[0]), device=self.rows[0].device)
        queue = [Left(everyone, self.sampler, torch.ones_like(everyone).double(), 0)]
        failed: list[Left] = []
        while queue:
            left = queue.pop()
            if left.number == len(self.level.pilots):
                failed.append(left)
                continue
            # A pilot's draws, and what a mixture learns from them, are held at once: no more rows than that allows.
            width = max(self.dim, MOST_PEAKS * len(SHARES))
            parts = torch.arange(len(left.index)).split(block_rows(self.level.pilots[left.number], width))
            if len(parts) > 1:
                queue += [left.take(part) for part in reversed(parts)]
                continue
            again, given_up = self._pilot(left)
            queue += [again] if len(again.index) else []
            failed += [given_up] if len(given_up.index) else []
        for left in failed if last else ():
            number = len(self.level.pilots) + left.number
            self._report(left.index, left.sampler, left.counts.clamp_max(self.level.most), number)
        return replace(self.estimate, evaluations=self.spent)

    def _pilot(self, left: Left) -> tuple[Left, Left]:
        """A pilot for some rows: those that pass are reported, the others may be tried again, or are given up."""
        size = self.level.pilots[left.number]
        pilot = self._draw(left.sampler, left.index, size, derive(self.seed, PILOT, left.number, int(left.index[0])))
        judged = Judgement(pilot, self.target)
        counts = torch.clamp(SAFETY * judged.needed, min=self.level.least)
        within = judged.passed & (counts <= self.level.most)
        passed, sampler = self._covered(left.index, left.sampler, judged, within, left.number)
        told = ["" if ok else "too many particles needed for the target" for ok in passed.tolist()]
        self._put(left.index, judged.estimate.doubted(told))
        good = passed.nonzero().flatten()
        if len(good):
            self._report(left.index[good], sampler.take(good).adapt(_rows(pilot, good)), counts[good], left.number)
        hopeless = judged.broken | (counts > self.level.patience * self.level.most)
        rest = Left(left.index, sampler, counts, left.number)
        later = (~passed & ~hopeless).nonzero().flatten()
        again, given_up = rest.take(later), rest.take((~passed & hopeless).nonzero().flatten())
        if len(later):
            learn = again.sampler.refine if size >= REFINED_FROM else again.sampler.adapt
            again = replace(again, sampler=learn(_rows(pilot, later)), number=left.number + 1)
        return again, given_up

    def _draw(self, sampler: Sampler, index: Tensor, count: int, seed: int) -> Particles:
        particles = sampler.draw(count, seed)
        self.spent[index] += particles.info["evaluations"] - sampler.cost
        return particles

    def _put(self, index: Tensor, part: Estimate) -> None:
        self.estimate = self.estimate.put(index, part)

    def _covered(
        self, index: Tensor, sampler: Sampler, judged: Judgement, passed: Tensor, number: int
    ) -> tuple[Tensor, Sampler]:
        """`passed`, less the rows that the sampler may not cover; the sampler without the doubts that were cleared.

        All rows are looked at by some draws of the guide and the prior. Fresh starts look where there is doubt about modes:
        the guide knows of none, `laplace` says itself where. What is found uncovered is added.
        """
        guided = isinstance(sampler, Proposal)
        passed, sampler, _ = self._look(
            thin, index, sampler, judged, passed, derive(self.seed, CHECKED, number, int(index[0]), 0)
        )
        if guided:
            passed, sampler, _ = self._look(
                light_tailed, index, sampler, judged, passed, derive(self.seed, CHECKED, number, int(index[0]), 2)
            )
        asked = passed & torch.tensor([guided or bool(doubt) for doubt in sampler.doubts], device=passed.device)
        look = functools.partial(uncovered, num_starts=STARTS_TO_CHECK_GUIDE if guided else STARTS_TO_CHECK)
        clear, sampler, missed = self._look(
            look, index, sampler, judged, asked, derive(self.seed, CHECKED, number, int(index[0]), 1)
        )
        passed = torch.where(asked, clear & (not many(missed)), passed)
        return passed, sampler.sure((passed & asked).nonzero().flatten())

    def _look(
        self, look: Callable[..., Any], index: Tensor, sampler: Sampler, judged: Judgement, asked: Tensor, seed: int
    ) -> tuple[Tensor, Sampler, Tensor]:
        """The rows among `asked` where a look from outside finds nothing, the sampler with what it has found, and where."""
        some = asked.nonzero().flatten()
        if len(some) == 0:
            return asked, sampler, asked[:0]
        at, log_z = index[some], judged.estimate.log_p[some]
        missed, where, cost = look(
            self.program, take(self.rows, at), sampler.take(some), log_z, seed=seed, memory=self.memory
        )
        self.spent[at] += cost
        clear = asked.clone()
        clear[some] = ~missed
        return clear, sampler.widen(some[missed], where[missed]), missed

    def _report(self, index: Tensor, sampler: Sampler, counts: Tensor, number: int) -> None:
        """Fresh draws for the rows at `index`, as many as `counts` says, in steps of sqrt 2.

        Where they fail, in rows of which the sampler has no doubt, as many as it takes are drawn anew, a few times at most.
        """
        steps = torch.ceil(2.0 * torch.log2(counts / self.level.least)).clamp_min(0.0).long()
        for step in steps.unique().tolist():
            count = min(round(self.level.least * 2 ** (step / 2)), self.level.most)
            retry, more, size = [], [], block_rows(count, self.dim)
            for piece, part in enumerate((steps == step).nonzero().flatten().split(size)):
                some = sampler.take(part)
                seed = derive(self.seed, REPORTED, number, step, piece, int(index[0]))
                judged = Judgement(self._draw(some, index[part], count, seed), self.target)
                estimate = judged.reported(self.target)
                self._put(index[part], estimate)
                # Where only the target was missed, the draws say well enough how many it takes.
                wanted = torch.maximum(SAFETY * judged.needed, torch.where(judged.passed, 1.2, 2.0) * count)
                sure = torch.tensor([not doubt for doubt in some.doubts], device=part.device)
                again = ~estimate.reliable & ~judged.broken & sure & (wanted <= self.level.most)
                retry.append(part[again])
                more.append(wanted[again])
            if len(left := torch.cat(retry)) and number < (TRIES - 1) * RETRIED:
                self._report(index[left], sampler.take(left), torch.cat(more), number + RETRIED)


def _rows(particles: Particles, index: Tensor) -> Particles:
    """The particles of some rows, without what belongs to all."""
    z = {name: value[:, index] for name, value in particles.z.items()}
    strata = None if particles.strata is None else particles.strata[:, index]
    return Particles(particles.log_weights[:, index], z, particles.rounding[index], strata=strata)
