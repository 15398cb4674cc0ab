"""K particles through a callable that was written for one.

A particle is a full set of latents for all rows. Running a program K times is always right and always slow; a left-most
batch dimension is fast, but a network may refuse it (a convolution) or take it and be wrong (`BatchNorm1d` on (K, N, D)
normalises over the wrong dimension without a word). Copies of the rows work for any network that treats rows alone.
Which one serves a program is found out by comparison with single runs.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyro
import torch
from torch import Tensor

from pyro_vae.rows import Rows, positive

COPIED = 2**24
"""Draws that need copies of the rows are made in pieces of at most this many copied numbers, or of one particle."""

KEPT = 4
"""A program remembers its layouts for so many shapes of rows and states of the parameters."""

Values = dict[str, Tensor]
PyroCallable = Callable[..., Any]


class Layout(enum.Enum):
    """How the K particles are laid out."""

    BATCHED = "a left-most batch dimension"
    TILED = "K copies of the rows"
    LOOPED = "one run a particle"


class Densities(Protocol):
    """An effect handler that adds up log-densities while a callable runs inside it."""

    latent: Tensor | float
    observed: Tensor | float
    values: Values

    def __enter__(self) -> Densities: ...

    def __exit__(self, *error: object) -> bool | None: ...


@dataclass(frozen=True)
class Run:
    """Densities and latents of K particles: log p or q of the latents, log-likelihood, values (K, N, ...)."""

    latent: Tensor
    observed: Tensor
    values: Values


def run(
    function: PyroCallable,
    rows: Rows,
    num_particles: int,
    layout: Layout,
    handler: Callable[[Values], Densities],
    particles: Mapping[str, Tensor] | None = None,
) -> Run:
    """Run `function(*rows)` for `num_particles` particles.

    Args:
        function: a Pyro model or guide.
        rows: N rows.
        num_particles: K.
        layout: how to run them.
        handler: makes the handler of one run from that run's share of `particles`.
        particles: tensors (K, N, ...), what the handlers place; None where they draw.
    """
    particles = particles or {}
    shape = (num_particles, len(rows[0]))
    if layout is Layout.LOOPED or num_particles == 1:
        runs = []
        for k in range(num_particles):
            with handler({name: value[k] for name, value in particles.items()}) as densities:
                function(*rows)
            runs.append(densities)
        return Run(
            torch.stack([torch.as_tensor(d.latent).expand(shape[1:]) for d in runs]),
            torch.stack([torch.as_tensor(d.observed).expand(shape[1:]) for d in runs]),
            {name: torch.stack([d.values[name] for d in runs]) for name in runs[0].values},
        )
    if layout is Layout.TILED:
        with handler({name: value.flatten(0, 1) for name, value in particles.items()}) as tiled:
            function(*(part.repeat(num_particles, *(1,) * (part.dim() - 1)) for part in rows))
        flat = (shape[0] * shape[1],)
        return Run(
            torch.as_tensor(tiled.latent).expand(flat).unflatten(0, shape),
            torch.as_tensor(tiled.observed).expand(flat).unflatten(0, shape),
            {name: value.unflatten(0, shape) for name, value in tiled.values.items()},
        )
    with handler(dict(particles)) as batched, pyro.plate("_particles", num_particles, dim=-2):
        function(*rows)
    return Run(
        torch.as_tensor(batched.latent).expand(shape), torch.as_tensor(batched.observed).expand(shape), batched.values
    )


def draw(function: PyroCallable, rows: Rows, num_particles: int, layout: Layout, handler: Callable[[], Densities]) -> Run:
    """`num_particles` draws by torch's ambient generator: `run` with nothing placed, in pieces where it copies the rows.

    The pieces follow from shapes alone and not from any byte budget, which must not change what is drawn.
    """
    positive(num_particles=num_particles)
    copied = max(1, sum(part.numel() for part in rows))
    step = max(1, COPIED // copied) if layout is Layout.TILED else num_particles
    sizes = [min(step, num_particles - first) for first in range(0, num_particles, step)]
    runs = [run(function, rows, size, layout, lambda _: handler()) for size in sizes]
    return Run(
        torch.cat([part.latent for part in runs]),
        torch.cat([part.observed for part in runs]),
        {name: torch.cat([part.values[name] for part in runs]) for name in runs[0].values},
    )


def find_layout(
    function: PyroCallable, probes: Sequence[tuple[Rows, Values]], handler: Callable[[Values], Densities]
) -> Layout:
    """The fastest layout whose densities equal those of single runs, on every probe.

    Args:
        function: a Pyro model or guide.
        probes: rows and latents (K, N, ...) for them. More than one N is needed: `BatchNorm1d(3)` takes (K, 3, D) for what
            it knows, and nothing is wrong to see before it is trained.
        handler: makes the handler of one run from that run's share of the latents.
    """

    def densities(probe: tuple[Rows, Values], layout: Layout) -> Tensor:
        rows, particles = probe
        done = run(function, rows, len(next(iter(particles.values()))), layout, handler, particles)
        return done.latent + done.observed

    expected = [densities(probe, Layout.LOOPED) for probe in probes]
    if all(bool(part.isnan().all()) for part in expected):
        return Layout.LOOPED  # nothing to compare with
    # A wrong network is off by far more than rounding, unless it is hardly trained yet.
    tolerance = 1e2 * torch.finfo(probes[0][0][0].dtype).eps
    for layout in (Layout.BATCHED, Layout.TILED):
        try:
            tried = [densities(probe, layout) for probe in probes]
        except Exception:  # whatever a network raises that cannot take this layout
            continue
        pairs = zip(tried, expected, strict=True)
        if all(torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True) for a, b in pairs):
            return layout
    return Layout.LOOPED
