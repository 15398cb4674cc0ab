"""Coarse arithmetic: what it is, that it ends where it should, and what a captured step makes of it."""

from __future__ import annotations

import math

import pytest
import torch
from learning.twins import STEPS, columns, same, small, some, stepping, trained
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.learning.capture import CapturedStep
from pyro_vae.learning.precision import NAMES, Precision

CPU = torch.device("cpu")


def product() -> Tensor:
    """A matrix product whose exact value, 1 + 2^-10, has too many digits for bfloat16 and enough for TF32's inputs."""
    return torch.tensor([[1.0 + 2.0**-10]]) @ torch.ones(1, 1)


def test_bf16_rounds_products_and_nothing_else() -> None:
    with Precision("bf16", CPU).writing():
        assert product().dtype == torch.bfloat16
        assert product().item() == 1.0
        assert (torch.tensor([1.0 + 2.0**-10]) * 1.0).item() == 1.0 + 2.0**-10
    assert product().item() == 1.0 + 2.0**-10


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", ["writing", "running"])
def test_it_ends_with_its_context(name: str, way: str) -> None:
    before = torch.get_float32_matmul_precision()
    with pytest.raises(RuntimeError, match="on purpose"), getattr(Precision(name, CPU), way)():  # noqa: PT012
        assert torch.get_float32_matmul_precision() == ("high" if name == "tf32" else before)
        assert torch.is_autocast_enabled("cpu") == (name == "bf16" and way == "writing")
        raise RuntimeError("on purpose")
    assert torch.get_float32_matmul_precision() == before
    assert not torch.is_autocast_enabled("cpu")


def test_another_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^precision='half' is none of 'full', 'tf32', 'bf16'\.$"):
        Precision("half", CPU)
    with pytest.raises(ValueError, match="precision=16 is none of"):
        pv.fit(small()[0], columns(), epochs=1, precision=16)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["tf32", "bf16"])
def test_a_captured_step_in_coarse_arithmetic_is_the_eager_one(name: str) -> None:
    same(small, precision=name)


def test_a_captured_step_has_its_casts_written_down() -> None:
    """It runs outside of autocast, and rounds all the same: its losses are far from those in full precision."""
    coarse, full = (trained(small, captured=True, precision=name).losses for name in ("bf16", "full"))
    distance = max(abs(a - b) / abs(b) for a, b in zip(coarse, full, strict=True))
    assert 1e-5 < distance < 2e-2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tf32", "bf16"])
def test_the_compiler_rounds_no_further_than_the_check_allows(name: str) -> None:
    """TorchInductor keeps more digits between two operations in bfloat16 than eager steps do."""
    vae, rows = small()
    stepper, update = stepping(vae, rows, precision=name)
    step = CapturedStep(stepper, update, some(rows, 1), 1)
    for number in range(1, STEPS):
        assert step.agrees(some(rows, number), number) is None


def test_the_gap_is_zero_only_where_nothing_is_coarse() -> None:
    gaps = {name: pv.fit(small()[0], columns(), epochs=2, batch_size=8, precision=name).precision_gap for name in NAMES}
    assert gaps["full"] is None
    assert gaps["tf32"] == 0.0  # a CPU has none
    assert gaps["bf16"] is not None
    assert 0.0 < abs(gaps["bf16"]) < 0.5


def test_validation_is_in_full_precision() -> None:
    seen: list[torch.dtype] = []

    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 7)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            if not self.training:
                seen.append(y.dtype)
            return y.float()

    vae, _ = small(body=Looks(), features=7)
    history = pv.fit(vae, columns(), columns()[:4], epochs=2, batch_size=8, precision="bf16")
    assert math.isfinite(history.valid_elbo[-1])
    assert seen.count(torch.bfloat16) == 1  # for the gap
    assert seen.count(torch.float32) > 2
