"""Posterior modes of many rows at once: ascent from several starts, duplicates dropped, Newton to the end.

Near a mode m the log joint is v - (u - m)' P (u - m) / 2 with P the negative Hessian. A start that ended where this form
already gives as much density as there is belongs to that mode; what the form does not explain is another one. So rows with
one mode, most of them, pay for one Newton run, whatever the number of starts.

Reaching the neighbourhood of a mode is cheap (one gradient a step), Hessians are not (D gradients each): the ascent runs on
all starts, Newton on the best start of each row, then on the best start that is not yet explained, and so on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae.log_joint import LogJoint
from pyro_vae.memory import BUDGET, bytes_needed
from pyro_vae.posterior.derivatives import derivatives
from pyro_vae.program import Program
from pyro_vae.rows import Rows, take

DEPTH = 8.0
"""Modes more than so many nats below the best one of their row are left out: they hold less than e^-8 of its height."""

ASCENT_STEPS, NEWTON_STEPS = 40, 2

STEP_LENGTHS = (1.0, 0.5, 0.2, 0.05)

EVALUATIONS = ASCENT_STEPS + 1
"""Gradient evaluations of the decoder for each row and start; Newton comes on top, for distinct modes only."""


@dataclass(frozen=True)
class Modes:
    """P modes, each of one row.

    Attributes:
        row: which row, (P,), integer.
        u: where, (P, D), float64.
        value: the log joint there, (P,), float64.
        factor: Cholesky factor of the negative Hessian, made positive where it is not, (P, D, D), float64.
    """

    row: Tensor
    u: Tensor
    value: Tensor
    factor: Tensor

    @property
    def log_mass(self) -> Tensor:
        """Laplace's approximation to the log of the integral around each mode, (P,), in nats."""
        half_log_det = self.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return self.value + 0.5 * self.u.shape[-1] * math.log(2.0 * math.pi) - half_log_det

    def and_at(self, row: Tensor, u: Tensor) -> Modes:
        """These modes, and unit ones of value 0 for the rows `row` at u[row], u (N, D)."""
        unit = torch.eye(u.shape[-1], dtype=u.dtype, device=u.device).expand(len(row), -1, -1)
        extra = Modes(row, u[row], u.new_zeros(len(row)), unit)
        return join([self, extra])


def join(parts: Sequence[Modes]) -> Modes:
    """The modes of all parts."""
    return Modes(*(torch.cat([getattr(part, name) for part in parts]) for name in ("row", "u", "value", "factor")))


def find_modes(program: Program, rows: Rows, starts: Tensor, memory: int = BUDGET) -> Modes:
    """The modes that starts lead to.

    Args:
        program: gives the log joint.
        rows: N rows.
        starts: (S, N, D), unconstrained.
        memory: byte budget: rows are worked on so many at a time as it holds.

    Returns:
        at least one mode for each row in which some start ends at a finite density, in no order.
    """
    each, _ = bytes_needed(program, rows, {"u": starts}, lambda joint, values: joint(values["u"]))
    # A gradient keeps what the density allocated and makes as much again; the line search tries five points.
    step = max(1, memory // (3 * each * max(len(starts), len(STEP_LENGTHS) + 1)))
    # A Gaussian of twice the starts' spread: that of the prior, where prior draws are among them.
    least = 0.25 / starts.double().var().clamp_min(1e-6)
    parts = []
    for index in torch.arange(len(rows[0]), device=starts.device).split(step):
        modes = _find_modes(program, take(rows, index), starts[:, index], least)
        parts.append(Modes(index[modes.row], modes.u, modes.value, modes.factor))
    return join(parts)


def _find_modes(program: Program, rows: Rows, starts: Tensor, least: Tensor) -> Modes:
    u, value = ascend(program.log_joint(rows), starts, ASCENT_STEPS)
    left, best = torch.isfinite(value), torch.full_like(value[0], -torch.inf)
    found: list[Modes] = []
    for _ in range(len(starts)):
        top, which = value.masked_fill(~left, -torch.inf).max(0)
        index = (torch.isfinite(top) & (top > best - DEPTH)).nonzero().flatten()
        if len(index) == 0:
            break
        modes = newton(program, rows, index, u[which[index], index], least)
        left[which[index], index] = False
        distance = (torch.einsum("snd,nde->sne", u[:, index].double() - modes.u, modes.factor)).square().sum(-1)
        left[:, index] &= value[:, index] > modes.value - 0.5 * distance + 1.0
        best[index] = torch.maximum(best[index], modes.value)
        found.append(_without_duplicates(modes, found))
    if not found:
        none = torch.zeros(0, dtype=torch.long, device=u.device)
        return Modes(none, u[0].double()[:0], value[0, :0], u.new_zeros(0, u.shape[-1], u.shape[-1]).double())
    return join(found)


def ascend(log_joint: LogJoint, starts: Tensor, steps: int, rate: float = 0.2) -> tuple[Tensor, Tensor]:
    """Adam on the log joint from every start, its rate falling from `rate` to 0 along a cosine.

    Returns:
        the ends (S, N, D) and the log joint there (S, N); -inf where it is not a number.
    """
    u = starts.detach().clone().requires_grad_()
    adam = torch.optim.Adam([u], lr=rate, maximize=True)
    for step in range(steps):
        adam.param_groups[0]["lr"] = rate * 0.5 * (1.0 + math.cos(math.pi * step / steps))
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(log_joint(u).sum(), u)
        u.grad = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)
        adam.step()
    with torch.no_grad():
        return u.detach(), torch.nan_to_num(log_joint(u), nan=-torch.inf, posinf=-torch.inf)


def newton(program: Program, rows: Rows, index: Tensor, start: Tensor, least: Tensor) -> Modes:
    """Damped Newton from one start (P, D) for each of the rows `index` (P,); see `positive_factor` for `least`."""
    log_joint = program.log_joint(take(rows, index))
    lengths = torch.tensor([*STEP_LENGTHS, 0.0], dtype=torch.float64, device=start.device)[:, None, None]
    u = start.double()
    for _ in range(NEWTON_STEPS):
        _, gradient, hessian = (part[0] for part in derivatives(log_joint, u.to(start.dtype)[None]))
        direction = torch.cholesky_solve(gradient[..., None], positive_factor(-hessian, least))[..., 0]
        tried = u + lengths * direction
        with torch.no_grad():
            values = torch.nan_to_num(log_joint(tried.to(start.dtype)), nan=-torch.inf)
        u = tried[values.argmax(0), torch.arange(len(index), device=index.device)]
    value, _, hessian = (part[0] for part in derivatives(log_joint, u.to(start.dtype)[None]))
    return Modes(index, u, value, positive_factor(-hessian, least))


def positive_factor(matrix: Tensor, least: Tensor) -> Tensor:
    """Cholesky factor of symmetric matrices (P, D, D), curvatures made positive and at least `least`.

    Negative curvature keeps its size with the other sign. A direction in which the log joint is flat at the mode (along a
    ring, say) would otherwise get a Gaussian of any width; no posterior is much wider than the prior.
    """
    matrix = torch.nan_to_num(matrix, nan=0.0, posinf=0.0, neginf=0.0)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    unit = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    inverse = torch.linalg.solve_triangular(torch.where(failed[:, None, None] > 0, unit, factor), unit, upper=False)
    variance = inverse.square().sum(-2).amax(-1)
    bad = ((failed > 0) | (variance * least > 1.0)).nonzero().flatten()
    if len(bad):
        values, vectors = torch.linalg.eigh(matrix[bad])
        size = torch.maximum(values.abs(), least)
        factor[bad] = torch.linalg.cholesky(vectors @ torch.diag_embed(size) @ vectors.mT)
    return factor


def _without_duplicates(modes: Modes, found: list[Modes]) -> Modes:
    """`modes` without those that an earlier run of the same row has reached: less than half a unit of its metric away."""
    new = torch.ones(len(modes.row), dtype=torch.bool, device=modes.row.device)
    for earlier in (one for one in found if len(one.row)):
        place = torch.full((int(modes.row.max()) + 1,), -1, device=modes.row.device)
        inside = earlier.row <= modes.row.max()
        place[earlier.row[inside]] = inside.nonzero().flatten()
        match = place[modes.row]
        delta = modes.u - earlier.u[match]
        distance = torch.einsum("nd,nde->ne", delta, earlier.factor[match]).square().sum(-1)
        new &= (match < 0) | (distance > 0.25)
    return Modes(modes.row[new], modes.u[new], modes.value[new], modes.factor[new])
