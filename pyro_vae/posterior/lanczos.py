"""The narrow directions of a posterior in many dimensions, without its Hessian.

The Lanczos iteration (Golub & Van Loan 2013, section 10.1) multiplies by the negative Hessian r times and finds the r
directions in which it is largest, for all points at once. The prior bounds the curvature from below in all others, so one
number, the mean of some probes, stands for them. What this misses, the importance weights and their diagnostics show.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_vae.posterior.derivatives import Local
from pyro_vae.posterior.shapes import LowRank

RANK = 64
"""r."""

PROBES = 4


def lanczos(local: Local, least: Tensor) -> LowRank:
    """Low-rank precisions at the points of `local`, (1, P, D), curvatures positive and at least `least`.

    Starting vectors and probes are always the same ones, for all points: how rows are cut to fit the memory is no matter.
    """
    _, num_points, dim = local.gradient.shape
    rank = min(RANK, dim)
    basis = torch.zeros(num_points, dim, rank, dtype=torch.float64, device=local.gradient.device)
    tridiagonal = torch.zeros(num_points, rank, rank, dtype=torch.float64, device=basis.device)
    generator = torch.Generator().manual_seed(0)

    def drawn() -> Tensor:
        return torch.randn(dim, generator=generator, dtype=torch.float64).to(basis.device).expand(num_points, dim)

    vector = _unit(drawn())
    for j in range(rank):
        basis[..., j] = vector
        image = torch.nan_to_num(-local.hessian_times(vector[None])[0], nan=0.0, posinf=0.0, neginf=0.0)
        tridiagonal[:, j, j] = (image * vector).sum(-1)
        if j == rank - 1:
            break
        image = _orthogonal(image, basis[..., : j + 1])
        length = image.norm(dim=-1)
        tridiagonal[:, j, j + 1] = tridiagonal[:, j + 1, j] = length
        # Where the images end, all that is left has one curvature, and any other direction will do.
        ended = length < 1e-6 * tridiagonal[:, j, j].abs().clamp_min(1.0)
        fresh = _orthogonal(drawn(), basis[..., : j + 1])
        vector = _unit(torch.where(ended[:, None], fresh, image))
    values, vectors = torch.linalg.eigh(tridiagonal)
    rest = torch.zeros_like(values[:, 0])
    for _ in range(PROBES):
        probe = _unit(_orthogonal(drawn(), basis))
        rest += (probe * -local.hessian_times(probe[None])[0]).sum(-1) / PROBES
    rest = torch.nan_to_num(rest, nan=0.0)
    return LowRank(basis @ vectors, torch.maximum(values.abs(), least), torch.maximum(rest.abs(), least))


def _orthogonal(vector: Tensor, basis: Tensor) -> Tensor:
    """`vector` (P, D) less what lies in the span of `basis` (P, D, r); twice, because once leaves rounding behind."""
    for _ in range(2):
        vector = vector - torch.einsum("pdr,pr->pd", basis, torch.einsum("pdr,pd->pr", basis, vector))
    return vector


def _unit(vector: Tensor) -> Tensor:
    return vector / vector.norm(dim=-1, keepdim=True).clamp_min(1e-300)
