"""Adam in a graph against `torch.optim`, step by step, and which optimisers it serves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from learning.twins import small, stepping
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from pyro_vae.graph import Graph
from pyro_vae.learning.adam import GraphAdam, clipped, serves

SHAPES = [(3, 2), (4,), ()]


def leaves() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def gradients(step: int) -> list[Tensor]:
    """Small and large ones, of both signs, and in step 3 nothing but zeros."""
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) * 10.0 ** (step % 4 - 2) * (step != 3) for shape in SHAPES]


MAKERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "Adam": lambda p: Adam(p, lr=0.1),
    "Adam, fused": lambda p: Adam(p, lr=0.1, fused=True),
    "Adam, decay, no foreach": lambda p: Adam(p, lr=0.1, weight_decay=0.3, foreach=False),
    "Adam, decoupled": lambda p: Adam(p, lr=0.1, weight_decay=0.3, decoupled_weight_decay=True),
    "AdamW": lambda p: AdamW(p, lr=0.1, weight_decay=0.3, betas=(0.7, 0.9), eps=1e-3),
    "groups": lambda p: AdamW(
        [{"params": p[1:2], "lr": 0.3, "weight_decay": 0.0}, {"params": [p[0], p[2]], "betas": (0.5, 0.6)}], lr=0.01
    ),
}


class Both:
    """The same leaves under `torch.optim` and under a graph of `GraphAdam`, both after one step of the former."""

    def __init__(self, make: Callable[[list[nn.Parameter]], Optimizer], clip_norm: float | None = None) -> None:
        self.theirs, self.ours, self.clip_norm = leaves(), leaves(), clip_norm
        self.optimiser, self.mine = make(self.theirs), make(self.ours)
        for optimiser, own in ((self.optimiser, self.theirs), (self.mine, self.ours)):
            self.eagerly(optimiser, own, 0)
        assert serves(self.mine, self.ours)
        self.adam = GraphAdam(self.mine, self.ours)
        examples = [torch.tensor(self.adam.numbers(), dtype=torch.float64), torch.tensor(True), *gradients(1)]
        self.graph = Graph(self.update, examples, compiled=False)

    def update(self, numbers: Tensor, healthy: Tensor, *given: Tensor) -> list[Tensor]:
        with torch.no_grad():
            self.adam.update(given, numbers, healthy, self.clip_norm)
        return [numbers.sum()]

    def eagerly(self, optimiser: Optimizer, own: list[nn.Parameter], step: int) -> None:
        for leaf, gradient in zip(own, gradients(step), strict=True):
            leaf.grad = gradient.clone()
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(own, self.clip_norm)
        optimiser.step()

    def in_graph(self, step: int, healthy: bool = True) -> None:
        self.graph(torch.tensor(self.adam.numbers(), dtype=torch.float64), torch.tensor(healthy), *gradients(step))
        self.adam.count()

    def compare(self) -> None:
        for theirs, ours in zip(self.theirs, self.ours, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)
            states = self.optimiser.state[theirs], self.mine.state[ours]
            assert states[0].keys() == states[1].keys()
            for name, value in states[0].items():
                atol = 1e-6 if name == "exp_avg" else 1e-12  # gradients of both signs, up to 10, cancel in it
                torch.testing.assert_close(states[1][name], value, rtol=1e-5, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def scheduled(optimiser: Optimizer, step: int) -> None:
    for group in optimiser.param_groups:
        group["lr"] *= 0.9
        group["betas"] = (0.5 + 0.02 * step, group["betas"][1])


@pytest.mark.parametrize("clip_norm", [None, 0.05])
@pytest.mark.parametrize("name", MAKERS)
def test_twenty_steps_are_those_of_torch(name: str, clip_norm: float | None) -> None:
    both = Both(MAKERS[name], clip_norm)
    for step in range(1, 21):
        both.eagerly(both.optimiser, both.theirs, step)
        both.in_graph(step)
        both.compare()
        scheduled(both.optimiser, step)
        scheduled(both.mine, step)


@pytest.mark.parametrize("name", MAKERS)
def test_from_one_to_the_other_and_back(name: str) -> None:
    both = Both(MAKERS[name])
    for step in range(1, 13):
        both.eagerly(both.optimiser, both.theirs, step)
        if step in (4, 5, 9):
            both.eagerly(both.mine, both.ours, step)
            both.adam.refresh()
        else:
            both.in_graph(step)
        both.compare()


def test_a_loaded_state_is_found_after_a_refresh() -> None:
    both = Both(MAKERS["AdamW"])
    both.mine.load_state_dict(both.mine.state_dict())  # other tensors
    both.adam.refresh()
    both.graph = Graph(
        both.update, [torch.tensor(both.adam.numbers()).double(), torch.tensor(True), *gradients(1)], compiled=False
    )
    for step in (1, 2):
        both.eagerly(both.optimiser, both.theirs, step)
        both.in_graph(step)
    both.compare()


def test_nothing_moves_in_a_step_that_is_not_healthy() -> None:
    both = Both(MAKERS["Adam, decay, no foreach"])
    before = [value.clone() for value in both.adam.state]
    both.in_graph(1, healthy=False)
    assert all(map(torch.equal, both.adam.state, before))


def test_clipping_is_torch_s() -> None:
    for step, norm in ((1, 1e-3), (2, 1.0), (2, 100.0)):
        given = leaves()
        for leaf, gradient in zip(given, gradients(step), strict=True):
            leaf.grad = gradient.clone()
        torch.nn.utils.clip_grad_norm_(given, norm)
        for mine, leaf in zip(clipped(gradients(step), norm), given, strict=True):
            torch.testing.assert_close(mine, leaf.grad)


def stepped(
    make: Callable[[list[nn.Parameter]], Optimizer], which: slice = slice(None)
) -> tuple[Optimizer, list[nn.Parameter]]:
    own = leaves()
    optimiser = make(own)
    for leaf in own[which]:
        leaf.grad = torch.ones_like(leaf)
    optimiser.step()
    return optimiser, own


class Other(Adam):
    """Somebody's own."""


@pytest.mark.parametrize(
    "make",
    [
        lambda p: Adam(p, amsgrad=True),
        lambda p: AdamW(p, maximize=True),
        lambda p: Adam([{"params": p[:2]}, {"params": p[2:], "maximize": True}]),
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.RAdam(p),
        lambda p: torch.optim.NAdam(p),
        Other,
    ],
    ids=["amsgrad", "maximize", "maximize in a group", "SGD", "RAdam", "NAdam", "a subclass"],
)
def test_what_is_not_served(make: Any) -> None:
    assert not serves(*stepped(make))


def test_parameters_of_one_age_without_hooks_are_served() -> None:
    assert serves(*stepped(Adam))
    optimiser, own = stepped(Adam)
    optimiser.register_step_post_hook(lambda *_: None)
    assert not serves(optimiser, own)
    optimiser, own = stepped(Adam, slice(1, None))
    assert not serves(optimiser, own)  # the first has no state yet
    assert serves(optimiser, own[1:])
    own[0].grad = torch.ones(SHAPES[0])
    optimiser.step()
    assert not serves(optimiser, own)  # and is now younger
    assert not serves(Adam(leaves()), leaves())


def test_asking_leaves_the_state_alone() -> None:
    optimiser, own = stepped(Adam, slice(1, None))
    serves(optimiser, own)
    assert len(optimiser.state) == 2


def test_complex_parameters_are_not_served() -> None:
    leaf = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    optimiser = Adam([leaf])
    leaf.grad = torch.ones_like(leaf)
    optimiser.step()
    assert not serves(optimiser, [leaf])


def test_a_weight_decay_that_comes_in_later_makes_it_stale() -> None:
    optimiser, own = stepped(Adam)
    adam = GraphAdam(optimiser, own)
    assert not adam.stale
    optimiser.param_groups[0]["weight_decay"] = 0.1
    assert adam.stale


def test_schedules_see_that_steps_are_taken() -> None:
    """A run that goes on from a checkpoint in its first epoch takes no step of `torch.optim` before its schedule's."""
    _, update = stepping(*small(), optimiser=lambda p: Adam(p))
    fresh = Adam(update.leaves)
    fresh.load_state_dict(update.optimiser.state_dict())
    schedule = torch.optim.lr_scheduler.StepLR(fresh, 1)
    GraphAdam(fresh, update.leaves).count()
    schedule.step()
    assert fresh.param_groups[0]["lr"] == pytest.approx(1e-4)
