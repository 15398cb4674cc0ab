"""Draws of p(z | x) for an export, whatever they come from, and what is known of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_vae.evidence.estimate import Estimate
from pyro_vae.memory import block_rows
from pyro_vae.parameters import judging
from pyro_vae.posterior.chains import Hamiltonian
from pyro_vae.posterior.engine import Engine
from pyro_vae.posterior.particles import Particles
from pyro_vae.posterior.proposals import from_guide
from pyro_vae.program import Program
from pyro_vae.rows import Rows, even_blocks, take
from pyro_vae.seeds import derive

MORE = 4
"""Particles for each draw that is taken from them."""

OWN_WEIGHT = "(log weight)"
"""Goes through resampling as if it were a latent; no Pyro site is called so."""

DRAWN, AGAIN = 0, 1
"""Sub-streams of a block's seed."""


@dataclass(frozen=True)
class PosteriorDraws:
    """C chains of S draws for each of N rows.

    Attributes:
        z: latents by site name, each (C, S, N, *event_shape).
        drawn: what is known of each draw, (C, S, N).
        by_row: what is known of each row, (N,).
        method: what made the draws.
        estimate: log p(x) from the weights, where there are any.
    """

    z: Mapping[str, Tensor]
    drawn: Mapping[str, Tensor]
    by_row: Mapping[str, Tensor]
    method: str
    estimate: Estimate | None = None


def by_chains(
    method: Hamiltonian, program: Program, rows: Rows, num_chains: int, num_draws: int, seed: int, memory: int
) -> PosteriorDraws:
    """Hamiltonian chains; statistics under the names that ArviZ's schema has for them."""
    chains = method(program, rows, num_chains=num_chains, num_draws=num_draws, seed=seed, memory=memory)
    drawn = {"lp": chains.log_joint, "acceptance_rate": chains.acceptance}
    steps = torch.full_like(chains.step_size, chains.num_leapfrog, dtype=torch.long)
    return PosteriorDraws(chains.z, drawn, {"step_size": chains.step_size, "n_steps": steps}, "hamiltonian")


def by_particles(method: Engine, program: Program, rows: Rows, num_draws: int, seed: int, memory: int) -> PosteriorDraws:
    """Particles of an engine, drawn again by their weights: one chain of S."""
    count = max(MORE * num_draws, method.default_particles)

    def particles(part: Rows, key: int) -> Particles:
        return method(program, part, num_particles=count, seed=derive(key, DRAWN), memory=memory)

    def again(found: Particles, key: int) -> dict[str, Tensor]:
        weighed = replace(found, z={**found.z, OWN_WEIGHT: found.log_weights})
        return weighed.resample(num_draws, seed=derive(key, AGAIN))

    return _weighted(program, rows, particles, again, count, seed, method.name)


def by_guide(program: Program, rows: Rows, num_draws: int, seed: int, memory: int) -> PosteriorDraws:
    """Draws of the guide as they are, with the weights that would mend them: one chain of S."""

    def particles(part: Rows, key: int) -> Particles:
        return from_guide(program, part, num_particles=num_draws, seed=key, memory=memory)

    def again(found: Particles, _: int) -> dict[str, Tensor]:
        return {**found.z, OWN_WEIGHT: found.log_weights}

    return _weighted(program, rows, particles, again, num_draws, seed, "guide")


def _weighted(
    program: Program,
    rows: Rows,
    particles: Callable[[Rows, int], Particles],
    again: Callable[[Particles, int], dict[str, Tensor]],
    count: int,
    seed: int,
    name: str,
) -> PosteriorDraws:
    """Block by block of rows, each reduced to draws and an estimate before the next begins."""
    draws, estimates = [], []
    with judging(program.modules_found()):
        most = block_rows(count, program.log_joint(take(rows, slice(1))).dim)
        for block, index in enumerate(even_blocks(torch.arange(len(rows[0]), device=rows[0].device), most)):
            found = particles(take(rows, index), derive(seed, block))
            estimates.append(Estimate.from_particles(found))
            draws.append(again(found, derive(seed, block)))
    z = {site: torch.cat([part[site] for part in draws], dim=1)[None] for site in draws[0]}
    estimate = Estimate.cat(estimates)
    drawn, by_row = {"log_weight": z.pop(OWN_WEIGHT)}, {"pareto_k": estimate.pareto_k, "ess": estimate.ess}
    return PosteriorDraws(z, drawn, by_row, name, estimate)
