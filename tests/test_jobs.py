"""The command line on several processes: `torchrun`, and a rank that dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jobs
import pandas as pd
import pytest

from pyro_vae import files
from pyro_vae.launch import Place, place
from pyro_vae.learning import checkpoint

FIT = "-m pyro_vae fit digits --latent 2 --hidden 16 --transform dequantise --batch-size 64".split()
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]


def launched(*words: str) -> subprocess.CompletedProcess[str]:
    command = [*TORCHRUN, str(jobs.free_port()), *words]
    return subprocess.run(command, env={**os.environ, **jobs.ALONE}, capture_output=True, text=True, timeout=100)


def test_a_launcher_says_which_process_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    for name in told:
        monkeypatch.delenv(name, raising=False)
    assert place() == Place(0, 1, 0)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert place() == Place(3, 4, 1)
    assert str(place()) == "rank 3 of 4"
    for rank in ("4", "-1", "one"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(ValueError, match=f"RANK={rank}, WORLD_SIZE=4"):
            place()
    monkeypatch.delenv("MASTER_ADDR")  # a cluster's variables without a launcher's
    assert place() == Place(0, 1, 0)


def test_without_a_launcher_nothing_of_ours_imports_torch_distributed() -> None:
    """What torch itself imports of it aside, which has no way round it."""
    words = "import sys, torch; before = set(sys.modules); import pyro, pyro_vae.launch; between = set(sys.modules); "
    words += "import pyro_vae.team, pyro_vae.learning.fit, pyro_vae.evidence.blocks; "
    words += "print([m for m in set(sys.modules) - between if m.startswith('torch.distributed')])"
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.slow
def test_torchrun_fits_and_evaluates(tmp_path: Path) -> None:
    out = tmp_path / "run"
    fitted = launched(*FIT, "--epochs", "3", "--out", str(out), "--json")
    assert fitted.returncode == 0, fitted.stderr
    assert len(json.loads(fitted.stdout)["elbo"]) == 3  # one rank prints
    options = ["-m", "pyro_vae", "evaluate", str(out), "--json", "--bounds", "20"]
    two = launched(*options)
    assert two.returncode == 0, two.stderr
    shared = pd.read_csv(out / "evidence.csv")
    one = subprocess.run([sys.executable, *options], env={**os.environ, **jobs.ALONE}, capture_output=True, text=True)
    pd.testing.assert_frame_equal(shared, pd.read_csv(out / "evidence.csv"), rtol=1e-9)
    assert json.loads(two.stdout) == json.loads(one.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 1])
def test_a_killed_rank_ends_the_job_and_other_numbers_of_ranks_go_on(dead: int, tmp_path: Path) -> None:
    words = [*FIT, "--epochs", "60", "--out", str(tmp_path)]
    path, finished = tmp_path / checkpoint.NAME, []

    def epochs() -> int:
        return int(files.read(path, "checkpoint")[1]["state"]["position"]["epoch"]) if path.exists() else 0

    for size in (2, 1, 2):
        before = epochs()
        ranks = jobs.start(words, size)
        while epochs() < before + 5:
            assert all(rank.poll() is None for rank in ranks), jobs.wait(ranks)
            time.sleep(0.02)
        ranks[min(dead, size - 1)].send_signal(signal.SIGKILL)
        started = time.monotonic()
        ended = jobs.wait(ranks, 20.0)
        assert time.monotonic() - started < 10.0
        assert ended[min(dead, size - 1)].code == -signal.SIGKILL
        if size == 2:
            left = ended[1 - dead]
            assert left.code == 1
            assert left.err.count("\n") == 1
            assert "Another of the 2 processes of this job has ended" in left.err
            assert f"The same command goes on from {tmp_path}." in left.err
        finished.append(epochs())
    assert finished == sorted(finished)
    for ended in jobs.wait(jobs.start(words, 2)):
        assert ended.code == 0, ended.err
    history = json.loads((tmp_path / "history.json").read_text())
    assert history["epoch"] == list(range(1, 61))
    assert history["elbo"][-1] > history["elbo"][0]
    assert history["seconds"] == sorted(history["seconds"])
