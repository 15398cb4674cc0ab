"""What a program observes: which of its rows, and whether their likelihood is a density or a mass function.

A probability of discrete data has no unit, so it can be given in bits for each number that was observed,

    -log p(x) / (d ln 2),

with d the number of these; a density has the unit of 1 / x, and none of that means anything. d is counted row by row,
because a likelihood may take NaN for a value that is missing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import MaskedDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_vae.evidence.estimate import DENSITY
from pyro_vae.parameters import judging
from pyro_vae.program import Program, record
from pyro_vae.rows import Rows, probe, row_blocks, take
from pyro_vae.seeds import seeded
from pyro_vae.sites import Shape, Site

FEW = 3
"""Rows that show what a program observes."""


@dataclass(frozen=True)
class Observed:
    """One observed site.

    Attributes:
        name: of the site.
        family: name of its distribution.
        shape: of one row's value.
        discrete: whether it has a mass function; False for densities and for `pyro.factor`.
        masked: whether a mask, of a handler or a distribution, takes part of it out of log p(x).
        place: which tensor of the rows it is, in whatever shape and dtype; None if it is none of them.
        unit: how many numbers of it make one dimension: C in one-hot codes of C classes, else 1.
    """

    name: str
    family: str
    shape: Shape
    discrete: bool
    masked: bool
    place: int | None
    unit: int

    @classmethod
    def of(cls, site: Site, rows: Rows) -> Observed:
        """What a site of a run on `rows` is."""
        discrete, unit = _is_discrete(site.distribution.support), 1
        if discrete and _innermost(site.distribution.support) is constraints.one_hot:
            unit = site.event_shape[-1]
        place, masked = _place(rows, site.value), _is_masked(site)
        return cls(site.name, site.family, site.event_shape, discrete, masked, place, unit)

    @property
    def dimensions(self) -> int:
        """Dimensions of a row without missing values."""
        return math.prod(self.shape) // self.unit

    def count(self, rows: Rows) -> Tensor:
        """Dimensions of each row that are not NaN, (N,), integer."""
        counts = torch.full((len(rows[0]),), self.dimensions, dtype=torch.long, device=rows[0].device)
        if self.place is None or not rows[self.place].dtype.is_floating_point:
            return counts
        part = rows[self.place]
        for at in row_blocks(len(part)):
            seen = ~part[at].isnan().reshape(len(part[at]), -1, self.unit).any(-1)
            counts[at] = seen.sum(-1)
        return counts


def observed_sites(program: Program, rows: Rows) -> tuple[Observed, ...]:
    """What `program` observes of rows like the first of `rows`, by one run on `FEW` of them.

    Args:
        program: one that fits, see `Program.check`.
        rows: that it can be run on.
    """
    few = probe(rows, FEW)
    with torch.no_grad(), seeded(0, few[0].device), judging(program.modules_found()):
        latents = {name: site.value for name, site in record(program.guide, few).items()}
        sites = record(program.model, few, latents).values()
    return tuple(Observed.of(site, few) for site in sites if site.observed)


def discrete_dimensions(program: Program, rows: Rows, usable: Tensor) -> Tensor:
    """How many numbers each row observes, (N,), integer; `DENSITY` where p(x) is a density, wholly or in part.

    Args:
        program: one that fits.
        rows: N rows.
        usable: indices of rows that it can be run on, at least one.
    """
    sites = observed_sites(program, take(rows, usable[:FEW]))
    if not all(site.discrete for site in sites):
        return torch.full((len(rows[0]),), DENSITY, dtype=torch.long, device=rows[0].device)
    return torch.stack([site.count(rows) for site in sites]).sum(0)


def _is_discrete(support: Any) -> bool:
    """Whether all of a value is discrete. torch's own word of columns beside each other is whether some of it is."""
    inner = _innermost(support)
    if parts := getattr(inner, "cseq", ()):
        return all(_is_discrete(part) for part in parts)
    return bool(getattr(inner, "is_discrete", False))


def _is_masked(site: Site) -> bool:
    inner, masked = site.distribution, site.mask is not None and site.mask is not True
    while hasattr(inner, "base_dist"):
        masked, inner = masked or isinstance(inner, MaskedDistribution), inner.base_dist
    return masked


def _innermost(support: Any) -> Any:
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support


def _place(rows: Rows, value: Tensor) -> int | None:
    """Which tensor of `rows` a value is: the object itself, else the first of equal numbers; None if there is none."""
    same = [i for i, mine in enumerate(rows) if mine is value]
    equal = [i for i, mine in enumerate(rows) if mine.numel() == value.numel() > 0 and _equal(mine, value)]
    return next(iter(same + equal), None)


def _equal(a: Tensor, b: Tensor) -> bool:
    a, b = a.reshape(-1), b.reshape(-1)
    return bool(((a == b) | (a.isnan() & b.isnan())).all())
