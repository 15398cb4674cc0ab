"""Posterior predictive checks against closed forms of a linear-Gaussian model."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_gaussian import LinearGaussian
from torch import Tensor

import pyro_vae as pv
from pyro_vae.report.diagnostics import PosteriorPredictive, posterior_predictive

KNOWN = LinearGaussian()


def first(x: Tensor) -> Tensor:
    return x[:, 0]


@pytest.mark.parametrize("shift", [0.0, 1.5])
@pytest.mark.parametrize("method", [None, pv.posterior.laplace])
def test_replications_of_a_row_are_normal_around_the_posterior_mean(
    shift: float, method: pv.posterior.Engine | None
) -> None:
    """x_rep | x ~ N(W m + b, W C W' + diag s^2), of the guide with its own, moved, mean."""
    x, draws = KNOWN.draw(40), 2000
    result = posterior_predictive(KNOWN.program(shift=shift), x, {"first": first}, num_draws=draws, method=method, seed=1)
    moved = shift * torch.linalg.cholesky(KNOWN.covariance).sum(-1) if method is None else 0.0
    mean = ((KNOWN.posterior_mean(x) + moved) @ KNOWN.weight.T + KNOWN.bias)[:, 0]
    covariance = KNOWN.weight @ KNOWN.covariance @ KNOWN.weight.T + torch.diag(KNOWN.scale.square())
    deviation = float(covariance[0, 0].sqrt())
    assert torch.equal(result.observed["first"], x[:, 0])
    replicated = result.replicated["first"]
    assert replicated.shape == (draws, 40)
    # Particles drawn again by their weights repeat each other, which costs a half more of the error.
    error = deviation / math.sqrt(draws) * (1.0 if method is None else 1.5)
    assert ((replicated.mean(0) - mean).abs() < 4.5 * error).all()
    assert (
        (replicated.std(0) / deviation - 1.0).abs() < 4.5 / math.sqrt(2 * draws) * (1.0 if method is None else 1.5)
    ).all()
    side = torch.special.ndtr((x[:, 0] - mean) / deviation)
    expected = 2.0 * torch.minimum(side, 1.0 - side)
    binomial = 2.0 * torch.sqrt((expected / 2.0) * (1.0 - expected / 2.0) / draws) * (1.0 if method is None else 1.5)
    assert ((result.p_value("first") - expected).abs() < 5.0 * binomial + 3.0 / draws).all()


def test_a_statistic_of_all_rows_pairs_one_draw_of_each() -> None:
    """The mean of x_rep over N rows: its variance is 1' (W C W' + S) 1 / (d^2 N)."""
    x, draws = KNOWN.draw(30), 1000
    result = posterior_predictive(KNOWN.program(), x, {"mean": torch.mean}, num_draws=draws)
    covariance = KNOWN.weight @ KNOWN.covariance @ KNOWN.weight.T + torch.diag(KNOWN.scale.square())
    deviation = float(covariance.sum().sqrt()) / 6.0 / math.sqrt(30)
    replicated = result.replicated["mean"]
    mean = float((KNOWN.posterior_mean(x) @ KNOWN.weight.T + KNOWN.bias).mean())
    assert replicated.shape == (draws,)
    assert float(replicated.mean()) == pytest.approx(mean, abs=4.5 * deviation / math.sqrt(draws))
    assert float(replicated.std()) == pytest.approx(deviation, rel=4.5 / math.sqrt(2 * draws))
    assert float(result.observed["mean"]) == pytest.approx(float(x.mean()))


def test_a_wrong_model_is_found_on_its_own_side() -> None:
    """Data with tails that a Normal does not draw: the maximum is too large, and nothing is said of the mean."""
    x = KNOWN.draw(200)
    x[7, 2] += 12.0
    result = posterior_predictive(KNOWN.program(), x, num_draws=199)
    assert list(result.observed) == ["mean", "standard deviation", "minimum", "maximum"]
    assert float(result.p_value("maximum")) == pytest.approx(2.0 / 200.0)
    assert (result.replicated["maximum"] < result.observed["maximum"]).all()
    assert float(result.p_value("minimum")) > 0.05


def made(observed: list[float], replicated: list[list[float]]) -> PosteriorPredictive:
    pair = torch.tensor(observed, dtype=torch.float64), torch.tensor(replicated, dtype=torch.float64)
    return PosteriorPredictive({"t": pair[0]}, {"t": pair[1]}, len(observed), "x", "guide")


def test_p_values_by_hand() -> None:
    result = made(
        [2.0, 9.0, 0.0, 1.0, math.nan], [[1.0, 1.0, 1.0, 1.0, 1.0], [2.0] * 3 + [1.0, 2.0], [3.0] * 3 + [1.0, 3.0]]
    )
    p = result.p_value("t")
    # 2 (1 + 2) / 4 is more than 1; 2 (1 + 0) / 4 on either side; all equal; not a number.
    assert p[:4].tolist() == [1.0, 0.5, 0.5, 1.0]
    assert p[4].isnan()


def test_missing_values_are_missing_in_the_replications_too() -> None:
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(2),
        likelihood=pv.likelihoods.Normal(pv.nets.MLP(2, 5, hidden=(8,)), scale=0.5, missing=True),
        guide=pv.guides.DiagonalNormal(pv.nets.MLP(5, hidden=(8,)), latent_dim=2),
    )
    x = torch.randn(20, 5)
    x[3, 1:], x[4, 0] = torch.nan, torch.nan
    seen: list[Tensor] = []

    def holes(rows: Tensor) -> Tensor:
        seen.append(rows)
        return rows.isnan().sum(-1)

    result = posterior_predictive(vae, x, {"holes": holes, "sum": lambda rows: rows.nansum(-1)}, num_draws=6)
    assert (result.replicated["holes"] == result.observed["holes"]).all()
    assert len(seen) == 7
    assert result.replicated["sum"][:, 3].std() > 0.0
    assert all(bool(value.isfinite()) for value in posterior_predictive(vae, x, num_draws=3).observed.values())


def two_sites(x: Tensor, y: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z[..., None], 1.0).expand([*z.shape, 2]).to_event(1), obs=x)
        pyro.sample("y", dist.Poisson((3.0 + z).exp()), obs=y)


def two_guide(x: Tensor, y: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.1 * x[:, 0], 0.1))


def test_one_of_several_sites_is_named() -> None:
    program = pv.Program(two_sites, two_guide)
    rows = (torch.randn(50, 2), torch.full((50,), 20.0))
    result = posterior_predictive(program, rows, {"mean": torch.mean}, site="y", num_draws=50)
    assert result.site == "y"
    assert float(result.observed["mean"]) == 20.0
    mean = float(((3.0 + 0.1 * rows[0][:, 0]).exp() * math.exp(0.5 * 0.01)).mean())
    assert float(result.replicated["mean"].mean()) == pytest.approx(mean, rel=0.03)
    with pytest.raises(ValueError, match="observes several sites: give one of 'x', 'y'"):
        posterior_predictive(program, rows)
    with pytest.raises(ValueError, match="site='z' is none that the program observes: give one of 'x', 'y'"):
        posterior_predictive(program, rows, site="z")


def test_it_prints_itself_makes_a_table_and_is_reproducible() -> None:
    x = KNOWN.draw(9)
    statistics = {"mean": torch.mean, "first": first}
    before = torch.random.get_rng_state()
    result, again = (posterior_predictive(KNOWN.program(), x, statistics, num_draws=20, seed=3) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(result.replicated["first"], again.replicated["first"])
    lines = str(result).splitlines()
    assert lines[0] == "posterior predictive check of 'x': 20 replications of 9 rows, latents by guide"
    assert lines[1].startswith("  mean: observed ")
    assert lines[2].startswith("  first, by row: two-sided p at most 0.05 in ")
    frame = result.to_dataframe()
    assert list(frame.columns) == ["statistic", "row", "observed", "mean", "sd", "p_value"]
    assert frame["row"].tolist() == [-1, *range(9)]
    assert frame["p_value"].tolist()[1:] == result.p_value("first").tolist()


@pytest.mark.parametrize(
    ("options", "kind", "told"),
    [
        ({"statistics": {}}, ValueError, "statistics is empty"),
        ({"statistics": {"all": lambda x: x}}, ValueError, r"statistics\['all'\] returned shape \(5, 6\)"),
        ({"num_draws": 0}, ValueError, "num_draws=0 must be"),
        ({"method": pv.evidence.exact}, TypeError, "is no engine"),
    ],
)
def test_refusals(options: dict[str, object], kind: type[Exception], told: str) -> None:
    with pytest.raises(kind, match=told):
        posterior_predictive(KNOWN.program(), KNOWN.draw(5), **options)


def test_rows_that_cannot_be_judged_are_refused() -> None:
    x = KNOWN.draw(5)
    x[2, 0] = torch.nan
    with pytest.raises(ValueError, match=r"Row 2 of x cannot be judged \(NaN or infinite values\): leave it out"):
        posterior_predictive(KNOWN.program(), x)
