"""The command that checks everything on a machine with a GPU: what it says where there is none, and its way on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "experiments" / "gpu_check.py"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="needs experiments/gpu_check.py, which a checkout has")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=580)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = run()
    assert done.returncode == 2
    assert done.stdout == (
        "There is no GPU here that torch can use, so nothing was checked; --device cpu tries the way on the processor.\n"
    )


def test_an_unknown_check_is_refused() -> None:
    done = run("--device", "cpu", "--only", "speed,nonsense")
    assert done.returncode == 2
    assert "no check 'nonsense': same, graphs, waits, speed, precision, memory, evidence, ranks" in done.stderr


@pytest.mark.slow
def test_the_way_on_the_processor(tmp_path: Path) -> None:
    done = run("--device", "cpu", "--quick", "--out", str(tmp_path / "check.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("All of it holds.\n")
    result = json.loads((tmp_path / "check.json").read_text())
    assert set(result) == {
        "device", "torch", "same", "graphs", "waits", "speed", "precision", "memory", "evidence", "ranks"
    }  # fmt: skip
    assert (tmp_path / "check.png").stat().st_size > 5_000
    assert all(case["compiled"] for name, case in result["same"].items() if name != "warnings")
    assert result["precision"]["full"]["gap"] is None
    assert not any(result[name]["warnings"] for name in result if isinstance(result[name], dict))
