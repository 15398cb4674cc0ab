"""Checkpoints: optimisers and schedules come back exactly, settings are compared by texts without addresses."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyro.infer
import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from pyro_vae import data, files
from pyro_vae.learning import checkpoint
from pyro_vae.learning.objectives import ELBO, cyclic, warm_up

OPTIMISERS: dict[str, Callable[[Iterable[Tensor]], Optimizer]] = {
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.8, 0.99)),
    "fused Adam": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "AMSGrad": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True, weight_decay=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1, centered=True, momentum=0.5),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.1),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.1),
}
SCHEDULES: dict[str, Callable[[Optimizer], LRScheduler]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 6, 9], gamma=0.5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 12),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 1.0 / (1 + epoch)),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.3, total_steps=20, cycle_momentum=False),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.MultiStepLR(o, [1, 5])], milestones=[4]
    ),
}


def descend(parameters: list[Tensor], optimiser: Optimizer, schedule: LRScheduler | None, steps: range) -> list[float]:
    """A few noisy steps; the noise depends on the step alone."""
    rates = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = parameter.detach() + torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        rates.append(float(optimiser.param_groups[0]["lr"]))
        optimiser.step()
        if schedule is not None:
            schedule.step()
    return rates


def fresh() -> list[Tensor]:
    return [torch.ones(3, 2, requires_grad=True), torch.ones((), dtype=torch.float64, requires_grad=True)]


@pytest.mark.parametrize(
    ("optimiser", "schedule"), [(name, None) for name in OPTIMISERS] + [("Adam", name) for name in SCHEDULES]
)
def test_going_on_from_a_file_is_the_same_to_the_bit(optimiser: str, schedule: str | None, tmp_path: Path) -> None:
    def made() -> tuple[list[Tensor], Optimizer, LRScheduler | None]:
        parameters = fresh()
        chosen = OPTIMISERS[optimiser](parameters)
        return parameters, chosen, None if schedule is None else SCHEDULES[schedule](chosen)

    whole = made()
    rates = descend(*whole, range(12))
    begun = made()
    begun_rates = descend(*begun, range(5))
    named = {str(i): parameter for i, parameter in enumerate(begun[0])}
    checkpoint.write(tmp_path, {}, {}, {"parameter": named}, *begun[1:])
    found = checkpoint.read(tmp_path)
    assert found is not None
    header, groups = found
    resumed = made()
    with torch.no_grad():
        for i, parameter in enumerate(resumed[0]):
            parameter.copy_(groups["parameter"][str(i)])
    checkpoint.restore_optimiser(resumed[1], resumed[2], header, groups["optimiser"])
    assert begun_rates + descend(*resumed, range(5, 12)) == rates
    for mine, theirs in zip(resumed[0], whole[0], strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(resumed[1].state.values(), whole[1].state.values(), strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            same = torch.equal(mine[key], value) if isinstance(value, Tensor) else mine[key] == value
            assert same, key


def test_groups_settings_and_state_come_back(tmp_path: Path) -> None:
    parameters = fresh()
    optimiser = OPTIMISERS["Adam"](parameters)
    groups = {
        "parameter": {"a/b": parameters[0]},
        "buffer": {"mean": torch.arange(3)},
        "best": {"buffer/x.y": torch.zeros(1)},
    }
    checkpoint.write(
        tmp_path / "new", {"lr": [0.1]}, {"best": -float("inf"), "elbo": [0.1, 1 / 3]}, groups, optimiser, None
    )
    found = checkpoint.read(tmp_path / "new")
    assert found is not None
    header, tensors = found
    assert header["settings"] == {"lr": [0.1]}
    assert header["state"] == {"best": -float("inf"), "elbo": [0.1, 1 / 3]}
    assert tensors["buffer"]["mean"].tolist() == [0, 1, 2]
    assert torch.equal(tensors["parameter"]["a/b"], parameters[0])
    assert tensors["best"].keys() == {"buffer/x.y"}


def test_no_checkpoint_yet(tmp_path: Path) -> None:
    assert checkpoint.read(tmp_path) is None
    assert checkpoint.read(tmp_path / "absent") is None


def test_a_strange_file_is_refused(tmp_path: Path) -> None:
    files.write(tmp_path / checkpoint.NAME, "vae", {}, {})
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors holds a vae, not a checkpoint"):
        checkpoint.read(tmp_path)


def test_what_json_cannot_hold_leaves_the_file(tmp_path: Path) -> None:
    optimiser = OPTIMISERS["SGD"](fresh())
    checkpoint.write(tmp_path, {"a": 1}, {}, {}, optimiser, None)
    before = (tmp_path / checkpoint.NAME).read_bytes()
    optimiser.param_groups[0]["strange"] = object()
    with pytest.raises(TypeError):
        checkpoint.write(tmp_path, {"a": 2}, {}, {}, optimiser, None)
    assert (tmp_path / checkpoint.NAME).read_bytes() == before


def test_leftovers_of_a_killed_write_are_removed(tmp_path: Path) -> None:
    for name in (f".{checkpoint.NAME}.abc123.tmp", ".other.tmp", checkpoint.NAME, "mine.tmp"):
        (tmp_path / name).write_text("")
    checkpoint.tidy(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".other.tmp", checkpoint.NAME, "mine.tmp"}


def test_other_settings_are_named_with_both_values() -> None:
    then, now = {"lr": [0.1], "seed": 3, "patience": None}, {"lr": [0.2], "seed": 3, "patience": 4}
    checkpoint.require_same(Path("runs/a"), then, dict(then))
    with pytest.raises(
        ValueError, match=r"runs/a.*lr was \[0\.1\] and is \[0\.2\]; patience was None and is 4\. Use"
    ) as told:
        checkpoint.require_same(Path("runs/a"), then, now)
    assert "seed" not in str(told.value)


def test_first_not_finite_names_the_first_broken_tensor() -> None:
    fine = {"a": torch.ones(2), "count": torch.tensor([2**40])}
    assert checkpoint.first_not_finite(fine) is None
    broken = {"b": torch.tensor([1.0, float("inf")]), "c": torch.tensor(float("nan"))}
    assert checkpoint.first_not_finite(fine | broken) == "b"


class Plain:
    """An object with the default repr, which shows an address."""

    def __init__(self, levels: int, function: Any = torch.sigmoid) -> None:
        self.levels, self.function, self._private = levels, function, object()
        self.tensor = torch.ones(2)
        self.steps_taken = levels * 100

    def method(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("thing", "text"),
    [
        (None, "None"),
        (data.binarise, "binarise"),
        (torch.optim.Adam, "Adam"),
        (functools.partial(data.dequantise, levels=17), "dequantise([{levels: 17}])"),
        (functools.partial(operator.add, 1), "add([1, {}])"),
        (ELBO(beta=warm_up(5)), "ELBO(kl=analytic_kl, beta=warm_up(5, start=0.0, end=1.0), num_particles=1)"),
        (Plain(3, data.binarise), "Plain(function=binarise, levels=3)"),
        (Plain(3).method, "Plain.method"),
        ({"betas": (0.9, 0.99)}, "{betas: [0.9, 0.99]}"),
    ],
)
def test_names(thing: Any, text: str) -> None:
    assert checkpoint.name_of(thing) == text


@pytest.mark.parametrize(
    "make",
    [
        lambda: ELBO(beta=lambda step: step / 10),
        lambda: pyro.infer.Trace_ELBO(),
        lambda: pyro.infer.RenyiELBO(alpha=0.5, num_particles=2),
        lambda: functools.partial(Plain(2).method, Plain(3)),
        lambda: torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU()),
        *(lambda make=make: make(OPTIMISERS["Adam"](fresh())) for make in SCHEDULES.values()),
    ],
)
def test_names_have_no_addresses(make: Callable[[], Any]) -> None:
    kept = [make(), make()]
    assert checkpoint.name_of(kept[0]) == checkpoint.name_of(kept[1])
    assert "0x" not in checkpoint.name_of(kept[0])


def test_names_tell_settings_apart() -> None:
    optimiser = OPTIMISERS["SGD"](fresh())
    different = [
        pyro.infer.RenyiELBO(alpha=0.5),
        pyro.infer.RenyiELBO(alpha=0.25),
        ELBO(beta=cyclic(4)),
        ELBO(beta=cyclic(5)),
        functools.partial(data.dequantise, levels=17),
        functools.partial(data.dequantise, levels=16),
        lr_scheduler.StepLR(optimiser, 2),
        lr_scheduler.StepLR(optimiser, 3),
        lr_scheduler.MultiStepLR(optimiser, [2, 3]),
        lr_scheduler.MultiStepLR(optimiser, [2, 4]),
    ]
    assert len({checkpoint.name_of(thing) for thing in different}) == len(different)
