"""The work of `pyro-vae evaluate` on a program whose log p(x) is known, and what Ctrl-C leaves of it."""

from __future__ import annotations

import io
import json
import math
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from linear_gaussian import LinearGaussian
from matplotlib import image
from rich.console import Console
from rich.progress import Progress

import pyro_vae as pv
from pyro_vae.evidence.cascade import LEVELS
from pyro_vae.report import bars, evaluation
from pyro_vae.report.evaluation import CONVERGENCE, CSV, PARETO_K, SANDWICH, Asked
from pyro_vae.team import Team

COLUMNS = ["row", "log_p", "standard_error", "lower", "upper", "ess", "pareto_k", "engine", "reliable"]
KNOWN = LinearGaussian(dim=5, latent_dim=2)


@pytest.fixture(autouse=True)
def _handler_given_back() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) is before


def interrupt(*_: Any, **__: Any) -> Any:
    signal.raise_signal(signal.SIGINT)


def half_covered(rows: int) -> tuple[pv.Program, torch.Tensor]:
    """A guide that serves no row well, so that the cascade goes on from it."""
    return KNOWN.program(shift=6.0), KNOWN.draw(rows)


def test_the_cascade_writes_estimates_bounds_and_figures(tmp_path: Path) -> None:
    x = KNOWN.draw(60)
    found = evaluation.run(KNOWN.program(inflate=1.2), x, Asked(bounds=20, seed=3), tmp_path)
    rows, truth = pd.read_csv(tmp_path / CSV), KNOWN.log_p(x)
    assert [name for name in COLUMNS if name not in rows.columns] == []
    assert rows["row"].tolist() == list(range(60))
    assert rows["reliable"].all()
    away = (torch.tensor(rows["log_p"]) - truth) / torch.tensor(rows["standard_error"])
    assert away.abs().max() < 5.0
    # Both sides of the first rows, the estimate's own lower bound of the others.
    assert rows["upper"].notna().tolist() == [True] * 20 + [False] * 40
    assert rows["lower"][20:].tolist() == rows["log_p"][20:].tolist()
    for side, sign in (("lower", -1.0), ("upper", 1.0)):
        first = rows[:20]
        beyond = sign * (truth[:20] - torch.tensor(first[side])) / torch.tensor(first[f"{side}_standard_error"])
        assert beyond.max() < 5.0
    assert set(found.figures) == {CONVERGENCE, PARETO_K, SANDWICH}
    assert all(image.imread(tmp_path / name).std() > 0.01 for name in found.figures)
    assert not found.interrupted


def test_the_estimate_is_the_librarys(tmp_path: Path) -> None:
    program, x = half_covered(12)
    found = evaluation.run(program, x, Asked(target=0.02, bounds=0, seed=5), tmp_path, figures=False)
    assert torch.equal(found.estimate.log_p, pv.log_evidence(program, x, target=0.02, seed=5).log_p)
    assert found.box is None
    assert found.figures == ()
    assert [path.name for path in tmp_path.iterdir()] == [CSV]
    found = evaluation.run(program, x, Asked(method="laplace", particles=64, seed=5), tmp_path, figures=False)
    alone = pv.log_evidence(program, x, method=pv.posterior.laplace, num_particles=64, seed=5)
    assert torch.equal(found.estimate.log_p, alone.log_p)


def test_the_summary_counts_by_engine(tmp_path: Path) -> None:
    program, x = half_covered(30)
    found = evaluation.run(program, x, Asked(bounds=10), tmp_path, figures=False)
    told = json.loads(json.dumps(found.to_dict()))
    rows = pd.read_csv(tmp_path / CSV)
    for name, engine in told["engines"].items():
        mine = rows[rows["engine"] == name]
        assert engine["rows"] == len(mine)
        assert engine["reliable"] == mine["reliable"].sum()
        assert engine["mean_evaluations"] == pytest.approx(mine["evaluations"].mean())
        assert engine["median_standard_error"] <= mine["standard_error"].median()  # torch takes the lower of two
    assert sum(engine["rows"] for engine in told["engines"].values()) == 30
    assert told["sandwich"]["rows"] == told["sandwich"]["rows_with_both"] == 10
    assert told["sandwich"]["mean_width"] == pytest.approx((rows["upper"] - rows["lower"])[:10].mean())
    text = str(found)
    assert text.index("evaluations a row") < text.index("log p(x) = ") < text.index("log p(x) between ")
    name = next(iter(told["engines"]))
    assert any(line.split()[:2] == [name, str(told["engines"][name]["rows"])] for line in text.splitlines())


@pytest.mark.parametrize(
    ("method", "figures"), [("guide", {CONVERGENCE, PARETO_K}), ("annealed", {CONVERGENCE, PARETO_K}), ("exact", set())]
)
def test_one_method_replaces_the_figures_of_another(method: str, figures: set[str], tmp_path: Path) -> None:
    for name in (CONVERGENCE, PARETO_K, SANDWICH):
        (tmp_path / name).write_bytes(b"of yesterday")
    found = evaluation.run(KNOWN.program(inflate=1.2), KNOWN.draw(5), Asked(method=method), tmp_path)
    assert set(found.figures) == figures
    assert {path.name for path in tmp_path.iterdir()} == {CSV, *figures}
    assert all(image.imread(tmp_path / name).std() > 0.01 for name in figures)
    assert set(pd.read_csv(tmp_path / CSV)["engine"]) == {method}


def test_bounds_by_a_method(tmp_path: Path) -> None:
    found = evaluation.run(
        KNOWN.program(inflate=1.2), KNOWN.draw(5), Asked(method="guide", bounds=3), tmp_path, figures=False
    )
    assert found.box is not None
    assert (found.box.engine, len(found.box)) == ("guide", 3)


# Ctrl-C


def test_ctrl_c_keeps_the_rows_that_were_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / SANDWICH).write_bytes(b"of yesterday")
    monkeypatch.setattr(bars.Bars, "on_block", interrupt)
    x = KNOWN.draw(600)  # two blocks
    found = evaluation.run(KNOWN.program(), x, Asked(method="guide", particles=50), tmp_path)
    rows = pd.read_csv(tmp_path / CSV)
    assert found.interrupted
    assert found.to_dict()["interrupted"]
    assert found.figures == ()
    assert not (tmp_path / SANDWICH).exists()
    assert rows["log_p"][:300].tolist() == pytest.approx(KNOWN.log_p(x)[:300].tolist())
    assert rows["log_p"][300:].isna().all()
    assert set(rows["reason"][300:]) == {"interrupted before it was reached"}
    assert found.to_dict()["engines"]["none"]["rows"] == 300
    assert "not reached" in str(found)


def test_ctrl_c_between_the_levels_of_the_cascade(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bars.Bars, "on_block", interrupt)
    program, x = half_covered(8)
    found = evaluation.run(program, x, Asked(), tmp_path)
    assert found.interrupted
    assert found.box is None
    assert not pd.read_csv(tmp_path / CSV)["reliable"].any()


@pytest.mark.parametrize("what", ["bounds", "figures"])
def test_ctrl_c_after_the_estimate(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if what == "bounds":
        monkeypatch.setattr(pv.evidence, "sandwich", interrupt)
    else:
        monkeypatch.setattr(evaluation.growth, "convergence", interrupt)
    x = KNOWN.draw(8)
    found = evaluation.run(KNOWN.program(inflate=1.2), x, Asked(bounds=4), tmp_path)
    assert found.interrupted
    assert (found.box is None) == (what == "bounds")
    assert CONVERGENCE not in found.figures
    assert pd.read_csv(tmp_path / CSV)["reliable"].all()


def test_ctrl_c_while_the_rows_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = evaluation.write_bytes
    monkeypatch.setattr(evaluation, "write_bytes", lambda *given: (interrupt(), write(*given)))
    found = evaluation.run(KNOWN.program(inflate=1.2), KNOWN.draw(8), Asked(bounds=4), tmp_path)
    assert found.interrupted
    assert found.figures == ()
    assert pd.read_csv(tmp_path / CSV)["reliable"].all()


class Other(Team):
    """Rank 0 of two, to which Ctrl-C comes once both have been asked whether it did; the other rank saw none."""

    gathered = 0

    def add(self, values: torch.Tensor) -> torch.Tensor:
        interrupt()
        return values

    def gather(self, content: bytes) -> list[bytes]:
        self.gathered += 1
        return [content, b""]


def test_ctrl_c_after_the_ranks_have_agreed_leaves_none_of_them_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    team, estimated = Other(0, 2), pv.evidence.log_evidence
    monkeypatch.setattr(pv.evidence, "log_evidence", lambda *given, team, **more: estimated(*given, **more))
    found = evaluation.run(KNOWN.program(inflate=1.2), KNOWN.draw(8), Asked(bounds=4), tmp_path, team=team)
    assert team.gathered == 1
    assert found.interrupted
    assert found.figures == ()
    assert pd.read_csv(tmp_path / CSV)["reliable"].all()


def test_ctrl_c_before_anything_leaves_the_folder_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / SANDWICH).write_bytes(b"of yesterday")
    monkeypatch.setattr(pv.evidence, "log_evidence", interrupt)
    with pytest.raises(KeyboardInterrupt):
        evaluation.run(KNOWN.program(), KNOWN.draw(8), Asked(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [SANDWICH]


# Options and bars


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"particles": 500}, r"^--particles 500 needs --method .* give --target for its accuracy\.$"),
        ({"method": "guide", "target": 0.1}, r"^--target 0\.1 is for the cascade: leave it out, or --method guide\.$"),
        ({"method": "exact", "particles": 5}, r"^--particles 5: --method exact draws none, leave it out\.$"),
        ({"method": "exact", "bounds": 5}, r"^--bounds 5: --method exact needs no bounds, leave it out\.$"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Asked(**options)


def shown(progress: Progress) -> list[tuple[str, float, float | None]]:
    return [(task.description, task.completed, task.total) for task in progress.tasks]


def test_a_bar_for_each_level_of_the_cascade() -> None:
    progress = Progress(console=Console(file=io.StringIO()))
    made = bars.Bars(progress, None, 700)
    assert shown(progress) == [("guide", 0, 700)]
    made.on_block("guide", 350, 700)
    assert shown(progress) == [("guide", 350, 700)]
    made.on_block("guide", 700, 700)
    first, second = bars._named(LEVELS[1].engine), bars._named(LEVELS[2].engine)
    assert first != second  # both are called laplace
    assert shown(progress) == [("guide", 700, 700), (first, 0, None)]
    made.on_block("laplace", 40, 40)
    made.on_block("laplace", 40, 40)
    assert shown(progress)[1:3] == [(first, 40, 40), (second, 40, 40)]
    made.close(filled=False)  # no row was left for the next level
    assert len(progress.tasks) == 3
    made.begin("bounds", 5)
    made.close()
    assert shown(progress)[3:] == [("bounds", 5, 5)]


def test_bars_of_a_run_that_was_stopped() -> None:
    progress = Progress(console=Console(file=io.StringIO()))
    made = bars.Bars(progress, "guide", 700)
    made.on_block("from_guide", 350, 700)
    made.close(filled=False)
    assert shown(progress) == [("guide", 350, 700)]


def test_no_bars_where_stderr_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert bars.on_stderr().disable


def test_every_level_is_seen(tmp_path: Path) -> None:
    progress = Progress(console=Console(file=io.StringIO()))
    program, x = half_covered(10)
    evaluation.run(program, x, Asked(bounds=2), tmp_path, progress=progress)
    names = [name for name, _, _ in shown(progress)]
    assert names[:2] == ["guide", bars._named(LEVELS[1].engine)]
    assert names[-2:] == ["bounds by laplace", "figures"]
    assert all(total is not None and done == total for _, done, total in shown(progress))
    assert not any(math.isinf(done) for _, done, _ in shown(progress))
