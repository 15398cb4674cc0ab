"""Directions of largest curvature against precisions whose eigenvectors are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyro_vae.posterior.derivatives import Local
from pyro_vae.posterior.lanczos import lanczos
from pyro_vae.posterior.shapes import LowRank

LEAST = torch.tensor(0.25, dtype=torch.float64)


def spectrum(values: Tensor, rest: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """n matrices with eigenvalues `values` (n, r) and `rest` (n,) in all other directions: the vectors, the matrices."""
    vectors = torch.linalg.qr(torch.randn(len(values), dim, values.shape[1], dtype=torch.float64)).Q
    across = torch.eye(dim, dtype=torch.float64) - vectors @ vectors.mT
    return vectors, vectors @ torch.diag_embed(values) @ vectors.mT + rest[:, None, None] * across


def shape_of(precision: Tensor) -> LowRank:
    """What Lanczos makes of the log joint -u' P u / 2 + g' u."""
    u = torch.randn(1, len(precision), precision.shape[-1], dtype=torch.float64)

    def log_joint(u: Tensor) -> Tensor:
        return -0.5 * torch.einsum("knd,nde,kne->kn", u, precision, u) + 0.3 * u.sum(-1)

    return lanczos(Local(log_joint, u), LEAST)  # type: ignore[arg-type]


def explicit(shape: LowRank) -> Tensor:
    dim = shape.vectors.shape[1]
    units = torch.eye(dim, dtype=torch.float64)[:, None].expand(dim, len(shape.rest), dim)
    root = shape.whiten(units).permute(1, 2, 0)
    return root.mT @ root


def test_low_rank_plus_identity_is_found_exactly_in_400_dimensions() -> None:
    """Ten curvatures between 2 and 5,000 and one for all others, different at each of three points."""
    values = torch.logspace(0.3, 3.7, 10, dtype=torch.float64) * torch.tensor([[1.0], [0.7], [1.4]], dtype=torch.float64)
    rest = torch.tensor([1.0, 0.6, 1.2], dtype=torch.float64)
    vectors, precision = spectrum(values, rest, 400)
    shape = shape_of(precision)
    torch.testing.assert_close(shape.curvature.sort(-1).values[:, -10:], values.sort(-1).values, rtol=1e-8, atol=0.0)
    torch.testing.assert_close(shape.rest, rest, rtol=1e-8, atol=0.0)
    # Each eigenvector lies in the span that was found, with its own eigenvalue.
    torch.testing.assert_close(explicit(shape) @ vectors, vectors * values[:, None], rtol=1e-7, atol=1e-6)
    torch.testing.assert_close(shape.half_log_det, 0.5 * torch.linalg.slogdet(precision).logabsdet)
    torch.testing.assert_close(explicit(shape), precision, rtol=1e-7, atol=1e-6)


def test_few_dimensions_are_found_completely() -> None:
    root = torch.randn(2, 6, 6, dtype=torch.float64)
    precision = root @ root.mT + torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(explicit(shape_of(precision)), precision)


def test_the_narrowest_directions_come_first_where_there_are_too_many() -> None:
    """300 different curvatures: the largest ones, well apart, are right; the shape is a positive one."""
    values = torch.cat([torch.logspace(2.0, 4.0, 12), torch.linspace(1.0, 3.0, 288)]).double()[None]
    _, precision = spectrum(values, torch.ones(1, dtype=torch.float64), 300)
    shape = shape_of(precision)
    largest = values[0].sort(descending=True).values[:12]
    torch.testing.assert_close(shape.curvature[0].sort(descending=True).values[:12], largest, rtol=1e-6, atol=0.0)
    assert 1.0 <= float(shape.rest) <= 3.0
    assert (shape.curvature > 0.0).all()


def test_negative_and_vanishing_curvatures_become_positive() -> None:
    """-50 keeps its size; 1e-3 in the rest becomes the least there may be."""
    values = torch.tensor([[80.0, -50.0, 4.0]], dtype=torch.float64)
    vectors, precision = spectrum(values, torch.tensor([1e-3], dtype=torch.float64), 100)
    shape = shape_of(precision)
    torch.testing.assert_close(explicit(shape) @ vectors, vectors * values.abs()[:, None], rtol=1e-6, atol=1e-6)
    assert float(shape.rest) == pytest.approx(0.25)
    assert float(torch.linalg.eigvalsh(explicit(shape)).min()) == pytest.approx(0.25)


def test_nothing_as_large_as_a_hessian_comes_back() -> None:
    _, precision = spectrum(torch.full((1, 3), 9.0, dtype=torch.float64), torch.ones(1, dtype=torch.float64), 400)
    shape = shape_of(precision)
    assert max(part.numel() for part in (shape.vectors, shape.curvature, shape.rest)) < 400 * 400 / 2


def test_points_one_by_one_are_found_as_points_together() -> None:
    """Where the spectrum has no end that is found exactly, the answer depends on where the search begins."""
    _, precision = spectrum(torch.linspace(1.0, 2.0, 200, dtype=torch.float64).repeat(3, 1), torch.ones(3).double(), 200)
    together = shape_of(precision)
    for i in range(3):
        alone = shape_of(precision[i : i + 1])
        torch.testing.assert_close(alone.curvature[0], together.curvature[i], rtol=1e-6, atol=0.0)
        torch.testing.assert_close(alone.half_log_det[0], together.half_log_det[i], rtol=1e-6, atol=0.0)
