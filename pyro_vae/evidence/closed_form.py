"""log p(x) in closed form, where the log joint is quadratic in z: linear-Gaussian models of any form.

With log p(x, u) = c - (u - m)' H (u - m) / 2 the integral over u is exact,

    log p(x) = c + (D/2) log 2 pi - (1/2) log |H|,

with m and H from the gradient and Hessian at any point. Nothing is assumed about how the model is written: that the log
joint is quadratic is verified at points drawn around m, row by row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_vae.evidence.estimate import Estimate
from pyro_vae.log_joint import LogJoint
from pyro_vae.posterior.derivatives import derivatives
from pyro_vae.program import Program
from pyro_vae.rows import Data, as_rows
from pyro_vae.seeds import Seed, seeded

NUM_CHECKS = 8


def exact(program: Program, x: Data, *, seed: Seed = 0) -> Estimate:
    """log p(x) of rows whose log joint is quadratic in the latents.

    Args:
        program: linear-Gaussian in its latents; its guide is not used.
        x: rows, (N, ...).
        seed: of the points where the quadratic form is verified.

    Returns:
        the estimate, whose standard error is the rounding of the program's arithmetic.

    Raises:
        ValueError: the log joint of a row is not quadratic, or has no maximum (the integral diverges).
    """
    rows = as_rows(x)
    log_joint = program.log_joint(rows)
    zero = rows[0].new_zeros(1, len(rows[0]), log_joint.dim)
    _, gradient, hessian = (part[0] for part in derivatives(log_joint, zero))
    factor, failed = torch.linalg.cholesky_ex(-hessian)
    if bool(failed.any()):
        row = int(failed.nonzero()[0])
        raise ValueError(
            f"The log joint of row {row} has no maximum in z (its Hessian at 0 is not negative definite), "
            "so it is not quadratic with a finite integral: use pv.posterior.from_guide."
        )
    mode = torch.cholesky_solve(gradient[..., None], factor)[..., 0]
    with torch.no_grad():
        peak = log_joint(mode.to(zero.dtype)[None])[0]
        eps = torch.finfo(zero.dtype).eps
        rounding = 4.0 * eps * (1.0 + peak.abs())
        _require_quadratic(log_joint, mode, factor, peak, zero.dtype, seed)
    log_det = 2.0 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    log_p = peak + 0.5 * log_joint.dim * math.log(2.0 * math.pi) - 0.5 * log_det
    return Estimate.known(log_p, rounding, "exact", evaluations=2 + NUM_CHECKS)


def _require_quadratic(
    log_joint: LogJoint, mode: Tensor, factor: Tensor, peak: Tensor, dtype: torch.dtype, seed: Seed
) -> None:
    """Compare the log joint with its quadratic form at points some posterior standard deviations away."""
    with seeded(seed, mode.device):
        noise = torch.randn(NUM_CHECKS, *mode.shape, dtype=mode.dtype, device=mode.device)
    noise = noise * torch.linspace(0.5, 4.0, NUM_CHECKS, dtype=mode.dtype, device=mode.device)[:, None, None]
    away = torch.linalg.solve_triangular(factor.mT, noise[..., None], upper=True)[..., 0]
    expected = peak - 0.5 * noise.square().sum(-1)
    found = log_joint((mode + away).to(dtype))
    difference = (found - expected).abs()
    # The points are rounded too, which moves a steep log joint by more than its own rounding.
    allowed = 1e3 * torch.finfo(dtype).eps * (1.0 + peak.abs() + noise.square().sum(-1))
    if bool((difference > allowed).any()):
        row = int((difference > allowed).any(0).nonzero()[0])
        raise ValueError(
            f"The log joint of row {row} is not quadratic in z: {float(difference[:, row].max()):.3g} nats away from its "
            "quadratic form, so there is no closed form: use pv.posterior.from_guide."
        )
