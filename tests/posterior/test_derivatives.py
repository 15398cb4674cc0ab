"""Hessians: those of the formula, whether columns share a backward pass, go alone, or must."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_vae as pv
from pyro_vae.posterior import derivatives
from pyro_vae.posterior.derivatives import Local

WEIGHT = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Cubed(torch.autograd.Function):
    """z^3, with a derivative that looks at its values, as no function can that serves several vectors at once."""

    passes = 0

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z**3

    @staticmethod
    def backward(ctx: Any, *up: Tensor) -> Tensor:
        return Slope.apply(up[0], ctx.saved_tensors[0])  # type: ignore[no-any-return]


class Slope(torch.autograd.Function):
    """up * 3 z^2."""

    @staticmethod
    def forward(ctx: Any, up: Tensor, z: Tensor) -> Tensor:
        ctx.save_for_backward(up, z)
        return up * 3.0 * z**2

    @staticmethod
    def backward(ctx: Any, *v: Tensor) -> tuple[Tensor, Tensor]:
        up, z = ctx.saved_tensors
        Cubed.passes += 1
        assert float(v[0].sum()) == float(v[0].sum())  # a value: refused where v stands for several vectors
        return v[0] * 3.0 * z**2, v[0] * up * 6.0 * z


def program(cube: Any) -> pv.Program:
    """x ~ N(W'z^3, 1) in R^4, z ~ N(0, I) in R^3."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3, dtype=x.dtype), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(cube(z) @ WEIGHT, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, :3], 1.0).to_event(1))

    return pv.Program(model, guide)


def expected(x: Tensor, z: Tensor) -> Tensor:
    """-I + diag(6 z) diag(W (x - W'z^3)) - diag(3 z^2) W W' diag(3 z^2)."""
    residual = (x - z**3 @ WEIGHT) @ WEIGHT.T
    slope = torch.diag_embed(3.0 * z**2)
    return torch.diag_embed(6.0 * z * residual - 1.0) - slope @ (WEIGHT @ WEIGHT.T) @ slope


@pytest.mark.parametrize("together", [1, 15, 24, 1024])  # of 10 points: one column a pass, one, two and one, all three
def test_hessians_are_those_of_the_formula(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(derivatives, "TOGETHER", together)
    x, z = torch.randn(5, 4, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64)
    passes: list[Tensor] = []
    grad = torch.autograd.grad

    def counted(*arguments: Any, **options: Any) -> Any:
        passes.append(arguments[1])
        return grad(*arguments, **options)

    local = Local(program(lambda z: z**3).log_joint(x), z)
    monkeypatch.setattr(torch.autograd, "grad", counted)
    torch.testing.assert_close(local.hessian(), expected(x, z), rtol=1e-9, atol=1e-9)
    assert len(passes) == {1: 3, 15: 3, 24: 2, 1024: 1}[together]


def test_a_function_that_takes_one_vector_at_a_time() -> None:
    x, z = torch.randn(5, 4, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64)
    local = Local(program(Cubed.apply).log_joint(x), z)
    Cubed.passes = 0
    torch.testing.assert_close(local.hessian(), expected(x, z), rtol=1e-9, atol=1e-9)
    assert Cubed.passes >= 3


def test_linear_in_one_latent_and_flat_in_another() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Exponential(torch.ones(2, dtype=x.dtype)).to_event(1))
            pyro.sample("x", dist.Normal(0.0 * z[..., 0], 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Exponential(torch.ones(2, dtype=x.dtype)).to_event(1))

    u = torch.randn(1, 3, 2, dtype=torch.float64)  # log density -e^u + u
    local = Local(pv.Program(model, guide).log_joint(torch.zeros(3, dtype=torch.float64)), u)
    torch.testing.assert_close(local.hessian(), torch.diag_embed(-u.exp()), rtol=1e-9, atol=1e-9)
