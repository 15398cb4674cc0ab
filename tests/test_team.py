"""What a team is without a launcher, and how work is divided; `learning/test_ranks.py` and others run real ranks."""

from __future__ import annotations

import itertools
import signal
from typing import Any

import pytest
import torch

from pyro_vae.launch import Place
from pyro_vae.learning import preparation
from pyro_vae.team import ALONE, Lost, Team, flat, held, joined, standing


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 4, 7, 30])
def test_parts_and_turns_divide_everything_evenly(count: int, size: int) -> None:
    teams = [Team(rank, size) for rank in range(size)]
    things = list(range(count))
    parts = [things[team.part(count)] for team in teams]
    assert list(itertools.chain(*parts)) == things
    dealt = [list(team.turns(count)) for team in teams]
    assert sorted(itertools.chain(*dealt)) == things
    for shares in (parts, dealt):
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert len({team.key for team in teams}) == size
    assert [team.leads for team in teams] == [True] + [False] * (size - 1)


def test_one_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with joined() as team:
        assert team is ALONE
    assert standing() == (0, 1, 0)
    values = torch.tensor([1.5, -2.0])
    assert team.add(values) is values
    assert team.same(values).tolist() == [1.5, -2.0]
    assert team.gather(b"abc") == [b"abc"]
    assert team.key == ()
    team.require_same({"lr": 1.0}, "so")
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("said", "ended"),
    [
        ("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:5", True),
        ("Read error [127.0.0.1]:5: Connection reset by peer", True),
        ("[/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1000ms for recv operation to complete", True),
        ("NCCL error: remote process exited or there was a network error", True),
        ("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the manual", False),
        ("Invalid scalar type", False),
    ],
)
def test_only_a_lost_connection_is_told_as_the_end_of_another_process(
    said: str, ended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(torch.distributed, "all_reduce", fails)
    with pytest.raises(Lost) as told:
        Team(0, 2).add(torch.ones(1))
    assert str(told.value).startswith("Another of the 2 processes of this job has ended") == ended
    if not ended:
        first = said.split("\n")[0].rstrip(".")
        assert str(told.value) == f"The exchange with the other processes failed ({first})."


def test_ranks_without_a_number_on_their_machine_share_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program's own process group, as `mp.spawn` and Slurm make it, does not say which GPU is whose."""
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device in ("cuda", "auto"):
        with pytest.raises(ValueError, match=r"rank 1 of 2: set LOCAL_RANK .* device='cuda:1'"):
            preparation.place_of(device)
    assert preparation.place_of("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert standing() == Place(1, 2, 1)
    assert preparation._own_gpu(standing()) == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "first")
    with pytest.raises(ValueError, match="LOCAL_RANK=first"):
        standing()


def test_flat_keeps_the_widest_dtype() -> None:
    one, two = torch.ones(2, 3), torch.full((2,), 1 / 3, dtype=torch.float64)
    assert flat([one, two]).tolist() == [1.0] * 6 + [1 / 3] * 2
    assert flat([one.half()]).dtype is torch.float32


def test_ctrl_c_waits_for_the_end_of_what_must_not_be_left() -> None:
    done = []

    def work() -> None:
        with held():
            signal.raise_signal(signal.SIGINT)
            done.append("the rest")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["the rest"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
