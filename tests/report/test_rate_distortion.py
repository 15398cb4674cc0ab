"""Rate-distortion curves against linear-Gaussian models, where every q_b is a Gaussian that is known."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_gaussian import LinearGaussian, kl_normal
from torch import Tensor

import pyro_vae as pv
from pyro_vae.report.diagnostics import rate_distortion

NAMES = (
    ["beta"] + [name + end for name in ("distortion", "rate") for end in ("", "_standard_error", "_data_error")] + ["ess"]
)


def known_point(known: LinearGaussian, x: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Distortion and rate of q_b, (N,) each: a Gaussian of precision I + b W' S^-1 W."""
    latent = known.latent_dim
    precision = known.weight.T / known.scale.square()
    covariance = torch.linalg.inv(torch.eye(latent, dtype=torch.float64) + beta * precision @ known.weight)
    mean = beta * (x - known.bias) @ precision.T @ covariance
    residual = (x - known.bias - mean @ known.weight.T) / known.scale
    spread = torch.einsum("ij,jk,ik->i", known.weight, covariance, known.weight) / known.scale.square()
    constant = (2.0 * math.pi * known.scale.square()).log().sum()
    distortion = 0.5 * (residual.square().sum(-1) + spread.sum() + constant)
    unit = torch.eye(latent, dtype=torch.float64)
    return distortion, kl_normal(mean, torch.linalg.cholesky(covariance), torch.zeros(latent, dtype=torch.float64), unit)


def test_every_point_is_the_known_one_within_its_errors() -> None:
    known = LinearGaussian(dim=5, latent_dim=3)
    x = known.draw(40)
    curve = rate_distortion(known.program(), x, num_chains=32, num_temperatures=64, seed=2)
    assert len(curve) == 64
    assert curve.beta.tolist() == pytest.approx([(t / 64) ** 3 for t in range(1, 65)])
    for at in (20, 31, 47, 63):
        distortion, rate = known_point(known, x, float(curve.beta[at]))
        # The self-normalised mean and the log of a mean are biased by far less than an error here.
        for name, truth in (("distortion", distortion), ("rate", rate)):
            error = curve.mean_standard_error(name)[at]
            assert abs(curve.mean(name)[at] - truth.mean()) < 4.5 * error, (name, at)
            span = curve.mean(name).max() - curve.mean(name).min()
            assert error < 0.02 * span
            expected = truth.std() / 40**0.5
            assert curve.data_standard_error(name)[at] == pytest.approx(float(expected), rel=0.35)
    total = curve.rate[-1] + curve.distortion[-1]
    assert abs((total + known.log_p(x)).mean()) < 0.02
    assert curve.ess[-1].median() > 8.0


def test_the_expected_point_can_be_reached_however_few_the_temperatures() -> None:
    """Every encoder has R >= -b D - log Z_b for all b: the tangents of the curve, log Z_b known. Three temperatures."""
    known = LinearGaussian(dim=5, latent_dim=3)
    x = known.draw(1).repeat(2000, 1)
    curve = rate_distortion(known.program(), x, num_chains=2, num_temperatures=3, seed=1)
    above = []
    for beta in torch.linspace(0.0, 1.0, 21).tolist():
        distortion, rate = (part[0] for part in known_point(known, x[:1], beta))
        log_z = -beta * distortion - rate
        height = curve.rate + beta * curve.distortion + log_z
        mean, error = height.mean(1), height.std(1) / 2000**0.5
        assert (mean > -4.5 * error).all(), beta
        above.append(mean / error)
    # Not for want of power: at three temperatures the points lie far above the curve.
    assert (torch.stack(above).amin(0)[1:] > 4.5).all()


def test_errors_are_those_of_the_chains() -> None:
    """800 rows of one x: the scatter of the rows is what each row states."""
    known = LinearGaussian(dim=4, latent_dim=2)
    x = known.draw(1, seed=4).repeat(800, 1)
    curve = rate_distortion(known.program(), x, num_chains=32, num_temperatures=32, seed=3)
    for at in (8, 20, 31):
        for name in ("distortion", "rate"):
            stated = getattr(curve, f"{name}_standard_error")[at].square().mean().sqrt()
            scatter = getattr(curve, name)[at].std()
            assert float(stated / scatter) == pytest.approx(1.0, abs=0.15), (name, at)


def test_a_constrained_latent_has_its_jacobian_in_both_densities() -> None:
    """z log-normal, x normal around log z: log p(x) is known."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(torch.tensor(0.4, dtype=x.dtype), 0.7))
            pyro.sample("x", dist.Normal(z.log(), 0.5), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(torch.zeros(len(x), dtype=x.dtype), 1.0))

    x = torch.linspace(-1.0, 2.5, 20, dtype=torch.float64)
    curve = rate_distortion(pv.Program(model, guide), x, num_chains=64, num_temperatures=32)
    truth = torch.distributions.Normal(0.4, math.hypot(0.7, 0.5)).log_prob(x)
    total = curve.rate[-1] + curve.distortion[-1]
    assert ((total + truth).abs() < 0.25).all()  # sd(log w) is about 0.4, in 64 chains
    assert abs((total + truth).mean()) < 0.02
    # KL(q_1 || p) by the Gaussians of log z.
    variance = 1.0 / (1.0 / 0.49 + 1.0 / 0.25)
    mean = variance * (0.4 / 0.49 + x / 0.25)
    rate = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, variance**0.5), torch.distributions.Normal(0.4, 0.7)
    )
    assert abs(curve.mean("rate")[-1] - rate.mean()) < 4.5 * curve.mean_standard_error("rate")[-1]


def test_rows_that_cannot_be_judged_disturb_no_other() -> None:
    known = LinearGaussian(dim=4, latent_dim=2)
    x = known.draw(4)
    x[2, 1] = torch.nan
    curve = rate_distortion(known.program(), x, num_chains=8, num_temperatures=8)
    assert curve.known.tolist() == [True, True, False, True]
    assert curve.rate[:, 2].isnan().all()
    assert curve.mean("rate").isfinite().all()
    assert "1 rows have no value" in str(curve)
    with pytest.raises(ValueError, match=r"None of the 4 rows of x can be judged, the first because of .*NaN"):
        rate_distortion(known.program(), torch.full_like(x, torch.nan))


def test_the_same_seed_gives_the_same_curve_on_any_budget() -> None:
    known = LinearGaussian(dim=4, latent_dim=2)
    x = known.draw(5)
    first, second, third = (
        rate_distortion(known.program(), x, num_chains=4, num_temperatures=5, seed=seed, memory=memory)
        for seed, memory in ((7, 2**30), (7, 2**12), (8, 2**30))
    )
    assert torch.allclose(first.rate, second.rate, rtol=1e-9)
    assert not torch.allclose(first.rate, third.rate, rtol=1e-3)


def test_the_result_prints_itself() -> None:
    known = LinearGaussian(dim=4, latent_dim=2)
    x = known.draw(12)
    curve = rate_distortion(known.program(), x, num_chains=16, num_temperatures=32)
    frame = curve.to_dataframe()
    assert list(frame.columns) == NAMES
    assert len(frame) == 32
    assert frame["rate"].iloc[-1] == pytest.approx(float(curve.rate[-1].mean()))
    lines = str(curve).splitlines()
    assert lines[0] == "rate-distortion curve, nats a row (12 rows, 32 temperatures, 16 chains)"
    assert lines[3].startswith("  b = 1: rate ")
    total = float((curve.rate[-1] + curve.distortion[-1]).mean())
    assert lines[4] == f"  R + D at b = 1: {total:.4f}, in expectation at least -log p(x)"
    assert len(lines) <= 8


def test_a_chain_that_stands_for_all_is_told() -> None:
    known = LinearGaussian(dim=8, latent_dim=4)
    curve = rate_distortion(known.program(), known.draw(20) * 3.0, num_chains=4, num_temperatures=1)
    assert "WARNING: one chain stands for all in" in str(curve)


def test_what_cannot_be_run_is_refused() -> None:
    known = LinearGaussian(dim=4, latent_dim=2)
    with pytest.raises(ValueError, match="num_chains=1 leaves no standard error: give at least 2"):
        rate_distortion(known.program(), known.draw(2), num_chains=1)
    with pytest.raises(ValueError, match="num_temperatures=0 must be a whole number of at least 1"):
        rate_distortion(known.program(), known.draw(2), num_temperatures=0)
