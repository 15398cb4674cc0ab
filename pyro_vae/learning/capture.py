"""A whole SVI step as one compiled graph: loss, gradients and, for Adam, the update.

The way of a batch: its rows and the numbers of the step (beta of a warm-up, learning rate) go in; parameters, optimiser
state and buffers are held by the graph and changed in place; loss and ELBO are added up where the graph runs and read when
the run wants to know, so that a GPU need not wait for the host in between. Other optimisers than Adam take their step
outside, on the gradients that the graph returns.

A captured step repeats the eager one: the same draws for the same random state, the same gradient up to rounding. That is
compared at the capture and again now and then (`agrees`), because Python that changes while the program trains is invisible
to a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro.infer
import torch
from torch import Tensor

from pyro_vae.graph import CannotCapture, Graph, restored
from pyro_vae.learning.adam import GraphAdam, serves
from pyro_vae.learning.objectives import ELBO, Objective, analytic_kl, sampled_kl
from pyro_vae.learning.steps import Stepper
from pyro_vae.learning.updates import Spent, Tally, Update
from pyro_vae.rows import Rows
from pyro_vae.seeds import kept, seeded

LOSS_TOLERANCE = 1e-4
"""Deviation of a captured loss from the eager one that rounding explains, relative."""

GRADIENT_TOLERANCE = 1e-2
"""Deviation of a captured gradient that rounding explains, relative to the norm of that parameter's gradient."""

INTERVAL = 50
"""Steps between two looks at the loss on a device that should not wait for the host."""


class CapturedStep:
    """Steps of a program under an objective, on batches of the shapes of `rows`.

    Args:
        stepper: program, objective and parameters.
        update: what is done with the gradients.
        rows: a batch; its values do not matter.
        steps_taken: so far.
        compiled: see `Graph`.

    Attributes:
        interval: steps after which `read` is due.

    Raises:
        CannotCapture: says why.
    """

    def __init__(self, stepper: Stepper, update: Update, rows: Rows, steps_taken: int, *, compiled: bool = True) -> None:
        self._stepper, self._update, self._count = stepper, update, len(rows[0])
        self._objective = capturable(stepper.objective)
        self._names = list(self._objective.schedules())
        self.tally = Tally(rows[0].device)
        self._adam: GraphAdam | None = None
        self.interval = 1 if rows[0].device.type == "cpu" else INTERVAL
        try:
            with restored(self._buffers()), kept(rows[0].device):
                gradients = self._eager(rows, steps_taken)[2]
        except (ValueError, RuntimeError) as error:
            raise CannotCapture(f"the eager step failed ({' '.join(str(error).split())[:200]})") from error
        self._used = [leaf for leaf, gradient in zip(stepper.leaves, gradients, strict=True) if gradient is not None]
        if update.alone and serves(update.optimiser, self._used):
            self._adam = GraphAdam(update.optimiser, self._used)
        with restored(self._changed()), seeded(0, rows[0].device):
            self._graph = Graph(self._step, (self._numbers(steps_taken), *rows), compiled=compiled)
        if wrong := self.agrees(rows, steps_taken):
            raise CannotCapture(wrong)

    def take(self, rows: Rows, steps_taken: int) -> None:
        """One step: parameters and optimiser move, loss and ELBO are counted."""
        with self._stepper.precision.running():
            found = self._graph(self._numbers(steps_taken), *rows)
        if self._adam is not None:
            self._adam.count()
            return
        loss, elbo, *gradients = found
        for leaf, gradient in zip(self._used, gradients, strict=True):
            leaf.grad = gradient
        loss, elbo, count = self._update.over_ranks(loss, elbo, self._count)
        fine = self.tally.add(loss, elbo, count)
        if self.interval > 1 or bool(fine):
            self._update()

    def read(self) -> Spent:
        """What was counted since the last reading."""
        return self.tally.read()

    def refresh(self) -> None:
        """Look again at what is held: another step than a captured one was taken, or a checkpoint read."""
        if self._adam is not None:
            self._adam.refresh()
        self._graph.refresh()

    def agrees(self, rows: Rows, steps_taken: int) -> str | None:
        """Compare with the eager step on `rows`, both from the same state and random numbers; why not, None if it does."""
        with restored(self._changed()), seeded(0, rows[0].device):
            loss, elbo, expected = self._eager(rows, steps_taken)
            if self._adam is not None:
                expected = self._moments(expected, steps_taken)
        with restored(self._changed()), seeded(0, rows[0].device):
            with self._stepper.precision.running():
                found = self._graph(self._numbers(steps_taken), *rows)
            values, gradients = (found[:2], found[2:]) if self._adam is None else (found, self._adam.means)
            self.tally.values.zero_()
            told = zip(("loss", "ELBO"), values, (loss, elbo), strict=True)
            for name, value, should in told:
                if not bool(torch.isclose(value, should.to(value.dtype), rtol=LOSS_TOLERANCE, atol=LOSS_TOLERANCE)):
                    return f"the captured step has {name} {float(value):.6g}, the eager one {float(should):.6g}"
            for leaf, gradient, should in zip(self._used, gradients, [g for g in expected if g is not None], strict=True):
                if float((gradient - should).norm()) > GRADIENT_TOLERANCE * float(should.norm()) + 1e-7:
                    return f"the captured gradient of a parameter of shape {tuple(leaf.shape)} differs from the eager one"
        return None

    def _moments(self, gradients: Sequence[Tensor | None], steps_taken: int) -> list[Tensor]:
        """First moments after an eager step of Adam: linear in the gradients, where the parameters' steps are not."""
        assert self._adam is not None
        numbers = self._numbers(steps_taken)[len(self._names) :]
        with torch.no_grad():
            whole = [gradient for gradient in gradients if gradient is not None]
            self._adam.update(whole, numbers, torch.ones_like(numbers[0], dtype=torch.bool), self._update.clip_norm)
        return [mean.clone() for mean in self._adam.means]

    def _numbers(self, steps_taken: int) -> Tensor:
        """What changes from step to step, (numbers of the objective and of Adam,), float64."""
        self._objective.steps_taken = steps_taken
        numbers = [float(self._objective.scheduled(name)) for name in self._names]
        if self._adam is not None:
            numbers += self._adam.numbers()
        return torch.tensor(numbers or [0.0], dtype=torch.float64).to(self.tally.values.device, non_blocking=True)

    def _eager(self, rows: Rows, steps_taken: int) -> tuple[Tensor, Tensor, Sequence[Tensor | None]]:
        """Loss, ELBO and gradients of a mean row; `.grad` is left alone."""
        self._objective.steps_taken = steps_taken
        return self._differentiated(rows)

    def _differentiated(self, rows: Rows) -> tuple[Tensor, Tensor, Sequence[Tensor | None]]:
        program = self._stepper.program
        with self._stepper.precision.writing():
            total, elbo = self._objective.loss_and_elbo(program.model, program.guide, *rows)
        loss = total / self._count
        return loss.detach(), elbo.detach(), torch.autograd.grad(loss, self._stepper.leaves, allow_unused=True)

    def _step(self, numbers: Tensor, *rows: Tensor) -> Sequence[Tensor]:
        """What is captured."""
        scheduled = dict(zip(self._names, numbers.unbind(), strict=False))
        with self._objective.given(scheduled):
            loss, elbo, gradients = self._differentiated(rows)
        whole = [gradient for gradient in gradients if gradient is not None]
        if self._adam is None:
            return loss, elbo, *whole
        with torch.no_grad():
            healthy = self.tally.add(loss, elbo, self._count)
            self._adam.update(whole, numbers[len(self._names) :], healthy, self._update.clip_norm)
        return loss, elbo

    def _changed(self) -> list[Tensor]:
        """Everything that a step changes in place."""
        state = [] if self._adam is None else self._adam.state
        return [*self._buffers(), *state, self.tally.values]

    def _buffers(self) -> list[Tensor]:
        return [buffer for module in self._stepper.program.modules_found().values() for buffer in module.buffers()]


def capturable(objective: Any) -> Objective:
    """The objective to capture: ours as it is, Pyro's two ELBOs by ours of the same loss, gradient and draws.

    Raises:
        CannotCapture: another loss of Pyro's.
    """
    if isinstance(objective, Objective):
        return objective
    kl = {pyro.infer.Trace_ELBO: sampled_kl, pyro.infer.TraceMeanField_ELBO: analytic_kl}.get(type(objective))
    if kl is None:
        raise CannotCapture(
            f"{type(objective).__name__} asks for numbers as it goes; objectives of pyro_vae, Trace_ELBO and "
            "TraceMeanField_ELBO can be captured"
        )
    return ELBO(kl=kl, num_particles=objective.num_particles)
