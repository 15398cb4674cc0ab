"""Posterior modes of many rows at once: ascent from several starts, duplicates dropped, Newton to the end.

Near a mode m the log joint is v - (u - m)' P (u - m) / 2 with P the negative Hessian. A start that ended where this form
already gives as much density as there is belongs to that mode; what the form does not explain is another one. So rows with
one mode, most of them, pay for one Newton run, whatever the number of starts. Where the first starts do not agree on one
mode, there may be more that none of them has met: there further starts are climbed from.

Reaching the neighbourhood of a mode is cheap (one gradient a step), Hessians are not (D gradients each): the ascent runs on
all starts, Newton on the best start of each row, then on the best start that is not yet explained, and so on. Above D = 256
no Hessian is built: the ascent goes on to the end, and `lanczos` finds the directions in which the posterior is narrowest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_vae.log_joint import LogJoint
from pyro_vae.memory import BUDGET, gradient_rows
from pyro_vae.posterior.ascent import ascend
from pyro_vae.posterior.derivatives import Local
from pyro_vae.posterior.lanczos import RANK, lanczos
from pyro_vae.posterior.shapes import Dense, LowRank, Shape, positive
from pyro_vae.program import Program
from pyro_vae.rows import Rows

DEPTH = 8.0
"""Modes more than so many nats below the best one of their row are left out: they hold less than e^-8 of its height."""

LARGEST_DENSE = 256
"""D up to which Hessians are built."""

DOUBTFUL_SHARE = 0.01
"""Mass of a row that may be overlooked."""

BATCH, STARTS_A_MODE = 16, 6
"""One of M + 1 modes with basins of one size is missed by 6 (M + 1) starts with probability e^-6."""

COMMON, FEW_ROWS = 0.05, 32
"""Rows of one model are alike: where so many of them have several modes, so may those whose starts agree by luck. Of fewer
rows than `FEW_ROWS` nothing is known."""

ASCENT_STEPS, LONG_ASCENT_STEPS, NEWTON_STEPS = 40, 200, 4
"""At most; the long ascent is the one without a Newton run after it."""

CLOSE = 0.05
"""A Newton run ends when the last step promised fewer nats."""

SHORTER_STEPS = (0.5, 0.2, 0.05)
"""Tried where a whole Newton step leads down."""


@dataclass(frozen=True)
class Modes:
    """P modes, each of one row.

    Attributes:
        row: which row, (P,), integer.
        u: where, (P, D), float64.
        value: the log joint there, (P,), float64.
        shape: P precision matrices, the negative Hessians there, made positive where they are not.
        visits: how many starts led there, (P,), integer.
    """

    row: Tensor
    u: Tensor
    value: Tensor
    shape: Shape
    visits: Tensor

    @property
    def log_mass(self) -> Tensor:
        """Laplace's approximation to the log of the integral around each mode, (P,), in nats."""
        return self.value + 0.5 * self.u.shape[-1] * math.log(2.0 * math.pi) - self.shape.half_log_det

    def take(self, index: Tensor) -> Modes:
        """The modes at `index`."""
        return Modes(self.row[index], self.u[index], self.value[index], self.shape.take(index), self.visits[index])


def join(parts: Sequence[Modes]) -> Modes:
    """The modes of all parts."""
    row, u, value, visits = (torch.cat([getattr(part, name) for part in parts]) for name in ("row", "u", "value", "visits"))
    return Modes(row, u, value, type(parts[0].shape).join([part.shape for part in parts]), visits)


def unit_modes(row: Tensor, u: Tensor) -> Modes:
    """Modes of value 0 and unit covariance at u (P, D): for rows whose density is nowhere finite."""
    count, dim = u.shape
    shape: Shape = Dense.unit(count, dim, u.device)
    if dim > LARGEST_DENSE:
        shape = LowRank.unit(count, dim, RANK, u.device)
    zero = torch.zeros(count, dtype=torch.float64, device=u.device)
    return Modes(row, u.double(), zero, shape, torch.zeros_like(row))


def find_modes(
    program: Program,
    rows: Rows,
    starts: Tensor,
    memory: int = BUDGET,
    least: Tensor | None = None,
    first: int | None = None,
) -> tuple[Modes, Tensor]:
    """The modes that starts lead to.

    Args:
        program: gives the log joint.
        rows: N rows.
        starts: (S, N, D), unconstrained.
        memory: byte budget: rows are worked on so many at a time as it holds.
        least: see `shapes.positive`; None for that of the starts.
        first: so many starts are climbed from in all rows; `BATCH` more where these lead to different modes, or in all rows
            where many have several modes; and `BATCH` more again where M modes were found from fewer than `STARTS_A_MODE`
            (M + 1) starts, as long as there are some. None for all.

    Returns:
        the modes, at least one for each row, ordered by row and then by mass, largest first (a row without a finite density
        has a unit one at its first start, of no visits); and the decoder evaluations spent on each row, (N,).
    """
    log_joint, num_rows, device = program.log_joint(rows), len(rows[0]), starts.device
    least = least_curvature(starts) if least is None else least
    first = len(starts) if first is None else first
    step = gradient_rows(program, rows, starts[: max(first, BATCH)], memory)
    cost = torch.zeros(num_rows, dtype=torch.long, device=device)
    parts, several = [], 0
    for index in torch.arange(num_rows, device=device).split(step):
        search = _Search(log_joint.take(index), starts[:, index], least, cost[index[0] : index[-1] + 1])
        everyone = torch.arange(len(index), device=device)
        search.climb(slice(first), everyone)
        search.settle()
        seen, several = int(index[-1]) + 1, several + int((search.modes() > 1).sum())
        alike = seen < FEW_ROWS or several > COMMON * seen
        left = everyone if alike else search.disagreeing().nonzero().flatten()
        for begin in range(first, len(starts), BATCH):
            search.climb(slice(begin, begin + BATCH), left)
            search.settle()
            left = left[STARTS_A_MODE * (search.modes()[left] + 1) > begin + BATCH]
        for modes in search.found:
            # A density that overflows next to its mode has no shape there: as if there were no mode.
            modes = modes.take(torch.isfinite(modes.log_mass).nonzero().flatten())
            parts.append(Modes(index[modes.row], modes.u, modes.value, modes.shape, modes.visits))
    alone = torch.ones(num_rows, dtype=torch.bool, device=device)
    for part in parts:
        alone[part.row] = False
    none = alone.nonzero().flatten()
    modes = join([*parts, unit_modes(none, starts[0, none])])
    by_mass = torch.argsort(modes.log_mass, descending=True)
    return modes.take(by_mass[torch.argsort(modes.row[by_mass], stable=True)]), cost


def least_curvature(starts: Tensor) -> Tensor:
    """That of a Gaussian of twice the spread of the starts (S, N, D): of the prior, where they are draws of it.

    By medians: a row whose guide overflows must not decide for the others.
    """
    finite = starts.double()[torch.isfinite(starts)]
    spread = 1.4826 * (finite - finite.median()).abs().median()
    return 0.25 / torch.nan_to_num(spread, nan=1.0).square().clamp_min(1e-6)


class _Search:
    """The modes of N rows, from starts (S, N, D) that are climbed from part by part; adds to `cost`, (N,).

    Attributes:
        ends: where the starts have come to, (S, N, D).
        value: the log joint there, (S, N), float64; -inf before the ascent.
        left: ends that belong to no mode yet, boolean (S, N).
        found: modes, in the order of the rounds that found them, at most one of a row in each.
    """

    def __init__(self, log_joint: LogJoint, starts: Tensor, least: Tensor, cost: Tensor) -> None:
        self.log_joint, self.least, self.cost = log_joint, least, cost
        self.ends, self.value = starts.clone(), torch.full_like(starts[..., 0], -torch.inf, dtype=torch.float64)
        self.left = torch.zeros_like(self.value, dtype=torch.bool)
        self.best = torch.full_like(self.value[0], -torch.inf)
        self.found: list[Modes] = []
        self.dense = starts.shape[-1] <= LARGEST_DENSE

    def climb(self, part: slice, rows: Tensor) -> None:
        """Climb from a part of the starts in the rows (n,), and see which of the ends belong to modes that are known."""
        if len(rows) == 0:
            return
        starts = self.ends[part, rows]
        row, steps = rows.repeat(len(starts)), ASCENT_STEPS if self.dense else LONG_ASCENT_STEPS
        ends, value, spent = ascend(self.log_joint, row, starts.flatten(0, 1), steps)
        self.ends[part, rows], self.value[part, rows] = ends.view_as(starts), value.view_as(starts[..., 0])
        self.left[part, rows] = torch.isfinite(self.value[part, rows])
        self.cost.index_add_(0, row, 2 * spent)
        for modes in self.found:
            modes.visits.add_(self._claim(modes).sum(0))

    def settle(self) -> None:
        """Newton from the best end of each row, then from the best that is left, while that may be a mode of some mass."""
        refine = newton if self.dense else without_hessian
        while True:
            top, which = self.value.masked_fill(~self.left, -torch.inf).max(0)
            index = (torch.isfinite(top) & (top > self.best - DEPTH)).nonzero().flatten()
            if len(index) == 0:
                return
            modes = refine(self.log_joint, index, self.ends[which[index], index], self.least, self.cost)
            self.best[index] = torch.maximum(self.best[index], modes.value)
            self.left[which[index], index] = False
            visits = 1 + self._claim(modes).sum(0)
            self.found.append(_without_duplicates(replace(modes, visits=visits), self.found))

    def _claim(self, modes: Modes) -> Tensor:
        """The ends that are left and have no more density than the quadratic forms of P modes give, up to a nat: (S, P)."""
        distance = modes.shape.whiten(self.ends[:, modes.row].double() - modes.u).square().sum(-1)
        mine = self.left[:, modes.row] & (self.value[:, modes.row] <= modes.value - 0.5 * distance + 1.0)
        self.left[:, modes.row] &= ~mine
        return mine

    def disagreeing(self) -> Tensor:
        """Rows whose ends lie at several modes, or elsewhere, or have found none, boolean (N,)."""
        count = torch.zeros_like(self.best)
        for modes in self.found:
            count[modes.row] += 1.0
        return (count != 1.0) | self.left.any(0)

    def modes(self) -> Tensor:
        """Number of modes of each row that hold some mass, (N,)."""
        highest, count = torch.full_like(self.best, -torch.inf), torch.zeros_like(self.best, dtype=torch.long)
        for modes in self.found:
            highest[modes.row] = torch.fmax(highest[modes.row], modes.log_mass)
        for modes in self.found:
            count[modes.row] += modes.log_mass > highest[modes.row] + math.log(DOUBTFUL_SHARE)
        return count


def newton(log_joint: LogJoint, index: Tensor, start: Tensor, least: Tensor, cost: Tensor) -> Modes:
    """Damped Newton from one start (P, D) for each of the rows `index` (P,); see `shapes.positive` for `least`."""
    dim, dtype = start.shape[-1], start.dtype
    u, value = start.double(), torch.full((len(index),), -torch.inf, dtype=torch.float64, device=start.device)
    found = Dense.unit(len(index), dim, start.device)
    going = torch.arange(len(index), device=start.device)
    for _ in range(NEWTON_STEPS):
        local = Local(log_joint.take(index[going]), u[going].to(dtype)[None])
        shape = positive(-local.hessian()[0], least)
        half = shape.precondition(torch.nan_to_num(local.gradient, nan=0.0, posinf=0.0, neginf=0.0))
        u[going], value[going] = _line_search(
            log_joint.take(index[going]), u[going], shape.colour(half)[0], local.value[0], dtype
        )
        found.factor[going], found.inverse[going] = shape.factor, shape.inverse
        cost[index[going]] += 3 + dim
        # The curvature is not computed again after the last step, which moved the mode by a fraction of its width.
        going = going[0.5 * half[0].square().sum(-1) > CLOSE]
        if len(going) == 0:
            break
    return Modes(index, u, value, found, torch.zeros_like(index))


def _line_search(log_joint: LogJoint, u: Tensor, step: Tensor, value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Where the whole step (P, D) leads from u, or a shorter one where that is down, or nowhere; and the values there."""

    def at(which: Tensor, points: Tensor) -> Tensor:
        with torch.no_grad():
            values = log_joint.take(which)(points.to(dtype))
        return torch.nan_to_num(values, nan=-torch.inf, posinf=-torch.inf)

    everyone = torch.arange(len(u), device=u.device)
    best, end = torch.nan_to_num(value, nan=-torch.inf), u.clone()
    whole = at(everyone, (u + step)[None])[0]
    better = whole >= best
    end[better], best = (u + step)[better], torch.where(better, whole, best)
    down = (~better).nonzero().flatten()
    if len(down):
        lengths = torch.tensor(SHORTER_STEPS, dtype=u.dtype, device=u.device)[:, None, None]
        tried = u[down] + lengths * step[down]
        values, which = at(down, tried).max(0)
        up = values > best[down]
        end[down[up]], best[down[up]] = tried[which[up], up.nonzero().flatten()], values[up]
    return end, best


def without_hessian(log_joint: LogJoint, index: Tensor, start: Tensor, least: Tensor, cost: Tensor) -> Modes:
    """As `newton` for ends (P, D) of a long ascent: shapes by `lanczos`, one Newton step in those directions."""
    local = Local(log_joint.take(index), start[None])
    shape = lanczos(local, least)
    step = shape.colour(shape.precondition(torch.nan_to_num(local.gradient, nan=0.0, posinf=0.0, neginf=0.0)))[0]
    u, value = _line_search(log_joint.take(index), start.double(), step, local.value[0], start.dtype)
    cost[index] += 3 + RANK
    return Modes(index, u, value, shape, torch.zeros_like(index))


def _without_duplicates(modes: Modes, found: list[Modes]) -> Modes:
    """`modes` without those that an earlier round has reached, less than half a unit of its metric away.

    Their visits are added to the earlier ones.
    """
    new = torch.ones(len(modes.row), dtype=torch.bool, device=modes.row.device)
    for earlier in (one for one in found if len(one.row)):
        place = torch.full((int(modes.row.max()) + 1,), -1, device=modes.row.device)
        inside = earlier.row <= modes.row.max()
        place[earlier.row[inside]] = inside.nonzero().flatten()
        match = place[modes.row]
        delta = (modes.u - earlier.u[match])[None]
        same = (match >= 0) & (earlier.shape.take(match).whiten(delta)[0].square().sum(-1) <= 0.25)
        earlier.visits.index_add_(0, match[new & same], modes.visits[new & same])
        new &= ~same
    return modes.take(new.nonzero().flatten())
