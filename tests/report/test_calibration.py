"""Simulation-based calibration: exact posteriors pass, wrong ones are found, and the PIT is that of closed forms."""

from __future__ import annotations

import math
from pathlib import Path

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_gaussian import LinearGaussian
from matplotlib import pyplot as plt
from programs import Several
from scipy import stats

import pyro_vae as pv
from pyro_vae.report.diagnostics import Calibration, calibration
from pyro_vae.report.ranks import LOG_JOINT, SIMULATED
from pyro_vae.report.versions import before_arviz_one
from pyro_vae.seeds import derive

KNOWN = LinearGaussian()
LIKE = KNOWN.draw(4)


def checked(**settings: object) -> Calibration:
    """Of the guide of `KNOWN` with a wrong scale or place."""
    wrong = {name: settings.pop(name) for name in ("inflate", "shift") if name in settings}
    return calibration(KNOWN.program(**wrong), like=LIKE, **{"num_simulated": 500, "num_draws": 50, **settings})


def test_the_exact_posterior_is_uniform_over_seeds() -> None:
    """Kolmogorov-Smirnov and chi-square of scipy on all PIT, and p-values that are uniform over seeds."""
    results = [checked(seed=seed, num_draws=19) for seed in range(12)]
    pit = torch.stack([result.pit for result in results]).numpy()  # (12, 500, 4)
    assert pit.shape == (12, 500, 4)
    for quantity in range(4):
        values = pit[..., quantity].ravel()
        assert stats.kstest(values, "uniform").pvalue > 1e-4
        counts = np.bincount((values * 20).astype(int), minlength=20)  # the 20 ranks
        assert stats.chisquare(counts).pvalue > 1e-4
    p = torch.cat([result.p_value for result in results])
    assert int((p <= 0.05).sum()) <= 9  # of 48: P(more) < 1e-3
    assert stats.kstest(p[::4].numpy(), "uniform").pvalue > 1e-3
    assert not bool(torch.stack([result.adjusted < 0.001 for result in results]).any())


@pytest.mark.parametrize("inflate", [0.5, 1.6])
def test_a_wrong_scale_is_found(inflate: float) -> None:
    result = checked(inflate=inflate)
    assert (result.p_value < 1e-4).all()
    assert (result.adjusted < 1e-3).all()
    assert bool(result.outside.all())
    assert ((result.spread[:3] > 1.0) == (inflate < 1.0)).all()
    assert f"draws too {'narrow' if inflate < 1.0 else 'wide'}" in str(result)


def test_the_spread_of_a_narrow_guide_is_known() -> None:
    """PIT = Phi(e), e ~ N(0, 1 / s^2) as L grows: 12 E[(PIT - 1/2)^2] = (6 / pi) asin(1 / (1 + s^2))."""
    scale = 0.5
    result = checked(inflate=scale, num_simulated=4000, num_draws=200, seed=2)
    expected = 6.0 / math.pi * math.asin(1.0 / (1.0 + scale**2))
    centred = 12.0 * (result.pit[:, :3] - 0.5).square()
    error = centred.std(0) / math.sqrt(len(result))
    assert ((centred.mean(0) - expected).abs() < 4.5 * error + 2.0 * expected / 201).all()


@pytest.mark.parametrize("shift", [0.4, -0.4])
def test_a_moved_mean_is_found_and_so_is_its_direction(shift: float) -> None:
    """z - E z = e, draws = a + e': mean PIT = Phi(-a / sqrt 2), a the shift in deviations of that dimension."""
    result = checked(shift=shift, num_simulated=2000, num_draws=100)
    factor = torch.linalg.cholesky(KNOWN.covariance)
    moved = shift * factor.sum(-1) / KNOWN.covariance.diagonal().sqrt()
    expected = torch.special.ndtr(-moved / math.sqrt(2.0))
    error = result.pit[:, :3].std(0) / math.sqrt(2000)
    assert ((result.mean[:3] - expected).abs() < 4.5 * error).all()
    assert result.p_value[int(moved.abs().argmax())] < 1e-6
    assert f"{result.names[int(moved.abs().argmax())]}: draws too {'high' if shift > 0.0 else 'low'}" in str(result)


def _unread() -> pv.Program:
    """The guide is the prior and does not read x."""

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))

    return pv.Program(KNOWN.model, guide)


def test_only_the_log_joint_sees_that_a_guide_is_the_prior() -> None:
    """Modrák et al. 2023: draws of the prior pass on every dimension."""
    result = calibration(_unread(), like=LIKE, num_simulated=1000, num_draws=50)
    assert (result.p_value[:3] > 1e-3).all()
    assert result.p_value[3] < 1e-10
    assert result.names == ("z[0]", "z[1]", "z[2]", LOG_JOINT)
    assert result.names[int(result.order[0])] == LOG_JOINT


@pytest.mark.parametrize("method", [pv.posterior.laplace, pv.posterior.from_guide])
def test_weights_mend_a_wrong_guide(method: pv.posterior.Engine) -> None:
    result = checked(inflate=1.4, method=method, num_simulated=400, num_draws=400)
    assert (result.p_value > 1e-3).all()
    assert str(result).startswith(f"calibration of {method.name}, weighted (400 simulated rows, 400 draws each")
    assert checked(inflate=1.4, num_simulated=400).p_value.min() < 1e-6


def test_a_weighted_pit_is_the_weight_below() -> None:
    """Against the posterior's own distribution function at the simulated latents."""
    result = calibration(
        KNOWN.program(inflate=1.3, shift=0.5), like=LIKE, method=pv.posterior.from_guide, num_simulated=40,
        num_draws=20_000,
    )  # fmt: skip
    rows, z = KNOWN.program().simulate(LIKE.repeat(10, 1), seed=derive(0, SIMULATED))
    deviation = KNOWN.covariance.diagonal().sqrt()
    expected = torch.special.ndtr((z["z"] - KNOWN.posterior_mean(rows[0])) / deviation)
    assert (result.pit[:, :3] - expected).abs().max() < 0.05
    assert (result.pit[:, :3] - expected).abs().mean() < 0.01


def test_the_rank_of_the_log_joint_is_that_of_its_formula() -> None:
    """With the prior as guide, against as many prior draws of our own and log p(x, z) from torch's densities."""
    draws = 4000
    result = calibration(_unread(), like=LIKE, num_simulated=40, num_draws=draws)
    rows, z = KNOWN.program().simulate(LIKE.repeat(10, 1), seed=derive(0, SIMULATED))
    other = torch.randn(draws, 40, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def log_joint(latents: torch.Tensor) -> torch.Tensor:
        p_x = torch.distributions.Normal(latents @ KNOWN.weight.T + KNOWN.bias, KNOWN.scale)
        return p_x.log_prob(rows[0]).sum(-1) - 0.5 * latents.square().sum(-1)

    expected = (log_joint(other) < log_joint(z["z"])).double().mean(0)
    error = torch.sqrt(2.0 * expected * (1.0 - expected) / draws)
    assert ((result.pit[:, 3] - expected).abs() < 5.0 * error + 2.0 / draws).all()


def test_latents_of_every_support_have_names_and_ranks() -> None:
    several = Several()
    result = calibration(several.program, like=torch.zeros(3, 4), num_simulated=60, num_draws=20)
    assert result.names == ("z1", "z2[0]", "z2[1]", "rate", "share", "simplex u0", "simplex u1", LOG_JOINT)
    assert ((result.pit >= 0.0) & (result.pit <= 1.0)).all()


def test_ranks_in_u_are_those_of_a_positive_latent() -> None:
    """One latent, Gamma prior and Poisson-like Gamma guide: the exact posterior of an exponential likelihood passes."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0), 1.5))
            pyro.sample("x", dist.Exponential(rate), obs=x)

    def guide(x: torch.Tensor, more: float = 0.0) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("rate", dist.Gamma(torch.tensor(3.0) + more, 1.5 + x))

    def wrong(x: torch.Tensor) -> None:
        guide(x, 1.0)

    like = torch.ones(2)
    exact = calibration(pv.Program(model, guide), like=like, num_simulated=1000, num_draws=50)
    assert exact.names == ("rate", LOG_JOINT)
    assert (exact.p_value > 1e-3).all()
    high = calibration(pv.Program(model, wrong), like=like, num_simulated=1000, num_draws=50)
    assert high.p_value[0] < 1e-6
    assert high.mean[0] < 0.45


def test_ties_are_broken_evenly() -> None:
    """A latent that the guide never moves: all draws equal the truth, and the PIT is uniform by itself."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_tensor(1.0), 1e-30))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_ones(len(x)), 1e-30))

    result = calibration(pv.Program(model, guide), like=torch.zeros(2), num_simulated=2000, num_draws=10)
    assert stats.kstest(result.pit[:, 0].numpy(), "uniform").pvalue > 1e-3


def test_a_vae_needs_no_rows_and_keeps_no_trace() -> None:
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(2),
        likelihood=pv.likelihoods.Normal(pv.nets.MLP(2, 5, hidden=(8,)), scale=0.5),
        guide=pv.guides.DiagonalNormal(pv.nets.MLP(5, hidden=(8,)), latent_dim=2),
    )
    before = torch.random.get_rng_state()
    first, again, other = (calibration(vae, num_simulated=30, num_draws=9, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(first.pit, again.pit)
    assert not torch.equal(first.pit, other.pit)
    assert vae.training
    small = calibration(vae, num_simulated=30, num_draws=9, seed=1, memory=20_000)
    assert torch.allclose(first.pit, small.pit)


def test_a_conditional_vae_is_simulated_at_given_conditions() -> None:
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(2),
        likelihood=pv.likelihoods.Normal(pv.nets.Conditional(pv.nets.MLP(5, 4, hidden=(8,)), classes=3), scale=0.5),
        guide=pv.guides.DiagonalNormal(pv.nets.Conditional(pv.nets.MLP(7, hidden=(8,)), classes=3), latent_dim=2),
    )
    like = (torch.zeros(3, 4), torch.arange(3))
    assert len(calibration(vae, like=like, num_simulated=12, num_draws=5)) == 12
    with pytest.raises(ValueError, match="give like="):
        calibration(vae, num_simulated=12, num_draws=5)


def test_it_prints_itself_and_makes_a_table() -> None:
    result = checked(inflate=0.5, seed=3)
    lines = str(result).splitlines()
    assert len(lines) <= 8
    assert lines[0] == "calibration of guide (500 simulated rows, 50 draws each, 4 quantities)"
    assert lines[1] == "  4 of 4 leave the simultaneous 95 % band, 0.2 expected by chance"
    assert "below 1e-10 among 4 (Holm)" in lines[2]
    frame = result.to_dataframe()
    assert list(frame.columns) == ["quantity", "p_value", "adjusted", "outside", "mean", "spread"]
    assert frame["quantity"].tolist() == ["z[0]", "z[1]", "z[2]", LOG_JOINT]


def test_arviz_finds_the_pit_of_each_quantity(tmp_path: Path) -> None:
    result = checked(num_simulated=60)
    result.pit[7] = torch.nan
    data = result.to_arviz()
    pit = data["prior_sbc"]["pit"]
    assert pit.dims == ("chain", "draw", "quantity")
    assert pit["quantity"].values.tolist() == ["z[0]", "z[1]", "z[2]", LOG_JOINT]
    assert np.array_equal(pit.values, result.pit[result.known][None].numpy())
    data.to_netcdf(str(tmp_path / "pit.nc"))
    assert np.array_equal(az.from_netcdf(str(tmp_path / "pit.nc"))["prior_sbc"]["pit"].values, pit.values)
    few = ["z[1]", LOG_JOINT]
    if before_arviz_one():
        for name in few:
            numbers = pit.sel(quantity=name).values.ravel()
            az.plot_ecdf(numbers, cdf=stats.uniform.cdf, eval_points=np.linspace(0.0, 1.0, 50), difference=True)
    else:
        az.plot_ecdf_pit(data, coords={"quantity": few})
        assert len(plt.gcf().axes) == 2
    assert all(ax.lines or ax.collections for number in plt.get_fignums() for ax in plt.figure(number).axes)
    plt.close("all")


def test_holms_p_values_and_rows_without_draws() -> None:
    """By hand: p = (0.01, 0.04, 0.03) gives 0.03, then 2 x 0.03, and 0.04 not below that."""
    result = Calibration(("a", "b", "c"), torch.rand(20, 3, dtype=torch.float64), 5, "guide")
    result.__dict__["p_value"] = torch.tensor([0.01, 0.04, 0.03], dtype=torch.float64)
    assert result.adjusted.tolist() == pytest.approx([0.03, 0.06, 0.06])
    result.pit[4, 1] = torch.nan
    assert result.expected.count == 19
    assert "WARNING: 1 of 20 simulated rows have no draws" in str(result)


def test_difference_and_band_share_their_points() -> None:
    result = checked(num_simulated=50)
    lower, upper = result.band
    assert result.difference.shape == (49, 4)
    assert lower.shape == upper.shape == (49,)
    sample = np.sort(result.pit[:, 1].numpy())
    points = result.expected.points.numpy()
    expected = np.searchsorted(sample, points, side="right") / 50 - points
    assert np.allclose(result.difference[:, 1].numpy(), expected)
    inside = (result.difference >= lower[:, None] - 1e-12) & (result.difference <= upper[:, None] + 1e-12)
    assert torch.equal(inside.all(0), ~result.outside)


@pytest.mark.parametrize(
    ("options", "kind", "told"),
    [
        ({"num_simulated": 0}, ValueError, "num_simulated=0 must be"),
        ({"num_simulated": 1}, ValueError, "num_simulated=1 leaves no distribution"),
        ({"num_draws": 1}, ValueError, "num_draws=1 leaves no distribution"),
        ({"method": "laplace"}, TypeError, "method='laplace' is no engine"),
        ({"like": None}, ValueError, "give like=x"),
    ],
)
def test_refusals(options: dict[str, object], kind: type[Exception], told: str) -> None:
    with pytest.raises(kind, match=told):
        calibration(KNOWN.program(), **{"like": LIKE, **options})
