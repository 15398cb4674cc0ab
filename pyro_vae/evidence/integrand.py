"""exp(log joint) of rows as a function on the cube (-1, 1)^D that quadrature integrates, D = 1 or 2; see `quadrature`."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, max_pool2d

from pyro_vae.evidence.cells import POINTS, Cells, rule
from pyro_vae.memory import CACHE, bytes_needed
from pyro_vae.posterior.derivatives import derivatives
from pyro_vae.program import Program
from pyro_vae.rows import Rows, take

SCALE = 6.0
"""S: the cells |y| < 1/2 then end at 4 standard deviations."""

LARGEST = 1.0 - 2.0**-44
"""Stands for y = 1, which is infinity."""

NEWTON_STEPS, CLOSE = 20, 0.01
"""Of an ascent: at most so many, and none where the next one promises fewer nats."""

STEP_LENGTHS = (1.0, 0.5, 0.2, 0.05, 0.005)


class _Peaks(NamedTuple):
    """M ends of ascents: row (M,), u (M, D), log joint (M,), negative Hessian made positive (M, D, D)."""

    row: Tensor
    u: Tensor
    value: Tensor
    precision: Tensor

    def only(self, which: Tensor) -> _Peaks:
        return _Peaks(*(part[which] for part in self))


class Integrand:
    """The log joint of N rows in y, and what was seen of it so far.

    Args:
        program: gives the log joint.
        rows: N rows.
        starts: of the search for peaks, (S, N, D), unconstrained.
        prior: low end, middle and high end of where the prior lies, (3, N, D), unconstrained, float64.
        memory: byte budget.

    Attributes:
        num_rows: N.
        boxes: where cells must be small, in t: low end, high end and largest width, (3, N, M, D); NaN where
            a row has fewer.
        peak: the largest log joint met, (N,).
        broken: log of the largest part of a cell's integral that a point next to one without a number has, (N,).
    """

    def __init__(self, program: Program, rows: Rows, starts: Tensor, prior: Tensor, memory: int) -> None:
        self._program, self._rows, self._memory, self.num_rows = program, rows, memory, len(rows[0])
        self._bytes, self._shared = bytes_needed(program, rows, {"u": starts}, lambda joint, values: joint(values["u"]))
        peaks = self._climb(starts, 0.4 * (prior[2] - prior[0]).clamp_min(1e-30))
        self._place(peaks, prior)
        self.boxes = self._boxes(peaks, prior)
        self.peak = torch.full((self.num_rows,), -torch.inf, dtype=torch.float64, device=starts.device)
        self.broken = self.peak.clone()
        self._noise = self._measure_noise(peaks)

    def _climb(self, starts: Tensor, spread: Tensor) -> _Peaks:
        """Where Newton's method leads from each start, the same ends dropped; `spread` (N, D) is that of the prior."""
        count, num_rows, dim = starts.shape
        row = torch.arange(num_rows, device=starts.device).repeat(count)
        u = starts.reshape(-1, dim).double()
        # No posterior is taken to be much wider than the prior.
        least = 0.1 / spread.square().amax(-1)
        peaks = _Peaks(row, u, u.new_full((len(u),), -torch.inf), torch.diag_embed(torch.ones_like(u)))
        todo = torch.arange(len(row), device=row.device)
        for _ in range(NEWTON_STEPS):
            parts = todo.split(max(1, self._memory // (12 * self._bytes)))
            todo = torch.cat([part[self._newton_step(peaks, part, least)] for part in parts])
            if len(todo) == 0:
                break
        apart = (peaks.u.unflatten(0, (count, 1, num_rows)) - peaks.u.unflatten(0, (1, count, num_rows)))[..., None]
        distance = (apart * (peaks.precision.unflatten(0, (1, count, num_rows)) @ apart)).sum((-2, -1))
        good = peaks.value.isfinite().unflatten(0, (count, num_rows))
        before = torch.ones(count, count, dtype=torch.bool, device=row.device).tril(-1)[..., None]
        same = (distance < 0.25) & before & good
        return peaks.only((good & ~same.any(1)).flatten())

    def _newton_step(self, peaks: _Peaks, part: Tensor, least: Tensor) -> Tensor:
        """One step for some of the peaks, in place, curvatures made positive and at least `least` (N,); who goes on."""
        row, u = peaks.row[part], peaks.u[part]
        log_joint = self._program.log_joint(take(self._rows, row))
        value, gradient, hessian = (each[0] for each in derivatives(log_joint, self._cast(u)[None]))
        size, axes = torch.linalg.eigh(hessian.nan_to_num(0.0, 0.0, 0.0))
        size = torch.maximum(size.abs(), least[row, None])
        along = (axes.mT @ gradient.nan_to_num(0.0, 0.0, 0.0)[..., None])[..., 0]
        step = (axes @ (along / size)[..., None])[..., 0]
        tried = u + u.new_tensor(STEP_LENGTHS)[:, None, None] * step
        best, which = self._log_joint(row, tried).nan_to_num(-torch.inf, -torch.inf).max(0)
        better = best > value.nan_to_num(-torch.inf, -torch.inf)
        peaks.value[part], peaks.precision[part] = value, axes @ torch.diag_embed(size) @ axes.mT
        peaks.u[part] = torch.where(better[:, None], tried[which, torch.arange(len(part), device=part.device)], u)
        return better & ((along.square() / size).sum(-1) > CLOSE)

    def _place(self, peaks: _Peaks, prior: Tensor) -> None:
        """a and L of each row: moments of the Gaussians at its peaks; where there are none, those of the prior."""
        low, centre, high = prior
        log_mass = peaks.value - 0.5 * torch.linalg.slogdet(peaks.precision)[1]
        weight = torch.exp(log_mass - largest_by_row(log_mass, peaks.row, self.num_rows)[peaks.row])
        total = centre.new_zeros(self.num_rows).index_add(0, peaks.row, weight)
        weight = weight / total[peaks.row]
        mean = torch.zeros_like(centre).index_add(0, peaks.row, weight[:, None] * peaks.u)
        away = peaks.u - mean[peaks.row]
        second = torch.linalg.inv(peaks.precision) + away[:, :, None] * away[:, None, :]
        factor = torch.diag_embed(0.4 * (high - low).clamp_min(1e-30))
        covariance = torch.zeros_like(factor).index_add(0, peaks.row, weight[:, None, None] * second)
        size = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
        # A weak correlation is not worth leaving the axes for, along which kinks and cuts of a model often lie.
        covariance = covariance.masked_fill(covariance.abs() < 0.5 * size[:, :, None] * size[:, None, :], 0.0)
        found = total > 0
        self._centre = torch.where(found[:, None], mean, centre)
        self._factor = torch.where(found[:, None, None], torch.linalg.cholesky_ex(covariance)[0], factor)
        self._log_det = self._factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def _boxes(self, peaks: _Peaks, prior: Tensor) -> Tensor:
        dim = prior.shape[-1]
        corners = torch.stack([torch.stack(ends, -1) for ends in itertools.product(*prior[::2].unbind(-1))])
        corners = torch.linalg.solve_triangular(self._factor, (corners - self._centre)[..., None], upper=False)[..., 0]
        low, high = corners.amin(0), corners.amax(0)
        first = torch.stack([low, high, (high - low) * (1.5 if dim > 1 else 0.15)])[:, :, None]
        away, factor = (peaks.u - self._centre[peaks.row])[..., None], self._factor[peaks.row]
        t = torch.linalg.solve_triangular(factor, away, upper=False)[..., 0]
        size = (factor.mT @ peaks.precision @ factor).diagonal(dim1=-2, dim2=-1).rsqrt()
        order = torch.argsort(peaks.row, stable=True)
        row = peaks.row[order]
        rank = torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)
        rest = first.new_full((3, self.num_rows, int(rank.max()) + 1 if len(row) else 0, dim), torch.nan)
        rest[:, row, rank] = torch.stack([t - size, t + size, 5.0 * size])[:, order]
        return torch.cat([first, rest], dim=2)

    def _measure_noise(self, peaks: _Peaks) -> Tensor:
        """Rounding shows in third differences of close points, two deviations off the highest peak where it is steepest.

        The 22nd of 30: more than most, but none that a kink has made.
        """
        noise = torch.zeros_like(self.peak)
        best = peaks.only(peaks.value == largest_by_row(peaks.value, peaks.row, self.num_rows)[peaks.row])
        size, axes = torch.linalg.eigh(best.precision)
        steps = 2.0 + 1e-3 * torch.arange(33, dtype=size.dtype, device=size.device)[:, None, None]
        value = self._log_joint(best.row, best.u + steps * axes[..., -1] * size[:, -1:].rsqrt())
        noise[best.row] = value.diff(n=3, dim=0).abs().nan_to_num(0.0, 0.0, 0.0).sort(dim=0).values[22]
        return noise

    @property
    def rounding(self) -> Tensor:
        """The error in nats that the program's arithmetic leaves, (N,)."""
        eps = torch.finfo(self._rows[0].dtype).eps
        return torch.maximum(4.0 * eps * (1.0 + self.peak.abs().nan_to_num(posinf=0.0)), self._noise)

    def _cast(self, u: Tensor) -> Tensor:
        return u.to(self._rows[0].dtype)

    def _log_joint(self, row: Tensor, u: Tensor) -> Tensor:
        """The log joint of the rows `row` (C,) at u (P, C, D), within the budget: (P, C)."""
        chunk = max(self._bytes, min(self._memory - self._shared, CACHE))
        step = max(1, chunk // (self._bytes * len(u)))
        points = max(1, chunk // self._bytes) if step == 1 else len(u)
        out = torch.empty(u.shape[:2], dtype=torch.float64, device=u.device)
        if len(row) == 0:
            return out
        for part in torch.arange(len(row), device=u.device).split(step):
            log_joint = self._program.log_joint(take(self._rows, row[part]))
            for k in range(0, len(u), points):
                out[k : k + points, part] = log_joint(self._cast(u[k : k + points, part]))
        return out

    def over(self, cells: Cells) -> Cells:
        """The cells with their integrals and errors."""
        # Each point takes about 16 numbers besides what the program needs.
        step = max(1, min(self._memory, CACHE) // (128 * POINTS ** cells.half.shape[-1]))
        parts = torch.arange(len(cells.row), device=cells.row.device).split(step)
        return Cells.cat([cells.only(part).integrated(self._log_density(cells.only(part))) for part in parts])

    def _log_density(self, cells: Cells) -> Tensor:
        """log of the density of y at the points of the rule in each cell, (P, C); -inf where it is not a number."""
        dim = cells.half.shape[-1]
        nodes, weights = (part.to(cells.half.device) for part in rule(dim)[:2])
        y = (cells.centre + cells.half * nodes[:, None]).clamp(-LARGEST, LARGEST)
        gap = (1.0 - y) * (1.0 + y)
        u = self._centre[cells.row] + torch.einsum("cde,pce->pcd", self._factor[cells.row], SCALE * y / gap)
        value = self._log_joint(cells.row, u)
        broken = value.isnan() | value.isposinf()
        value = torch.where(broken, -torch.inf, value)
        self.peak = torch.maximum(self.peak, largest_by_row(value.amax(0), cells.row, self.num_rows))
        value = value + (math.log(SCALE) + torch.log1p(y.square()) - 2.0 * gap.log()).sum(-1) + self._log_det[cells.row]
        if bool(broken.any()):
            part = value + weights.log()[:, None] + cells.half.log().sum(-1)
            beside = part.masked_fill(~_next_to(broken, dim), -torch.inf).amax(0)
            self.broken = torch.maximum(self.broken, largest_by_row(beside, cells.row, self.num_rows))
        return value


def largest_by_row(value: Tensor, row: Tensor, num_rows: int) -> Tensor:
    """The largest value (M,) of each row, (N,); -inf where a row has none."""
    return value.new_full((num_rows,), -torch.inf).scatter_reduce(0, row, value, "amax")


def _next_to(broken: Tensor, dim: int) -> Tensor:
    """The points of cells (P, C) that have a neighbour without a number."""
    grid = broken.T.reshape(-1, 1, *(POINTS,) * dim).float()
    pool = max_pool1d if dim == 1 else max_pool2d
    return pool(grid, 3, stride=1, padding=1).bool().reshape(broken.T.shape).T
