"""Memory: chunks change nothing but rounding, and stay within the budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from programs import Curved, Networks, Several, weights
from torch import Tensor, nn

from pyro_vae import memory
from pyro_vae.log_joint import LogJoint
from pyro_vae.memory import bytes_allocated, in_chunks


class Measured:
    """`LogJoint.of_sites`, with the bytes and the shape of each chunk."""

    def __init__(self) -> None:
        self.bytes: list[int] = []
        self.shapes: list[tuple[int, int]] = []

    def __call__(self, log_joint: LogJoint, z: dict[str, Tensor]) -> Tensor:
        out: list[Tensor] = []
        self.bytes.append(bytes_allocated(lambda: out.append(log_joint.of_sites(z))))
        self.shapes.append(tuple(out[0].shape))  # type: ignore[arg-type]
        return out[0]


def test_bytes_allocated_counts_every_tensor() -> None:
    x = torch.zeros(100, dtype=torch.float64)
    assert bytes_allocated(lambda: x + 1.0) == 800
    assert bytes_allocated(lambda: (x + 1.0).float().sum()) == 800 + 400 + 4
    assert bytes_allocated(lambda: None) == 0


@pytest.mark.parametrize("budget", [3000, 20_000, 250_000, 2**30])
def test_chunks_change_nothing(budget: int) -> None:
    curved = Curved()
    x, z = weights(37, 3), weights(23, 37, 2, seed=1)
    measured = Measured()
    log_joint = in_chunks(curved.program, (x,), {"z": z}, measured, budget)
    torch.testing.assert_close(log_joint, curved.log_joint(x, z), rtol=1e-5, atol=1e-5)
    chunks = measured.shapes[2:]  # the first two take the measure
    assert sum(k * n for k, n in chunks) == 23 * 37
    assert (len(chunks) == 1) == (budget == 2**30)


def test_chunks_of_several_latents() -> None:
    several = Several()
    x = weights(5, 4)
    z, _ = several.program.sample(x, 11)
    chunked = in_chunks(several.program, (x,), z, LogJoint.of_sites, 5000)
    torch.testing.assert_close(chunked, several.log_joint(x, z), rtol=1e-5, atol=1e-5)


def test_chunks_keep_no_graph() -> None:
    networks = Networks(nn.Linear(2, 3), nn.Linear(3, 2), 2)
    assert not in_chunks(
        networks.program, (weights(4, 3),), {"z": weights(3, 4, 2)}, LogJoint.of_sites, 2**20
    ).requires_grad


class Conv(nn.Module):
    """Cannot take a dimension of particles."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(2, 3), nn.Conv1d(1, 16, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        return self.conv(self.linear(z).view(len(z), 1, 3)).mean(1)


@pytest.mark.parametrize("make", [lambda: nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 3)), Conv])
@pytest.mark.parametrize("budget", [20_000, 150_000, 600_000])
def test_no_chunk_takes_more_than_the_budget(make: Any, budget: int) -> None:
    networks = Networks(make(), nn.Linear(3, 2), 2)
    x, z = weights(17, 3), weights(60, 17, 2, seed=1)
    measured = Measured()
    log_joint = in_chunks(networks.program, (x,), {"z": z}, measured, budget)
    torch.testing.assert_close(log_joint, networks.log_joint(x, z), rtol=1e-5, atol=1e-4)
    chunks = measured.bytes[2:]
    assert max(chunks) <= budget
    assert max(chunks) > budget / 4  # and makes use of it
    assert len(chunks) > 1


def test_what_all_particles_share_is_within_the_budget() -> None:
    class WithTable(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return z @ torch.linspace(-1.0, 1.0, 20_000)[:6].reshape(2, 3)  # 80,000 bytes

    networks = Networks(WithTable(), nn.Linear(3, 2), 2)
    measured = Measured()
    in_chunks(networks.program, (weights(17, 3),), {"z": weights(60, 17, 2)}, measured, 120_000)
    assert 80_000 < max(measured.bytes[2:]) <= 120_000
    assert len(measured.bytes[2:]) > 1


def test_chunks_stay_near_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CACHE", 100_000)
    networks = Networks(nn.Linear(2, 3), nn.Linear(3, 2), 2)
    measured = Measured()
    in_chunks(networks.program, (weights(41, 3),), {"z": weights(200, 41, 2)}, measured, 2**30)
    assert max(measured.bytes[2:]) <= 100_000


def test_a_budget_that_holds_nothing_is_refused() -> None:
    curved = Curved()
    with pytest.raises(ValueError, match=r"memory=10 bytes is less than one particle of one row takes \(\d+\): give more"):
        in_chunks(curved.program, (weights(4, 3),), {"z": weights(3, 4, 2)}, LogJoint.of_sites, 10)


def test_one_particle_of_one_row_is_the_smallest_chunk() -> None:
    curved = Curved()
    x, z = weights(3, 3), weights(2, 3, 2)
    with pytest.raises(ValueError, match="takes") as refusal:
        in_chunks(curved.program, (x,), {"z": z}, LogJoint.of_sites, 1)
    least = int(str(refusal.value).split("(")[1].split(")")[0])
    measured = Measured()
    chunked = in_chunks(curved.program, (x,), {"z": z}, measured, least)
    assert measured.shapes[2:] == [(1, 1)] * 6
    torch.testing.assert_close(chunked, curved.log_joint(x, z), rtol=1e-5, atol=1e-5)
