"""Cells of adaptive quadrature: boxes in [-1, 1]^D, D = 1 or 2, of many rows, and the rule that integrates over one.

The rule is a product of Gauss-Lobatto rules with 15 points. It is taken for its points on the faces: a kink or a jump close
to a face can lie between the points of a Gauss or a Kronrod rule of either cell, and nothing shows.

The error comes from null rules (Berntsen & Espelid 1991), sums that are zero for polynomials of low degree. The largest
are about the error of a function that is not smooth; how fast they fall tells how much smaller it is for one that is.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

POINTS = 15
"""Of a rule in each direction."""

SMALLEST = 2.0**-41
"""Half the width of a cell that is not cut any more."""


@dataclass(frozen=True)
class Cells:
    """C boxes, each of one row. They come from 4^D equal ones by halving.

    Attributes:
        row: (C,), integer.
        centre: (C, D).
        half: half the widths, (C, D).
        log_mass: log of the integral, (C,); 0 while it is not known.
        log_error: log of its error by direction, (C, D).
        log_face: log of (largest density on a face x volume of the cell), (C, D, 2): lower and upper face
            of each direction; 0 in one dimension.
        spot: where on the face that is, in the other direction, (C, D, 2).
    """

    row: Tensor
    centre: Tensor
    half: Tensor
    log_mass: Tensor
    log_error: Tensor
    log_face: Tensor
    spot: Tensor

    @classmethod
    def first(cls, num_rows: int, dim: int, device: torch.device) -> Cells:
        """4^D equal cells for each of N rows."""
        line = torch.tensor([-0.75, -0.25, 0.25, 0.75], dtype=torch.float64, device=device)
        centre = torch.cartesian_prod(*[line] * dim).reshape(-1, dim).repeat(num_rows, 1)
        row = torch.arange(num_rows, device=device).repeat_interleave(4**dim)
        return cls._new(row, centre, torch.full_like(centre, 0.25))

    @classmethod
    def _new(cls, row: Tensor, centre: Tensor, half: Tensor) -> Cells:
        face = centre.new_zeros(*centre.shape, 2)
        return cls(row, centre, half, centre.new_zeros(len(row)), torch.zeros_like(centre), face, face)

    @classmethod
    def cat(cls, parts: Sequence[Cells]) -> Cells:
        """The cells of all parts."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def only(self, which: Tensor) -> Cells:
        """Some of the cells, by index or mask."""
        return Cells(*(getattr(self, field.name)[which] for field in fields(self)))

    def halved(self, split: Tensor) -> Cells:
        """The parts of all cells, each cut in the directions that `split` (C, D) says; nothing is known of them yet."""
        half = torch.where(split, 0.5 * self.half, self.half)
        parts = []
        for signs in itertools.product((-1.0, 1.0), repeat=split.shape[-1]):
            sign = torch.tensor(signs, dtype=half.dtype, device=half.device)
            mine = (split | (sign > 0)).all(-1)
            centre = self.centre + torch.where(split, sign * half, 0.0)
            parts.append(Cells._new(self.row[mine], centre[mine], half[mine]))
        return Cells.cat(parts)

    def integrated(self, log_density: Tensor) -> Cells:
        """The cells with their integrals, from the log-density (P, C) at the points of `rule`, -inf where there is none."""
        dim = self.half.shape[-1]
        _, weights, null, line = (part.to(self.half.device) for part in rule(dim))
        volume = self.half.log().sum(-1)
        top = log_density.amax(0)
        density = torch.exp(log_density - torch.where(top.isfinite(), top, 0.0))
        total = weights @ density
        grid = density.reshape(*[POINTS] * dim, -1)
        if dim == 1:
            terms = torch.einsum("kap,pc->kac", null, grid).square().sum(1).sqrt()[:, None]
        else:
            lines = (torch.einsum(sums, null, grid).square().sum(1).sqrt() for sums in ("kap,pqc->kaqc", "kaq,pqc->kapc"))
            terms = torch.stack([torch.einsum("p,kpc->kc", line, part) for part in lines], 1)
        decay = (terms[:-1] / terms[1:]).amax(0)
        # The root of 2 makes a coefficient the integral of a function of that size.
        error = 2.0**0.5 * terms[:-1].amax(0) * (2.0 * decay).pow(5).clamp_max(1.0)
        log_mass = top + total.log().nan_to_num(neginf=0.0) + volume
        log_face, spot = self._faces(log_density)
        return Cells(
            self.row,
            self.centre,
            self.half,
            log_mass,
            (top + volume)[:, None] + error.nan_to_num(nan=0.0).T.log(),
            log_face + volume[:, None, None],
            spot,
        )

    def _faces(self, log_density: Tensor) -> tuple[Tensor, Tensor]:
        """The largest log-density on each face and where, both (C, D, 2); in one direction nothing is looked up."""
        dim = self.half.shape[-1]
        if dim == 1:
            return self.log_face, self.spot
        grid = log_density.reshape(POINTS, POINTS, -1)
        faces = torch.stack([torch.stack([grid[0], grid[-1]]), torch.stack([grid[:, 0], grid[:, -1]])])
        largest, which = faces.max(2)
        node = rule(1)[0][:, 0].to(which.device)
        other = self.centre.flip(-1)[..., None] + self.half.flip(-1)[..., None] * node[which].permute(2, 0, 1)
        return largest.permute(2, 0, 1), other

    def too_large(self, important: Tensor) -> Tensor:
        """Which cells are more than twice as wide as one beside them, across an important face (C, D, 2), D = 2: (C, D).

        A thin ridge can pass between all points of a large cell, though not between those of the small ones around it.
        """
        cell, direction, side = important.nonzero(as_tuple=True)
        point = torch.stack([self.spot[cell, direction, side]] * 2, -1)
        beyond = self.centre[cell, direction] + (2.0 * side - 1.0) * 1.001 * self.half[cell, direction]
        point.scatter_(1, direction[:, None], beyond[:, None])
        inside = (point.abs() < 1.0).all(-1)
        cell, point = cell[inside], point[inside]
        level = -torch.log2(self.half).round().long()
        kind = 64 * level[:, 0] + level[:, 1]
        split = torch.zeros_like(self.half)
        for number in kind.unique().tolist():
            mine = (kind == number).nonzero().flatten()
            shape = self.half[mine[0]]
            some = (shape > 2.0 * self.half[cell]).any(-1).nonzero().flatten()
            key = self._key(self.row[mine], self.centre[mine], shape)
            wanted = self._key(self.row[cell[some]], point[some], shape)
            order = torch.argsort(key)
            place = order[torch.searchsorted(key[order], wanted).clamp_max(len(key) - 1)]
            hit = key[place] == wanted
            larger = shape > 2.0 * self.half[cell[some[hit]]]
            split.index_add_(0, mine[place[hit]], larger.double())
        return split > 0

    @staticmethod
    def _key(row: Tensor, point: Tensor, shape: Tensor) -> Tensor:
        """A number for the box of a given shape that holds a point, the same for all points in it and for no other box."""
        index = ((point + 1.0) / (2.0 * shape)).floor().long()
        return row * 0x1E3779B97F4A7C15 + index[:, 0] * 0x3F58476D1CE4E5B9 + index[:, 1] * 0x14D049BB133111EB


@functools.cache
def rule(dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The product of Gauss-Lobatto rules, exact to degree 27 in each direction, and the null rules of one direction.

    Returns:
        nodes (P, D) with P = 15^D, weights (P,); null rules (4, 2, 15): the coefficients of degree 14 and 13, 12 and 11,
        10 and 9, 8 and 7 of polynomials orthonormal on the nodes; weights of one direction (15,). Float64, on the CPU.
    """
    k = torch.arange(1, POINTS - 2, dtype=torch.float64)
    side = torch.diag((k * (k + 2.0) / ((2.0 * k + 1.0) * (2.0 * k + 3.0))).sqrt(), 1)
    # The nodes inside are those of the Gauss rule for the weight 1 - y^2 (Golub & Welsch 1969).
    inside, vectors = torch.linalg.eigh(side + side.T)
    end = torch.ones(1, dtype=torch.float64)
    at_end = end * 2.0 / (POINTS * (POINTS - 1))
    node = torch.cat([-end, inside, end])
    weight = torch.cat([at_end, 4.0 / 3.0 * vectors[0].square() / (1.0 - inside.square()), at_end])
    # Columns of Q are the polynomials of degree 0, 1, ... times the root of the weights.
    basis = torch.linalg.qr(weight.sqrt()[:, None] * torch.vander(node, increasing=True))[0]
    null = (weight.sqrt()[:, None] * basis).T.flip(0)[:8].reshape(4, 2, POINTS)
    product = functools.reduce(lambda left, right: torch.outer(left, right).flatten(), [weight] * dim)
    return torch.cartesian_prod(*[node] * dim).reshape(-1, dim), product, null, weight
