"""Whether a sampler covers the posterior: what its own weights cannot say.

Weights are blind to mass that no draw has met. Two looks from outside: fresh starts climb to modes and find peaks
(`uncovered`); plain draws of the guide and of the prior find broad shoulders that have no mode of their own (`thin`). A
place is covered where a draw of the sampler there would have a weight p / (p(x) r) below e^3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_vae.memory import at_u, gradient_rows, in_chunks
from pyro_vae.posterior.ascent import ascend
from pyro_vae.posterior.engine import Sampler
from pyro_vae.posterior.local import COVERED, find_starts
from pyro_vae.posterior.modes import ASCENT_STEPS, DOUBTFUL_SHARE
from pyro_vae.program import Program
from pyro_vae.rows import Rows
from pyro_vae.seeds import Seed, seeded

STRETCH, STRETCHED = 4.0, 32
"""How far draws of the guide are moved away from its centre, and how many."""

TAIL = 0.02
"""Relative variance of a weight that may lie in tails which a few hundred draws do not reach."""

LOOKS = 8
"""Draws of the guide, and as many of the prior."""


def uncovered(
    program: Program, rows: Rows, sampler: Sampler, log_z: Tensor, *, num_starts: int, seed: Seed, memory: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows in which fresh starts reach density that a sampler does not cover.

    Args:
        program: model and guide.
        rows: N rows.
        sampler: of these rows.
        log_z: log p(x) by its draws, (N,).
        num_starts: of the ascent.
        seed: of the starts.
        memory: bytes.

    Returns:
        boolean (N,), where the weight p / (p(x) r) at some end within ln 100 of the best passes e^3; the end where it is
        largest, (N, D); and decoder evaluations, (N,).
    """
    with seeded(seed, rows[0].device):
        starts, log_joint = find_starts(program, rows, num_starts), program.log_joint(rows)
    missed, cost = torch.zeros_like(log_z, dtype=torch.bool), torch.zeros_like(log_z, dtype=torch.long)
    worst = starts[0].clone()
    for index in torch.arange(len(log_z), device=log_z.device).split(gradient_rows(program, rows, starts, memory)):
        row = torch.arange(len(index), device=index.device).repeat(num_starts)
        ends, values, spent = ascend(log_joint.take(index), row, starts[:, index].flatten(0, 1), ASCENT_STEPS)
        cost[index] += 2 * spent.unflatten(0, (num_starts, -1)).sum(0)
        values, ends = values.unflatten(0, (num_starts, -1)), ends.unflatten(0, (num_starts, -1))
        excess = values - log_z[index] - sampler.log_density(ends, index)
        deep = values > values.amax(0) + math.log(DOUBTFUL_SHARE)
        largest, which = excess.masked_fill(~deep, -torch.inf).max(0)
        missed[index], worst[index] = largest > COVERED, ends[which, torch.arange(len(index), device=index.device)]
    return missed, worst, cost


def light_tailed(
    program: Program, rows: Rows, sampler: Sampler, log_z: Tensor, *, seed: Seed, memory: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows whose guide falls off faster than the posterior: what its own weights show only when it is too late.

    Draws of the guide are stretched along one axis each, to `STRETCH` times their distance from the guide's centre; the
    density of such a point is q / `STRETCH`. They say what variance the weights p / (p(x) q) have where these exceed e.

    Args:
        program: model and guide.
        rows: N rows.
        sampler: of these rows, one that draws from the guide.
        log_z: log p(x) by its draws, (N,).
        seed: of the draws.
        memory: bytes.

    Returns:
        boolean (N,), where that variance passes `TAIL`; the point with most of it, (N, D); and decoder evaluations, (N,).
    """
    log_joint, guide = program.log_joint(rows), program.guide_density(rows)
    with torch.no_grad(), seeded(seed, rows[0].device):
        u = log_joint.flatten(program.sample(rows, STRETCHED)[0])
        log_q = guide(u) - math.log(STRETCH)
    axis = torch.arange(len(u), device=u.device) % u.shape[-1]
    along = torch.nn.functional.one_hot(axis, u.shape[-1])[:, None].to(u)
    u = u + (STRETCH - 1.0) * along * (u - u.mean(0))
    log_p = torch.nan_to_num(in_chunks(program, rows, {"u": u}, at_u, memory), nan=-torch.inf, posinf=-torch.inf) - log_z
    everyone = torch.arange(len(log_z), device=u.device)
    log_w = log_p - sampler.log_density(u, everyone)
    variance = torch.where(log_w > 1.0, torch.exp(log_p + log_w - log_q), 0.0)
    variance = torch.nan_to_num(variance, nan=0.0, posinf=torch.inf)
    return variance.mean(0) > TAIL, u[variance.argmax(0), everyone], torch.full_like(log_z, STRETCHED).long()


def thin(
    program: Program, rows: Rows, sampler: Sampler, log_z: Tensor, *, seed: Seed, memory: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows in which draws of the guide or the prior find mass that a sampler does not cover.

    Args:
        program: model and guide.
        rows: N rows.
        sampler: of these rows.
        log_z: log p(x) by its draws, (N,).
        seed: of the draws.
        memory: bytes.

    Returns:
        boolean (N,), where the importance weights of either say that more than 1 % of the mass lies where the sampler is
        thin; the draw with most of it, (N, D); and decoder evaluations, (N,).
    """
    log_joint, guide = program.log_joint(rows), program.guide_density(rows)
    with torch.no_grad(), seeded(seed, rows[0].device):
        drawn = [log_joint.flatten(draw(rows, LOOKS)[0]) for draw in (program.sample, program.sample_prior)]
        log_q = torch.cat([guide(drawn[0]), log_joint.prior(drawn[1])])
    u = torch.cat(drawn)
    log_p = torch.nan_to_num(in_chunks(program, rows, {"u": u}, at_u, memory), nan=-torch.inf, posinf=-torch.inf)
    everyone = torch.arange(len(log_z), device=u.device)
    missing = log_p - log_z - sampler.log_density(u, everyone) > COVERED
    mass = torch.nan_to_num(torch.where(missing, torch.exp(log_p - log_q - log_z), 0.0), nan=0.0, posinf=0.0) / LOOKS
    share = mass.unflatten(0, (2, LOOKS)).sum(1).amax(0)
    cost = torch.full_like(log_z, 2 * LOOKS).long()
    return share > DOUBTFUL_SHARE, u[mass.argmax(0), everyone], cost
