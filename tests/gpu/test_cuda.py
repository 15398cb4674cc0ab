"""On a CUDA device: the captured step is the eager one, is a CUDA graph, and never makes the host wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from learning.twins import columns, same, small, stepping
from torch import nn

import pyro_vae as pv
from pyro_vae.learning import capture
from pyro_vae.learning.capture import CapturedStep
from pyro_vae.rows import Rows

pytestmark = pytest.mark.gpu
o = pv.objectives


def on_device(make: Callable[[], tuple[Any, Rows]] = small) -> tuple[Any, Rows]:
    program, rows = make()
    return program.to("cuda"), tuple(part.to("cuda") for part in rows)


def fused(leaves: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(leaves, lr=0.01, eps=1e-2, fused=True)


def with_noise_and_statistics() -> tuple[pv.VAE, Rows]:
    torch.manual_seed(1)
    return small(body=nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 7), nn.Tanh(), nn.Dropout(0.3)), features=7)


OBJECTIVES: dict[str, Callable[[], Any]] = {
    "warm-up": lambda: o.ELBO(beta=o.warm_up(20)),
    "IWAE": lambda: o.IWAE(4),
    "DReG": lambda: o.DReG(4),
    "score": lambda: o.ScoreFunction(3),
}
OPTIMISERS: dict[str, Any] = {
    "Adam in the graph": fused,
    "SGD outside": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_steps_are_the_eager_ones(name: str, compiled: bool) -> None:
    same(on_device, OBJECTIVES[name], tolerance=1e-4, compiled=compiled, optimiser=fused)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_statistics_dropout_and_both_ways_of_an_update(name: str) -> None:
    make = lambda: on_device(with_noise_and_statistics)  # noqa: E731
    same(make, tolerance=1e-4, compiled=True, optimiser=OPTIMISERS[name], clip_norm=1.0)


@pytest.fixture
def skips() -> Iterator[Callable[[], int]]:
    """How many CUDA graphs TorchInductor has refused to make since the test began."""
    from torch._dynamo.utils import counters

    counters["inductor"].clear()
    yield lambda: int(counters["inductor"]["cudagraph_skips"])
    counters["inductor"].clear()


@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_step_is_one_launch_and_the_host_does_not_wait(name: str, skips: Callable[[], int]) -> None:
    program, rows = on_device()
    stepper, update = stepping(program, rows, optimiser=OPTIMISERS[name])
    step = CapturedStep(stepper, update, rows, 1)
    assert step.interval == capture.INTERVAL
    for number in range(1, 5):
        step.take(rows, number)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(5, 55):
            step.take(rows, number)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    spent = step.read()
    assert (spent.steps, spent.failed) == (54, False)
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
        for number in range(10):
            step.take(rows, number)
        torch.cuda.synchronize()
    assert sum(event.count for event in profile.key_averages() if event.key == "cudaGraphLaunch") == 10
    assert skips() == 0


def test_a_fit_compiled_and_not(skips: Callable[[], int]) -> None:
    histories = []
    for mode in (False, True):
        vae = small()[0]
        history = pv.fit(vae, columns(1000), columns(100), epochs=3, batch_size=64, compile=mode, device="cuda")
        assert {leaf.device.type for leaf in vae.parameters()} == {"cuda"}
        histories.append(history)
    assert histories[1].compiled_from == 1
    assert histories[1].loss == pytest.approx(histories[0].loss, rel=1e-4)
    assert histories[1].valid_elbo == pytest.approx(histories[0].valid_elbo, rel=1e-3)
    assert skips() == 0


def test_a_loss_that_is_not_finite_is_told_at_its_batch() -> None:
    """The host looks after fifty steps, the short last batch is taken eagerly, and nothing has moved in between."""
    x = columns(150)
    x[13] = 1e25
    told = []
    for mode in (False, True):
        with pytest.raises(FloatingPointError) as caught:
            pv.fit(small()[0], x, epochs=3, batch_size=4, compile=mode, device="cuda", seed=2)
        told.append(str(caught.value).split(":")[0])
    assert told[0] == told[1]


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_coarse_arithmetic_is_captured_and_its_price_is_told(precision: str) -> None:
    history = pv.fit(small()[0], columns(1000), epochs=3, batch_size=64, compile=True, device="cuda", precision=precision)
    assert history.why_eager == ""
    assert history.compiled_from == 1
    assert history.precision_gap is not None
    assert abs(history.precision_gap) < 0.5


@pytest.mark.parametrize("method", [pv.posterior.from_guide, pv.posterior.laplace])
def test_evidence_is_that_of_the_processor(method: Any) -> None:
    vae, x = small()[0], columns(50)
    pv.fit(vae, columns(1000), epochs=5, device="cpu")
    here = pv.log_evidence(vae, x, method=method, num_particles=2000, seed=1)
    there = pv.log_evidence(vae.to("cuda"), x.to("cuda"), method=method, num_particles=2000, seed=1)
    error = (here.standard_error**2 + there.standard_error.cpu() ** 2).sqrt()
    assert ((there.log_p.cpu() - here.log_p).abs() < 5.0 * error + 1e-3).all()
