"""Several processes that fit together. Run as a script, this file is one of them, and writes what it found."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jobs
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.learning.batches import Batches
from pyro_vae.learning.history import History
from pyro_vae.learning.state import State
from pyro_vae.learning.steps import Stepper
from pyro_vae.learning.updates import Update
from pyro_vae.learning.validation import true_elbo
from pyro_vae.team import ALONE, Team, joined

COUNTS = [8, 7, 1]
"""Rows of a batch over two ranks: halves, uneven parts, and one rank without any."""


def given_noise() -> tuple[pv.Program, Callable[[Tensor, Tensor], Tensor], list[nn.Parameter]]:
    """A program whose noise is part of x = (rows, eps), its loss of a mean row written out, its parameters."""
    torch.manual_seed(5)
    encoder, decoder, unused = nn.Linear(6, 4), nn.Linear(2, 6), nn.Linear(2, 2)

    def parts(x: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_sd = encoder(x).chunk(2, -1)
        z = mean + log_sd.exp() * eps
        return z, dist.Normal(mean, log_sd.exp()).log_prob(z).sum(-1)

    def model(x: Tensor, eps: Tensor) -> None:
        pyro.module("decoder", decoder)
        pyro.module("unused", unused)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.5).to_event(1), obs=x)

    def guide(x: Tensor, eps: Tensor) -> None:
        pyro.module("encoder", encoder)
        z, log_q = parts(x, eps)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(z, log_density=log_q, event_dim=1))

    def loss(x: Tensor, eps: Tensor) -> Tensor:
        z, log_q = parts(x, eps)
        log_p = dist.Normal(decoder(z), 0.5).log_prob(x).sum(-1) + dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
        return (log_q - log_p).mean()

    return pv.Program(model, guide), loss, [*encoder.parameters(), *decoder.parameters(), *unused.parameters()]


def gradients(team: Team) -> list[dict[str, float]]:
    """How far loss and gradients of the team are from those of the whole batch by autograd, relative."""
    found = []
    for count in COUNTS:
        program, loss, leaves = given_noise()
        generator = torch.Generator().manual_seed(count)
        x, eps = torch.randn(count, 6, generator=generator) * 2.0, torch.randn(count, 2, generator=generator)
        whole = loss(x, eps)
        expected = torch.autograd.grad(whole, leaves, allow_unused=True)
        objective = pv.objectives.ELBO(kl=pv.objectives.sampled_kl)
        stepper = Stepper(program, objective, {str(i): leaf for i, leaf in enumerate(leaves)}, (x, eps))
        update = Update(leaves, torch.optim.SGD(leaves, lr=0.1), team=team)
        mine = team.part(count)
        told = stepper.gradients((x[mine], eps[mine]), 0)
        value, elbo, rows = update.over_ranks(*told, len(x[mine]))
        away = [float((leaf.grad - g).norm() / g.norm()) for leaf, g in zip(leaves, expected, strict=True) if g is not None]
        found.append(
            {
                "gradient": max(away),
                "loss": abs(value - float(whole.detach())) / abs(float(whole.detach())),
                "elbo": abs(elbo + float(whole.detach())) / abs(float(whole.detach())),
                "rows": rows,
                "none": sum(leaf.grad is None for leaf in leaves),
            }
        )
    return found


def vae(*, norm: bool = False) -> pv.VAE:
    """Weights that differ from rank to rank, as they do where nobody seeds them."""
    torch.manual_seed(int(os.environ.get("RANK", "0")))
    body = nn.Sequential(*[nn.BatchNorm1d(6)] * norm, nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2))
    return pv.VAE(
        prior=pv.priors.StandardNormal(2),
        likelihood=pv.likelihoods.Normal(pv.nets.MLP(2, 6, hidden=(8,)), pv.likelihoods.Learned()),
        guide=pv.guides.DiagonalNormal(body, latent_dim=2, features=8),
    )


def rows(count: int = 201) -> tuple[Tensor, Tensor]:
    x = torch.rand(count + 50, 6, generator=torch.Generator().manual_seed(1))
    return x[:count], x[count:]


class Raises:
    """A transform that raises, or sends this process a signal, in its n-th call on rank 1."""

    def __init__(self, at: int, signal_number: int | None = None) -> None:
        self.left = at if os.environ["RANK"] == "1" else -1
        self.number = signal_number

    def __repr__(self) -> str:
        return "Raises"

    def __call__(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left == 0:
            if self.number is None:
                raise LookupError("a broken transform")
            signal.raise_signal(self.number)
        return x


class Draws:
    """A transform that keeps what the random numbers of its rows would be."""

    def __init__(self) -> None:
        self.drawn: list[float] = []

    def __repr__(self) -> str:
        return "Draws"

    def __call__(self, x: Tensor) -> Tensor:
        self.drawn.append(torch.rand(()).item())
        return x


def open_threads() -> int:
    """Threads of process groups that are still there."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return sum("gloo" in name for name in names)


def fitted(*, norm: bool = False, count: int = 201, program: pv.VAE | None = None, **changes: Any) -> dict[str, Any]:
    """A digest of what a fit came to, or how it ended."""
    program = program or vae(norm=norm)
    before = torch.get_rng_state()
    options = {"epochs": 3, "batch_size": 40, "seed": 3, "clip_norm": 1.0, "compile": False, **changes}
    try:
        history = pv.fit(program, *rows(count), **options)
    except (Exception, SystemExit) as error:
        return {"error": type(error).__name__, "told": str(error)}
    digest = hashlib.sha256(b"".join(value.numpy().tobytes() for value in program.state_dict().values())).hexdigest()
    left = torch.equal(before, torch.get_rng_state()) and not torch.distributed.is_initialized()
    return {"digest": digest, "history": history.to_dict(), "left alone": left}


def levelled(team: Team) -> list[list[float]]:
    """Buffers after `State.level`: of rank r a mean r + 1, a constant, a mask and a count 10 (r + 1)."""
    module = nn.Module()
    module.register_buffer("mean", torch.tensor([float(team.rank + 1)]))
    module.register_buffer("constant", torch.tensor([0.1]))
    module.register_buffer("mask", torch.tensor([0.0, -torch.inf, torch.inf]))
    module.register_buffer("count", torch.tensor([10 * (team.rank + 1)]))
    program = pv.Program(lambda x: module.mean, lambda x: module.mean)
    program.modules_found = lambda: {"m": module}  # type: ignore[method-assign]
    State(program, {}, None, None).level(team)  # type: ignore[arg-type]
    return [buffer.tolist() for buffer in module.buffers()]


def rank(folder: Path) -> None:
    """All that one of two ranks does."""
    torch.set_num_threads(1)
    me, found = int(os.environ["RANK"]), {}
    if me == 0:  # what is left of an earlier group, which the other rank comes upon first, is closed on it
        port = int(os.environ["MASTER_PORT"])
        old = torch.distributed.TCPStore("127.0.0.1", port, 2, is_master=True, wait_for_workers=False)
        time.sleep(2.0)
        del old
    with joined() as team:
        found["gradients"] = gradients(team)
        found["level"] = levelled(team)
        valid = Batches(rows()[1], "valid", 7, torch.device("cpu"), pv.data.binarise)
        program = vae()
        State(program, dict(program.named_parameters()), None, None).begin(team)  # type: ignore[arg-type]
        found["validation"] = [true_elbo(program, valid, 0, who) for who in (team, ALONE)]
    found["threads"] = open_threads()
    draws = Draws()
    fitted(transform=draws, epochs=1)
    found["drawn"] = draws.drawn
    found["eager"] = fitted()
    found["compiled"] = fitted(compile=True)
    found["norm"] = fitted(norm=True, count=210, patience=2)
    found["differ"] = fitted(lr=1e-3 * (1 + me))
    found["few"] = fitted(batch_size=1)
    found["vote"] = fitted(callbacks=[lambda epoch, _: me == 1 and epoch == 2])
    found["transform"] = fitted(transform=Raises(9), checkpoint=folder / "transform")
    found["stopped"] = fitted(transform=Raises(9, signal.SIGTERM), checkpoint=folder / "stopped")
    found["resumed"] = fitted(transform=Raises(-1), checkpoint=folder / "stopped")
    found["through"] = fitted(transform=Raises(-1))
    found["broken"] = fitted(lr=1e25)
    with contextlib.suppress(RuntimeError), joined() as team:
        if me == 1:
            raise RuntimeError("this rank leaves")
        try:
            team.add(torch.ones(1))
        except ConnectionError as error:
            found["lost"] = str(error)
    # A group that the user has made stays.
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(folder / "store"), 2), rank=me, world_size=2
    )
    found["user's group"] = fitted(), torch.distributed.is_initialized()
    torch.distributed.destroy_process_group()
    (folder / f"{me}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    jobs.run(__file__, folder)
    first, second = (json.loads((folder / f"{me}.json").read_text()) for me in range(2))
    return first, second


Both = tuple[dict[str, Any], dict[str, Any]]


@pytest.mark.parametrize("i", range(len(COUNTS)), ids=map(str, COUNTS))
def test_parts_of_a_batch_make_the_gradient_of_the_whole(i: int, both: Both) -> None:
    for found in both:
        part = found["gradients"][i]
        assert part["gradient"] < 1e-6
        assert part["loss"] < 1e-6
        assert part["elbo"] < 1e-6
        assert part["rows"] == COUNTS[i]
        assert part["none"] == 2  # what nobody uses has no gradient, rather than zeros that Adam would count


@pytest.mark.parametrize("kind", ["eager", "compiled", "norm"])
def test_both_ranks_end_with_the_same_parameters_and_history(kind: str, both: Both) -> None:
    first, second = (found[kind] for found in both)
    assert first == second
    assert first["left alone"]
    assert len(first["history"]["elbo"]) == 3
    assert first["history"]["elbo"][-1] > first["history"]["elbo"][0]
    assert (first["history"]["compiled_from"] is not None) == (kind == "compiled"), first["history"]["why_eager"]


def test_the_compiled_step_does_what_the_eager_one_does(both: Both) -> None:
    eager, compiled = (both[0][kind]["history"] for kind in ("eager", "compiled"))
    for name in ("loss", "elbo", "valid_elbo"):
        assert compiled[name] == pytest.approx(eager[name], rel=1e-4)


def test_each_rank_has_noise_of_its_own(both: Both) -> None:
    """The six steps of an epoch, and the look at the rows before anything is seeded; not what judges."""
    assert len(set(both[1]["drawn"]) - set(both[0]["drawn"])) == 7


def test_nothing_stays_connected(both: Both) -> None:
    """Even where the first optimiser was made in the meantime: torch then keeps the group that it finds as a default."""
    assert [found["threads"] for found in both] == [0, 0]


def test_a_rank_alone_draws_what_it_draws_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    alone = fitted()
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    launched = fitted()
    del alone["history"]["seconds"], launched["history"]["seconds"]
    assert alone == launched


def test_buffers_become_the_mean_and_constants_stay(both: Both) -> None:
    for found in both:
        assert found["level"] == [[1.5], [float(torch.tensor(0.1))], [0.0, -math.inf, math.inf], [10]]


def test_the_validation_elbo_is_that_of_one_process(both: Both) -> None:
    (team, alone), other = both[0]["validation"], both[1]["validation"]
    assert team == pytest.approx(alone, rel=1e-12)
    assert other == [team, alone]


def test_ranks_with_other_arguments_are_refused(both: Both) -> None:
    for found in both:
        assert found["differ"]["error"] == "ValueError"
        assert "differ in lr:" in found["differ"]["told"]
        assert "fewer than the 2 ranks" in found["few"]["told"]


def test_one_vote_stops_all(both: Both) -> None:
    for found in both:
        history = History(**found["vote"]["history"])
        assert history.stopped == "stopped by a callback"
        assert len(history) == 2


def test_an_error_on_one_rank_is_told_to_the_other(both: Both) -> None:
    assert [found["transform"]["error"] for found in both] == ["FloatingPointError", "LookupError"]
    assert "in the rows of another rank" in both[0]["transform"]["told"]


def test_a_loss_that_is_not_finite_ends_both_at_the_same_batch(both: Both) -> None:
    wheres = [found["broken"]["told"].split(":")[0] for found in both]
    assert [found["broken"]["error"] for found in both] == ["FloatingPointError"] * 2
    assert wheres[0] == wheres[1]


def test_a_signal_to_one_rank_stops_both_and_the_run_goes_on_from_there(both: Both) -> None:
    for found in both:
        assert found["stopped"] == {"error": "SystemExit", "told": "143"}
        resumed, through = found["resumed"], found["through"]
        del resumed["history"]["seconds"], through["history"]["seconds"]
        assert resumed == through
    assert both[0]["resumed"] == both[1]["resumed"]


def test_a_rank_that_leaves_is_missed(both: Both) -> None:
    assert "Another of the 2 processes of this job has ended" in both[0]["lost"]


def test_a_process_group_of_the_users_stays(both: Both) -> None:
    for found in both:
        result, initialised = found["user's group"]
        assert initialised
        assert result["digest"] == found["eager"]["digest"]


if __name__ == "__main__":
    rank(Path(sys.argv[1]))
