"""Timing on a machine that is not ours alone: blocks of work in turns, and what other processes did meanwhile."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

DISTURBED = 0.1
"""Processors that others may keep busy while we measure. OpenMP's threads wait for each other and suffer most by company: a
ratio to JAX, whose threads share the work as it comes, is no ratio in a crowd."""


def turns(names: list[str], rounds: int) -> Iterator[list[str]]:
    """The order of each round: rotated, and every second one backwards."""
    for number in range(rounds):
        shift = number % len(names)
        order = names[shift:] + names[:shift]
        yield order[::-1] if number % 2 else order


class Block(NamedTuple):
    """One block of steps: how long it took, and how many processors it and other processes kept busy on average."""

    seconds: float
    processors: float
    others: float

    @property
    def quiet(self) -> bool:
        """Whether the machine did little else."""
        return not self.others >= DISTURBED  # nan where it is not known


def busy_seconds() -> float:
    """Processor time of the whole machine since it started; nan where nobody counts it."""
    file = Path("/proc/stat")
    if not file.exists():
        return math.nan
    user, nice, system, _, _, irq, softirq, steal = map(int, file.read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def wait_for_quiet(seconds: float = 10.0) -> None:
    """Sleep until the machine does little else, so many seconds at most: in company a block may take 30 times as long."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end and not watched(lambda: time.sleep(0.15)).quiet:
        pass


def timed(work: Callable[[], Any]) -> Block:
    """Wait for quiet, do it and tell."""
    wait_for_quiet()
    return watched(work)


def watched(work: Callable[[], Any]) -> Block:
    """Do it and tell."""
    all_before, mine_before, start = busy_seconds(), time.process_time(), time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    mine = time.process_time() - mine_before
    return Block(seconds, mine / seconds, (busy_seconds() - all_before - mine) / seconds)


def undisturbed(work: Callable[[], Any], trials: int) -> Block:
    """Do it until the machine was quiet meanwhile, `trials` times at most, and tell of the quietest time."""
    seen = [timed(work)]
    while not seen[-1].quiet and len(seen) < trials:
        seen.append(timed(work))
    return min(seen, key=lambda block: block.others)
