"""Seeds: the same key gives the same numbers, different keys do not, and what was there before comes back."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from pyro_vae.seeds import derive, seeded

CPU = torch.device("cpu")
WRITTEN_DOWN = (7210762507766007076, 6344374988633210798)


def draw(*key: int, seed: Any = 3) -> torch.Tensor:
    with seeded(seed, CPU, *key):
        return torch.randn(20000)


def test_derive_is_the_same_everywhere_and_always() -> None:
    """Written down: these numbers decide all draws, a checkpoint or a result of last year depends on them."""
    assert derive(0) == WRITTEN_DOWN[0]
    assert derive(3, 7) == WRITTEN_DOWN[1]
    code = "from pyro_vae.seeds import derive; print(derive(0), derive(3, 7))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split() == [str(number) for number in WRITTEN_DOWN]


def test_keys_are_tuples_of_numbers() -> None:
    assert derive((3, 7), 2) == derive(3, 7, 2) == derive((3, 7, 2))
    assert derive(np.int64(3), np.int32(7)) == derive(3, 7)  # type: ignore[arg-type]


def test_different_keys_give_different_seeds_of_63_bits() -> None:
    keys = [(a, b) for a in range(-5, 60) for b in range(60)] + [(a,) for a in range(60)] + [(1, 2, 3), (12, 3), (123,)]
    seeds = {derive(key) for key in keys}
    assert len(seeds) == len(set(keys))
    assert 0 <= min(seeds)
    assert 2**61 < max(seeds) < 2**63


def test_streams_of_different_keys_are_not_correlated() -> None:
    streams = torch.stack([draw(), draw(0), draw(1), draw(seed=4), draw(seed=(3, 0, 0)), draw(seed=-3)])
    assert torch.corrcoef(streams).triu(1).abs().max() < 5 / math.sqrt(20000)
    assert torch.equal(draw(1), streams[2])


@pytest.mark.parametrize("seed", [1.5, "3", None, True, (1, 2.0), ((1, 2), 3)])
def test_other_seeds_are_refused(seed: Any) -> None:
    with pytest.raises(ValueError, match=r"seed=.* must be a whole number or a tuple of them"), seeded(seed, CPU):
        pass


def test_the_state_comes_back() -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    with seeded(3, CPU):
        inside = torch.rand(5)
        with seeded(3, CPU):
            assert torch.equal(torch.rand(5), inside)
        assert not torch.equal(torch.rand(5), inside)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_state_comes_back_after_a_failure() -> None:
    before = torch.get_rng_state()

    def fail() -> None:
        with seeded(3, CPU):
            torch.rand(5)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(torch.get_rng_state(), before)


def test_other_devices_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.manual_seed would seed the generators of all devices, and only the CPU's is given back."""
    touched: list[object] = []
    for name in ("manual_seed", "manual_seed_all"):
        monkeypatch.setattr(torch.cuda, name, touched.append)
    with seeded(3, CPU):
        torch.rand(1)
    assert touched == []
