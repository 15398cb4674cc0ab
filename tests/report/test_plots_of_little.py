"""Figures of one epoch, one latent, one row, and of what is not what they draw: readable, or one clear sentence."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.text import Text

import pyro_vae as pv
from pyro_vae.em import EMHistory
from pyro_vae.evidence import Sandwich
from pyro_vae.learning.history import History
from pyro_vae.report import plots
from pyro_vae.report.aggregate import Aggregate
from pyro_vae.report.latents import LatentUsage
from pyro_vae.report.replicates import PosteriorPredictive


@pytest.fixture
def ax() -> Iterator[Axes]:
    yield plt.subplots(figsize=(5.0, 4.0), layout="constrained")[1]
    plt.close("all")


def svi(epochs: int) -> History:
    elbo = [-1000.0, *(-90.0 + i for i in range(1, epochs))][:epochs]
    count = list(range(1, epochs + 1))
    return History(epoch=count, elbo=elbo, valid_elbo=[value - 5.0 for value in elbo], seconds=[0.5 * i for i in count])


def em(epochs: int, valid: bool = True) -> EMHistory:
    log_p, count = [-45.0, *(-9.0 - 1.0 / i for i in range(1, epochs))][:epochs], list(range(1, epochs + 1))
    made = EMHistory(epoch=count, log_p=log_p, standard_error=[0.1] * epochs, seconds=[2.0 * i for i in count])
    if valid:
        made.valid_log_p, made.valid_standard_error = [value - 0.5 for value in log_p], [0.2] * epochs
    return made


def legend(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def inside(ax: Axes, *texts: Text) -> bool:
    """Whether the texts lie inside of the figure."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in texts]
    return all(0.0 <= box.x0 and box.x1 <= figure.bbox.x1 and 0.0 <= box.y0 and box.y1 <= figure.bbox.y1 for box in boxes)


@pytest.mark.parametrize("make", [svi, em])
@pytest.mark.parametrize(("epochs", "marked"), [(1, True), (10, True), (11, False)])
def test_few_epochs_have_marks(ax: Axes, make: Any, epochs: int, marked: bool) -> None:
    assert plots.learning_curve(make(epochs), ax) is ax
    curves = [line for line in ax.get_lines() if len(line.get_xdata()) == epochs]
    assert [line.get_marker() not in ("", "None") for line in curves[:2]] == [marked] * 2
    if epochs == 1:
        assert ax.get_xlim() == (0.5, 1.5)
        assert [place for place in ax.get_xticks() if 0.5 < place < 1.5] == [1.0]


@pytest.mark.parametrize("empty", [History(), EMHistory()])
def test_a_history_without_epochs_is_refused(empty: Any) -> None:
    before = plt.get_fignums()
    with pytest.raises(ValueError, match="This history has no epoch to draw"):
        empty.plot()
    assert plt.get_fignums() == before


def test_the_first_epochs_of_em_do_not_squash_the_others(ax: Axes) -> None:
    em(20).plot(ax)
    low, high = ax.get_ylim()
    assert -11.0 < low < -9.5 - 0.5 - 0.4  # below the third epoch's bar of the validation rows
    assert -9.0 < high < -8.0


def test_an_epoch_without_numbers_does_not_cost_the_figure(ax: Axes) -> None:
    record, broken = em(20), svi(20)
    record.log_p[7] = record.standard_error[9] = record.valid_log_p[7] = math.nan
    broken.elbo[7] = broken.valid_elbo[7] = math.nan
    assert np.isfinite(record.plot(ax).get_ylim()).all()
    assert np.isfinite(broken.plot(ax).get_ylim()).all()


def test_nats_against_seconds_of_em(ax: Axes) -> None:
    plots.nats_against_seconds({"MCEM": em(20), "no validation": em(20, valid=False)}, ax)
    assert [ax.get_title(), ax.get_ylabel()] == ["log p(x) against seconds", "log p(x) (nats per row)"]
    first, second = ax.get_lines()
    assert first.get_xydata().tolist() == [[t, v] for t, v in zip(em(20).seconds, em(20).valid_log_p, strict=True)]
    assert list(second.get_ydata()) == em(20).log_p
    assert legend(ax)[0].startswith("MCEM: -9.55 after 40 s")


@pytest.mark.parametrize(
    ("curves", "what", "title", "told"),
    [
        ({"a": svi(3)}, "ELBO", "ELBO against seconds", ["a: "]),
        ({"a": svi(3), "b": em(3)}, "ELBO and log p(x)", "ELBO and log p(x) against seconds", ["a, ELBO: ", "b, log p"]),
        ({"a": ([1.0, 2.0], [3.0, 4.0])}, "", "Nats against seconds", ["a: "]),
        ({"a": np.array([[1.0], [3.0]]), "b": em(3)}, "", "Nats against seconds", ["a: ", "b, log p(x): "]),
    ],
)  # fmt: skip
def test_nats_against_seconds_says_what_is_known(ax: Axes, curves: Any, what: str, title: str, told: list[str]) -> None:
    plots.nats_against_seconds(curves, ax)
    assert ax.get_title() == title
    assert ax.get_ylabel() == (f"{what} (nats per row)" if what else "nats per row")
    assert all(label.startswith(start) for label, start in zip(legend(ax), told, strict=True))


@pytest.mark.parametrize(
    ("curves", "told"),
    [(svi(3), "curves is History: give curves by name"), ({"a": 3}, r"curves\['a'\] is int: give a History")],
)
def test_what_is_no_curve_is_refused(ax: Axes, curves: Any, told: str) -> None:
    with pytest.raises(TypeError, match=told):
        plots.nats_against_seconds(curves, ax)


def test_one_latent_has_a_line_a_class_and_no_heights(ax: Axes) -> None:
    means = np.linspace(-1.0, 1.0, 20)[:, None]
    plots.latent_space(means, ["b", "a"] * 10, ax)
    assert not len(ax.get_yticks())
    assert [ax.get_xlabel(), ax.get_ylabel()] == ["E[z[0] | x]", "class"]
    first, second = (np.asarray(part.get_offsets()) for part in ax.collections)
    assert np.allclose(first[:, 0], means[1::2, 0])
    assert first[:, 1].max() < 0.5 < second[:, 1].min()
    assert [text.get_text() for text in ax.texts] == ["a", "b"]


@pytest.mark.parametrize(
    ("means", "labels", "told"),
    [
        (torch.rand(5), None, r"means has shape \(5,\): give one line a row, \(N, D\)"),
        (torch.rand(0, 2), None, r"means has shape \(0, 2\)"),
        (torch.rand(1, 2), [3, 4], r"labels has shape \(2,\) and means has 1 row: give one label a row"),
        (torch.rand(3, 2), torch.zeros(3, 1), r"labels has shape \(3, 1\) and means has 3 rows"),
    ],
)
def test_a_latent_space_that_does_not_match_is_refused(ax: Axes, means: Any, labels: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        plots.latent_space(means, labels, ax)


def usage(count: int, height: float = 1.0) -> LatentUsage:
    names, rows = tuple(f"z[{i}]" for i in range(count)), torch.ones(5).double()
    kl, flat = torch.full((count,), height).double(), torch.eye(count).double()
    aggregate = Aggregate(rows, rows, rows, kl, flat, kl, flat, names)
    activity = torch.tensor([0.9, 0.0, 0.9][:count]).double()
    return LatentUsage(names, torch.arange(count), kl, 0.0 * kl, rows, rows, activity, aggregate, 1.0)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_legend_of_the_usage_lies_above_the_bars(ax: Axes, count: int) -> None:
    plots.latent_usage(usage(count), ax)
    ax.figure.canvas.draw()
    bottom = ax.get_legend().get_window_extent().y0
    assert bottom > max(bar.get_window_extent().y1 for bar in ax.patches)
    assert ax.get_ylim()[0] == 0.0
    assert legend(ax)[0] == ("active: 1 of 1 dimension" if count == 1 else f"active: {count - 1} of {count} dimensions")


def test_axes_that_share_a_scale_show_the_bars_of_both() -> None:
    shared = plt.subplots(1, 2, sharey=True)[1]
    for ax, height in zip(shared, (0.001, 3.0), strict=True):
        plots.latent_usage(usage(2, height), ax)
    assert shared[0].get_ylim()[1] > 3.0
    plt.close("all")


def box(half: list[float], kind: str = "simulated") -> Sandwich:
    width = torch.tensor(half).double()
    middle, error = -90.0 - torch.arange(len(half)).double(), torch.full_like(width, 0.05)
    return Sandwich(torch.zeros(len(half), 1), middle - width, middle + width, error, error, kind, "annealed")


def test_the_sandwich_fills_its_axes_and_its_title_fits(ax: Axes) -> None:
    plots.sandwich(box([0.15, 0.1, 0.2]), ax)
    assert ax.get_yscale() == "linear"
    assert 0.25 < ax.get_ylim()[1] < 0.4
    assert inside(ax, ax.title, ax.xaxis.label)
    default = plots.sandwich(box([0.15, 0.1, 0.2]))
    assert inside(default, default.title, default.xaxis.label)


def test_rows_that_stand_out_of_the_sandwich_need_a_logarithm(ax: Axes) -> None:
    plots.sandwich(box([0.1, 0.1, 0.1, 12.0]), ax)
    assert ax.get_yscale() == "symlog"
    assert ax.yaxis.get_transform().linthresh == 0.1
    assert ax.get_ylim()[1] == pytest.approx(3.0 * 12.05)


def test_the_sandwich_of_one_row_has_no_error(ax: Axes) -> None:
    plots.sandwich(box([0.1]), ax)
    assert ax.get_title() == "Bounds of log p(x), 1 simulated row, annealed:\nmean width 0.2 nats"


def test_an_error_that_is_not_finite_does_not_cost_the_sandwich(ax: Axes) -> None:
    made = box([0.1, 0.2])
    made.upper_standard_error[0], made.lower_standard_error[1] = math.inf, math.nan
    assert np.isfinite(plots.sandwich(made, ax).get_ylim()).all()


def test_the_legend_of_a_predictive_check_fits(ax: Axes) -> None:
    draws = torch.arange(1000.0).double()
    result = PosteriorPredictive({"mean": torch.tensor(-1234.5678).double()}, {"mean": draws}, 3, "x", "guide")
    plots.predictive_check(result, ax=ax)
    ax.figure.canvas.draw()
    drawn = ax.get_legend().get_window_extent()
    assert ax.bbox.x0 <= drawn.x0 <= drawn.x1 <= ax.bbox.x1
    assert drawn.y0 > max(bar.get_window_extent().y1 for bar in ax.patches)


@pytest.mark.parametrize(
    ("draw", "kind", "maker"),
    [
        (plots.sandwich, "Sandwich", "pv.evidence.sandwich"),
        (plots.pareto_k, "Estimate", "pv.log_evidence"),
        (plots.inference_gap, "InferenceGap", "pv.diagnostics.inference_gap"),
        (plots.latent_usage, "LatentUsage", "pv.diagnostics.latent_usage"),
        (plots.convergence, "Convergence", "pv.diagnostics.convergence"),
        (plots.rate_distortion, "RateDistortion", "pv.diagnostics.rate_distortion"),
        (plots.calibration, "Calibration", "pv.diagnostics.calibration"),
        (plots.predictive_check, "PosteriorPredictive", "pv.diagnostics.posterior_predictive"),
        (plots.comparison, "Comparison", "pv.compare"),
        (plots.learning_curve, "History or EMHistory", "pv.fit or pv.em.fit"),
    ],
)
def test_another_result_is_refused(draw: Any, kind: str, maker: str) -> None:
    told = f"This figure draws the {kind} that {maker} returns, and was given: Tensor."
    with pytest.raises(TypeError, match=re.escape(told)):
        draw(torch.zeros(3))
    kinds = kind.split(" or ")
    for name, returned in zip(maker.split(" or "), kinds, strict=True):
        assert operator.attrgetter(name.removeprefix("pv."))(pv).__annotations__["return"].split("[")[0] == returned
