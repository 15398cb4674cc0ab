"""Figures: on the Axes they were given, titled, labelled, and showing what they were told to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import image
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from pyro_vae.evidence import Estimate, Sandwich
from pyro_vae.learning.history import BLUE, VERMILION, History
from pyro_vae.report import plots
from pyro_vae.report.aggregate import Aggregate
from pyro_vae.report.compression import RateDistortion
from pyro_vae.report.gap import InferenceGap
from pyro_vae.report.growth import Convergence, Curve
from pyro_vae.report.latents import LatentUsage


@pytest.fixture
def ax() -> Iterator[Axes]:
    yield plt.subplots()[1]
    plt.close("all")


def history(epochs: int, valid: bool = True) -> History:
    elbo = [-1000.0 / (1 + i) for i in range(epochs)]
    made = History(epoch=list(range(1, epochs + 1)), elbo=elbo)
    made.valid_elbo = [value - 5.0 for value in elbo] if valid else []
    return made


def texts(ax: Axes) -> list[str]:
    return [ax.get_title(), ax.get_xlabel(), ax.get_ylabel()]


@pytest.mark.parametrize("valid", [True, False])
@pytest.mark.parametrize("epochs", [1, 2, 40])
def test_learning_curve(ax: Axes, epochs: int, valid: bool) -> None:
    record = history(epochs, valid)
    assert plots.learning_curve(record, ax) is ax
    assert texts(ax) == ["Learning curve", "epoch", "ELBO (nats per row)"]
    drawn = [list(line.get_ydata()) for line in ax.get_lines()]
    assert drawn == ([record.elbo, record.valid_elbo] if valid else [record.elbo])
    low, high = ax.get_ylim()
    assert high > max(record.elbo)
    late = (record.valid_elbo or record.elbo)[epochs // 10 :]
    assert low < min(late)
    if epochs == 40:
        assert low > record.elbo[0]  # the steep beginning is left out


def test_learning_curve_of_a_run_that_broke(ax: Axes) -> None:
    record = history(20)
    record.valid_elbo[12], record.valid_elbo[13] = float("nan"), -float("inf")
    plots.learning_curve(record, ax)
    low, high = ax.get_ylim()
    assert low < min(record.elbo[2:]) < max(record.elbo) < high


def points(ax: Axes) -> Any:
    return np.concatenate([np.asarray(part.get_offsets()) for part in ax.collections])


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_latent_space(ax: Axes, dim: int) -> None:
    means = torch.randn(30, dim) * torch.arange(1.0, dim + 1)
    assert plots.latent_space(means, None, ax) is ax
    assert all(texts(ax)[:2])
    drawn = points(ax)
    assert drawn.shape == (30, 2)
    if dim <= 2:
        assert np.allclose(drawn[:, :dim], means.numpy(), atol=1e-6)
        assert ax.get_ylabel() == ("E[z[1] | x]" if dim == 2 else "")
        assert ax.get_xlabel() == "E[z[0] | x]"
    else:  # the plane of greatest variance, by the eigenvalues of the covariance
        variances = np.linalg.eigvalsh(np.cov(means.numpy().T))[::-1]
        assert np.allclose(drawn.var(0, ddof=1), variances[:2], rtol=1e-4)


def test_classes_are_named_where_they_lie(ax: Axes) -> None:
    labels = torch.tensor([3, 7]).repeat(10)
    means = torch.stack([labels.float(), -labels.float()], -1) + 0.1 * torch.randn(20, 2)
    plots.latent_space(means, labels, ax)
    assert len(ax.collections) == 2
    for annotation in ax.texts:
        x, y = annotation.xy
        assert x == pytest.approx(float(annotation.get_text()), abs=0.2)
        assert y == pytest.approx(-float(annotation.get_text()), abs=0.2)
    assert [annotation.get_text() for annotation in ax.texts] == ["3", "7"]
    colours = [tuple(part.get_facecolor()[0]) for part in ax.collections]
    assert colours[0] != colours[1]


def gaps(approximation: list[float], amortisation: list[float]) -> InferenceGap:
    """Gaps of rows whose ELBO is -10 nats, with an error of 0.1 in each value."""
    first, second = (torch.tensor(values, dtype=torch.float64) for values in (approximation, amortisation))
    elbo, error = torch.full_like(first, -10.0), torch.full_like(first, 0.1)
    log_p = elbo + first + second
    return InferenceGap(log_p, error, elbo + second, error, elbo, error, "factorised Normal", ("",) * len(first))


def heights(ax: Axes) -> list[Any]:
    """(values, baselines) of the steps drawn."""
    steps = [patch.get_data() for patch in ax.patches if hasattr(patch, "get_data")]
    return [(np.asarray(step.values), np.asarray(step.baseline)) for step in steps]


def test_inference_gap_stacks_sorted_rows(ax: Axes) -> None:
    result = gaps([1.0, 2.0, 0.5, np.nan], [0.5, 3.0, -0.25, 1.0])
    assert plots.inference_gap(result, ax) is ax
    title, xlabel, ylabel = texts(ax)
    assert (xlabel, ylabel) == ("row, by its inference gap", "gap (nats)")
    assert title.startswith("Inference gap: mean 2.25 ")
    (first, ground), (top, base) = heights(ax)
    assert np.allclose(first, [2.0, 1.0, 0.5])
    assert np.allclose(ground, 0.0)
    assert np.allclose(base, [2.0, 1.0, 0.0])  # gaps of two signs are not stacked
    assert np.allclose(top, [5.0, 1.5, -0.25])
    assert ax.patches[1].get_hatch()  # told apart by more than colour
    named = [text.get_text() for text in ax.get_legend().get_texts()]
    assert named[0].startswith("approximation: mean 1.167 ")
    assert named[1].startswith("amortisation: mean 1.083 ")
    assert len(ax.containers) == 1
    points, _, (bars,) = ax.containers[0].lines
    assert np.allclose(points.get_ydata(), [5.0, 1.5, 0.25])
    assert np.allclose([np.ptp(segment[:, 1]) for segment in bars.get_segments()], 2.0 * np.hypot(0.1, 0.1))


def test_many_inference_gaps_have_no_error_bars(ax: Axes) -> None:
    plots.inference_gap(gaps([1.0] * 100, [0.5] * 100), ax)
    assert not ax.containers
    assert ax.get_ylim()[1] > 1.5


def test_no_inference_gap_is_refused(ax: Axes) -> None:
    with pytest.raises(ValueError, match="None of the 2 rows"):
        plots.inference_gap(gaps([np.nan, np.nan], [1.0, 1.0]), ax)


def usage(kl: list[float], activity: list[float], error: float = 0.0) -> LatentUsage:
    names = tuple(f"z[{i}]" for i in range(len(kl)))
    zeros, unit = torch.zeros(len(kl), dtype=torch.float64), torch.eye(len(kl), dtype=torch.float64)
    rows = torch.full((5,), sum(kl), dtype=torch.float64)
    return LatentUsage(
        names=names,
        part=torch.arange(len(kl)),
        kl=torch.tensor(kl, dtype=torch.float64),
        kl_standard_error=torch.full((len(kl),), error, dtype=torch.float64),
        row_kl=rows,
        row_kl_standard_error=0.0 * rows,
        activity=torch.tensor(activity, dtype=torch.float64),
        aggregate=Aggregate(rows, rows, rows, zeros, unit, zeros, unit, names),
        decoder_spread=1.0,
    )


@pytest.mark.parametrize("error", [0.0, 0.2])
def test_latent_usage_marks_active_dimensions(ax: Axes, error: float) -> None:
    assert plots.latent_usage(usage([0.5, 0.001, 2.0], [0.4, 0.0, 0.9], error), ax) is ax
    assert texts(ax) == ["KL(q(z | x) || p(z)) by dimension: 2.501 nats in all", "latent dimension", "KL (nats per row)"]
    bars = ax.patches
    assert [bar.get_height() for bar in bars] == [2.0, 0.5, 0.001]
    assert [bool(bar.get_hatch()) for bar in bars] == [False, False, True]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["z[2]", "z[0]", "z[1]"]
    named = [text.get_text() for text in ax.get_legend().get_texts()]
    assert named == ["active: 2 of 3 dimensions", "inactive: 1 of 3"]
    crosses = [line for line in ax.get_lines() if line.get_marker() == "x"]
    assert [list(line.get_xdata()) for line in crosses] == [[3]]
    segments = [segment for part in ax.collections for segment in part.get_segments()]
    assert len(segments) == (3 if error else 0)


@pytest.mark.parametrize(("activity", "label"), [(0.5, "active: 50 of 50 dimensions"), (0.0, "inactive: 50 of 50")])
def test_latent_usage_of_many_dimensions_that_are_all_alike(ax: Axes, activity: float, label: str) -> None:
    plots.latent_usage(usage([1.0] * 50, [activity] * 50), ax)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [label]
    assert "z[3]" not in [text.get_text() for text in ax.get_xticklabels()]
    colour = ax.patches[0].get_facecolor() if activity else ax.patches[0].get_edgecolor()
    assert to_hex(colour).upper() == (BLUE if activity else VERMILION)


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def legend(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def estimate(k: list[float], engines: list[str], log_p: float = -3.0) -> Estimate:
    """Rows with these k-hats, answered by these engines."""
    ones = torch.ones(len(k), dtype=torch.float64)
    return Estimate(
        log_p * ones, 0.2 * ones, 0.0 * ones, 50.0 * ones, doubles(*k), log_p * ones, log_p * ones, ones.long(),
        tuple(engines), ("",) * len(k),
    )  # fmt: skip


def test_pareto_k_counts_rows_by_engine(ax: Axes) -> None:
    inf, nan = float("inf"), float("nan")
    told = estimate([0.12, 0.55, 0.15, 0.72, 3.0, -inf, nan], ["laplace", "guide", "guide", *["laplace"] * 3, "exact"])
    assert plots.pareto_k(told, ax) is ax
    title, xlabel, ylabel = texts(ax)
    assert (title, ylabel) == ("k-hat of 5 rows", "rows")
    beyond = "1 row beyond the ends, in the outermost bins"
    assert xlabel == f"k-hat of the weights\n(1 row without a tail, 1 row without a k-hat, {beyond})"
    assert legend(ax) == [
        "0.5: no variance above, 3 rows",
        "0.7: not to be trusted above, 2 rows",
        "guide: 2 rows",
        "laplace: 3 rows",
    ]
    assert [line.get_xdata()[0] for line in ax.get_lines()] == [0.5, 0.7]
    bars = [
        (round(bar.get_x(), 9), bar.get_height(), bar.get_y(), bar.get_hatch()) for bar in ax.patches if bar.get_height()
    ]
    # The guide's below, the others' on top of them; what is beyond the end stands in the last bin.
    assert [bar[:3] for bar in bars] == [(0.1, 1, 0), (0.5, 1, 0), (0.1, 1, 1), (0.7, 1, 0), (1.4, 1, 0)]
    assert {bool(bar[3]) for bar in bars[:2]} != {bool(bar[3]) for bar in bars[2:]}  # told apart by more than colour
    low, high = ax.get_xlim()
    assert low < 0.1
    assert high > 1.5


def test_pareto_k_of_good_rows_shows_the_thresholds(ax: Axes) -> None:
    plots.pareto_k(estimate([0.1, 0.2], ["mine", "mine"]), ax)
    assert ax.get_xlim()[1] > 0.7
    assert legend(ax)[0] == "0.5: no variance above, 0 rows"


def test_no_k_hat_is_refused(ax: Axes) -> None:
    with pytest.raises(ValueError, match="None of the 2 rows has a k-hat to draw"):
        plots.pareto_k(estimate([float("nan"), -float("inf")], ["exact", "laplace"]), ax)


def sandwich(lower: list[float], upper: list[float], kind: str = "real") -> Sandwich:
    low, high = doubles(*lower), doubles(*upper)
    error = torch.full_like(low, 0.25)
    return Sandwich(torch.zeros(len(low), 1), low, high, error, 2.0 * error, kind, "laplace")


@pytest.mark.parametrize("kind", ["real", "simulated"])
def test_sandwich_shows_both_bounds_around_their_midpoint(ax: Axes, kind: str) -> None:
    box = sandwich([-10.0, -30.0, -20.0, -5.0], [-9.0, -30.5, -18.0, float("inf")], kind)
    assert plots.sandwich(box, ax) is ax
    title, xlabel, ylabel = texts(ax)
    assert title.startswith(f"Bounds of log p(x), 3 {kind} rows, laplace:\nmean width 0.83 ± ")
    assert title.endswith("\n1 more row without a side")
    assert xlabel.startswith("midpoint of both bounds (nats)\n(")
    assert " ".join(xlabel.split()).endswith(f"({box.covers})")
    assert ylabel == "bound - midpoint (nats)"
    drawn = {line.get_label(): line.get_xydata() for line in ax.get_lines() if not line.get_label().startswith("_")}
    assert np.allclose(drawn["upper bound"], [[-9.5, 0.5], [-30.25, -0.25], [-19.0, 1.0]])
    assert np.allclose(drawn["lower bound"], [[-9.5, -0.5], [-30.25, 0.25], [-19.0, -1.0]])
    whiskers = [[np.ptp(segment[:, 1]) for segment in part.get_segments()] for part in ax.collections]
    assert np.allclose(whiskers, [[1.0] * 3, [0.5] * 3])
    assert ax.get_yscale() == "linear"
    low, high = ax.get_ylim()
    assert 1.5 < -low == high < 2.0  # the farthest whisker ends at 1 + 0.5
    markers = [line.get_marker() for line in ax.get_lines()][:2]
    assert markers == ["^", "v"]


def test_bounds_of_many_rows_have_no_whiskers(ax: Axes) -> None:
    plots.sandwich(sandwich([0.0] * 501, [0.1] * 501), ax)
    assert not ax.collections


def test_no_bounds_are_refused(ax: Axes) -> None:
    with pytest.raises(ValueError, match="None of the 2 rows has both bounds"):
        plots.sandwich(sandwich([0.0, 0.0], [float("inf"), float("nan")]), ax)


@pytest.mark.parametrize("truth", [None, -2.5, estimate([0.1] * 4, ["guide"] * 4, log_p=-2.5)])
def test_convergence_in_the_number_of_particles(ax: Axes, truth: Any) -> None:
    guide = Curve(torch.tensor([1, 10, 100]), doubles(-6.0, -4.0, -3.0), doubles(0.5, 0.3, 0.1))
    laplace = Curve(torch.tensor([1, 1000]), doubles(-2.6, -2.5), doubles(float("inf"), 0.01))
    result = Convergence({"laplace": laplace, "guide": guide}, num_rows=7)
    assert plots.convergence(result, ax, truth=truth) is ax
    assert texts(ax) == [
        "Convergence, mean of 7 rows",
        "particles a row, k",
        "log p-hat with k particles (nats per row)",
    ]
    assert ax.get_xscale() == "log"
    lines = ax.get_lines()
    assert np.allclose(lines[1].get_xydata(), [[1, -6.0], [10, -4.0], [100, -3.0]])
    assert lines[0].get_linestyle() != lines[1].get_linestyle()
    assert lines[0].get_marker() != lines[1].get_marker()
    bands = [part.get_paths()[0].vertices for part in ax.collections]
    assert np.isfinite(bands[0]).all()  # no error is known where there is one draw
    assert (bands[1][:, 1].min(), bands[1][:, 1].max()) == (-6.5, -2.9)
    told = ["laplace: -2.500 with 1,000", "guide: -3.000 with 100"]
    if truth is not None:
        assert lines[2].get_ydata()[0] == -2.5
        told.append("log p(x): -2.500" + ("" if isinstance(truth, float) else " ± 0.1"))
    assert legend(ax) == told


def test_rate_distortion_goes_from_the_prior_to_the_posterior(ax: Axes) -> None:
    beta = doubles(0.01, 0.1, 0.5, 1.0)
    distortion, rate = (
        doubles(*values)[:, None].expand(4, 3) for values in ((90.0, 50.0, 20.0, 10.0), (0.0, 1.0, 5.0, 9.0))
    )
    error = torch.full_like(rate, 0.3)
    curve = RateDistortion(beta, distortion, error, rate, error, 8.0 * torch.ones_like(rate), 16)
    assert plots.rate_distortion(curve, ax) is ax
    assert texts(ax) == [
        "Rate-distortion curve: R + D = 19.00 nats at b = 1",
        "distortion E[-log p(x | z)] (nats per row)",
        "rate KL(q || p(z)) (nats per row)",
    ]
    assert np.allclose(ax.get_lines()[0].get_xydata(), [[90, 0], [50, 1], [20, 5], [10, 9]])
    assert [(text.get_text(), text.xy) for text in ax.texts] == [
        ("b = 0.01", (90.0, 0.0)),
        ("b = 0.1", (50.0, 1.0)),
        ("b = 1", (10.0, 9.0)),
    ]
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert band.max() == pytest.approx(9.0 + 0.3 / 3**0.5)


def test_without_axes_a_figure_is_made() -> None:
    drawn = [
        plots.learning_curve(history(3)),
        plots.images(torch.rand(2, 4), (2, 2)),
        plots.latent_space(torch.randn(3, 2)),
        plots.inference_gap(gaps([1.0], [2.0])),
        plots.latent_usage(usage([1.0], [0.5])),
        plots.pareto_k(estimate([0.1], ["guide"])),
        plots.sandwich(sandwich([0.0], [1.0])),
    ]
    assert len({id(ax.get_figure()) for ax in drawn}) == 7
    plt.close("all")


@pytest.mark.parametrize("kind", [Path, str])
def test_save_writes_a_picture_and_closes_the_figure(kind: type, tmp_path: Path) -> None:
    before = plt.get_fignums()
    plots.save(plots.images(torch.rand(2, 4), (2, 2)), kind(tmp_path / "new" / "a.png"))
    assert image.imread(tmp_path / "new" / "a.png").std() > 0.0
    assert plt.get_fignums() == before
