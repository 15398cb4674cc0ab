"""Annealed importance sampling (Neal 2001, arXiv:physics/9803008).

Chains begin at draws of a start r(u) and go through bridges f_t = r^(1 - b_t) p(x, .)^b_t from b_0 = 0 to b_T = 1, one
Hamiltonian transition at each. The weight

    log w = sum_t (b_t - b_{t-1}) (log p(x, u_{t-1}) - log r(u_{t-1}))

is unbiased for p(x), whatever the transitions, as long as they are not tuned on the run that is reported. So a pilot run
tunes the step sizes, row by row and temperature by temperature; they are frozen, and fresh runs are reported. The number of
temperatures of a row is doubled until the pilot's variance of log w over its chains is below 1, or the budget is spent.
From a start that knows the posterior (the mixture of `laplace`) few temperatures serve; from the prior, many.

A run backwards from a draw of the posterior gives a weight whose inverse is unbiased for 1 / p(x) (Grosse, Ghahramani &
Adams 2015, arXiv:1511.02543); among forward runs it makes the mean of log p-hat an upper bound.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae.layouts import Values
from pyro_vae.memory import BUDGET
from pyro_vae.posterior.engine import Engine, Sampler
from pyro_vae.posterior.hmc import Bridge, Points, transition
from pyro_vae.posterior.particles import Particles, rounding_error
from pyro_vae.posterior.starts import Begin, Start, at_modes
from pyro_vae.program import Program
from pyro_vae.rows import Rows, positive, take
from pyro_vae.seeds import Seed, derive, seeded

TARGET_ACCEPTANCE, FIRST_STEPS, PILOT_CHAINS = 0.8, 16, 16

Observer = Callable[[float, Points, Tensor], None]
"""Called at each temperature with b_t, the chains' points there and their log-weights so far, (K, N)."""


@dataclass(frozen=True)
class Schedule:
    """Rows that share a number of temperatures T: which, (n,), and the frozen step sizes, (T, n)."""

    index: Tensor
    steps: Tensor


class AnnealedSampler(Sampler):
    """Annealed chains with frozen temperatures and step sizes."""

    def __init__(
        self, program: Program, rows: Rows, start: Start, schedules: list[Schedule], engine: Annealed, memory: int
    ) -> None:
        self.program, self.rows, self.start, self.schedules = program, rows, start, schedules
        self.engine, self.memory = engine, memory
        self.cost, self.doubts = start.cost, start.doubts

    @property
    def temperatures(self) -> Tensor:
        """T of each row, (N,), integers."""
        out = torch.zeros(len(self.rows[0]), dtype=torch.long, device=self.rows[0].device)
        for schedule in self.schedules:
            out[schedule.index] = len(schedule.steps)
        return out

    def draw(
        self, num_particles: int, seed: Seed, exact: Values | None = None, observer: Observer | None = None
    ) -> Particles:
        """See `Sampler.draw`: K chains; `exact` begins one that runs backwards."""
        log_joint, device = self.program.log_joint(self.rows), self.rows[0].device
        end = log_joint.flatten({k: v[None] for k, v in exact.items()}) if exact is not None else None
        u = torch.empty(num_particles, len(self.rows[0]), log_joint.dim, dtype=self.rows[0].dtype, device=device)
        log_weights = torch.empty(u.shape[:2], dtype=torch.float64, device=device)
        size = torch.zeros_like(log_weights)
        for schedule in self.schedules:
            start, at = self.start.take(schedule.index), schedule.index
            path = Path(self.program, take(self.rows, at), start, self.engine, num_particles, self.memory)
            with seeded(derive(seed, len(schedule.steps)), device):
                log_weights[:, at], points = path.forward(num_particles, schedule.steps, observer)
                if end is not None:
                    log_weights[0, at] = path.backward(end[:, at], schedule.steps)[0]
            u[:, at], size[:, at] = points.u, points.log_p
        if end is not None:
            u[0] = end[0]
        with torch.no_grad():
            z = log_joint.unflatten(u)
        each = 2 * (self.temperatures * self.engine.num_leapfrog + 1)  # a forward and a backward pass
        info = {
            "engine": "annealed",
            "evaluations": self.cost + num_particles * each,
            "temperatures": self.temperatures,
            "doubts": self.doubts,
        }
        return Particles(log_weights, z, rounding_error(size, size, u.dtype), info=info)

    def log_density(self, u: Tensor, index: Tensor) -> Tensor:
        """See `Sampler.log_density`: that of the start."""
        with torch.no_grad():
            return self.start.take(index).log_density(u)

    def take(self, index: Tensor) -> AnnealedSampler:
        """See `Sampler.take`."""
        place = torch.full((len(self.rows[0]),), -1, device=index.device)
        place[index] = torch.arange(len(index), device=index.device)
        schedules = []
        for schedule in self.schedules:
            mine = place[schedule.index] >= 0
            if bool(mine.any()):
                schedules.append(Schedule(place[schedule.index[mine]], schedule.steps[:, mine]))
        rows, start = take(self.rows, index), self.start.take(index)
        some = AnnealedSampler(self.program, rows, start, schedules, self.engine, self.memory)
        some.doubts = tuple(self.doubts[i] for i in index.tolist())
        return some


@dataclass(frozen=True)
class Annealed(Engine):
    """Annealed importance sampling with Hamiltonian transitions.

    Attributes:
        start: where chains begin: `at_modes`, `at_guide`, `at_prior` or `at_points`.
        num_leapfrog: leapfrog steps of a transition.
        most_steps: T at most; doubled from `first_steps` until the variance of log w is below 1.
        first_steps: T at first; that of `most_steps` gives all rows the same temperatures.
        power: b_t = (t / T) ^ power; None for the start's own. Above 1 it lingers at the start, where a wide one needs it.
    """

    start: Begin = at_modes
    num_leapfrog: int = 2
    most_steps: int = 256
    first_steps: int = FIRST_STEPS
    power: float | None = None
    name = "annealed"
    default_particles = 32

    def prepare(
        self, program: Program, rows: Rows, *, seed: Seed = 0, memory: int = BUDGET, near: Tensor | None = None
    ) -> AnnealedSampler:
        """See `Engine.prepare`: temperatures and step sizes, by pilot runs of 16 chains; the start has `near`."""
        positive(num_leapfrog=self.num_leapfrog, most_steps=self.most_steps, first_steps=self.first_steps)
        device = rows[0].device
        with seeded(derive(seed, 0), device):
            start = self.start(program, rows, memory) if near is None else self.start(program, rows, memory, near=near)
        left, schedules, num_steps = torch.arange(len(rows[0]), device=device), [], min(self.first_steps, self.most_steps)
        while len(left):
            some = start.take(left)
            path = Path(program, take(rows, left), some, self, PILOT_CHAINS, memory)
            with seeded(derive(seed, num_steps), device):
                log_weights, steps = path.tune(PILOT_CHAINS, num_steps)
            start.cost[left] += 2 * PILOT_CHAINS * (num_steps * self.num_leapfrog + 1)
            done = log_weights.nan_to_num(nan=-1e9, neginf=-1e9).var(0) < 1.0
            if num_steps * 2 > self.most_steps:
                done = torch.ones_like(done)
            schedules.append(Schedule(left[done], steps[:, done]))
            left, num_steps = left[~done], 2 * num_steps
        schedules = [schedule for schedule in schedules if len(schedule.index)]
        return AnnealedSampler(program, rows, start, schedules, self, memory)


annealed = Annealed()


class Path:
    """The bridges between a start and the joint of some rows, and chains along them."""

    def __init__(self, program: Program, rows: Rows, start: Start, engine: Annealed, num_chains: int, memory: int) -> None:
        self.start, self.num_leapfrog = start, engine.num_leapfrog
        self.power = start.power if engine.power is None else engine.power
        log_joint = program.log_joint(rows)
        like = rows[0].new_zeros(num_chains, len(rows[0]), log_joint.dim)
        self.bridge = Bridge(program, rows, lambda index: start.take(index).log_density, like, memory)

    def ladder(self, num_steps: int) -> list[float]:
        """b_0 .. b_T."""
        steps = torch.linspace(0.0, 1.0, num_steps + 1, dtype=torch.float64) ** self.power
        return [float(b) for b in steps]

    def tune(self, num_chains: int, num_steps: int) -> tuple[Tensor, Tensor]:
        """A pilot run that adapts step sizes on its way: its log-weights (K, N), and the step sizes used, (T, N)."""
        points = self.bridge(self.start.draw(num_chains))
        first = 0.5 * points.u.shape[-1] ** -0.25
        step = torch.full((points.u.shape[1],), first, dtype=torch.float64, device=points.u.device)
        log_weights, used, ladder = torch.zeros_like(points.log_p), [], self.ladder(num_steps)
        for before, beta in itertools.pairwise(ladder):
            log_weights = log_weights + (beta - before) * (points.log_p - points.log_r)
            used.append(step)
            points, accepted = transition(self.bridge, points, beta, step, self.start.shape, self.num_leapfrog)
            step = step * torch.exp(0.5 * (accepted.mean(0) - TARGET_ACCEPTANCE))
        return log_weights, torch.stack(used)

    def forward(self, num_chains: int, steps: Tensor, observer: Observer | None = None) -> tuple[Tensor, Points]:
        """Chains from the start to the posterior, step sizes (T, N) as given: log-weights (K, N) and where they end."""
        points, ladder = self.bridge(self.start.draw(num_chains)), self.ladder(len(steps))
        log_weights = torch.zeros_like(points.log_p)
        for before, beta, step in zip(ladder, ladder[1:], steps, strict=False):
            log_weights = log_weights + (beta - before) * (points.log_p - points.log_r)
            points, _ = transition(self.bridge, points, beta, step, self.start.shape, self.num_leapfrog)
            if observer is not None:
                observer(beta, points, log_weights)
        return log_weights, points

    def backward(self, u: Tensor, steps: Tensor) -> Tensor:
        """Chains from posterior draws u (K, N, D) to the start: the log-weights of the same paths run forwards, (K, N)."""
        points, ladder = self.bridge(u), self.ladder(len(steps))
        log_weights = torch.zeros_like(points.log_p)
        for before, beta, step in reversed(list(zip(ladder, ladder[1:], steps, strict=False))):
            points, _ = transition(self.bridge, points, beta, step, self.start.shape, self.num_leapfrog)
            log_weights = log_weights + (beta - before) * (points.log_p - points.log_r)
        return log_weights
