"""Probabilistic PCA and factor analysis: maximum likelihood where the E-step is exact.

Both are x ~ N(W z + m, Psi), z ~ N(0, I), see `pyro_vae.em.linear`; Psi is s^2 I in probabilistic PCA, diagonal in factor
analysis. For S, the covariance of N complete rows, dividing by N, with eigenvalues l_1 >= ... >= l_d and eigenvectors u_k
the first has its maximum in closed form (Tipping & Bishop 1999, "Probabilistic principal component analysis", JRSS B
61:611, eq. 7-8),

    s^2 = mean of l_{D+1} .. l_d,   W = (u_1 .. u_D) diag(l_k - s^2)^(1/2).

Everything else is EM (Rubin & Thayer 1982; Ghahramani & Hinton 1996, CRG-TR-96-1), started from the closed form.
scikit-learn's `PCA` divides by N - 1 and so lies a little below this maximum: its `score` is lower by
(d/2) (log(N / (N - 1)) - 1/N) nats a row, exactly, for N > d (for fewer rows it leaves the zero eigenvalues out of s^2).

The iterations run in float64 in units in which columns have about unit variance, and the parameters come back in x's dtype.
"""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from pyro_vae.em.iterations import climb
from pyro_vae.em.linear import LinearGaussian
from pyro_vae.em.standard import Standard, standardise
from pyro_vae.em.steps import State, Step, each, shared
from pyro_vae.rows import Data, positive
from pyro_vae.warn import warn

MOST = 10_000
"""Iterations at most, unless told."""

ZERO, LEAST = 1e-12, 1e-8
"""Least s^2 of probabilistic PCA, as parts of the mean variance: what rounding leaves of an eigenvalue in float64, and what
it leaves of the differences that EM takes."""

SADDLE = 1e-6
"""EM that says it has converged so many nats a row below the closed form has stopped at a saddle point."""


def ppca(
    x: Data,
    latent_dim: int,
    *,
    max_iterations: int | None = None,
    tolerance: float = 1e-8,
    accelerate: bool = True,
    initial: LinearGaussian | None = None,
) -> LinearGaussian:
    """Probabilistic PCA at its maximum likelihood: x ~ N(W z + m, s^2 I).

    In closed form, unless values are missing or EM is asked for: by `max_iterations` or `initial`. On complete rows EM
    starts from a fixed random W, as the closed form would leave it nothing to do.

    Args:
        x: rows (N, d), N >= D + 2; NaN is a missing value (missing at random).
        latent_dim: D, 1 .. d - 1.
        max_iterations: of EM; None for the closed form where there is one, else for 10,000.
        tolerance: EM ends an estimated `tolerance` nats a row below the maximum.
        accelerate: parameter expansion and mixing; False gives the iterations of Tipping & Bishop.
        initial: where EM starts, an earlier result; its mean of s^2 counts.

    Returns:
        A `Program` with its exact posterior as the guide, and the log-likelihood of every iteration.

    Raises:
        ValueError: D, rows, shapes or values that no maximum goes with; each says which.
        ArithmeticError: an iteration lost log-likelihood.

    Warns:
        UserWarning: EM ended at `max_iterations`, or at a saddle point, which complete rows show; a column is constant.

    Examples:
        >>> import torch
        >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([3.0, 1.0, 1.0])
        >>> ppca(x, 1).weight.shape
        torch.Size([3, 1])
    """
    _require_sensible(tolerance, initial)
    data = standardise(x, latent_dim, shared)
    covariance, by_em = data.covariance, initial is not None or max_iterations is not None
    start, goal = None, math.inf
    if covariance is not None:
        solution, goal = _closed_form(covariance, latent_dim)
        if float(solution.variance[0]) < (LEAST if by_em else ZERO):
            raise _flat(data, latent_dim, by_em=by_em)
        if not by_em:
            return data.program(solution, torch.tensor([goal], dtype=torch.float64), scalar=True)
        start = _arbitrary(covariance, latent_dim)
    if initial is not None:
        start = data.state(initial, latent_dim)
        start = State(start.weight, start.mean, start.variance.mean().expand_as(start.variance))
    start = _closed_form(data.filled(), latent_dim)[0] if start is None else start
    step = data.step(latent_dim, shared, LEAST, expand=accelerate)
    program = _run(data, step, start, tolerance, max_iterations, accelerate=accelerate, scalar=True)
    if float((program.noise[0].detach().double() / data.unit[0]).square()) <= 1.001 * LEAST:
        raise _flat(data, latent_dim, by_em=True)
    below = goal - data.log_units - float(program.log_likelihood[-1])
    if covariance is not None and program.converged and below > max(SADDLE, 10.0 * tolerance):
        program.converged = False
        warn(
            f"EM has stopped at a saddle point, {below:.2g} nats a row below the maximum: start elsewhere (initial=), or "
            "leave out max_iterations= and initial= for the closed form."
        )
    return program


def factor_analysis(
    x: Data,
    latent_dim: int,
    *,
    max_iterations: int | None = None,
    tolerance: float = 1e-8,
    accelerate: bool = True,
    floor: float = 1e-4,
    initial: LinearGaussian | None = None,
) -> LinearGaussian:
    """Factor analysis at its maximum likelihood, by EM: x ~ N(W z + m, diag(s^2)).

    The likelihood may have more than one maximum; EM finds the one above its start, which is the closed form of
    probabilistic PCA on standardised columns. Where it rises until some noise is zero (a Heywood case: too many latent
    dimensions, or too few rows) the noise stops at `floor`, and a warning says so.

    Args:
        x: rows (N, d), N >= D + 2; NaN is a missing value (missing at random).
        latent_dim: D, 1 .. d - 1.
        max_iterations: of EM; None for 10,000.
        tolerance: EM ends an estimated `tolerance` nats a row below the maximum.
        accelerate: parameter expansion and mixing; False gives the iterations of Rubin & Thayer.
        floor: least s^2 of a column, as a part of its variance.
        initial: where EM starts, an earlier result.

    Returns:
        A `Program` with its exact posterior as the guide, and the log-likelihood of every iteration.

    Raises:
        ValueError: D, rows, shapes or values that no maximum goes with, a constant column among them; each says which.
        ArithmeticError: an iteration lost log-likelihood.

    Warns:
        UserWarning: EM ended at `max_iterations`; a Heywood case.

    Examples:
        >>> import torch
        >>> x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0)).cumsum(-1)
        >>> program = factor_analysis(x, 1)
        >>> bool((program.log_likelihood.diff() >= 0).all())
        True
    """
    _require_sensible(tolerance, initial)
    if not isinstance(floor, Real) or not 0.0 < floor < 1.0:
        raise ValueError(f"floor={floor!r} must lie between 0 and 1: it is a part of a column's variance.")
    data = standardise(x, latent_dim, each)
    if initial is not None:
        start = data.state(initial, latent_dim)
    else:
        start = _closed_form(data.filled() if data.covariance is None else data.covariance, latent_dim)[0]
    step = data.step(latent_dim, each, floor, expand=accelerate)
    start = State(start.weight, start.mean, start.variance.clamp(min=floor))
    program = _run(data, step, start, tolerance, max_iterations, accelerate=accelerate, scalar=False)
    share = (program.noise.detach().double() / data.unit).square()
    if len(low := (share <= floor * 1.001).nonzero().flatten().tolist()):
        warn(
            f"A Heywood case: the likelihood rises until the noise of {len(low)} of {len(share)} columns (first of column "
            f"{low[0]}) is zero, so it was held at floor={floor:g} of their variance: use fewer latent dimensions than "
            f"{latent_dim}, or more rows."
        )
    return program


def _require_sensible(tolerance: float, initial: LinearGaussian | None) -> None:
    if not isinstance(tolerance, Real) or not tolerance >= 0.0:
        raise ValueError(f"tolerance={tolerance!r} must be a number of nats of at least 0.")
    if initial is not None and not isinstance(initial, LinearGaussian):
        raise TypeError(f"initial={initial!r} is no result of ppca or factor_analysis: give one, or leave it out.")


def _run(
    data: Standard,
    step: Step,
    start: State,
    tolerance: float,
    max_iterations: int | None,
    *,
    accelerate: bool,
    scalar: bool,
) -> LinearGaussian:
    most = MOST if max_iterations is None else max_iterations
    positive(max_iterations=most)
    end = climb(step, start, tolerance=tolerance, max_iterations=most, accelerate=accelerate)
    if not end.converged:
        short = (
            f"an estimated {end.ahead:.2g} nats a row below"
            if math.isfinite(end.ahead)
            else "too early to say how far below"
        )
        warn(
            f"EM ended after max_iterations={most}, {short} the maximum (tolerance={tolerance:g}): allow more, or go on "
            "with initial=."
        )
    return data.program(end.state, end.path, scalar=scalar, converged=end.converged)


def _closed_form(covariance: Tensor, latent_dim: int) -> tuple[State, float]:
    """The maximum of probabilistic PCA, and a row's mean log-likelihood there (Tipping & Bishop 1999, eq. 4, 7-8), in nats.

    From the eigenvalues: no difference of large numbers, however small the noise.
    """
    values, vectors = torch.linalg.eigh(covariance)
    variance = values[:-latent_dim].mean()
    weight = vectors[:, -latent_dim:].flip(1) * (values[-latent_dim:].flip(0) - variance).clamp(min=0.0).sqrt()
    state = State(weight, torch.zeros_like(values), variance.clamp(min=0.0).expand_as(values))
    log_det = values[-latent_dim:].clamp(min=0.0).log().sum() + (len(values) - latent_dim) * state.variance[0].log()
    return state, -0.5 * float(len(values) * (math.log(2.0 * math.pi) + 1.0) + log_det)


def _arbitrary(covariance: Tensor, latent_dim: int) -> State:
    """A start that no data are orthogonal to: the same small random W each time, and a small noise.

    The columns of W shrink in directions in which the rows vary less than the noise, and are lost if they reach zero.
    """
    size, generator = len(covariance), torch.Generator().manual_seed(0)
    weight = 0.5 * torch.randn(size, latent_dim, generator=generator, dtype=torch.float64).to(covariance)
    noise = 0.1 * torch.linalg.eigvalsh(covariance)[-latent_dim].clamp(max=1.0)
    return State(weight, torch.zeros_like(weight[:, 0]), noise.clamp(min=LEAST).expand(size).clone())


def _flat(data: Standard, latent_dim: int, *, by_em: bool) -> ValueError:
    mend = "or leave out max_iterations= and initial= for the closed form, which resolves less noise" if by_em else ""
    return ValueError(
        f"The {data.num_rows} rows lie in a plane of latent_dim={latent_dim} dimensions or fewer, but for noise below "
        f"{LEAST if by_em else ZERO:g} of their mean variance: use a smaller latent_dim, more rows, columns of like scale"
        f"{', ' + mend if mend else ''}."
    )
