"""Whole runs for svi_speed.py, each in a process of its own: `pv.fit` on MNIST, and the same network in PyTorch by hand.

    python svi_runs.py fit|hand EPOCHS mnist|random

prints one line of JSON: seconds of each epoch, for `pv.fit` also those spent in its steps, and the memory of the process in
MiB before the training and at its peak. MNIST is binarised once; reading it takes more memory than any training, so memory
is compared on random rows.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from svi_vae import LEARNING_RATE, Network, Order, Size
from torch import Tensor

import pyro_vae as pv

SIZE = Size()


def images() -> tuple[Tensor, Tensor]:
    """Rows of MNIST for training and validation, (N, 784), zeros and ones."""
    splits = pv.data.load("mnist").split(seed=0)
    train, valid = ((part.x.flatten(1) > 0.5).float() for part in (splits.train, splits.valid))
    return train, valid


def peak() -> float:
    """Largest resident memory of this process so far, MiB; `ru_maxrss` would count the process it was forked from."""
    told = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(told["VmHWM"].split()[0]) / 2**10


def fit(train: Tensor, valid: Tensor, epochs: int) -> dict[str, Any]:
    """`pv.fit`, compiled from its second step on, with its progress bar; the time inside its steps is added up."""
    from svi_ours import vae_of

    from pyro_vae.learning.engine import Engine

    spent, take = [], Engine.take

    def watched(self: Engine, rows: tuple[Tensor, ...], steps_taken: int) -> None:
        start = time.perf_counter()
        take(self, rows, steps_taken)
        spent.append(time.perf_counter() - start)

    Engine.take = watched  # type: ignore[method-assign]
    history = pv.fit(vae_of(SIZE), train, valid, epochs=epochs, batch_size=SIZE.batch, compile=True, progress=True)
    per_epoch = len(spent) // epochs
    steps = [sum(spent[i * per_epoch : (i + 1) * per_epoch]) for i in range(epochs)]
    ends = [0.0, *history.seconds]
    return {"epochs": [b - a for a, b in itertools.pairwise(ends)], "steps": steps}


def hand(train: Tensor, valid: Tensor, epochs: int) -> dict[str, Any]:
    """A loop as one writes it, eager, validation in batches of 1,024 after each epoch."""
    network, order = Network(SIZE), Order(len(train), SIZE.batch)
    optimiser = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE, fused=True)
    seconds = []
    for _ in range(epochs):
        start = time.perf_counter()
        for index in order.take(len(train) // SIZE.batch):
            optimiser.zero_grad()
            network.loss(train.index_select(0, index)).backward()
            optimiser.step()
        with torch.no_grad():
            sum(network.loss(rows) for rows in valid.split(1024))
        seconds.append(time.perf_counter() - start)
    return {"epochs": seconds}


def in_a_process(kind: str, epochs: int, source: str) -> dict[str, Any]:
    """What `python svi_runs.py kind epochs source` prints."""
    command = [sys.executable, __file__, kind, str(epochs), source]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parent)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Run one kind."""
    kind, epochs, source = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    rows = images() if source == "mnist" else (torch.rand(20_000, SIZE.pixels).bernoulli(), torch.zeros(500, SIZE.pixels))
    before = peak()
    found = {"fit": fit, "hand": hand}[kind](*rows, epochs)
    print(json.dumps({**found, "mib_before": before, "mib": peak()}))


if __name__ == "__main__":
    main()
