"""One program trained twice, from the same start with the same draws: by autograd and torch.optim, by a captured step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import pyro_vae as pv
from pyro_vae.learning.capture import CapturedStep
from pyro_vae.learning.objectives import Objective
from pyro_vae.learning.precision import Precision
from pyro_vae.learning.steps import Stepper
from pyro_vae.learning.updates import Update
from pyro_vae.rows import Rows, take

Make = Callable[[], tuple[pv.Program, Rows]]
"""A program with initial values that are the same each time, and its rows."""

STEPS = 4


def adam(leaves: list[Tensor]) -> Optimizer:
    """With an eps that keeps a gradient of nothing but rounding from becoming a whole step."""
    return torch.optim.Adam(leaves, lr=0.01, eps=1e-2)


@dataclass
class Twin:
    """What a training came to: the loss of each step, and parameters, buffers and first moments at the end."""

    losses: list[float]
    values: dict[str, Tensor]


def eager(program: pv.Program, objective: Any, leaves: list[Tensor], rows: Rows, step: int) -> Tensor:
    """The loss of a mean row, its gradients in `.grad`, by nothing but the objective and autograd."""
    for leaf in leaves:
        leaf.grad = None
    if isinstance(objective, Objective):
        objective.steps_taken = step
    loss = objective.differentiable_loss(program.model, program.guide, *rows) / len(rows[0])
    loss.backward()
    return loss.detach()


def some(rows: Rows, step: int) -> Rows:
    """Half of the rows, others in each step."""
    count = len(rows[0])
    return take(rows, torch.arange(step, step + count // 2) * 3 % count)


def stepping(
    program: pv.Program, rows: Rows, objective: Any = None, optimiser: Callable[[list[Tensor]], Optimizer] = adam,
    clip_norm: float | None = None, precision: str = "full",
) -> tuple[Stepper, Update]:  # fmt: skip
    """What a captured step needs, after one eager step, which makes the optimiser's state."""
    objective = pv.objectives.ELBO() if objective is None else objective
    stepper = Stepper(program, objective, program.trainable(rows), rows, Precision(precision, rows[0].device))
    update = Update(stepper.leaves, optimiser(stepper.leaves), clip_norm)
    torch.manual_seed(100)
    with stepper.precision.writing():
        eager(program, objective, stepper.leaves, some(rows, 0), 0)
    update()
    return stepper, update


def trained(
    make: Make,
    objective: Callable[[], Any] = pv.objectives.ELBO,
    *,
    captured: bool,
    compiled: bool = False,
    **settings: Any,
) -> Twin:
    """Train; `captured` says which twin it is."""
    pyro.clear_param_store()
    program, rows = make()
    stepper, update = stepping(program, rows, objective(), **settings)
    step = CapturedStep(stepper, update, some(rows, 1), 1, compiled=compiled) if captured else None
    losses = []
    for number in range(1, STEPS):
        torch.manual_seed(100 + number)
        if step is not None:
            step.take(some(rows, number), number)
            spent = step.read()
            assert (spent.steps, spent.rows, spent.failed) == (1, len(rows[0]) // 2, False)
            losses.append(spent.loss / spent.rows)
        else:
            with stepper.precision.writing():
                losses.append(float(eager(program, stepper.objective, stepper.leaves, some(rows, number), number)))
            update()
    values = {f"leaf {i}": leaf.detach() for i, leaf in enumerate(stepper.leaves)}
    values |= {f"mean {i}": update.optimiser.state[leaf].get("exp_avg", leaf) for i, leaf in enumerate(stepper.leaves)}
    for at, module in program.modules_found().items():
        values |= {f"{at}.{name}": buffer for name, buffer in module.named_buffers()}
    return Twin(losses, {name: value.clone() for name, value in values.items()})


def same(make: Make, objective: Callable[[], Any] = pv.objectives.ELBO, tolerance: float = 2e-5, **settings: Any) -> Twin:
    """Both twins are the same up to rounding; the captured one."""
    compiled = settings.pop("compiled", False)
    first = trained(make, objective, captured=False, **settings)
    second = trained(make, objective, captured=True, compiled=compiled, **settings)
    torch.testing.assert_close(torch.tensor(second.losses), torch.tensor(first.losses), rtol=tolerance, atol=tolerance)
    assert first.values.keys() == second.values.keys()
    for name, value in first.values.items():
        torch.testing.assert_close(
            second.values[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert len(set(first.losses)) == len(first.losses)
    return second


def columns(count: int = 16, width: int = 6) -> Tensor:
    """Rows (count, width) that are all different."""
    return torch.randn(count, width, generator=torch.Generator().manual_seed(3))


def small(decoder: nn.Module | None = None, body: nn.Module | None = None, **settings: Any) -> tuple[pv.VAE, Rows]:
    """A small Gaussian VAE and its rows."""
    torch.manual_seed(1)
    likelihood = pv.likelihoods.Normal(decoder or pv.nets.MLP(2, 6, hidden=(7,)), pv.likelihoods.Learned(initial=0.6))
    guide = pv.guides.DiagonalNormal(body or pv.nets.MLP(6, hidden=(7,)), latent_dim=2, **settings)
    return pv.VAE(prior=pv.priors.StandardNormal(2), likelihood=likelihood, guide=guide), (columns(),)
