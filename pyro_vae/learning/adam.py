"""Adam inside a captured step (Kingma & Ba 2015, arXiv:1412.6980, algorithm 1; AdamW: Loshchilov & Hutter 2019).

The same update as `torch.optim.Adam`, on its own state: a run may go over from one to the other between any two steps.
What schedules change (learning rates, betas) and the bias corrections are inputs of the graph.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

_NUMBERS = ("lr", "beta1", "beta2", "eps", "weight_decay", "rate", "root")


def serves(optimiser: Optimizer, used: Sequence[Tensor]) -> bool:
    """Whether `GraphAdam` does what `optimiser` does: Adam or AdamW as torch has them, of real parameters of one age."""
    if type(optimiser) not in (Adam, AdamW) or any(leaf.is_complex() for leaf in used):
        return False
    unusual = ("amsgrad", "maximize", "differentiable")
    hooks = (*optimiser._optimizer_step_pre_hooks.values(), *optimiser._optimizer_step_post_hooks.values())
    steps = [optimiser.state.get(leaf, {}).get("step") for leaf in used]  # asking must not make an entry
    if any(step is None or step.device != leaf.device for step, leaf in zip(steps, used, strict=True)):
        return False
    ages = {int(step) for step in steps}
    plain = not any(group[name] for group in optimiser.param_groups for name in unusual)
    return plain and not hooks and len(ages) == 1


class GraphAdam:
    """The update of an `Adam` or `AdamW`, as tensor operations in place.

    Args:
        optimiser: has taken a step, so that its state is there; see `serves`.
        used: the parameters that get gradients.
    """

    def __init__(self, optimiser: Optimizer, used: Sequence[Tensor]) -> None:
        self._optimiser, self._used = optimiser, list(used)
        place = {id(leaf): number for number, group in enumerate(optimiser.param_groups) for leaf in group["params"]}
        self._groups = [place[id(leaf)] for leaf in used]
        self._decays = _decays(optimiser)
        adam_w = isinstance(optimiser, AdamW)
        self._decoupled = [bool(group.get("decoupled_weight_decay", adam_w)) for group in optimiser.param_groups]
        states = [optimiser.state[leaf] for leaf in self._used]
        self.means: list[Tensor] = [state["exp_avg"] for state in states]
        self.squares: list[Tensor] = [state["exp_avg_sq"] for state in states]
        self.steps: list[Tensor] = [state["step"] for state in states]
        self.refresh()

    def refresh(self) -> None:
        """Look again at how many steps were taken: another than a captured one was among them."""
        self._taken = int(self.steps[0])
        # What a learning-rate schedule looks for before it warns that no step was taken.
        self._optimiser._opt_called = True  # type: ignore[attr-defined]

    @property
    def stale(self) -> bool:
        """Whether a captured update is no longer the optimiser's: a weight decay came or went, or its state is another."""
        states = [self._optimiser.state[leaf] for leaf in self._used]
        same = all(state.get("exp_avg") is mean for state, mean in zip(states, self.means, strict=True))
        return _decays(self._optimiser) != self._decays or not same

    @property
    def state(self) -> list[Tensor]:
        """Everything that a step changes in place."""
        return [*self._used, *self.means, *self.squares, *self.steps]

    def numbers(self) -> list[float]:
        """What the next update goes by, for each group of parameters."""
        return [number for group in self._optimiser.param_groups for number in _numbers(group, self._taken + 1)]

    def count(self) -> None:
        """Count an update."""
        self._taken += 1

    def update(self, gradients: Sequence[Tensor], numbers: Tensor, healthy: Tensor, clip_norm: float | None) -> None:
        """Move the parameters in place, or nothing at all where `healthy`, (), is false.

        Args:
            gradients: of the parameters in `used`.
            numbers: those of `numbers`, (groups x 7,).
            healthy: whether the loss is finite.
            clip_norm: largest norm of all gradients together, or None.
        """
        if clip_norm is not None:
            gradients = clipped(gradients, clip_norm)
        table = [dict(zip(_NUMBERS, row, strict=True)) for row in numbers.reshape(-1, len(_NUMBERS)).unbind()]
        for decays, by in zip(self._decays, table, strict=True):
            if not decays:
                del by["weight_decay"]  # else it costs one more pass over the parameters
        for leaf, mean, square, gradient, group in zip(
            self._used, self.means, self.squares, gradients, self._groups, strict=True
        ):
            moved = _moved(leaf, mean, square, gradient, table[group], decoupled=self._decoupled[group])
            for old, new in zip((leaf, mean, square), moved, strict=True):
                old.copy_(torch.where(healthy, new, old))
        for step in self.steps:
            step.add_(healthy)


def _decays(optimiser: Optimizer) -> list[bool]:
    return [group["weight_decay"] != 0 for group in optimiser.param_groups]


def clipped(gradients: Sequence[Tensor], clip_norm: float) -> list[Tensor]:
    """As `torch.nn.utils.clip_grad_norm_`, without changing anything in place."""
    norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
    factor = (clip_norm / (norm + 1e-6)).clamp(max=1.0)
    return [gradient * factor for gradient in gradients]


def _numbers(group: Mapping[str, Any], step: int) -> tuple[float, ...]:
    lr, (beta1, beta2) = float(group["lr"]), group["betas"]
    rate, root = lr / (1.0 - beta1**step), 1.0 / math.sqrt(1.0 - beta2**step)
    return lr, beta1, beta2, group["eps"], group["weight_decay"], rate, root


def _moved(
    leaf: Tensor, mean: Tensor, square: Tensor, gradient: Tensor, by: Mapping[str, Tensor], *, decoupled: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """New parameter, first and second moment."""
    if "weight_decay" in by:
        decay = by["weight_decay"] * leaf
        leaf, gradient = (leaf - by["lr"] * decay, gradient) if decoupled else (leaf, gradient + decay)
    mean = mean + (gradient - mean) * (1.0 - by["beta1"])
    square = by["beta2"] * square + (1.0 - by["beta2"]) * gradient * gradient
    step = by["rate"] * mean / (square.sqrt() * by["root"] + by["eps"])
    return leaf - step, mean, square
