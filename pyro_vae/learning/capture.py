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

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.infer
import torch
from torch import Tensor, nn

from pyro_vae.graph import Graph
from pyro_vae.learning.adam import GraphAdam, serves
from pyro_vae.learning.objectives import ELBO, Objective, analytic_kl, sampled_kl, sites_of
from pyro_vae.learning.steps import Stepper
from pyro_vae.learning.updates import Spent, Tally, Update
from pyro_vae.program import Program
from pyro_vae.rows import Rows, take
from pyro_vae.seeds import seeded
from pyro_vae.tracing import CannotCapture, Untouched, restored

NOISE = 1e-5
"""Deviation of a captured gradient that rounding explains, relative to the norm of all gradients together: some parameters
have a gradient of zero in truth, a bias before BatchNorm for one, and then nothing but rounding is there to compare."""

CAPTURED, CHECKED = 0, 1
"""Seeds of the draws at the capture, and of those that it is checked with."""

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
        self._objective, self._runs = capturable(stepper.objective)
        self._names = list(self._objective.schedules())
        self._replaced: list[str] = []
        self.tally = Tally(rows[0].device)
        self._adam: GraphAdam | None = None
        if any(leaf._post_accumulate_grad_hooks for leaf in stepper.leaves):
            raise CannotCapture("a parameter has a hook for when its gradient is accumulated, which a graph does not do")
        with _draws_kept():
            gradients = self._first(rows, steps_taken)
            self._used = [leaf for leaf, gradient in zip(stepper.leaves, gradients, strict=True) if gradient is not None]
            if update.alone and serves(update.optimiser, self._used):
                self._adam = GraphAdam(update.optimiser, self._used)
            self._given = torch.tensor(self._changing(steps_taken) or [0.0], dtype=torch.float64)
            self._view, self._on_cpu = self._given.numpy(), rows[0].device.type == "cpu"
            self.interval = 1 if rows[0].device.type == "cpu" else INTERVAL
            with self._kept(rows[0].device, CAPTURED), stepper.precision.running():
                self._graph = Graph(self._step, (self._numbers(steps_taken), *rows), compiled=compiled)
            if wrong := self.agrees(rows, steps_taken):
                raise CannotCapture(wrong)

    def _first(self, rows: Rows, steps_taken: int) -> Sequence[Tensor | None]:
        """Gradients of an eager step: which parameters get one. What objectives find out once, they find out here."""
        program, objective = self._stepper.program, self._stepper.objective
        with self._kept(rows[0].device, CAPTURED), Untouched():
            try:
                gradients = self._eager(rows, steps_taken)[2]
                if objective is self._objective:
                    return gradients
                q = sites_of(program.model, program.guide, rows, {}).q
                if not all(site.distribution.has_rsample for site in q.values()):
                    raise CannotCapture(
                        f"{type(objective).__name__} takes the score-function gradient of some latents, which only "
                        "objectives.ScoreFunction() does in a graph"
                    )
                self._differentiated(rows)
            except CannotCapture:
                raise
            except Exception as error:  # whatever a user's program raises: there is the eager way, or that raises it again
                raise CannotCapture(f"the eager step failed ({_one_line(error)})") from error
        return gradients

    def take(self, rows: Rows, steps_taken: int) -> None:
        """One step: parameters and optimiser move, loss and ELBO are counted."""
        if self._adam is not None:
            with self._stepper.precision.running():
                self._graph(self._numbers(steps_taken), *rows)
            return self._adam.count()
        # Those of an earlier step mean nothing, and a CUDA graph puts new ones where the last were, if no one holds them.
        _clear(self._stepper.leaves)
        with self._stepper.precision.running():
            loss, elbo, *gradients = self._graph(self._numbers(steps_taken), *rows)
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
        """Look again at what is held, and forget its gradients, as another step than a captured one was taken."""
        if self._adam is not None:
            self._adam.refresh()
        _clear(self._stepper.leaves)
        self._graph.refresh()

    @property
    def stale(self) -> bool:
        """Whether it is known, without a comparison, that the step must be captured anew: the optimiser is another."""
        return self._adam is not None and self._adam.stale

    def agrees(self, rows: Rows, steps_taken: int) -> str | None:
        """Compare with an eager step, both from the same state and random numbers; why not, None if it does.

        Each of the first half of `rows` comes twice, and the draws are others than at the capture: else what Python took
        from these (`x.numpy()`) would be the same by chance.
        """
        index = torch.arange(self._count, device=rows[0].device) // 2
        try:
            with _draws_kept():
                wrong = self._difference(take(rows, index), steps_taken)
            if self._replaced:
                name = self._replaced.pop()
                return f"a step puts another tensor in the place of the buffer {name!r}: use {name}.copy_(...)"
            return wrong
        except Exception as error:  # as in the constructor
            return f"a step of it failed ({_one_line(error)})"

    def _difference(self, rows: Rows, steps_taken: int) -> str | None:
        with self._kept(rows[0].device, CHECKED), Untouched():
            loss, elbo, expected = self._eager(rows, steps_taken)
            whole = [gradient for gradient in expected if gradient is not None]
            leaves = zip(self._stepper.leaves, expected, strict=True)
            if [id(leaf) for leaf, gradient in leaves if gradient is not None] != list(map(id, self._used)):
                return "other parameters get a gradient now than when the step was captured"
            if self._adam is not None:
                whole = self._moments(whole, steps_taken)
            buffers = [(name, buffer, buffer.clone()) for name, buffer in self._buffers()]
        with restored(self._graph.held), seeded(CHECKED, rows[0].device):
            if self._adam is not None:
                torch._foreach_zero_(self._adam.means)
            with self._stepper.precision.running():
                found = self._graph(self._numbers(steps_taken), *rows)
            gradients = found[2:] if self._adam is None else self._adam.means
            return self._told(found[:2], (loss, elbo)) or self._compared(gradients, whole) or self._moved(buffers)

    def _told(self, found: Sequence[Tensor], expected: Sequence[Tensor | None]) -> str | None:
        tolerance = self._stepper.precision.rounding
        for name, value, should in zip(("loss", "ELBO"), found, expected, strict=True):
            if should is not None and not torch.allclose(value, should.to(value.dtype), rtol=tolerance, atol=tolerance):
                return f"the captured step has {name} {float(value):.6g}, the eager one {float(should):.6g}"
        return None

    def _compared(self, found: Sequence[Tensor], expected: Sequence[Tensor]) -> str | None:
        tolerance, noise = self._stepper.precision.gradient_rounding, NOISE * float(_norm(expected))
        for leaf, gradient, should in zip(self._used, found, expected, strict=True):
            if not float(_norm([gradient - should])) <= tolerance * float(_norm([should])) + noise:
                return f"the captured gradient of a parameter of shape {tuple(leaf.shape)} differs from the eager one"
        return None

    def _moved(self, expected: Sequence[tuple[str, Tensor, Tensor]]) -> str | None:
        tolerance = self._stepper.precision.rounding
        for name, buffer, should in expected:
            if not torch.allclose(buffer.double(), should.double(), rtol=tolerance, atol=tolerance, equal_nan=True):
                return f"the captured step leaves other values in the buffer {name!r} than the eager one"
        return None

    def _buffers(self) -> Iterator[tuple[str, Tensor]]:
        for at, module in _modules(self._stepper.program):
            yield from ((f"{at}.{name}", buffer) for name, buffer in module._buffers.items() if buffer is not None)

    def _moments(self, gradients: Sequence[Tensor], steps_taken: int) -> list[Tensor]:
        """First moments that were zero, after an eager step of Adam: linear in the gradients, as the step itself is not."""
        assert self._adam is not None
        numbers = self._numbers(steps_taken)[len(self._names) :]
        with torch.no_grad():
            torch._foreach_zero_(self._adam.means)
            self._adam.update(gradients, numbers, torch.ones_like(numbers[0], dtype=torch.bool), self._update.clip_norm)
        return [mean.clone() for mean in self._adam.means]

    def _changing(self, steps_taken: int) -> list[float]:
        """What changes from step to step: numbers of the objective and of Adam."""
        numbers = []
        if self._names:
            self._objective.steps_taken = steps_taken
            numbers = [float(self._objective.scheduled(name)) for name in self._names]
        return numbers if self._adam is None else numbers + self._adam.numbers()

    def _numbers(self, steps_taken: int) -> Tensor:
        """These as a tensor, (one and more,), float64, good until the next call: a new one takes three times as long."""
        if numbers := self._changing(steps_taken):
            self._view[:] = numbers
        return self._given if self._on_cpu else self._given.to(self.tally.values.device, non_blocking=True)

    def _eager(self, rows: Rows, steps_taken: int) -> tuple[Tensor, Tensor | None, Sequence[Tensor | None]]:
        """Loss and gradients of a mean row by the objective that the run was given; its ELBO too if it is one of ours."""
        theirs, program = self._stepper.objective, self._stepper.program
        self._objective.steps_taken = steps_taken
        if theirs is self._objective:
            return self._differentiated(rows)
        with self._stepper.precision.writing():
            loss = theirs.differentiable_loss(program.model, program.guide, *rows) / self._count
        return loss.detach(), None, self._gradients(loss)

    def _differentiated(self, rows: Rows) -> tuple[Tensor, Tensor, Sequence[Tensor | None]]:
        program = self._stepper.program
        with self._stepper.precision.writing():
            runs = [self._objective.loss_and_elbo(program.model, program.guide, *rows) for _ in range(self._runs)]
        total, elbo = (torch.stack(parts).sum() / self._runs for parts in zip(*runs, strict=True))
        loss = total / self._count
        return loss.detach(), elbo.detach(), self._gradients(loss)

    def _gradients(self, loss: Tensor) -> list[Tensor | None]:
        """One for each leaf; `.grad` is left alone."""
        wanted = [leaf for leaf in self._stepper.leaves if leaf.requires_grad]
        found = iter(torch.autograd.grad(loss, wanted, allow_unused=True))
        return [next(found) if leaf.requires_grad else None for leaf in self._stepper.leaves]

    def _step(self, numbers: Tensor, *rows: Tensor) -> Sequence[Tensor]:
        """What is captured."""
        scheduled = dict(zip(self._names, numbers.unbind(), strict=False))
        with self._objective.given(scheduled):
            loss, elbo, gradients = self._differentiated(rows)
        whole = [gradient for gradient in gradients if gradient is not None]
        if self._adam is None:
            if loss.is_cuda:  # the host does not look at each loss: what is not finite must not reach the parameters
                fine = torch.isfinite(loss) & torch.isfinite(elbo)
                whole = [torch.where(fine, gradient, torch.zeros_like(gradient)) for gradient in whole]
            return loss, elbo, *whole
        with torch.no_grad():
            healthy = self.tally.add(loss, elbo, self._count)
            self._adam.update(whole, numbers[len(self._names) :], healthy, self._update.clip_norm)
        return loss, elbo

    @contextmanager
    def _kept(self, device: torch.device, seed: int) -> Iterator[None]:
        """What Python does in here leaves no trace in torch's generators and in buffers; replaced ones are noted."""
        modules = dict(_modules(self._stepper.program))
        buffers = {at: dict(module._buffers) for at, module in modules.items()}
        tensors = [tensor for each in buffers.values() for tensor in each.values() if tensor is not None]
        try:
            with restored(tensors), seeded(seed, device), warnings.catch_warnings():
                if self._stepper.objective is not self._objective:  # what stands in would say again what was said
                    warnings.simplefilter("ignore")
                yield
        finally:
            for at, module in modules.items():
                for name, tensor in buffers[at].items():
                    if module._buffers.get(name) is not tensor:
                        self._replaced.append(f"{at}.{name}")
                        module._buffers[name] = tensor


@contextmanager
def _draws_kept() -> Iterator[None]:
    """The generators of Python, NumPy and torch as before on leaving; not in between, where frozen draws must show."""
    state = pyro.util.get_rng_state()
    try:
        yield
    finally:
        pyro.util.set_rng_state(state)


def _clear(leaves: Sequence[Tensor]) -> None:
    for leaf in leaves:
        leaf.grad = None


def _modules(program: Program) -> Iterator[tuple[str, nn.Module]]:
    for at, outer in program.modules_found().items():
        yield from ((f"{at}.{name}".rstrip("."), module) for name, module in outer.named_modules())


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    """Of all numbers together, ()."""
    return torch.stack([tensor.double().square().sum() for tensor in tensors]).sum().sqrt()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def capturable(objective: Any) -> tuple[Objective, int]:
    """The objective to capture and how often to run it: ours as it is, Pyro's two ELBOs by ours of the same draws.

    Raises:
        CannotCapture: another loss of Pyro's.
    """
    if isinstance(objective, Objective):
        return objective, 1
    kl = {pyro.infer.Trace_ELBO: sampled_kl, pyro.infer.TraceMeanField_ELBO: analytic_kl}.get(type(objective))
    if kl is None:
        raise CannotCapture(
            f"{type(objective).__name__} asks for numbers as it goes; objectives of pyro_vae, Trace_ELBO and "
            "TraceMeanField_ELBO can be captured"
        )
    if objective.vectorize_particles:
        return ELBO(kl=kl, num_particles=objective.num_particles), 1
    return ELBO(kl=kl), objective.num_particles
