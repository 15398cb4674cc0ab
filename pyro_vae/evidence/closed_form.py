"""log p(x) up to rounding: in closed form where the log joint is quadratic in z, by quadrature where D <= 2.

With log p(x, u) = c - (u - m)' H (u - m) / 2 the integral over u is exact,

    log p(x) = c + (D/2) log 2 pi - (1/2) log |H|,

with m and H from the gradient and Hessian at any point. Nothing is assumed about how the model is written: that the log
joint is quadratic is verified row by row, by its values and Hessians at points near m and far out. Rows that fail go to
`quadrature` for D <= 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_vae.evidence.estimate import Estimate
from pyro_vae.evidence.quadrature import MOST, integrate
from pyro_vae.memory import BUDGET, bytes_needed
from pyro_vae.posterior.derivatives import derivatives
from pyro_vae.program import Program
from pyro_vae.rows import Data, Rows, as_rows, positive, take
from pyro_vae.seeds import Seed, seeded

NUM_NEAR, NUM_FAR = 8, 8
"""Points where the quadratic form is verified: some posterior deviations away, and across the prior and beyond."""

EVALUATIONS = 3 + NUM_NEAR + NUM_FAR


@dataclass(frozen=True)
class _Forms:
    """The quadratic forms of N rows, and how well they hold.

    Attributes:
        log_p: what they integrate to, (N,).
        rounding: error of the program's arithmetic in nats, (N,).
        bounded: which have a maximum, boolean (N,).
        miss: largest distance from the log joint in nats, as a multiple of what rounding explains, (N,).
        distance: the distance in nats where that is, (N,).
        bend: largest change of the Hessian relative to itself, as a multiple of what rounding explains, (N,).
    """

    log_p: Tensor
    rounding: Tensor
    bounded: Tensor
    miss: Tensor
    distance: Tensor
    bend: Tensor

    @property
    def hold(self) -> Tensor:
        """Which rows have a closed form, boolean (N,)."""
        return self.bounded & (self.miss <= 1.0) & (self.bend <= 1.0)


def exact(program: Program, x: Data, *, seed: Seed = 0, memory: int = BUDGET) -> Estimate:
    """log p(x) without Monte Carlo error.

    Args:
        program: linear-Gaussian in its latents, written in any form, or with D <= 2 latent dimensions and any decoder; its
            guide only gives quadrature a start.
        x: rows, (N, ...).
        seed: of the points where the quadratic form is verified, and of the starts of quadrature.
        memory: byte budget.

    Returns:
        the estimate in nats. Its standard error bounds the rounding of the program's arithmetic and what a quadrature
        leaves; rows on which quadrature fails are marked, with the reason.

    Raises:
        ValueError: D > 2, and the log joint of a row is not quadratic or has no maximum (the integral diverges).
    """
    positive(memory=memory)
    rows = as_rows(x)
    forms = _forms(program, rows, seed, memory)
    log_p, error, reasons = forms.log_p.clone(), forms.rounding.clone(), [""] * len(forms.log_p)
    evaluations = torch.full_like(log_p, EVALUATIONS).long()
    others = (~forms.hold).nonzero().flatten()
    if len(others):
        if program.log_joint(take(rows, others[:1])).dim not in MOST:
            raise _no_closed_form(forms, int(others[0]))
        found = integrate(program, take(rows, others), seed=seed, memory=memory)
        log_p[others], error[others], evaluations[others] = found.log_p, found.error, found.evaluations
        for row, reason in zip(others.tolist(), found.reasons, strict=True):
            reasons[row] = reason
    good = torch.tensor([not reason for reason in reasons], device=log_p.device)
    bound = torch.where(good, log_p, torch.nan)
    estimate = Estimate.known(log_p, error, "exact", EVALUATIONS)
    engine = tuple("exact" if held else "quadrature" for held in forms.hold.tolist())
    return replace(estimate, lower=bound, upper=bound, evaluations=evaluations, engine=engine, reasons=tuple(reasons))


def _no_closed_form(forms: _Forms, row: int) -> ValueError:
    if not bool(forms.bounded[row]):
        return ValueError(
            f"The log joint of row {row} has no maximum in z (its Hessian at 0 is not negative definite), so it is not "
            "quadratic with a finite integral: use pv.log_evidence without a method."
        )
    if float(forms.miss[row]) > 1.0:
        how = f"{float(forms.distance[row]):.3g} nats away from its quadratic form"
    else:
        how = f"its Hessian changes by {float(forms.bend[row]):.3g} times what rounding explains"
    return ValueError(
        f"The log joint of row {row} is not quadratic in z: {how}, so there is no closed form: "
        "use pv.log_evidence without a method."
    )


def _forms(program: Program, rows: Rows, seed: Seed, memory: int) -> _Forms:
    """The forms of all rows, so many at a time as the budget holds."""
    log_joint = program.log_joint(rows)
    zero = rows[0].new_zeros(1, len(rows[0]), log_joint.dim)
    with torch.no_grad(), seeded(seed, zero.device):
        near = torch.randn(NUM_NEAR, *zero.shape[1:], dtype=torch.float64, device=zero.device)
        prior = log_joint.flatten(program.sample_prior(rows, NUM_FAR)[0]).double()
    near = near * torch.linspace(0.5, 4.0, NUM_NEAR, dtype=near.dtype, device=near.device)[:, None, None]
    # Both ways along differences of prior draws, from as long as these are to 64 times as long.
    apart = prior[: NUM_FAR // 2] - prior[NUM_FAR // 2 :]
    length = torch.linalg.vector_norm(apart, dim=-1, keepdim=True)
    growth = 4.0 ** torch.arange(len(apart), dtype=near.dtype, device=near.device)[:, None, None]
    far = growth * apart * (length.mean(0) / length)
    far = torch.cat([far, -far])
    each, _ = bytes_needed(program, rows, {"u": zero}, lambda joint, values: joint(values["u"]))
    step = max(1, memory // (4 * each * (NUM_NEAR + NUM_FAR)))
    parts = []
    for index in torch.arange(len(rows[0]), device=zero.device).split(step):
        parts.append(_form(program, take(rows, index), zero[:, index], near[:, index], far[:, index]))
    return _Forms(*(torch.cat([getattr(part, name) for part in parts]) for name in _Forms.__dataclass_fields__))


def _form(program: Program, rows: Rows, zero: Tensor, near: Tensor, far: Tensor) -> _Forms:
    """The forms from derivatives at `zero` (1, N, D), checked `near` (in posterior deviations) and `far` from the mode."""
    log_joint, eps = program.log_joint(rows), torch.finfo(zero.dtype).eps
    _, gradient, hessian = (part[0] for part in derivatives(log_joint, zero))
    factor, failed = torch.linalg.cholesky_ex(-hessian.nan_to_num(0.0, 0.0, 0.0))
    bounded = (failed == 0) & gradient.isfinite().all(-1)
    factor = torch.where(bounded[:, None, None], factor, torch.eye(zero.shape[-1], dtype=factor.dtype, device=zero.device))
    mode = torch.cholesky_solve(gradient.nan_to_num(0.0, 0.0, 0.0)[..., None], factor)[..., 0]
    away = torch.cat([torch.linalg.solve_triangular(factor.mT, near[..., None], upper=True)[..., 0], far])
    square = (factor.mT @ away[..., None]).square().sum((-2, -1))
    with torch.no_grad():
        peak = log_joint(mode.to(zero.dtype)[None])[0]
        difference = (log_joint((mode + away).to(zero.dtype)) - peak + 0.5 * square).abs()
    # The points are rounded too, which moves a steep log joint by more than its own rounding.
    size = 1.0 + peak.abs() + square
    miss, worst = (difference / (1e3 * eps * size)).nan_to_num(torch.inf).max(0)
    others = derivatives(log_joint, (mode + away[[NUM_NEAR // 2, -1]]).to(zero.dtype))[2]
    scale = factor.square().sum(-1).sqrt()  # roots of the diagonal of H
    bend = ((others - hessian).abs() / (scale[..., :, None] * scale[..., None, :])).amax((0, -2, -1)) / (1e3 * eps)
    log_det = 2.0 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return _Forms(
        log_p=peak + 0.5 * zero.shape[-1] * math.log(2.0 * math.pi) - 0.5 * log_det,
        rounding=4.0 * eps * (1.0 + peak.abs()),
        bounded=bounded,
        miss=miss,
        distance=difference.gather(0, worst[None])[0],
        bend=bend.nan_to_num(torch.inf),
    )
