"""What a fit is judged by: rows in full precision and `eval()`, with the same noise each time so that figures compare."""

from __future__ import annotations

import torch

from pyro_vae.learning.batches import Batches
from pyro_vae.learning.objectives import ELBO
from pyro_vae.learning.precision import Precision
from pyro_vae.parameters import evaluating
from pyro_vae.program import Program
from pyro_vae.seeds import Seed, seeded
from pyro_vae.team import ALONE, Team

VALID, KL = 1, 3
"""Sub-streams of a fit's random numbers; `training` has the others."""

SOME = 1024
"""Rows that the end of a fit looks at."""


def true_elbo(program: Program, valid: Batches, seed: Seed, team: Team = ALONE) -> float:
    """The ELBO (beta = 1) of a mean row of `valid`, in nats.

    Each rank of a team judges whole batches, whose noise is keyed by their numbers, so that a team finds what one process
    finds, up to the rounding of the sum.
    """
    elbo, order = ELBO(), torch.arange(valid.num_rows)
    total = torch.zeros((), dtype=torch.float64, device=valid.device)
    with torch.no_grad(), evaluating(program.modules_found()):
        for number in team.turns(valid.num_batches):
            with seeded(seed, valid.device, VALID, number):
                total += elbo.rows(program.model, program.guide, *valid.at(order, number)).double().sum()
    return team.add(total).item() / valid.num_rows


def mean_kl(program: Program, batches: Batches, seed: Seed) -> float:
    """Mean KL(q(z | x) || p(z)) of some rows, in nats, so that a collapsed posterior does not go unseen."""
    with torch.no_grad(), evaluating(program.modules_found()), seeded(seed, batches.device, KL):
        return ELBO().kl_rows(program.model, program.guide, *batches.spread(SOME)).double().mean().item()


def precision_gap(program: Program, batches: Batches, seed: Seed, precision: Precision) -> float | None:
    """Mean ELBO of some rows in coarse `precision`, less the same in full, in nats a row; None if that is full."""
    if precision.name == "full":
        return None
    found = []
    for arithmetic in (precision, Precision("full", batches.device)):
        with torch.no_grad(), evaluating(program.modules_found()), seeded(seed, batches.device, KL), arithmetic.writing():
            rows = ELBO().rows(program.model, program.guide, *batches.spread(SOME))
            found.append(rows.double().mean().item())
    return found[0] - found[1]
