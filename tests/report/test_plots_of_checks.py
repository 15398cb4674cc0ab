"""Figures of calibration, predictive checks and fits against the clock: the data of what is drawn."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from pyro_vae.learning.history import History
from pyro_vae.report import plots
from pyro_vae.report.plots.figure import curve_look
from pyro_vae.report.ranks import Calibration
from pyro_vae.report.replicates import PosteriorPredictive


@pytest.fixture
def ax() -> Iterator[Axes]:
    yield plt.subplots()[1]
    plt.close("all")


def texts(ax: Axes) -> list[str]:
    return [ax.get_title(), ax.get_xlabel(), ax.get_ylabel()]


def legend(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def ranks(*powers: float, count: int = 200) -> Calibration:
    """PIT that are powers of evenly spread numbers: 1 is as uniform as can be."""
    even = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    names = tuple(f"z[{i}]" for i in range(len(powers)))
    return Calibration(names, torch.stack([even**power for power in powers], 1), 50, "guide")


def test_calibration_draws_the_difference_to_uniform_and_its_band(ax: Axes) -> None:
    result = ranks(1.0, 2.0, 0.6)
    assert plots.calibration(result, ax) is ax
    assert texts(ax) == [
        "Calibration of guide: 2 of 3 quantities outside,\n200 simulated rows, 50 draws each",
        "PIT: share of the draws below the simulated truth",
        "ECDF - uniform (probability)",
    ]
    named = {line.get_label(): line for line in ax.get_lines()}
    assert legend(ax) == ["95 % band, simultaneous", "1 inside", "z[1]: p < 1e-10", legend(ax)[3]]
    assert legend(ax)[3].startswith("z[2]: p ")
    for label, power in (("1 inside", 1.0), ("z[1]: p < 1e-10", 2.0), (legend(ax)[3], 0.6)):
        place, difference = named[label].get_xydata().T
        assert np.allclose(place, np.arange(101) / 100)
        assert np.abs(difference - (place ** (1.0 / power) - place)).max() <= 0.5 / 200 + 1e-9  # the exact inverse
        assert difference[0] == difference[-1] == 0.0
    band = ax.collections[0].get_paths()[0].vertices
    lower, upper = result.band
    assert band[:, 1].min() == pytest.approx(float(lower.min()))
    assert band[:, 1].max() == pytest.approx(float(upper.max()))
    looks = [(str(line.get_linestyle()), line.get_marker()) for label, line in named.items() if label.startswith("z")]
    assert len(set(looks)) == 2  # told apart by more than colour
    assert ax.get_ylim()[1] > max(max(line.get_ydata()) for line in ax.get_lines())


def test_calibration_names_six_and_counts_the_others(ax: Axes) -> None:
    plots.calibration(ranks(*np.linspace(1.6, 3.0, 9), 1.0), ax)
    told = legend(ax)
    assert len(told) == 8
    assert told[1] == "1 inside, 3 more outside"
    assert told[2].startswith("z[8]")  # the worst first
    assert len([line for line in ax.get_lines() if len(line.get_xdata()) == 101]) == 2 + 10


def test_calibration_of_a_calibrated_guide(ax: Axes) -> None:
    plots.calibration(ranks(1.0, 1.0), ax)
    assert legend(ax) == ["95 % band, simultaneous", "2 inside"]
    assert ax.get_title().startswith("Calibration of guide: 0 of 2 quantities outside")


def predictive() -> PosteriorPredictive:
    """One statistic of all rows, replicated from 1 to 40, and one of three rows, one of which is odd."""
    steps = torch.arange(1.0, 41.0, dtype=torch.float64)
    rows = torch.stack([steps, 10.0 * steps, steps], 1)
    observed = {"mean": torch.tensor(45.5).double(), "by row": torch.tensor([20.0, 500.0, math.nan]).double()}
    return PosteriorPredictive(observed, {"mean": steps, "by row": rows}, 3, "x", "guide")


def test_predictive_check_of_all_rows_is_a_histogram_with_a_line(ax: Axes) -> None:
    assert plots.predictive_check(predictive(), ax=ax) is ax
    assert texts(ax) == ["Posterior predictive check: two-sided p = 0.049", "mean of the data", "replications"]
    counts = [bar.get_height() for bar in ax.patches]
    assert sum(counts) == 40
    assert len(set(counts)) == 1  # evenly spread numbers
    assert ax.patches[0].get_x() == 1.0
    assert [line.get_xdata()[0] for line in ax.get_lines()] == [45.5]
    assert ax.get_lines()[0].get_linestyle() == "--"
    assert legend(ax) == ["40 replications, T(x_rep)", "observed, T(x) = 45.5"]
    assert ax.get_ylim()[1] > max(counts)


def test_predictive_check_by_row_shows_intervals_and_odd_rows(ax: Axes) -> None:
    plots.predictive_check(predictive(), "by row", ax)
    assert texts(ax) == [
        "Posterior predictive check of 2 rows:\ntwo-sided p at most 0.05 in 1",
        "by row, observed (one point a row)",
        "by row, replicated (median, 95 % interval)",
    ]
    usual, odd, equal = ax.get_lines()
    assert usual.get_xydata().tolist() == [[20.0, 20.5]]
    assert odd.get_xydata().tolist() == [[500.0, 205.0]]
    assert usual.get_marker() != odd.get_marker()
    assert np.array_equal(equal.get_xdata(), equal.get_ydata())
    segments = [part.get_segments()[0] for part in ax.collections]
    steps = np.arange(1.0, 41.0)
    assert np.allclose(segments[0][:, 1], np.quantile(steps, [0.025, 0.975]))
    assert np.allclose(segments[1][:, 1], np.quantile(10.0 * steps, [0.025, 0.975]))
    assert legend(ax) == ["p above 0.05: 1 row", "p at most 0.05: 1 row", "equal"]


def test_an_unknown_statistic_is_refused(ax: Axes) -> None:
    with pytest.raises(ValueError, match="name='median' is no statistic of this result: give one of mean, by row"):
        plots.predictive_check(predictive(), "median", ax)


def record(valid: bool) -> History:
    elbo = [-1000.0, *(-100.0 + i for i in range(20))]
    made = History(epoch=list(range(21)), elbo=elbo, seconds=[0.5 * (i + 1) for i in range(21)])
    made.valid_elbo = [value - 5.0 for value in elbo] if valid else []
    return made


def test_nats_against_seconds(ax: Axes) -> None:
    curves = {"SVI": record(True), "no validation": record(False), "EM": ([2.0, 40.0], [-90.0, -70.0])}
    assert plots.nats_against_seconds(curves, ax, truth=-60.0, what="held-out ELBO") is ax
    assert texts(ax) == ["held-out ELBO against seconds", "wall-clock time (s)", "held-out ELBO (nats per row)"]
    lines = ax.get_lines()
    assert np.allclose(lines[0].get_ydata(), record(True).valid_elbo)
    assert np.allclose(lines[1].get_ydata(), record(True).elbo)
    assert np.allclose(lines[0].get_xdata(), record(True).seconds)
    assert lines[2].get_xydata().tolist() == [[2.0, -90.0], [40.0, -70.0]]
    assert list(lines[3].get_ydata()) == [-60.0, -60.0]
    assert ax.get_xscale() == "log"
    low, high = ax.get_ylim()
    assert -110.0 < low < -103.0  # the steep beginning is left out, the rest is not
    assert high > -60.0
    assert legend(ax) == [
        "SVI: -86.00 after 10.5 s",
        "no validation: -81.00 after 10.5 s",
        "EM: -70.00 after 40 s",
        "to compare with: -60.00",
    ]
    assert len({str(line.get_linestyle()) for line in lines[:3]}) == len({line.get_marker() for line in lines[:3]}) == 3


def test_a_fit_that_broke_does_not_cost_the_figure(ax: Axes) -> None:
    plots.nats_against_seconds({"broke": ([1.0, 2.0, 3.0], [-5.0, -4.0, math.nan])}, ax)
    assert ax.get_ylim() == pytest.approx((-5.05, -3.95))


@pytest.mark.parametrize(
    ("curves", "told"),
    [
        ({}, "curves is empty"),
        ({"a": History()}, r"curves\['a'\] has seconds of shape \(0,\)"),
        ({"a": ([1.0, 2.0], [3.0])}, r"seconds of shape \(2,\) and nats of shape \(1,\)"),
        ({"a": ([0.0, 2.0], [3.0, 4.0])}, r"curves\['a'\] has 0 seconds"),
    ],
)
def test_curves_that_cannot_be_drawn_are_refused(ax: Axes, curves: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        plots.nats_against_seconds(curves, ax)


def test_looks_of_many_curves_differ() -> None:
    looks = [curve_look(i) for i in range(36)]
    assert len({(look.colour, str(look.dash), look.marker) for look in looks}) == 36
    assert len({str(look.dash) for look in looks[:6]}) == 6


def test_without_axes_a_figure_is_made() -> None:
    drawn = [
        plots.calibration(ranks(1.0)),
        plots.predictive_check(predictive()),
        plots.nats_against_seconds({"a": ([1.0], [2.0])}),
    ]
    assert len({id(ax.get_figure()) for ax in drawn}) == 3
    plt.close("all")
