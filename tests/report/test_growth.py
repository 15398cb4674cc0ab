"""Convergence in the number of particles, against closed forms of a linear-Gaussian model."""

from __future__ import annotations

import math

import pytest
import torch
from linear_gaussian import LinearGaussian

import pyro_vae as pv
from pyro_vae.report.diagnostics import convergence

INFLATE = 1.3


def test_the_guides_curve_begins_at_the_elbo_and_rises_to_log_p() -> None:
    """The posterior widened by s: log p - ELBO = D (s^2 - 1 - 2 log s) / 2, and Var log w = D (s^2 - 1)^2 / 2."""
    known = LinearGaussian(latent_dim=3)
    x = known.draw(50)
    result = convergence(known.program(inflate=INFLATE), x, methods={"guide": pv.posterior.from_guide}, ks=(1000, 1, 10))
    count, log_p, error = result.curves["guide"]
    assert count.tolist() == [1, 10, 1000]
    truth = known.log_p(x).mean()
    gap = 1.5 * (INFLATE**2 - 1.0 - 2.0 * math.log(INFLATE))
    deviation = math.sqrt(1.5) * (INFLATE**2 - 1.0)
    # 1000 groups of one draw in 50 rows.
    assert abs(log_p[0] - (truth - gap)) < 4.5 * deviation / math.sqrt(50_000)
    assert float(error[0]) == pytest.approx(deviation / math.sqrt(50), rel=0.05)
    assert abs(log_p[2] - truth) < 4.5 * error[2]
    assert log_p[0] < log_p[1] < truth
    assert error[0] > error[1] > error[2]


def test_strata_are_drawn_anew_and_serve_at_once() -> None:
    known = LinearGaussian(latent_dim=3)
    x = known.draw(20)
    result = convergence(known.program(shift=2.0), x, ks=(20, 50, 200))
    assert list(result.curves) == ["guide", "laplace"]
    laplace, guide = result.curves["laplace"], result.curves["guide"]
    assert (laplace.log_p - known.log_p(x).mean()).abs().max() < 0.02  # one Gaussian is the posterior
    assert guide.log_p[0] < known.log_p(x).mean() - 0.1
    assert (laplace.standard_error < guide.standard_error).all()


def test_it_prints_itself_and_is_reproducible() -> None:
    known = LinearGaussian(latent_dim=3)
    x = known.draw(5)
    x[1] = torch.nan
    first, again = (convergence(known.program(inflate=INFLATE), x, ks=(2, 8), seed=4) for _ in range(2))
    assert str(first) == str(again)
    lines = str(first).splitlines()
    assert lines[0] == "log p-hat with k particles, mean of 4 rows, nats"
    assert lines[1].startswith("  guide: ")
    assert "since 2" in lines[1]
    frame = first.to_dataframe()
    assert list(frame.columns) == ["method", "num_particles", "log_p", "standard_error"]
    assert frame["method"].tolist() == ["guide", "guide", "laplace", "laplace"]
    assert frame["num_particles"].tolist() == [2, 8, 2, 8]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"ks": ()}, "ks is empty"),
        ({"ks": (5, 0)}, "ks=0 must be a whole number of at least 1"),
        ({"methods": {"mine": pv.evidence.exact}}, r"methods\['mine'\]=<function exact .* is no engine: give one such as"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options: dict[str, object], told: str) -> None:
    known = LinearGaussian()
    with pytest.raises(ValueError, match=told):
        convergence(known.program(), known.draw(3), **options)


def test_no_row_to_judge() -> None:
    known = LinearGaussian()
    with pytest.raises(ValueError, match="None of the 3 rows of x can be judged"):
        convergence(known.program(), torch.full((3, 6), torch.nan, dtype=torch.float64))
