"""Draws of what a program observes, x ~ p(x | z), for latents that are given.

The program's own observed sites are freed (conditioned on nothing) and drawn while the latents keep their values, in the
order of the model: a site that is computed from what another returned sees its draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_vae.layouts import COPIED, Layout, PyroCallable, Values
from pyro_vae.memory import BLOCK_ROWS
from pyro_vae.parameters import judging
from pyro_vae.program import Program, record
from pyro_vae.rows import Rows, even_blocks, take
from pyro_vae.seeds import Seed, seeded


def draw_observed(program: Program, rows: Rows, z: Values, names: Sequence[str], seed: Seed = 0) -> Values:
    """One draw of the observed sites for each particle and row.

    Blocks of rows and pieces of particles follow from shapes alone, so that the draws depend on nothing but the seed.

    Args:
        program: a program that fits.
        rows: N rows; their conditions are kept, what the sites observe of them is not looked at.
        z: latents by name, each (K, N, *event_shape), in their own support.
        names: the observed sites to draw.
        seed: of the draws.

    Returns:
        draws by site name, each (K, N, *event_shape).

    Raises:
        NotImplementedError: a distribution that cannot be drawn from.
    """
    layout, num_particles = program.layout(rows).model, len(next(iter(z.values())))
    nothing: Any = dict.fromkeys(names)
    freed = pyro.condition(program.model, data=nothing)
    blocks = []
    with torch.no_grad(), judging(program.modules_found()):
        for block, index in enumerate(even_blocks(torch.arange(len(rows[0]), device=rows[0].device), BLOCK_ROWS)):
            part, given = take(rows, index), {name: value[:, index] for name, value in z.items()}
            each = sum(value.numel() for value in part) + sum(value[0].numel() for value in given.values())
            step = 1 if layout is Layout.LOOPED else max(1, COPIED // 4 // each)
            with seeded(seed, index.device, block):
                pieces = [
                    _piece(freed, part, {name: value[k : k + step] for name, value in given.items()}, names, layout)
                    for k in range(0, num_particles, step)
                ]
            blocks.append({name: torch.cat([piece[name] for piece in pieces]) for name in names})
    return {name: torch.cat([block[name] for block in blocks], dim=1) for name in names}


def _piece(freed: PyroCallable, rows: Rows, z: Values, names: Sequence[str], layout: Layout) -> Values:
    """Draws for k particles at once, laid out as the networks need it."""
    count, num_rows = next(iter(z.values())).shape[:2]
    if count > 1 and layout is Layout.BATCHED:
        sites: Any = record(freed, rows, z, num_particles=count)
        return {name: sites[name].value for name in names}
    copies = tuple(part.repeat(count, *(1,) * (part.dim() - 1)) for part in rows)
    sites = record(freed, copies, {name: value.flatten(0, 1) for name, value in z.items()})
    return {name: sites[name].value.unflatten(0, (count, num_rows)) for name in names}


def observed_values(program: Program, rows: Rows, z: Values, names: Sequence[str]) -> dict[str, Tensor]:
    """What the sites observe of the rows, each (N, *event_shape).

    Args:
        program: a program that fits.
        rows: N rows.
        z: latents by name, each (N, *event_shape): what is observed does not depend on them.
        names: of the observed sites.
    """
    with torch.no_grad(), seeded(0, rows[0].device), judging(program.modules_found()):
        blocks = []
        for index in even_blocks(torch.arange(len(rows[0]), device=rows[0].device), BLOCK_ROWS):
            sites = record(program.model, take(rows, index), {name: value[index] for name, value in z.items()})
            blocks.append({name: sites[name].value for name in names})
    return {name: torch.cat([block[name] for block in blocks]) for name in names}
