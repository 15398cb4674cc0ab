"""Annealed importance sampling (Neal 2001, arXiv:physics/9803008).

Chains begin at draws of a start r(u) and go through bridges f_t = r^(1 - b_t) p(x, .)^b_t from b_0 = 0 to b_T = 1, one
Hamiltonian transition at each. The weight

    log w = sum_t (b_t - b_{t-1}) (log p(x, u_{t-1}) - log r(u_{t-1}))

is unbiased for p(x), whatever the transitions, as long as they are not tuned on the run that is reported. So a pilot run
tunes the step sizes, row by row and temperature by temperature; they are frozen, and a fresh run is reported. The number
of temperatures is doubled until the pilot's variance of log w over the chains is below 1 in every row, or the budget is
spent. From a start that knows the posterior (the mixture of `laplace`) few temperatures serve; from the prior, many.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae.log_joint import LogJoint
from pyro_vae.memory import BUDGET
from pyro_vae.posterior.hmc import Bridge, LogStart, transition
from pyro_vae.posterior.mixture import mixture_of
from pyro_vae.posterior.particles import Particles, rounding_error
from pyro_vae.program import Program
from pyro_vae.rows import Data, Rows, as_rows, positive, take
from pyro_vae.seeds import Seed, seeded

TARGET_ACCEPTANCE, FIRST_STEPS = 0.8, 16
PILOT, REPORTED = 0, 1
"""Sub-streams of the seed."""


@dataclass(frozen=True)
class Start:
    """Where chains begin: draws u (K, N, D), their log-density, scales (N, D), and how temperatures are spaced.

    Attributes:
        draw: K -> (K, N, D), by the ambient generator.
        log_density: see `LogStart`.
        scale: standard deviations, (N, D), that precondition the transitions.
        power: b_t = (t / T) ^ power; above 1 it lingers at the start, where a wide start needs it.
    """

    draw: Callable[[int], Tensor]
    log_density: LogStart
    scale: Tensor
    power: float


def at_prior(program: Program, rows: Rows, memory: int) -> Start:
    """Begin at the prior: the path of the rate-distortion curve, and the slow one."""
    log_joint = program.log_joint(rows)
    scale = log_joint.flatten(program.sample_prior(rows, 64)[0]).std(0)

    def log_density(u: Tensor, part: slice) -> Tensor:
        return program.log_joint(take(rows, part)).prior(u)

    return Start(lambda count: log_joint.flatten(program.sample_prior(rows, count)[0]), log_density, scale, 3.0)


def at_modes(program: Program, rows: Rows, memory: int) -> Start:
    """Begin at the mixture of `laplace`, from four starts a row."""
    log_joint = program.log_joint(rows)
    mixture = mixture_of(program, rows, log_joint, 4, 100, memory)
    inverse = torch.linalg.inv(mixture.factor[0])
    scale = inverse.square().sum(-2).sqrt().to(rows[0].dtype)

    def log_density(u: Tensor, part: slice) -> Tensor:
        return mixture.rows(part).log_density(u)

    # Independent draws, not the strata of `laplace`: the chains of a row must be alike.
    return Start(lambda count: mixture.draw_independent(count, rows[0].dtype), log_density, scale, 1.0)


def annealed(
    program: Program,
    x: Data,
    *,
    num_particles: int = 16,
    seed: Seed = 0,
    memory: int = BUDGET,
    start: Callable[[Program, Rows, int], Start] = at_modes,
    num_leapfrog: int = 5,
    most_steps: int = 256,
) -> Particles:
    """K annealed chains for each row.

    Args:
        program: model and guide.
        x: rows, (N, ...).
        num_particles: K.
        seed: of everything.
        memory: byte budget of the evaluations.
        start: `at_modes` or `at_prior`.
        num_leapfrog: leapfrog steps of a transition.
        most_steps: T at most; doubled from 16 until the variance of log w is below 1.

    Returns:
        Particles at the chains' ends with log w in nats; `info["temperatures"]` is T.
    """
    positive(num_particles=num_particles, memory=memory, num_leapfrog=num_leapfrog, most_steps=most_steps)
    rows = as_rows(x)
    log_joint = program.log_joint(rows)
    with seeded(seed, rows[0].device):
        begin = start(program, rows, memory)
        bridge = Bridge(program, rows, begin.log_density, begin.draw(num_particles), memory)
    num_steps, spent = min(FIRST_STEPS, most_steps), 0
    while True:
        with seeded(seed, rows[0].device, PILOT, num_steps):
            pilot, steps, *_ = _run(bridge, begin, num_particles, num_steps, num_leapfrog, None)
        spent += num_steps
        if num_steps * 2 > most_steps or bool((pilot.nan_to_num(neginf=-1e9).var(0) < 1.0).all()):
            break
        num_steps *= 2
    with seeded(seed, rows[0].device, REPORTED, num_steps):
        log_weights, _, u, size = _run(bridge, begin, num_particles, num_steps, num_leapfrog, steps)
    evaluations = num_particles * num_leapfrog * (spent + num_steps)
    return Particles(
        log_weights,
        _sites(log_joint, u),
        rounding_error(size, size, rows[0].dtype),
        {"engine": "annealed", "evaluations": evaluations, "temperatures": num_steps},
    )


def _run(
    bridge: Bridge, begin: Start, num_chains: int, num_steps: int, num_leapfrog: int, steps: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All temperatures: log-weights (K, N), the step sizes used (T, N), the ends (K, N, D), and log p there.

    Step sizes are adapted on the way where `steps` is None, and taken from it otherwise.
    """
    ladder = torch.linspace(0.0, 1.0, num_steps + 1, dtype=torch.float64) ** begin.power
    points = bridge(begin.draw(num_chains))
    log_weights = torch.zeros_like(points.log_p)
    step = torch.full((points.u.shape[1],), 0.5 * points.u.shape[-1] ** -0.25, dtype=torch.float64, device=points.u.device)
    used = []
    for t in range(1, num_steps + 1):
        before, beta = float(ladder[t - 1]), float(ladder[t])
        log_weights = log_weights + (beta - before) * (points.log_p - points.log_r)
        step = step if steps is None else steps[t - 1]
        used.append(step)
        points, accepted = transition(bridge, points, beta, step, begin.scale, num_leapfrog)
        if steps is None:
            step = step * torch.exp(0.5 * (accepted.mean(0) - TARGET_ACCEPTANCE))
    return log_weights, torch.stack(used), points.u, points.log_p


def _sites(log_joint: LogJoint, u: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        return log_joint.unflatten(u)
