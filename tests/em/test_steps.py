"""Single iterations of EM against matrix inversion and sums over rows, and what a climb refuses."""

import math

import pytest
import torch
from em.correlated import COLUMNS, LATENT, draw, with_holes
from torch.distributions import MultivariateNormal

from pyro_vae.em import iterations
from pyro_vae.em.steps import CompleteRows, PartialRows, State, each, shared


def test_an_iteration_without_expansion_is_tipping_and_bishops() -> None:
    """Eq. 29-30 with S, M and s^2, by matrix inversion."""
    s = torch.cov(draw().mT / torch.logspace(-1.0, 1.0, COLUMNS).double()[:, None], correction=0)
    weight = torch.randn(COLUMNS, LATENT, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    noise = torch.tensor(0.7).double()
    state = State(weight, torch.zeros(COLUMNS).double(), noise.expand(COLUMNS))
    value, after = CompleteRows(s, shared, 1e-8, expand=False)(state)
    eye = torch.eye(LATENT).double()
    inverse = torch.linalg.inv(weight.mT @ weight + noise * eye)
    expected = s @ weight @ torch.linalg.inv(noise * eye + inverse @ weight.mT @ s @ weight)
    torch.testing.assert_close(after.weight, expected)
    expected_noise = (s - s @ weight @ inverse @ expected.mT).trace() / COLUMNS
    torch.testing.assert_close(after.variance, expected_noise.expand(COLUMNS))
    c = weight @ weight.mT + noise * torch.eye(COLUMNS).double()
    log_likelihood = -0.5 * (COLUMNS * math.log(2 * math.pi) + torch.logdet(c) + (torch.linalg.inv(c) @ s).trace())
    assert value == pytest.approx(float(log_likelihood), rel=1e-12)


@pytest.mark.parametrize("pool", [each, shared])
@pytest.mark.parametrize("expand", [False, True])
def test_an_iteration_on_rows_is_the_one_on_their_covariance_where_nothing_is_missing(pool: object, expand: bool) -> None:
    x = draw(50)
    x = (x - x.mean(0)) / x.std(0, unbiased=False)
    weight = torch.randn(COLUMNS, LATENT, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    state = State(weight, torch.zeros(COLUMNS).double(), torch.linspace(0.3, 1.0, COLUMNS).double())
    a, first = CompleteRows(x.mT @ x / 50, pool, 1e-8, expand=expand)(state)  # type: ignore[arg-type]
    b, second = PartialRows(x, LATENT, pool, 1e-8, expand=expand)(state)  # type: ignore[arg-type]
    assert a == pytest.approx(b, rel=1e-12)
    torch.testing.assert_close(first.flat(), second.flat(), rtol=1e-10, atol=1e-12)


def test_blocks_of_rows_do_not_change_an_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against sums over single rows."""
    x = with_holes(draw(40))
    x = (x - x.nanmean(0))[~x.isnan().all(-1)]
    state = State(
        torch.randn(COLUMNS, LATENT, generator=torch.Generator().manual_seed(2), dtype=torch.float64),
        torch.linspace(-0.5, 0.5, COLUMNS).double(),
        torch.linspace(0.3, 1.0, COLUMNS).double(),
    )
    monkeypatch.setattr("pyro_vae.em.steps.ELEMENTS", 7 * (LATENT + 1) ** 2)
    step = PartialRows(x, LATENT, each, 1e-8, expand=False)
    assert len(step.blocks) > 4
    value, after = step(state)
    top = [torch.zeros(LATENT + 1, LATENT + 1).double() for _ in range(COLUMNS)]
    side, log_p = [torch.zeros(LATENT + 1).double() for _ in range(COLUMNS)], 0.0
    moments = torch.zeros(LATENT + 1, LATENT + 1).double()
    covariance = state.weight @ state.weight.mT + torch.diag(state.variance)
    for row in x:
        seen = ~row.isnan()
        gain = state.weight[seen].mT @ torch.linalg.inv(covariance[seen][:, seen])
        z = torch.cat([gain @ (row - state.mean)[seen], torch.ones(1).double()])
        outer = torch.outer(z, z)
        outer[:-1, :-1] += torch.eye(LATENT).double() - gain @ state.weight[seen]
        moments += outer / len(x)
        log_p += float(MultivariateNormal(state.mean[seen], covariance[seen][:, seen]).log_prob(row[seen])) / len(x)
        for j in seen.nonzero().flatten().tolist():
            top[j] += outer
            side[j] += row[j] * z
    joint = torch.stack([torch.linalg.solve(a, b) for a, b in zip(top, side, strict=True)])
    assert value == pytest.approx(log_p, rel=1e-12)
    torch.testing.assert_close(after.weight, joint[:, :-1])
    torch.testing.assert_close(after.mean, joint[:, -1])
    for j in range(COLUMNS):
        seen = ~x[:, j].isnan()
        expected = (x[seen, j].square().sum() - joint[j] @ side[j]) / seen.sum()
        assert float(after.variance[j]) == pytest.approx(float(expected), rel=1e-9)
    # Liu, Rubin & Wu 1998: z ~ N(a, R) of the expanded model, brought back to N(0, I), gives the same N(m, W W' + psi).
    a, second = moments[:-1, -1], moments[:-1, :-1]
    assert a.abs().max() > 0.01
    expanded = PartialRows(x, LATENT, each, 1e-8, expand=True)(state)[1]
    spread = joint[:, :-1] @ (second - torch.outer(a, a)) @ joint[:, :-1].mT
    torch.testing.assert_close(expanded.weight @ expanded.weight.mT, spread)
    torch.testing.assert_close(expanded.mean, joint[:, -1] + joint[:, :-1] @ a)
    torch.testing.assert_close(expanded.variance, after.variance)


def test_a_loss_of_log_likelihood_is_an_error() -> None:
    class Falling(CompleteRows):
        calls = 0

        def __call__(self, state: State) -> tuple[float, State]:
            self.calls += 1
            value, after = super().__call__(state)
            return value - (1.0 if self.calls == 4 else 0.0), after

    s = torch.corrcoef(draw().mT)
    state = State(torch.ones(COLUMNS, 1).double() * 0.1, torch.zeros(COLUMNS).double(), torch.ones(COLUMNS).double())
    step = Falling(s, each, 1e-4, expand=False)
    with pytest.raises(ArithmeticError, match=r"Iteration 3 of EM took the log-likelihood from"):
        iterations.climb(step, state, tolerance=0.0, max_iterations=50, accelerate=False)
