"""Normals with one covariance for all rows, and missing numbers, against scipy and the textbook's conditional Normal."""

import pytest
import scipy.stats
import torch
from torch import Tensor

from pyro_vae.model.families.covariance import CovarianceNormal, FullNormal, LowRankNormal

DIM = 5
W = torch.tensor([[1.0, 0.2], [-0.7, 1.1], [0.4, -0.3], [2.0, 0.0], [0.1, 0.9]], dtype=torch.float64)
S = torch.tensor([0.5, 1.0, 0.3, 2.0, 0.7], dtype=torch.float64)
SIGMA = W @ W.T + torch.diag(S**2)


def both(loc: Tensor, *, missing: bool) -> list[CovarianceNormal]:
    return [
        FullNormal(loc, torch.linalg.cholesky(SIGMA).to(loc), missing=missing),
        LowRankNormal(loc, W.to(loc), S.to(loc), missing=missing),
    ]


@pytest.mark.parametrize("which", [0, 1])
def test_complete_rows_have_scipys_density(which: int) -> None:
    loc, x = torch.randn(7, DIM, dtype=torch.float64), 3.0 * torch.randn(4, 7, DIM, dtype=torch.float64)
    for missing in (False, True):
        p = both(loc, missing=missing)[which]
        expected = [[scipy.stats.multivariate_normal(m, SIGMA).logpdf(v) for m, v in zip(loc, k, strict=True)] for k in x]
        torch.testing.assert_close(p.log_prob(x), torch.tensor(expected, dtype=torch.float64))
        torch.testing.assert_close(p.covariance_matrix, SIGMA)
        torch.testing.assert_close(p.variance, SIGMA.diagonal().expand(7, -1))


@pytest.mark.parametrize("which", [0, 1])
def test_seen_numbers_have_scipys_marginal_for_any_broadcast(which: int) -> None:
    loc = torch.randn(3, 6, DIM, dtype=torch.float64)
    x = torch.randn(6, DIM, dtype=torch.float64)
    x[torch.rand(6, DIM) < 0.5] = torch.nan
    x[0], x[1] = torch.nan, 1.0
    p = both(loc, missing=True)[which]

    def marginal(mean: Tensor, row: Tensor) -> float:
        seen = ~row.isnan()
        if not seen.any():
            return 0.0
        return float(scipy.stats.multivariate_normal(mean[seen], SIGMA[seen][:, seen]).logpdf(row[seen]))

    expected = torch.tensor([[marginal(loc[k, n], x[n]) for n in range(6)] for k in range(3)], dtype=torch.float64)
    torch.testing.assert_close(p.log_prob(x), expected)
    torch.testing.assert_close(p.log_prob(x.expand(3, -1, -1)), expected)
    one = torch.tensor([[marginal(loc[k, n], x[2]) for n in range(6)] for k in range(3)], dtype=torch.float64)
    torch.testing.assert_close(p.log_prob(x[2]), one)
    torch.testing.assert_close(p.log_prob(x[2:3]), one)
    alone = both(loc[0, 0], missing=True)[which]
    torch.testing.assert_close(
        alone.log_prob(x), torch.tensor([marginal(loc[0, 0], row) for row in x], dtype=torch.float64)
    )


@pytest.mark.parametrize("which", [0, 1])
def test_draws_and_completions_have_the_moments_of_the_normal_and_of_its_conditional(which: int) -> None:
    """40,000 draws; means and covariances within 5 standard errors."""
    count, loc = 40_000, torch.arange(DIM, dtype=torch.float64)
    p = both(loc.expand(count, -1), missing=True)[which]
    row = torch.tensor([2.0, torch.nan, -1.0, torch.nan, torch.nan], dtype=torch.float64)
    gone = row.isnan()
    gain = SIGMA[gone][:, ~gone] @ torch.linalg.inv(SIGMA[~gone][:, ~gone])
    conditional = loc[gone] + gain @ (row[~gone] - loc[~gone]), SIGMA[gone][:, gone] - gain @ SIGMA[~gone][:, gone]
    completed = p.complete(row.expand(count, -1))
    assert torch.equal(completed[:, ~gone], row[~gone].expand(count, -1))
    for draws, (mean, covariance) in ((p.sample(), (loc, SIGMA)), (completed[:, gone], conditional)):
        sd = covariance.diagonal().sqrt()
        assert ((draws.mean(0) - mean).abs() < 5.0 * sd / count**0.5).all()
        error = (covariance.square() + torch.outer(sd, sd).square()).sqrt() / count**0.5
        assert ((torch.cov(draws.T) - covariance).abs() < 5.0 * error).all()


@pytest.mark.parametrize("which", [0, 1])
def test_gradients_are_those_of_the_marginal(which: int) -> None:
    """Of mean and covariance, through the masked factors, against finite differences."""
    x = torch.tensor([[1.0, torch.nan, 0.3, torch.nan, -2.0], [torch.nan] * 5, [0.5] * 5], dtype=torch.float64)
    loc = torch.randn(3, DIM, dtype=torch.float64, requires_grad=True)
    if which == 0:
        tril = torch.linalg.cholesky(SIGMA).requires_grad_()
        inputs = (loc, tril)
        make = lambda m, factor: FullNormal(m, factor.tril(), missing=True).log_prob(x)  # noqa: E731
    else:
        inputs = (loc, W.clone().requires_grad_(), S.clone().requires_grad_())
        make = lambda m, w, s: LowRankNormal(m, w, s, missing=True).log_prob(x)  # noqa: E731
    assert torch.autograd.gradcheck(make, inputs)
    assert torch.autograd.gradgradcheck(make, inputs)


def test_reparametrised_draws_carry_gradients() -> None:
    for p in both(torch.zeros(2, DIM, dtype=torch.float64).requires_grad_(), missing=False):
        assert p.has_rsample
        (slope,) = torch.autograd.grad(p.rsample().sum(), p.loc)
        torch.testing.assert_close(slope, torch.ones(2, DIM, dtype=torch.float64))
        with pytest.raises(ValueError, match="within the support"):
            p.log_prob(torch.full((2, DIM), torch.nan, dtype=torch.float64))


@pytest.mark.parametrize("which", [0, 1])
def test_regression_on_what_was_seen_is_the_formula(which: int) -> None:
    seen = torch.tensor([True, False, True, True, False])
    residual = torch.where(seen, torch.tensor([0.5, 9.0, -1.0, 2.0, 9.0], dtype=torch.float64), 0.0)
    found = both(torch.zeros(1, DIM, dtype=torch.float64), missing=True)[which].regress(residual[None], seen[None])[0]
    torch.testing.assert_close(found, SIGMA[:, seen] @ torch.linalg.inv(SIGMA[seen][:, seen]) @ residual[seen])
