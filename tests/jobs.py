"""Jobs of several processes, as a launcher starts them: the same script on each rank, with the launcher's variables."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

ALONE = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
"""One thread a process, and the helper modules of the tests."""


class Ended(NamedTuple):
    """How a rank ended: its exit code, and what it printed."""

    code: int
    out: str
    err: str


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(words: list[str], size: int, more: Mapping[str, str] | None = None) -> list[subprocess.Popen[str]]:
    """The ranks of a job that runs `python words...`."""
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **ALONE}
    ranks = []
    for rank in range(size):
        environment = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank), **(more or {})}
        command = [sys.executable, *words]
        ranks.append(subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True))
    return ranks


def wait(ranks: list[subprocess.Popen[str]], seconds: float = 100.0) -> list[Ended]:
    """How they end; all are killed where one takes too long."""
    try:
        told = [rank.communicate(timeout=seconds) for rank in ranks]
    except subprocess.TimeoutExpired:
        for rank in ranks:
            rank.kill()
        for rank in ranks:
            rank.communicate()  # closes its pipes
        raise
    return [Ended(rank.returncode, out, err) for rank, (out, err) in zip(ranks, told, strict=True)]


def run(script: str | Path, folder: Path, size: int = 2) -> None:
    """Run a script on `size` ranks, with the folder as its argument; all must end well."""
    for ended in wait(start([str(script), str(folder)], size)):
        assert ended.code == 0, ended.out + ended.err
