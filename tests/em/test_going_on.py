"""Monte Carlo EM that is stopped at any moment and started again ends as if it had never stopped, to the bit."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from em.curve import Curve, line_data
from torch import Tensor
from torch.optim.lr_scheduler import StepLR

import pyro_vae as pv
from pyro_vae.learning import checkpoint


def fitted(folder: Path | None, transform: Callable[[Tensor], Tensor] | None = None, **changes: Any) -> tuple[Any, ...]:
    curve = Curve()
    given = {
        "engine": pv.em.monte_carlo.WARM, "num_particles": 30, "epochs": 3, "batch_size": 16, "lr": 1e-2, "fit_guide": True,
        "transform": transform, "progress": False, "schedule": lambda o: StepLR(o, 2, gamma=0.5), **changes,
    }  # fmt: skip
    history = pv.em.fit(curve.program, line_data(48), line_data(16, seed=1), checkpoint=folder, **given)
    return history, curve.state()


class Jitter:
    """Adds noise to rows, and calls `alarm` in its n-th call."""

    def __init__(self, alarm: Callable[[], None] | None = None, at: int = -1) -> None:
        self.alarm, self.left = alarm, at

    def __repr__(self) -> str:
        return "Jitter()"

    def __call__(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left == 0 and self.alarm is not None:
            self.alarm()
        return x + 0.01 * torch.randn_like(x)


def require_equal(first: tuple[Any, ...], second: tuple[Any, ...]) -> None:
    told = [{**history.to_dict(), "seconds": None} for history in (first[0], second[0])]
    assert told[0] == told[1]
    assert not [name for name in first[1] if not torch.equal(first[1][name], second[1][name])]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_middle_of_an_epoch(
    number: signal.Signals, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = fitted(None, Jitter())
    for at in (11, 8):  # calls are also made by looking at the rows first
        alarm = Jitter(lambda: signal.raise_signal(number), at)
        with pytest.raises(SystemExit if number == signal.SIGTERM else KeyboardInterrupt):
            fitted(tmp_path, alarm)
        assert "stops when this batch is done" in capsys.readouterr().err
    found = checkpoint.read(tmp_path)
    assert found is not None
    assert found[0]["state"]["position"]["epoch"] < 3
    require_equal(fitted(tmp_path, Jitter()), whole)
    again = fitted(tmp_path, Jitter())
    require_equal(again, whole)
    assert again[0].seconds == sorted(again[0].seconds)


def test_killed_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    whole = fitted(None, Jitter())
    for at in (12, 9):
        child = os.fork()
        if child == 0:
            fitted(tmp_path, Jitter(lambda: os.kill(os.getpid(), signal.SIGKILL), at))
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    found = checkpoint.read(tmp_path)
    assert found is not None
    assert 0 < found[0]["state"]["position"]["epoch"] < 3
    require_equal(fitted(tmp_path, Jitter()), whole)


def test_more_epochs_go_on_and_other_settings_are_refused(tmp_path: Path) -> None:
    fitted(tmp_path, epochs=2)
    require_equal(fitted(tmp_path, epochs=3), fitted(None))
    for changes, told in (
        ({"m_steps": 2}, "m_steps was 5 and is 2"),
        ({"num_particles": 31}, "num_particles was 30 and is 31"),
        ({"engine": pv.posterior.laplace}, r"engine was 'Laplace\(num_starts=2, .*' and is 'Laplace\(num_starts=4, .*'"),
        ({"fit_guide": False}, "fit_guide was True and is False"),
        ({"seed": 3}, "seed was 0 and is 3"),
    ):
        with pytest.raises(ValueError, match=f"holds a run with other settings: .*{told}"):
            fitted(tmp_path, **changes)


def test_the_folder_of_the_other_kind_of_run_is_refused(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"epochs": 1, "batch_size": 16, "progress": False}
    pv.fit(Curve().program, line_data(48), checkpoint=tmp_path / "fit", compile=False, **settings)
    with pytest.raises(ValueError, match=r"fit holds a run of fit: use another folder\.$"):
        fitted(tmp_path / "fit")
    fitted(tmp_path / "em", epochs=1)
    with pytest.raises(ValueError, match=r"em holds a run of em\.fit: use another folder\.$"):
        pv.fit(Curve().program, line_data(48), checkpoint=tmp_path / "em", compile=False, **settings)


def test_what_is_no_program_or_no_engine_is_refused_with_the_mend() -> None:
    with pytest.raises(TypeError, match=r"program=Linear is no Program: give a pv\.VAE or pv\.Program"):
        pv.em.fit(torch.nn.Linear(2, 2), line_data(48))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"chains have no weights, Annealed\(start=at_points\) has\.$"):
        pv.em.fit(Curve().program, line_data(48), engine=pv.posterior.hamiltonian)  # type: ignore[arg-type]


def test_a_callback_stops_the_run_and_the_history_prints(tmp_path: Path) -> None:
    history, _ = fitted(tmp_path, callbacks=[lambda epoch, history: epoch == 2])
    assert len(history) == 2
    assert history.stopped == "stopped by a callback"
    assert repr(history).startswith("epoch 2: log p(x) -")
    assert "validation" in repr(history)
    assert (" % of rows reliable (others mostly: " in repr(history)) == (history.reliable[-1] < 1.0)
    assert repr(pv.em.EMHistory()) == "EMHistory: no epoch yet"
    assert len(history.plot().get_legend().get_texts()) == 2
    assert fitted(tmp_path)[0].stopped == "stopped by a callback"


def test_the_budget_changes_rounding_alone() -> None:
    wide, tight = (fitted(None, memory=memory, epochs=2) for memory in (2**30, 2**16))
    for name, value in wide[1].items():
        assert torch.allclose(value, tight[1][name], atol=1e-6), name
