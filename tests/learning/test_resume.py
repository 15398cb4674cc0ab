"""A run that is stopped at any moment and started again ends as if it had never stopped, to the bit.

Run as a script, this file stops runs from outside: it forks processes that fit, kills them at random moments and starts
them again. One process imports everything once, so that a restart costs milliseconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR, StepLR

import pyro_vae as pv
from pyro_vae import cli, files
from pyro_vae.learning import checkpoint
from pyro_vae.learning.history import History

D, EPOCHS = 6, 5


class Transform:
    """Leaves x as it is, or draws bits; runs `alarm` in its n-th call."""

    def __init__(self, bits: bool = False, alarm: Callable[[], None] | None = None, at: int = -1) -> None:
        self.bits, self.alarm, self.left = bits, alarm, at

    def __repr__(self) -> str:
        return f"Transform({self.bits})"

    def __call__(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left == 0 and self.alarm is not None:
            self.alarm()
        return pv.data.binarise(x) if self.bits else x


def options(variant: str) -> dict[str, Any]:
    """How the run is made, with fresh objects at each call."""
    return {
        "Adam, patience": {"patience": 50, "schedule": lambda o: StepLR(o, 2, gamma=0.7)},
        "momentum, milestones": {
            "optimiser": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
            "schedule": lambda o: MultiStepLR(o, [1, 3, 9]),
            "clip_norm": 1.0,
            "objective": Trace_ELBO(),
        },
        "AdamW, cosine, Renyi": {
            "optimiser": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
            "schedule": lambda o: CosineAnnealingLR(o, 50),
            "objective": RenyiELBO(alpha=0.5, num_particles=2),
        },
        "warm-up, bits": {"objective": pv.objectives.ELBO(beta=pv.objectives.warm_up(40)), "lr": 1e-2},
    }[variant]


VARIANTS = ["Adam, patience", "momentum, milestones", "AdamW, cosine, Renyi", "warm-up, bits"]


def make_vae(variant: str) -> pv.VAE:
    """With BatchNorm, whose statistics are state as well, and dropout, whose draws must come back."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.BatchNorm1d(D), nn.Linear(D, 8), nn.Tanh(), nn.Dropout(0.2))
    decoder = pv.nets.MLP(2, D, hidden=(8,))
    bits = "bits" in variant
    return pv.VAE(
        prior=pv.priors.StandardNormal(2),
        likelihood=pv.likelihoods.Bernoulli(decoder) if bits else pv.likelihoods.Normal(decoder, pv.likelihoods.Learned()),
        guide=pv.guides.DiagonalNormal(body, latent_dim=2, features=8),
    )


def data() -> tuple[Tensor, Tensor]:
    x = torch.rand(200, D, generator=torch.Generator().manual_seed(1))
    return x[:160], x[160:]


def run(
    variant: str, folder: Path | None, epochs: int = EPOCHS, transform: Transform | None = None, **changes: Any
) -> tuple[History, dict[str, Tensor]]:
    vae = make_vae(variant)
    transform = transform or Transform(bits="bits" in variant)
    given = {"batch_size": 32, "transform": transform, "checkpoint": folder, **options(variant), **changes}
    history = pv.fit(vae, *data(), epochs=epochs, **given)
    return history, {name: value.detach().clone() for name, value in vae.state_dict().items()}


def require_equal(first: tuple[History, dict[str, Tensor]], second: tuple[History, dict[str, Tensor]]) -> None:
    histories = [{k: v for k, v in history.to_dict().items() if k != "seconds"} for history in (first[0], second[0])]
    assert histories[0] == histories[1]
    assert first[1].keys() == second[1].keys()
    different = [name for name in first[1] if not torch.equal(first[1][name], second[1][name])]
    assert not different


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads only get into each other's way in networks this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Stopped from inside


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_checkpoint_changes_nothing(variant: str, tmp_path: Path) -> None:
    require_equal(run(variant, None), run(variant, tmp_path))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_signal_in_the_middle_of_an_epoch(variant: str, number: signal.Signals, tmp_path: Path) -> None:
    whole = run(variant, None)
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    stops = []
    for at in (9, 14, 18):
        alarm = Transform(bits="bits" in variant, alarm=lambda: signal.raise_signal(number), at=at)
        with pytest.raises(SystemExit if number == signal.SIGTERM else KeyboardInterrupt) as caught:
            run(variant, tmp_path, transform=alarm)
        if number == signal.SIGTERM:
            assert caught.value.code == 143
        found = checkpoint.read(tmp_path)
        assert found is not None
        stops.append((found[0]["state"]["position"]["epoch"], found[0]["state"]["position"]["batch"]))
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert stops == sorted(set(stops))  # each went further than the one before
    assert any(0 < batch < 5 for _, batch in stops)
    resumed = run(variant, tmp_path)
    require_equal(resumed, whole)
    assert resumed[0].seconds == sorted(resumed[0].seconds)


def test_a_second_signal_acts_at_once(tmp_path: Path) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("went on after the second signal")

    handler = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            run("warm-up, bits", tmp_path, transform=Transform(bits=True, alarm=twice, at=14))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, handler)
    require_equal(run("warm-up, bits", tmp_path), run("warm-up, bits", None))


def test_without_a_checkpoint_signals_are_left_alone() -> None:
    seen: list[Any] = []
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

    def look() -> None:
        seen.append((signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)))

    run("warm-up, bits", None, transform=Transform(bits=True, alarm=look, at=10))
    assert seen == [handlers]


def test_a_fit_in_another_thread(tmp_path: Path) -> None:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(run("warm-up, bits", tmp_path)))
    thread.start()
    thread.join()
    require_equal(results[0], run("warm-up, bits", None))


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_error_in_the_middle_of_an_epoch(variant: str, tmp_path: Path) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(variant, tmp_path, transform=Transform(bits="bits" in variant, alarm=fail, at=20))
    require_equal(run(variant, tmp_path), run(variant, None))


def test_a_disk_that_fills_up_during_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes = []

    def fsync(handle: int) -> None:
        writes.append(handle)
        if len(writes) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("pyro_vae.files.os.fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        run("Adam, patience", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.NAME]
    found = checkpoint.read(tmp_path)
    assert found is not None
    assert found[0]["state"]["position"]["epoch"] == 1
    require_equal(run("Adam, patience", tmp_path), run("Adam, patience", None))


# The same call again


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_finished_run_returns_at_once(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(variant, tmp_path)
    content = (tmp_path / checkpoint.NAME).read_bytes()
    steps: list[int] = []
    monkeypatch.setattr("pyro_vae.learning.steps.Stepper.gradients", lambda *given: steps.append(1))
    again = run(variant, tmp_path)
    require_equal(first, again)
    assert not steps
    assert again[0].seconds == first[0].seconds
    assert (tmp_path / checkpoint.NAME).read_bytes() == content


def test_a_run_that_was_stopped_early_stays_stopped(tmp_path: Path) -> None:
    first = run("Adam, patience", tmp_path, epochs=200, patience=2, lr=0.1)
    assert first[0].stopped
    assert len(first[0]) < 200
    require_equal(run("Adam, patience", tmp_path, epochs=200, patience=2, lr=0.1), first)
    stopped = run("warm-up, bits", tmp_path / "b", callbacks=[lambda epoch, history: epoch == 2])
    require_equal(run("warm-up, bits", tmp_path / "b"), stopped)


@pytest.mark.parametrize("variant", VARIANTS)
def test_more_epochs_go_on_where_it_ended(variant: str, tmp_path: Path) -> None:
    run(variant, tmp_path, epochs=2)
    more = run(variant, tmp_path, epochs=EPOCHS)
    require_equal(more, run(variant, None))
    fewer = run(variant, tmp_path, epochs=1)
    require_equal(fewer, more)


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "lr": ({"lr": 0.5}, r"lr was \[0\.001\] and is \[0\.5\]"),
    "seed": ({"seed": 8}, "seed was 0 and is 8"),
    "batch size": ({"batch_size": 16}, "batch_size was 32 and is 16"),
    "patience": ({"patience": 3}, "patience was 50 and is 3"),
    "clip": ({"clip_norm": 2.0}, r"clip_norm was None and is 2\.0"),
    "objective": ({"objective": pv.objectives.ELBO(beta=2.0)}, r"objective was .*beta=1\.0.* and is .*beta=2\.0"),
    "Pyro's": ({"objective": Trace_ELBO()}, r"objective was .* and is 'Trace_ELBO\("),
    "particles": ({"objective": Trace_ELBO(num_particles=3)}, r"objective was .* and is 'Trace_ELBO\(.*num_particles=3"),
    "optimiser": ({"optimiser": lambda p: torch.optim.SGD(p, lr=1e-3)}, "optimiser was 'Adam.* and is 'SGD"),
    "weight decay": (
        {"optimiser": lambda p: torch.optim.Adam(p, lr=1e-3, fused=True, weight_decay=0.1)},
        r"optimiser was 'Adam.*weight_decay: 0,.* and is 'Adam.*weight_decay: 0\.1",
    ),
    "schedule": ({"schedule": lambda o: StepLR(o, 3, gamma=0.7)}, r"schedule was .*step_size=2.* and is .*step_size=3"),
    "no schedule": ({"schedule": None}, "schedule was 'StepLR.* and is 'None'"),
    "transform": ({"transform": pv.data.binarise}, r"transform was 'Transform\(False\)' and is 'binarise'"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_other_settings_are_refused_by_name(what: str, tmp_path: Path) -> None:
    changes, told = CHANGES[what]
    run("Adam, patience", tmp_path, epochs=1)
    content = (tmp_path / checkpoint.NAME).read_bytes()
    with pytest.raises(ValueError, match=rf"{tmp_path.name}.* holds a run with other settings: {told}.*Use another folder"):
        run("Adam, patience", tmp_path, epochs=2, **changes)
    assert (tmp_path / checkpoint.NAME).read_bytes() == content


@pytest.mark.parametrize("part", ["train", "valid"])
def test_other_data_are_refused(part: str, tmp_path: Path) -> None:
    run("Adam, patience", tmp_path, epochs=1)
    train, valid = data()
    changed = {"train": train, "valid": valid, part: data()[part == "valid"] * 1.5}
    given = {"batch_size": 32, "transform": Transform(), "checkpoint": tmp_path, **options("Adam, patience")}
    with pytest.raises(ValueError, match=rf"other settings: {part} was '\d+ rows .*checksum \w+' and is '\d+ rows"):
        pv.fit(make_vae("Adam, patience"), changed["train"], changed["valid"], epochs=2, **given)


def test_another_network_is_refused(tmp_path: Path) -> None:
    run("Adam, patience", tmp_path, epochs=1)
    vae = make_vae("Adam, patience")
    vae.likelihood.decoder = pv.nets.MLP(2, D, hidden=(9,))
    given = {"batch_size": 32, "transform": Transform(), "checkpoint": tmp_path, **options("Adam, patience")}
    with pytest.raises(ValueError, match="other settings: parameters was"):
        pv.fit(vae, *data(), epochs=2, **given)


@pytest.mark.parametrize("content", ["random", "half", "another kind"])
def test_a_damaged_checkpoint_is_refused_and_left(content: str, tmp_path: Path) -> None:
    run("Adam, patience", tmp_path, epochs=1)
    path = tmp_path / checkpoint.NAME
    if content == "another kind":
        make_vae("Adam, patience").save(path)
    else:
        path.write_bytes({"random": os.urandom(400), "half": path.read_bytes()[: path.stat().st_size // 2]}[content])
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors") as caught:
        run("Adam, patience", tmp_path, epochs=2)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before


# Stopped from outside

KILLED_EPOCHS = 30
CLI = "fit digits --likelihood bernoulli --transform binarise --hidden 16 --latent 2 --epochs 12 --batch-size 64".split()


def fork(work: Callable[[], Any]) -> int:
    """The id of a new process that does `work` and ends with 0, or with the code of SystemExit."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait_for_changes(child: int, path: Path, count: int) -> bool:
    """Until the file has been replaced `count` times; False if the process ended first."""
    last: Any = path.stat().st_mtime_ns if path.exists() else None
    while count:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return False
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime_ns != last:
                last, count = path.stat().st_mtime_ns, count - 1
        time.sleep(0.0005)
    return True


def stop_and_go(work: Callable[[], Any], path: Path, number: signal.Signals, most: int, rng: random.Random) -> list[int]:
    """Start `work` again and again, send the signal at a random moment; the exit codes of all starts."""
    codes = []
    while not codes or codes[-1] != 0:
        assert len(codes) < 50
        child = fork(work)
        if len(codes) < most and wait_for_changes(child, path, rng.randint(1 if number == signal.SIGKILL else 2, 3)):
            time.sleep(rng.uniform(0.0, 0.03))
            os.kill(child, number)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    return codes


def keep(folder: Path, variant: str) -> Callable[[], None]:
    """Work that fits and writes what came of it beside the checkpoint."""

    def work() -> None:
        history, state = run(variant, folder, epochs=KILLED_EPOCHS)
        files.write(folder / "result.safetensors", "result", state, history.to_dict())

    return work


def die_while_writing(work: Callable[[], None], number: int, *, renamed: bool) -> Callable[[], None]:
    """Work that is killed in its n-th write, just before or just after the new file takes its place."""
    replace, left = os.replace, [number]

    def dying(source: Any, target: Any) -> None:
        left[0] -= 1
        if renamed or left[0]:
            replace(source, target)
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    def inner() -> None:
        os.replace = dying  # in this process only
        work()

    return inner


def script(folder: Path) -> None:
    """Everything that is stopped from outside; exit codes go to report.json."""
    torch.set_num_threads(1)
    run(VARIANTS[0], None, epochs=1)  # so that what torch imports late is imported once, and not in each fork
    cli.main([*CLI, "--epochs", "1", "--out", str(folder / "cli-first")])
    rng, report = random.Random(0), {}
    for i, variant in enumerate(VARIANTS):
        whole, killed = folder / f"whole{i}", folder / f"killed{i}"
        report[f"whole{i}"] = [os.waitstatus_to_exitcode(os.waitpid(fork(keep(whole, variant)), 0)[1])]
        codes = []
        for renamed in (False, True):
            child = fork(die_while_writing(keep(killed, variant), 2, renamed=renamed))
            codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            codes.append(len([name for name in os.listdir(killed) if name.endswith(".tmp")]))
        report[f"torn{i}"] = codes
        report[f"killed{i}"] = stop_and_go(keep(killed, variant), killed / checkpoint.NAME, signal.SIGKILL, 6, rng)
    for name, number, most in [("whole", 0, 0), ("KILL", 9, 4), ("TERM", 15, 2), ("INT", 2, 2)]:
        out = folder / f"cli-{name}"
        codes = stop_and_go(lambda out=out: cli.main([*CLI, "--out", str(out)]), out / checkpoint.NAME, number, most, rng)
        report[f"cli-{name}"] = codes
    (folder / "report.json").write_text(json.dumps(report))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[int]]]:
    folder = tmp_path_factory.mktemp("stopped")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__, str(folder)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, json.loads((folder / "report.json").read_text())


needs_fork = pytest.mark.skipif(not hasattr(os, "fork") or not hasattr(os, "waitid"), reason="needs fork and waitid")


@needs_fork
@pytest.mark.parametrize("i", range(len(VARIANTS)), ids=VARIANTS)
def test_killed_at_random_moments(i: int, stopped: tuple[Path, dict[str, list[int]]]) -> None:
    folder, report = stopped
    assert report[f"whole{i}"] == [0]
    assert report[f"torn{i}"] == [-9, 1, -9, 0]  # killed before the rename: its temporary file stays until the next start
    assert report[f"killed{i}"].count(-9) >= 3
    assert set(report[f"killed{i}"]) == {0, -9}
    whole, killed = (files.read(folder / f"{kind}{i}" / "result.safetensors", "result") for kind in ("whole", "killed"))
    require_equal((History(**whole[1]), whole[0]), (History(**killed[1]), killed[0]))
    assert whole[1]["epoch"] == list(range(1, KILLED_EPOCHS + 1))
    assert killed[1]["seconds"] == sorted(killed[1]["seconds"])


@needs_fork
@pytest.mark.parametrize(("name", "code"), [("KILL", -9), ("TERM", 143), ("INT", 130)])
def test_the_command_line_resumes(name: str, code: int, stopped: tuple[Path, dict[str, list[int]]]) -> None:
    folder, report = stopped
    assert report["cli-whole"] == [0]
    assert set(report[f"cli-{name}"]) == {code, 0}
    whole, resumed = folder / "cli-whole", folder / f"cli-{name}"
    assert (whole / "vae.safetensors").read_bytes() == (resumed / "vae.safetensors").read_bytes()
    histories = [json.loads((run / "history.json").read_text()) for run in (whole, resumed)]
    for history in histories:
        del history["seconds"]
    assert histories[0] == histories[1]
    assert {path.name for path in resumed.iterdir()} == {path.name for path in whole.iterdir()}


if __name__ == "__main__":
    script(Path(sys.argv[1]))
