"""Missing values drawn from their posterior: z ~ p(z | x_seen), then x_missing ~ p(x_missing | z, x_seen).

The latents are particles of an engine in `pyro_vae.posterior`, drawn again by their weights (Mattei & Frellsen 2018,
arXiv:1802.04826, sec. 3.2): the guide alone would give the draws of the guide.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_vae.model.families.partial import complete
from pyro_vae.parameters import judging
from pyro_vae.posterior.engine import Engine
from pyro_vae.program import Program
from pyro_vae.rows import Rows, row_blocks, take
from pyro_vae.seeds import Seed, derive, seeded

BLOCK = 256
"""Rows at a time."""

LATENTS, VALUES = 0, 1
"""Sub-streams of the seed."""


def draw_missing(
    program: Program, p_x: Any, rows: Rows, num_draws: int, method: Engine, num_particles: int | None, seed: Seed
) -> Tensor:
    """M draws of the rows' missing values, what was seen kept: (M, N, *event_shape).

    Args:
        program: with one latent "z".
        p_x: (z, *given) -> p(x | z), whose family can complete a row.
        rows: x, NaN where missing, and conditions.
        num_draws: M.
        method: the engine that finds z.
        num_particles: K, None for the engine's default.
        seed: of all draws.
    """
    blocks = []
    for number, at in enumerate(row_blocks(len(rows[0]), BLOCK)):
        x, *given = part = take(rows, at)
        particles = method(program, part, num_particles=num_particles, seed=derive(seed, number, LATENTS))
        z = particles.resample(num_draws, seed=derive(seed, number, LATENTS, 1))["z"]
        with (
            torch.no_grad(),
            judging(program.modules_found()),
            seeded(derive(seed, number, VALUES), x.device),
        ):
            blocks.append(torch.stack([complete(p_x(one, *given), x) for one in z]))
    return torch.cat(blocks, dim=1)
