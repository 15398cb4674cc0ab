"""log p(x) of programs with one or two latent dimensions, by adaptive quadrature of many rows at once.

Each row's R^D is mapped onto the cube (-1, 1)^D,

    u = a + L t,    t_d = S y_d / (1 - y_d^2),

with a and L L' the mean and covariance of the Gaussians at the peaks that were found in the row. The slope of the map grows
like t^2, so that a density with tails down to |t|^-2 becomes a bounded one. The cube is cut into cells (see `cells`), first
into those that peaks and prior ask for; those whose error matters are halved in the directions that it comes from, of all
rows together, until every row is good enough (global adaptation, as in QUADPACK: Piessens, de Doncker-Kapenga, Ueberhuber &
Kahaner 1983, but in batches).

What no point sees is not integrated: a peak far narrower than the cells around it, which no ascent has reached, leaves no
trace in the error.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae.evidence.cells import POINTS, SMALLEST, Cells
from pyro_vae.evidence.integrand import SCALE, Integrand, largest_by_row
from pyro_vae.memory import BUDGET
from pyro_vae.program import Program
from pyro_vae.rows import Rows, take
from pyro_vae.seeds import Seed, seeded

AIM, ACCEPTED = 1e-6, 1e-4
"""Relative error that cells are halved for, and the one above which a row is marked."""

MOST = {1: 2**16, 2: 2**22}
"""Evaluations of the log joint after which a row is given up, by D."""

FAR = 1.0 - 2.0**-20
"""Beyond this |y|, some million standard deviations away, an error that matters means that the integral diverges."""

NUM_STARTS, NUM_PRIOR = 6, 64
"""Prior draws that ascents start from, with their mirror images; and those that show where the prior lies."""


@dataclass(frozen=True)
class Integrals:
    """What quadrature says of N rows.

    Attributes:
        log_p: log p(x) in nats, (N,), float64; NaN where the integral seems to diverge.
        error: bound of its error in nats, rounding of the program's arithmetic included, (N,), float64; inf where unknown.
        evaluations: of the log joint at points of cells, (N,), integer.
        reasons: N texts, why a row is not reliable; empty where it is.
    """

    log_p: Tensor
    error: Tensor
    evaluations: Tensor
    reasons: tuple[str, ...]


def integrate(program: Program, rows: Rows, *, seed: Seed = 0, memory: int = BUDGET, most: int | None = None) -> Integrals:
    """log p(x) of rows by quadrature over u.

    Args:
        program: with D = 1 or 2 latent dimensions. Its guide gives one start of the search for peaks, no more.
        rows: N rows.
        seed: of the starts.
        memory: byte budget.
        most: evaluations after which a row is given up; None for `MOST`.

    Returns:
        values, errors, costs and reasons, row by row.

    Raises:
        ValueError: the program has more than two latent dimensions.
    """
    log_joint = program.log_joint(rows)
    dim, count = log_joint.dim, len(rows[0])
    if dim not in MOST:
        raise ValueError(f"Quadrature is for 1 or 2 latent dimensions, this program has {dim}: use pv.log_evidence.")
    most = MOST[dim] if most is None else most
    with torch.no_grad(), seeded(seed, rows[0].device):
        prior = log_joint.flatten(program.sample_prior(rows, NUM_PRIOR)[0]).nan_to_num(0.0, 0.0, 0.0)
        centre = log_joint.flatten(program.sample(rows, 16)[0]).mean(0, keepdim=True)
    order = prior.sort(dim=0).values
    middle = order[NUM_PRIOR // 2]
    signs = torch.tensor(list(itertools.product((1.0, -1.0), repeat=dim)), dtype=prior.dtype, device=prior.device)
    mirrored = middle + signs[:, None, None] * (prior[:NUM_STARTS] - middle)
    starts = torch.cat([centre, mirrored.flatten(0, 1)])
    spread = torch.stack([order[NUM_PRIOR // 10], middle, order[-NUM_PRIOR // 10]]).double()
    # A row's cells take some 64 numbers each while they are worked on.
    size = max(1, memory // (512 * most // POINTS**dim))
    parts = []
    with torch.no_grad():
        for index in torch.arange(count, device=rows[0].device).split(size):
            integrand = Integrand(program, take(rows, index), starts[:, index], spread[:, index], memory)
            parts.append(_refine(integrand, most))
    return Integrals(
        torch.cat([part.log_p for part in parts]),
        torch.cat([part.error for part in parts]),
        torch.cat([part.evaluations for part in parts]),
        tuple(reason for part in parts for reason in part.reasons),
    )


def _first_cells(boxes: Tensor) -> Cells:
    """Cells halved until those that meet a box (see `Integrand`) are small enough for it."""
    _, count, _, dim = boxes.shape
    cells = Cells.first(count, dim, boxes.device)
    while True:
        left, right = (SCALE * y / (1.0 - y.square()) for y in (cells.centre - cells.half, cells.centre + cells.half))
        low, high, width = boxes[:, cells.row]
        meets = ((left[:, None] < high) & (right[:, None] > low)).all(-1, keepdim=True)
        split = (meets & ((right - left)[:, None] > width)).any(1) & (cells.half > SMALLEST)
        some = split.any(-1)
        if not bool(some.any()):
            return cells
        cells = Cells.cat([cells.only(~some), cells.only(some).halved(split[some])])


@dataclass(frozen=True)
class _Sums:
    """What the cells make of their rows: log p (N,), each cell's errors relative to p (C, D), and those to be worked on."""

    log_p: Tensor
    error: Tensor
    real: Tensor

    @classmethod
    def of(cls, cells: Cells, rounding: Tensor) -> _Sums:
        top = largest_by_row(cells.log_mass, cells.row, len(rounding))
        weight = torch.exp(cells.log_mass - torch.where(top.isfinite(), top, 0.0)[cells.row])
        total = torch.zeros_like(top).index_add(0, cells.row, weight)
        log_p = top + total.log().nan_to_num(neginf=0.0)
        error = torch.exp(cells.log_error - log_p[cells.row, None]).nan_to_num(nan=0.0)
        # An error that the rounding of the log joint makes does not fall when its cell is halved.
        share = (weight / total[cells.row]).nan_to_num(nan=0.0)
        return cls(log_p, error, torch.where(error > (rounding[cells.row] * share)[:, None], error, 0.0))

    def by_row(self, cells: Cells, error: Tensor) -> Tensor:
        return torch.zeros_like(self.log_p).index_add(0, cells.row, error.sum(-1))


def _refine(integrand: Integrand, most: int) -> Integrals:
    """Halve cells until their errors are small in every row, or nothing more can be done."""
    cells = integrand.over(_first_cells(integrand.boxes))
    count, points = integrand.num_rows, POINTS ** cells.half.shape[-1]
    spent, fresh = points * torch.bincount(cells.row, minlength=count), len(cells.row)
    while True:
        sums = _Sums.of(cells, integrand.rounding)
        aim = integrand.rounding.clamp_min(AIM)
        per_cell = (aim / torch.bincount(cells.row, minlength=count))[cells.row]
        wanted = (sums.by_row(cells, sums.real) > aim)[cells.row] & (sums.real.sum(-1) > per_cell)
        split = wanted[:, None] & (sums.real >= 0.2 * sums.real.amax(-1, keepdim=True))
        if split.shape[-1] == 2:
            important = cells.log_face > (sums.log_p[cells.row] + per_cell.log())[:, None, None]
            important[:-fresh] = False  # others were looked at before, and cells beside them only become smaller
            split |= cells.too_large(important)
        split &= (cells.half > SMALLEST) & (spent < most)[cells.row, None]
        some = split.any(-1)
        if not bool(some.any()):
            return _judge(integrand, cells, sums, spent)
        new = integrand.over(cells.only(some).halved(split[some]))
        spent += points * torch.bincount(new.row, minlength=count)
        cells, fresh = Cells.cat([cells.only(~some), new]), len(new.row)


def _judge(integrand: Integrand, cells: Cells, sums: _Sums, evaluations: Tensor) -> Integrals:
    """Values, errors and reasons from the last cells."""
    far_out = (cells.centre.abs() + cells.half > FAR).any(-1, keepdim=True)
    accepted = integrand.rounding.clamp_min(ACCEPTED)
    empty = sums.log_p == -torch.inf
    diverges = sums.by_row(cells, sums.error * far_out) > accepted.clamp_max(0.1)
    told = {
        "no density at any point of the quadrature": empty,
        "the integral over the latents seems to diverge": diverges,
        "NaN or infinite density": integrand.broken - sums.log_p > math.log(AIM),
        "quadrature did not converge": sums.by_row(cells, sums.real) > accepted,
    }
    reasons = [""] * len(empty)
    for reason, which in told.items():
        for row in which.nonzero().flatten().tolist():
            reasons[row] = reasons[row] or reason
    error = integrand.rounding - torch.log1p(-sums.by_row(cells, sums.error).clamp_max(1.0))
    return Integrals(
        torch.where(diverges, torch.nan, sums.log_p),
        torch.where(diverges | empty, torch.inf, error),
        evaluations,
        tuple(reasons),
    )
