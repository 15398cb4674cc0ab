"""`pv.to_arviz`: what is in the groups against closed forms, names, refusals, and ArviZ's own functions at work on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_gaussian import LinearGaussian
from matplotlib import pyplot as plt
from programs import Networks, Several, log_normal
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.evidence.estimate import Estimate
from pyro_vae.layouts import Layout
from pyro_vae.report.inference_data import GROUPS
from pyro_vae.report.predictive import draw_observed
from pyro_vae.report.versions import before_arviz_one

KNOWN = LinearGaussian()
X = KNOWN.draw(3)
QUICK = pv.posterior.Hamiltonian(start=pv.posterior.at_guide, warm_up=20)
EXACT_GUIDE = KNOWN.program()


def groups(data: Any) -> list[str]:
    """Names of the groups, however they are held."""
    return list(data.groups()) if before_arviz_one() else list(data.children)


def tensor(data: Any, group: str, name: str) -> Tensor:
    return torch.tensor(np.asarray(data[group][name]))


def only(*names: str) -> tuple[str, ...]:
    """What to leave out so that these groups remain."""
    return tuple(name for name in GROUPS if name not in names)


def require_moments(draws: Tensor, mean: Tensor, covariance: Tensor) -> None:
    """Independent draws (M, d) have this mean and covariance, within 5 standard errors."""
    draws = draws.double()
    away = draws - mean
    products = (away[:, :, None] * away[:, None, :]).flatten(1)
    for found, expected in ((away, torch.zeros_like(mean)), (products, covariance.flatten())):
        error = found.std(0) / len(found) ** 0.5
        assert ((found.mean(0) - expected).abs() < 5.0 * error).all(), (found.mean(0), expected, error)


class Shapes:
    """Latents of event shapes (), (2,) and (2, 3), the last positive; x of shape (2, 3)."""

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.5, 1.0))
            b = pyro.sample("b", dist.Normal(torch.tensor([0.0, 1.0]), 1.0).to_event(1))
            c = pyro.sample("c", dist.Gamma(torch.full((2, 3), 2.0), 1.0).to_event(2))
            pyro.sample("x", dist.Normal(self.mean(a, b, c), 0.5).to_event(2), obs=x)

    @staticmethod
    def mean(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return a[..., None, None] + b[..., None] * c

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(x.mean((-1, -2)), 0.5))
            pyro.sample("b", dist.Normal(x.mean(-1), 0.5).to_event(1))
            pyro.sample("c", dist.LogNormal(0.1 * x, 0.5).to_event(2))

    program = property(lambda self: pv.Program(self.model, self.guide))


# What is in the groups


def test_every_shape_has_its_dimensions_and_its_densities() -> None:
    shapes, x = Shapes(), torch.randn(4, 2, 3)
    data = pv.to_arviz(shapes.program, x, method=QUICK, num_draws=10, num_chains=2)
    assert groups(data) == [name for name in groups(data) if name in GROUPS]
    assert set(groups(data)) == set(GROUPS) - {"constant_data", "log_evidence"}
    for group, chains in (("posterior", 2), ("prior", 1)):
        assert data[group]["a"].dims == ("chain", "draw", "row")
        assert data[group]["b"].dims == ("chain", "draw", "row", "b_dim_0")
        assert data[group]["c"].dims == ("chain", "draw", "row", "c_dim_0", "c_dim_1")
        assert data[group]["c"].shape == (chains, 10, 4, 2, 3)
        assert (tensor(data, group, "c") > 0.0).all()
    assert data["posterior_predictive"]["x"].dims == ("chain", "draw", "row", "x_dim_0", "x_dim_1")
    assert data["observed_data"]["x"].dims == ("row", "x_dim_0", "x_dim_1")
    assert torch.equal(tensor(data, "observed_data", "x"), x)
    z = {name: tensor(data, "posterior", name) for name in "abc"}
    by_hand = log_normal(x, shapes.mean(**z), 0.5).sum((-1, -2))
    assert data["log_likelihood"]["x"].dims == ("chain", "draw", "row")
    torch.testing.assert_close(tensor(data, "log_likelihood", "x"), by_hand, rtol=1e-5, atol=1e-4)
    stats = data["sample_stats"]
    assert stats["lp"].shape == stats["acceptance_rate"].shape == (2, 10, 4)
    assert stats["step_size"].dims == stats["n_steps"].dims == ("row",)


def test_the_likelihood_of_a_vae_is_that_of_torch() -> None:
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(2),
        likelihood=pv.likelihoods.Bernoulli(pv.nets.MLP(2, 5, hidden=(4,))),
        guide=pv.guides.DiagonalNormal(pv.nets.MLP(5, hidden=(4,)), latent_dim=2),
    )
    x = (torch.rand(6, 5) < 0.4).float()
    data = pv.to_arviz(vae, x, method=vae.guide, num_draws=7, leave_out="posterior_predictive")
    z = tensor(data, "posterior", "z")
    assert z.shape == (1, 7, 6, 2)
    with torch.no_grad():
        logits = vae.likelihood.decoder(z)
        q = vae.q_z(x)
    likelihood = torch.distributions.Bernoulli(logits=logits).log_prob(x).double().sum(-1)
    torch.testing.assert_close(tensor(data, "log_likelihood", "x"), likelihood, rtol=1e-5, atol=1e-5)
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
    weight = likelihood + prior - q.log_prob(z)
    torch.testing.assert_close(tensor(data, "sample_stats", "log_weight"), weight.double(), rtol=1e-4, atol=1e-4)
    assert "bits_per_dimension" in data["log_evidence"]
    assert set(np.unique(data["prior_predictive"]["x"])) == {0.0, 1.0}
    assert vae.training


def test_draws_of_the_exact_guide_and_what_they_predict() -> None:
    data = pv.to_arviz(EXACT_GUIDE, X, method=EXACT_GUIDE.guide, num_draws=2000, seed=3)
    mean = KNOWN.posterior_mean(X)
    z, predicted = tensor(data, "posterior", "z")[0], tensor(data, "posterior_predictive", "x")[0]
    noise, seen_before = torch.diag(KNOWN.scale.square()), KNOWN.weight @ KNOWN.weight.T
    for row in range(3):
        require_moments(z[:, row], mean[row], KNOWN.covariance)
        spread = KNOWN.weight @ KNOWN.covariance @ KNOWN.weight.T + noise
        require_moments(predicted[:, row], KNOWN.weight @ mean[row] + KNOWN.bias, spread)
        unit = torch.eye(3, dtype=torch.float64)
        require_moments(tensor(data, "prior", "z")[0, :, row], torch.zeros(3, dtype=torch.float64), unit)
        require_moments(tensor(data, "prior_predictive", "x")[0, :, row], KNOWN.bias, seen_before + noise)
    # Where the guide is the posterior all weights are p(x).
    weights = tensor(data, "sample_stats", "log_weight")
    torch.testing.assert_close(weights, KNOWN.log_p(X).expand(1, 2000, 3), rtol=0.0, atol=1e-9)
    torch.testing.assert_close(tensor(data, "log_evidence", "log_p"), KNOWN.log_p(X), rtol=0.0, atol=1e-9)


@pytest.mark.parametrize("method", [pv.posterior.laplace, pv.posterior.from_guide])
def test_particles_are_drawn_again_by_their_weights(method: Any) -> None:
    program = KNOWN.program(inflate=1.5, shift=0.4)
    data = pv.to_arviz(program, X, method=method, num_draws=1000, leave_out=only("posterior", "sample_stats"), seed=2)
    z, ess = tensor(data, "posterior", "z")[0], tensor(data, "sample_stats", "ess")
    assert groups(data) == ["posterior", "sample_stats"]
    # Of 4,000 particles: their own error and that of drawing again.
    error = KNOWN.covariance.diagonal().sqrt() * (1.0 / ess + 1.0 / 1000)[:, None].sqrt()
    assert ((z.mean(0) - KNOWN.posterior_mean(X)).abs() < 5.0 * error).all()
    assert (z.var(0) / KNOWN.covariance.diagonal() - 1.0).abs().max() < 0.35
    joint = torch.distributions.MultivariateNormal(KNOWN.bias + z @ KNOWN.weight.T, torch.diag(KNOWN.scale.square()))
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
    if method is pv.posterior.from_guide:
        factor = torch.linalg.cholesky(KNOWN.covariance)
        q = torch.distributions.MultivariateNormal(KNOWN.posterior_mean(X) + 0.4 * factor.sum(-1), scale_tril=1.5 * factor)
        weight = joint.log_prob(X) + prior - q.log_prob(z)
        torch.testing.assert_close(tensor(data, "sample_stats", "log_weight")[0], weight, rtol=0.0, atol=1e-8)
    assert (tensor(data, "sample_stats", "pareto_k") < 0.7).all()


def test_one_chain_carries_no_r_hat_and_several_do() -> None:
    one = pv.to_arviz(EXACT_GUIDE, X, method=pv.posterior.from_guide, num_draws=50, leave_out=only("posterior"))
    assert one["posterior"]["z"].sizes["chain"] == 1
    assert np.isnan(az.summary(one)["r_hat"].astype(float)).all()
    four = pv.to_arviz(EXACT_GUIDE, X, num_draws=100, leave_out=only("posterior"))
    assert (az.summary(four)["r_hat"].astype(float) < 1.06).all()
    assert four["posterior"]["z"].sizes["chain"] == 4


def test_the_evidence_has_a_group_of_its_own() -> None:
    estimate = pv.log_evidence(EXACT_GUIDE, X, method=pv.evidence.exact)
    alone = only("log_evidence")
    data = pv.to_arviz(EXACT_GUIDE, X, method=EXACT_GUIDE.guide, num_draws=5, estimate=estimate, leave_out=alone)
    evidence = data["log_evidence"]
    assert groups(data) == ["log_evidence"]
    assert all(evidence[name].dims == ("row",) for name in evidence.data_vars)
    torch.testing.assert_close(tensor(data, "log_evidence", "log_p"), KNOWN.log_p(X), rtol=0.0, atol=1e-9)
    assert evidence["engine"].values.tolist() == list(estimate.engine)
    assert evidence["reliable"].dtype == bool
    torch.testing.assert_close(tensor(data, "log_evidence", "upper"), estimate.upper)
    asked = pv.to_arviz(EXACT_GUIDE, X, method=QUICK, num_draws=5, estimate=True, leave_out=alone)
    gap = (tensor(asked, "log_evidence", "log_p") - KNOWN.log_p(X)).abs()
    assert (gap < 5.0 * tensor(asked, "log_evidence", "standard_error") + 1e-6).all()
    assert "log_evidence" not in groups(pv.to_arviz(EXACT_GUIDE, X, method=QUICK, num_draws=5))


def test_conditions_are_constant_data_and_shape_what_is_predicted() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z + 100.0 * y, 1.0), obs=x)

    def guide(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5 * (x - 100.0 * y), 0.7))

    y = torch.tensor([0, 3, 1])
    x = 100.0 * y + torch.tensor([0.3, -1.0, 0.5])
    data = pv.to_arviz(pv.Program(model, guide), (x, y), method=guide, num_draws=50)
    assert data["constant_data"]["y"].values.tolist() == [0, 3, 1]
    assert list(data["constant_data"].data_vars) == ["y"]
    for group in ("posterior_predictive", "prior_predictive"):
        assert (tensor(data, group, "x") - 100.0 * y).abs().max() < 8.0
    assert data["observed_data"]["x"].dims == ("row",)


def test_conditions_of_a_vae_and_missing_values() -> None:
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(2),
        likelihood=pv.likelihoods.Normal(
            pv.nets.Conditional(pv.nets.MLP(2 + 3, 4, hidden=(4,)), classes=3), scale=0.5, missing=True
        ),
        guide=pv.guides.DiagonalNormal(pv.nets.Conditional(pv.nets.MLP(4 + 3, hidden=(4,)), classes=3), latent_dim=2),
    )
    x, y = torch.randn(3, 4), torch.tensor([2, 0, 1])
    x[0, 1], x[1, :] = torch.nan, torch.nan
    data = pv.to_arviz(vae, (x, y), method=vae.guide, num_draws=6)
    assert data["constant_data"]["given"].values.tolist() == [2, 0, 1]
    torch.testing.assert_close(tensor(data, "observed_data", "x"), x, equal_nan=True)
    assert tensor(data, "posterior_predictive", "x").isfinite().all()
    with torch.no_grad():
        loc = vae.likelihood.decoder(tensor(data, "posterior", "z"), y)
    seen = torch.where(x.isnan(), 0.0, log_normal(x, loc, 0.5)).sum(-1)
    found = tensor(data, "log_likelihood", "x")
    torch.testing.assert_close(found, seen, rtol=1e-5, atol=1e-5)
    assert (found[..., 1] == 0.0).all()


def counts_of(x: Tensor, **settings: Any) -> Any:
    """What `to_arviz` makes of counts, one a row, that are Poisson with the rate exp(1 + z)."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Poisson((1.0 + z).exp()), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5 * (x + 0.5).log(), 0.5))

    return pv.to_arviz(pv.Program(model, guide), x, method=guide, num_draws=30, **settings)


OBSERVED = ("observed_data", "posterior_predictive", "prior_predictive")


@pytest.mark.parametrize(("given", "kind"), [(torch.float32, "int32"), (torch.float64, "int64")])
def test_counts_are_integers(given: torch.dtype, kind: str) -> None:
    x = torch.tensor([0, 3, 1, 12, 2]).to(given)
    data = counts_of(x)
    assert data["observed_data"]["x"].dtype == kind
    assert data["observed_data"]["x"].values.tolist() == [0, 3, 1, 12, 2]
    assert all(data[group]["x"].dtype.kind == "i" for group in OBSERVED)
    assert data["observed_data"]["x"].dims == ("row",)
    assert data["posterior_predictive"]["x"].shape == (1, 30, 5)
    assert data["posterior"]["z"].dtype.kind == "f"


def test_densities_levels_and_missing_values_stay_as_they_are() -> None:
    def vae(likelihood: nn.Module) -> pv.VAE:
        guide = pv.guides.DiagonalNormal(pv.nets.MLP(4, hidden=(4,)), latent_dim=2)
        return pv.VAE(prior=pv.priors.StandardNormal(2), likelihood=likelihood, guide=guide)

    def net() -> nn.Module:
        return pv.nets.MLP(2, 4, hidden=(4,))

    whole = torch.tensor([[0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    holes = whole.clone()
    holes[1, 2] = torch.nan
    levels = pv.likelihoods.DiscretisedLogistic(net(), pv.likelihoods.Learned(), levels=17)
    for likelihood, x in (
        (pv.likelihoods.Normal(net(), scale=0.5), whole),
        (levels, whole * 3.0 / 16.0),
        (pv.likelihoods.Bernoulli(net(), missing=True), holes),
    ):
        program = vae(likelihood)
        data = pv.to_arviz(program, x, method=program.guide, num_draws=8)
        assert all(data[group]["x"].dtype == "float32" for group in OBSERVED)
        torch.testing.assert_close(tensor(data, "observed_data", "x"), x, equal_nan=True)


def chained() -> pv.Program:
    """Two observed sites, the second around three times what the first returned, and a factor that nobody observes."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            first = pyro.sample("first", dist.Normal(z, 2.0), obs=x[:, 0])
            pyro.sample("second", dist.Normal(3.0 * first, 0.01), obs=x[:, 1])
            pyro.factor("push", 0.1 * z)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, 0], 1.0))

    return pv.Program(model, guide)


def test_a_site_that_follows_another_sees_its_draw() -> None:
    program, x = chained(), torch.tensor([[1.0, 3.0], [5.0, 15.0]])
    data = pv.to_arviz(program, x, method=program.guide, num_draws=200)
    for group in ("posterior_predictive", "prior_predictive"):
        first, second = (tensor(data, group, name) for name in ("first", "second"))
        assert first.std(1).min() > 1.5
        assert (second - 3.0 * first).abs().max() < 0.06
    z = tensor(data, "posterior", "z")
    by_hand = log_normal(x[:, 0], z, 2.0) + log_normal(x[:, 1], 3.0 * x[:, 0], 0.01) + 0.1 * z
    torch.testing.assert_close(tensor(data, "log_likelihood", "observed"), by_hand, rtol=1e-5, atol=1e-4)
    assert set(data["observed_data"].data_vars) == {"first", "second"}
    assert "constant_data" in groups(data)  # no site observes x as a whole
    assert torch.equal(tensor(data, "constant_data", "x"), x)


class OneByOne(nn.Linear):
    """Takes a batch of rows alone and no copies: two equal rows after each other are an error."""

    def forward(self, z: Tensor) -> Tensor:
        if z.dim() != 2 or len(z) not in (2, 3):
            raise ValueError("takes the rows of one particle")
        return super().forward(z)


@pytest.mark.parametrize(
    ("decoder", "layout"),
    [
        (lambda: nn.Linear(2, 4), Layout.BATCHED),
        (lambda: nn.Sequential(nn.Unflatten(1, (2, 1)), nn.Flatten(1), nn.Linear(2, 4)), Layout.TILED),
        (lambda: OneByOne(2, 4), Layout.LOOPED),
    ],
)
def test_predictions_are_right_in_every_layout(decoder: Callable[[], nn.Module], layout: Layout) -> None:
    networks = Networks(decoder(), nn.Linear(4, 2), 2)
    networks.noise = 1e-3
    x, program = torch.randn(3, 4), networks.program
    assert program.layout((x,)).model is layout
    z = {"z": torch.randn(5, 3, 2)}
    found = draw_observed(program, (x,), z, ["x"], seed=1)["x"]
    with torch.no_grad():
        expected = torch.stack([networks.decoder(one) for one in z["z"]])
    assert found.shape == (5, 3, 4)
    assert 1e-4 < (found - expected).abs().max() < 6e-3
    assert torch.equal(found, draw_observed(program, (x,), z, ["x"], seed=1)["x"])
    assert not torch.equal(found, draw_observed(program, (x,), z, ["x"], seed=2)["x"])


def test_the_seed_decides_and_the_budget_does_not() -> None:
    settings: dict[str, Any] = {"method": QUICK, "num_draws": 20, "num_chains": 2}
    first = pv.to_arviz(EXACT_GUIDE, X, seed=5, **settings)
    less = pv.to_arviz(EXACT_GUIDE, X, seed=5, memory=2**20, **settings)
    other = pv.to_arviz(EXACT_GUIDE, X, seed=6, **settings)
    for group, name in (("posterior", "z"), ("prior", "z"), ("posterior_predictive", "x"), ("prior_predictive", "x")):
        torch.testing.assert_close(tensor(first, group, name), tensor(less, group, name), rtol=1e-6, atol=1e-6)
        assert not torch.equal(tensor(first, group, name), tensor(other, group, name))


# Names


def test_names_of_dimensions_and_coordinates() -> None:
    data = pv.to_arviz(
        EXACT_GUIDE,
        X,
        method=EXACT_GUIDE.guide,
        num_draws=4,
        dims={"z": ["factor"]},
        coords={"row": ["ann", "bob", "cid"], "factor": ["a", "b", "c"], "x_dim_0": range(10, 16)},
    )
    assert data["posterior"]["z"].dims == data["prior"]["z"].dims == ("chain", "draw", "row", "factor")
    for group in ("posterior", "log_likelihood", "observed_data", "log_evidence", "sample_stats", "prior_predictive"):
        assert data[group]["row"].values.tolist() == ["ann", "bob", "cid"]
    assert data["posterior"]["factor"].values.tolist() == ["a", "b", "c"]
    assert data["observed_data"]["x_dim_0"].values.tolist() == list(range(10, 16))
    picked = data["posterior"]["z"].sel(row="bob", factor="c").values
    assert np.array_equal(picked, data["posterior"]["z"].values[:, :, 1, 2])


BAD: list[tuple[dict[str, Any], str]] = [
    ({"num_chains": 0}, "num_chains=0 must be a whole number"),
    ({"num_draws": 0}, "num_draws=0 must be a whole number"),
    ({"method": pv.posterior.laplace, "num_chains": 2}, "num_chains=2, but particles .* are one chain"),
    ({"method": "hmc"}, "method='hmc' makes no posterior draws: give pv.posterior.hamiltonian"),
    ({"leave_out": ["priors"]}, "leave_out has 'priors', which is no group"),
    ({"dims": {"w": ["factor"]}}, r"dims\['w'\] belongs to no variable: there are 'z', 'x'"),
    ({"dims": {"z": ["a", "b"]}}, r"must be a list of 1 name\(s\)"),
    ({"dims": {"z": "factor"}}, r"must be a list of 1 name\(s\)"),
    ({"dims": {"z": ["row"]}}, "'row', which is a dimension already"),
    ({"dims": {"z": ["x_dim_0"]}}, "'x_dim_0' of 'x' has length 6 there and 3 elsewhere"),
    ({"coords": {"factor": [1]}}, r"coords\['factor'\] belongs to no dimension: there are 'row', 'z_dim_0', 'x_dim_0'"),
    ({"coords": {"row": [1, 2]}}, r"coords\['row'\] has 2 labels, the dimension has length 3"),
    ({"estimate": Estimate.nothing(["", ""], torch.device("cpu"))}, "estimate is of 2 rows and x has 3"),
    ({"num_draws": 10_000, "memory": 2**20}, r"predictive draws take 2,880,000 bytes and memory=1,048,576"),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_bad_input_is_refused_before_any_draw(
    settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyro_vae.report.inference_data._draws", lambda *_: pytest.fail("drew"))
    with pytest.raises(ValueError, match=message):
        pv.to_arviz(EXACT_GUIDE, X, **{"method": EXACT_GUIDE.guide, "num_draws": 4, **settings})


def test_rows_that_cannot_be_judged_are_refused() -> None:
    broken = X.clone()
    broken[1, 2] = torch.nan
    with pytest.raises(ValueError, match=r"1 of 3 rows of x cannot be judged, first row 1 \(NaN or infinite values\)"):
        pv.to_arviz(EXACT_GUIDE, broken)


def test_a_site_must_not_be_called_as_a_dimension_is() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            row = pyro.sample("row", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(row, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("row", dist.Normal(x, 1.0))

    with pytest.raises(ValueError, match="Site 'row' bears the name of a dimension"):
        pv.to_arviz(pv.Program(model, guide), torch.randn(3), method=guide)


# ArviZ


@pytest.fixture(scope="module")
def several() -> Any:
    """Five latents of different supports and 60 draws in each of four chains."""
    torch.manual_seed(0)
    return pv.to_arviz(Several().program, torch.randn(3, 4), method=QUICK, num_draws=60, estimate=True)


def test_the_container_is_that_of_the_installed_arviz(several: Any) -> None:
    assert type(several).__name__ == ("InferenceData" if before_arviz_one() else "DataTree")
    assert before_arviz_one() == (int(az.__version__.split(".")[0]) < 1)


def test_summary_has_a_line_for_each_row_and_number(several: Any) -> None:
    table = az.summary(several)
    assert len(table) == 3 * (1 + 2 + 1 + 1 + 3)
    line = table.loc["z2[1, 0]"]
    assert float(line["mean"]) == pytest.approx(float(several["posterior"]["z2"][:, :, 1, 0].mean()), abs=0.06)
    assert float(line["r_hat"]) > 0.9


def test_netcdf_keeps_every_number_and_text(several: Any, tmp_path: Path) -> None:
    several.to_netcdf(str(tmp_path / "a.nc"))
    again = az.from_netcdf(str(tmp_path / "a.nc"))
    assert sorted(groups(again)) == sorted(groups(several))
    for group in groups(several):
        for name in several[group].data_vars:
            before, after = several[group][name], again[group][name]
            assert before.dims == after.dims
            np.testing.assert_array_equal(before.values, after.values)
    assert again["log_evidence"]["reliable"].dtype == bool
    assert again["posterior"].attrs["method"] == "hamiltonian"


def latents(*names: str) -> dict[str, Any]:
    return {"var_names": list(names)}


OLD: list[tuple[str, dict[str, Any]]] = [
    ("plot_trace", latents("z1", "z2")),
    ("plot_posterior", latents("z1", "simplex")),
    ("plot_ppc", {}),
    ("plot_ppc", {"group": "prior"}),
    ("plot_forest", latents("z1", "z2")),
    ("plot_rank", latents("z1")),
    ("plot_ess", latents("z1")),
]
NEW: list[tuple[str, dict[str, Any]]] = [
    ("plot_trace", latents("z1", "z2")),
    ("plot_dist", latents("z1", "simplex")),
    ("plot_ppc_dist", {}),
    ("plot_ppc_dist", {"group": "prior_predictive"}),
    ("plot_forest", latents("z1", "z2")),
    ("plot_rank", latents("z1")),
    ("plot_ess", latents("z1")),
    ("plot_prior_posterior", latents("z1")),
    ("plot_ppc_pit", {"coords": {"row": 1}}),
    ("plot_ppc_pit", {"method": "prit_c"}),
    ("plot_ppc_interval", {"coords": {"row": 1}}),
    ("plot_ppc_tstat", {"t_stat": "mean"}),
]


@pytest.mark.parametrize(("name", "settings"), OLD if before_arviz_one() else NEW)
def test_the_plots_that_make_sense_draw_it(several: Any, name: str, settings: dict[str, Any]) -> None:
    getattr(az, name)(several, **settings)
    require_drawn()


@pytest.mark.parametrize("name", ["plot_ppc", "plot_bpv"] if before_arviz_one() else ["plot_ppc_rootogram", "plot_ppc_pit"])
def test_the_plots_for_counts_draw_them(name: str) -> None:
    getattr(az, name)(counts_of(torch.tensor([0.0, 3.0, 1.0, 12.0, 2.0])))
    require_drawn()


def require_drawn() -> None:
    """Some figure has something in it; all of them are closed."""
    axes = [ax for number in plt.get_fignums() for ax in plt.figure(number).axes]
    assert any([*ax.lines, *ax.patches, *ax.collections] for ax in axes)
    plt.close("all")
