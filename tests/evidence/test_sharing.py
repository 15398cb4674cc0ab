"""Rows judged by two processes: one table, that of one process. Run as a script, this file is one of them."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import jobs
import pytest
import torch
from linear_gaussian import LinearGaussian

import pyro_vae as pv
from pyro_vae.evidence.estimate import TENSORS, TEXTS, Estimate
from pyro_vae.report import evaluation
from pyro_vae.team import ALONE, Team, joined

KNOWN = LinearGaussian(dim=5, latent_dim=2)
ROWS = 1100
"""Three blocks of the cascade's first level, three of a method's."""


def judged(team: Team, **options: Any) -> Estimate:
    """A guide that serves no row well, and a row with NaN and one of the next block that is far out."""
    x = KNOWN.draw(ROWS)
    x[3], x[600] = torch.nan, 30.0
    return pv.log_evidence(KNOWN.program(shift=6.0), x, seed=4, compile=False, team=team, **options)


def apart(first: Estimate, second: Estimate) -> dict[str, float]:
    """The largest difference of each field."""
    found = {name: float((getattr(first, name) - getattr(second, name)).nan_to_num().abs().max()) for name in TENSORS}
    return found | {name: float(getattr(first, name) != getattr(second, name)) for name in TEXTS}


class Interrupts:
    """Presses Ctrl-C once rank 0 has done its first block."""

    def __init__(self, team: Team) -> None:
        self.left = 1 - team.rank

    def __call__(self, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)


def rank(folder: Path) -> None:
    """All that one of two ranks does."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    found: dict[str, Any] = {}
    with joined() as team:
        found["bytes"] = [content.decode() for content in team.gather(b"abc" * team.rank)]
        for name, options in {
            "cascade": {},
            "method": {"method": pv.posterior.laplace, "num_particles": 100},
        }.items():
            together, alone = judged(team, **options), judged(ALONE, **options)
            truth = KNOWN.log_p(KNOWN.draw(ROWS))
            truth[600] = KNOWN.log_p(torch.full((1, 5), 30.0))[0]
            good = together.reliable
            away = (
                abs(float((together.log_p - truth)[good].mean()))
                / together.take(good.nonzero().flatten()).mean_standard_error
            )
            found[name] = {**apart(together, alone), "away": float(away), "reliable": int(together.reliable.sum())}
        stopped = judged(team, method=pv.posterior.from_guide, num_particles=16, on_block=Interrupts(team))
        found["stopped"] = torch.isfinite(stopped.log_p).tolist()
        x = KNOWN.draw(60)
        asked = evaluation.Asked(bounds=10, seed=3)
        shared = evaluation.run(KNOWN.program(inflate=1.2), x, asked, folder / "two", team=team)
        found["evaluated"] = [str(shared.estimate), list(shared.figures), shared.box is not None]
        if team.leads:
            alone_found = evaluation.run(KNOWN.program(inflate=1.2), x, asked, folder / "one")
            found["alone"] = [str(alone_found.estimate), list(alone_found.figures), alone_found.box is not None]
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    jobs.run(__file__, folder)
    first, second = (json.loads((folder / f"{me}.json").read_text()) for me in range(2))
    return folder, first, second


Both = tuple[Path, dict[str, Any], dict[str, Any]]


@pytest.mark.parametrize("way", ["cascade", "method"])
def test_two_ranks_find_the_table_of_one(way: str, both: Both) -> None:
    assert both[1][way] == both[2][way]
    found = both[1][way]
    assert max(found[name] for name in (*TENSORS, *TEXTS)) < 1e-9
    assert found["away"] < 5.0  # both are right, not alike alone
    assert found["reliable"] > 1090


def test_bytes_of_any_length_go_around(both: Both) -> None:
    assert [found["bytes"] for found in both[1:]] == [["", "abc"]] * 2


def test_ctrl_c_on_one_rank_keeps_what_both_have_finished(both: Both) -> None:
    """Of three blocks rank 0 had done the first, and rank 1 did the second."""
    first, second = both[1]["stopped"], both[2]["stopped"]
    assert first == second
    assert first == [i != 3 and i < 734 for i in range(ROWS)]


def test_rank_0_writes_and_draws_what_one_process_does(both: Both) -> None:
    folder, first, second = both
    assert first["evaluated"] == first["alone"]
    assert second["evaluated"] == [first["alone"][0], [], False]
    files = sorted(path.name for path in (folder / "one").iterdir())
    assert sorted(path.name for path in (folder / "two").iterdir()) == files
    for name in files:
        assert (folder / "two" / name).read_bytes() == (folder / "one" / name).read_bytes()


if __name__ == "__main__":
    rank(Path(sys.argv[1]))
