"""Local shapes against explicit matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyro_vae.posterior.shapes import Dense, LowRank, Shape, positive

COUNT, DIM, RANK = 3, 5, 2


def dense() -> tuple[Shape, Tensor]:
    root = torch.randn(COUNT, DIM, DIM, dtype=torch.float64)
    matrix = root @ root.mT + 0.3 * torch.eye(DIM, dtype=torch.float64)
    return Dense.of(torch.linalg.cholesky(matrix)), matrix


def low_rank() -> tuple[Shape, Tensor]:
    vectors = torch.linalg.qr(torch.randn(COUNT, DIM, RANK, dtype=torch.float64)).Q
    curvature, rest = 1.0 + 9.0 * torch.rand(COUNT, RANK, dtype=torch.float64), torch.tensor([0.7, 1.3, 2.0]).double()
    across = torch.eye(DIM, dtype=torch.float64) - vectors @ vectors.mT
    matrix = vectors @ torch.diag_embed(curvature) @ vectors.mT + rest[:, None, None] * across
    return LowRank(vectors, curvature, rest), matrix


def unit_dense() -> tuple[Shape, Tensor]:
    return Dense.unit(COUNT, DIM, torch.device("cpu")), torch.eye(DIM, dtype=torch.float64).expand(COUNT, -1, -1)


def unit_low_rank() -> tuple[Shape, Tensor]:
    return LowRank.unit(COUNT, DIM, RANK, torch.device("cpu")), torch.eye(DIM, dtype=torch.float64).expand(COUNT, -1, -1)


SHAPES = {"dense": dense, "low rank": low_rank, "dense unit": unit_dense, "low rank unit": unit_low_rank}


def matrices(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """R', R'^-1 and R^-1 of each of the n points, (n, D, D), column by column from unit vectors."""
    units = torch.eye(DIM, dtype=torch.float64)[:, None].expand(DIM, COUNT, DIM)
    return tuple(apply(units).permute(1, 2, 0) for apply in (shape.whiten, shape.colour, shape.precondition))  # type: ignore[return-value]


@pytest.mark.parametrize("name", SHAPES)
def test_square_roots_are_those_of_the_precision(name: str) -> None:
    """P = R R': whitening is R', colouring its inverse, so that its draws have covariance P^-1; gradients take R^-1."""
    shape, precision = SHAPES[name]()
    whiten, colour, precondition = matrices(shape)
    torch.testing.assert_close(whiten.mT @ whiten, precision)
    torch.testing.assert_close(colour @ colour.mT, torch.linalg.inv(precision))
    torch.testing.assert_close(precondition, torch.linalg.inv(whiten.mT))
    torch.testing.assert_close(shape.half_log_det, 0.5 * torch.linalg.slogdet(precision).logabsdet)


@pytest.mark.parametrize("name", SHAPES)
def test_vectors_of_many_draws_belong_to_their_own_matrices(name: str) -> None:
    shape, precision = SHAPES[name]()
    vector = torch.randn(4, COUNT, DIM, dtype=torch.float64)
    square = torch.einsum("knd,nde,kne->kn", vector, precision, vector)
    torch.testing.assert_close(shape.whiten(vector).square().sum(-1), square)
    # A Newton step is P^-1 g: precondition the gradient, colour the result.
    step = shape.colour(shape.precondition(vector))
    torch.testing.assert_close(step, torch.linalg.solve(precision, vector[..., None])[..., 0])


@pytest.mark.parametrize("name", ["dense", "low rank"])
def test_taken_and_joined_shapes_keep_their_order(name: str) -> None:
    shape, _ = SHAPES[name]()
    other, _ = SHAPES[name]()
    whole = matrices(shape)[0]
    taken = shape.take(torch.tensor([2, 0, 2]))
    torch.testing.assert_close(matrices(taken)[0], whole[[2, 0, 2]])
    torch.testing.assert_close(taken.half_log_det, shape.half_log_det[[2, 0, 2]])
    joined = type(shape).join([shape, other]).take(torch.tensor([4, 1, 3]))
    torch.testing.assert_close(matrices(joined)[0], torch.stack([matrices(other)[0][1], whole[1], matrices(other)[0][0]]))


def test_matrices_that_are_no_precisions_are_mended_and_others_are_not_touched() -> None:
    """Eigenvalues become absolute and at least `least`, eigenvectors stay; NaN counts as no curvature at all."""
    rotation = torch.linalg.qr(torch.randn(DIM, DIM, dtype=torch.float64)).Q
    least = torch.tensor(0.1, dtype=torch.float64)
    given = torch.tensor([[3.0, 2.0, 1.0, 0.5, 0.2], [3.0, -2.0, 1e-12, 0.5, -1e-12], [1e6, -1e-3, 0.0, 7.0, 0.11]])
    mended = torch.tensor([[3.0, 2.0, 1.0, 0.5, 0.2], [3.0, 2.0, 0.1, 0.5, 0.1], [1e6, 0.1, 0.1, 7.0, 0.11]])
    shape = positive(rotation @ torch.diag_embed(given.double()) @ rotation.T, least)
    expected = rotation @ torch.diag_embed(mended.double()) @ rotation.T
    torch.testing.assert_close(shape.factor @ shape.factor.mT, expected, rtol=1e-6, atol=1e-6)
    unit = torch.eye(DIM, dtype=torch.float64).expand(3, -1, -1)
    torch.testing.assert_close(shape.inverse @ shape.factor, unit, rtol=1e-6, atol=1e-6)
    nothing = positive(torch.full((1, DIM, DIM), torch.nan, dtype=torch.float64), least)
    torch.testing.assert_close(nothing.factor @ nothing.factor.mT, 0.1 * unit[:1])
