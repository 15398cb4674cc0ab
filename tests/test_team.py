"""What a team is without a launcher, and how work is divided; `learning/test_ranks.py` and others run real ranks."""

from __future__ import annotations

import itertools
import signal

import pytest
import torch

from pyro_vae.team import ALONE, Team, flat, held, joined, standing


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
