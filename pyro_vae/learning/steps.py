"""Loss and gradients of one step, for our objectives and for any Pyro ELBO, and what to say when they are not finite."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.infer
import torch
from torch import Tensor

from pyro_vae.learning.objectives import ELBO, Objective, analytic_kl, sites_of
from pyro_vae.learning.objectives.kl import tell_sampled
from pyro_vae.learning.precision import Precision
from pyro_vae.parameters import evaluating
from pyro_vae.program import Program
from pyro_vae.rows import Rows
from pyro_vae.sites import Site

_TRUE_ELBOS = (pyro.infer.Trace_ELBO, pyro.infer.TraceMeanField_ELBO)


class Stepper:
    """Computes gradients of an objective, per row, and the true ELBO beside it.

    Args:
        program: model and guide.
        objective: one of `pyro_vae.learning.objectives`, or any `pyro.infer.ELBO`.
        leaves: the parameters, by name.
        rows: a batch, to see whether the program carries scales.
        precision: of the steps; None is full.
    """

    def __init__(
        self,
        program: Program,
        objective: Any,
        leaves: Mapping[str, Tensor],
        rows: Rows,
        precision: Precision | None = None,
    ) -> None:
        if not isinstance(objective, pyro.infer.ELBO):
            raise ValueError(
                f"objective={objective!r} is no ELBO object: give pv.objectives.ELBO(), pyro.infer.Trace_ELBO() or such."
            )
        self.program, self.leaves = program, list(leaves.values())
        self.objective: Any = objective
        self.precision = precision or Precision("full", rows[0].device)
        with evaluating(program.modules_found()), torch.no_grad():  # looking must not move BatchNorm's statistics
            q, p = sites_of(program.model, program.guide, rows, {})
        # Pyro's own ELBOs are the true ELBO as long as nothing is scaled; any other loss is judged by one more run.
        scaled = any(not _is_one(site.scale) for site in (*q.values(), *p.values()))
        self._loss_is_elbo = type(objective) in _TRUE_ELBOS and not scaled
        if isinstance(objective, pyro.infer.TraceMeanField_ELBO):
            _tell_what_is_sampled(q, p)

    def gradients(self, rows: Rows, steps_taken: int) -> tuple[float, float]:
        """Fill `.grad` of every leaf with the gradient of the loss of a mean row.

        Returns:
            loss and true ELBO of a mean row, in nats.
        """
        for leaf in self.leaves:
            leaf.grad = None
        model, guide, count = self.program.model, self.program.guide, len(rows[0])
        if count == 0:  # the last batch has fewer rows than there are ranks
            return 0.0, 0.0
        if isinstance(self.objective, Objective):
            self.objective.steps_taken = steps_taken
            with self.precision.writing():
                total, elbo = self.objective.loss_and_elbo(model, guide, *rows)
            (total / count).backward()
            return total.item() / count, elbo.item()
        with self.precision.writing():
            loss = self._foreign(rows) / count
        if self._loss_is_elbo:
            return loss, -loss
        with torch.no_grad(), self._kept_buffers():
            return loss, ELBO().rows(model, guide, *rows).mean().item()

    @contextmanager
    def _kept_buffers(self) -> Iterator[None]:
        """For a second run of the same rows: BatchNorm's statistics have seen them already."""
        buffers = [buffer for module in self.program.modules_found().values() for buffer in module.buffers()]
        before = [buffer.clone() for buffer in buffers]
        yield
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)

    def _foreign(self, rows: Rows) -> float:
        """Loss and gradients of a Pyro ELBO, summed over rows as Pyro does; gradients are then those of a mean row."""
        model, guide = self.program.model, self.program.guide
        # Pyro's loss_and_grads goes backward only if it saw a param statement, and modules need not make one.
        if hasattr(self.objective, "differentiable_loss"):
            loss = self.objective.differentiable_loss(model, guide, *rows)
            if isinstance(loss, Tensor) and loss.requires_grad:
                loss.backward()
        else:
            loss = self.objective.loss_and_grads(model, guide, *rows)
        gradients = [leaf.grad for leaf in self.leaves if leaf.grad is not None]
        if not gradients:
            raise ValueError(
                f"{type(self.objective).__name__} gave no gradient to any parameter: "
                "register the modules with pyro.module inside model and guide."
            )
        torch._foreach_div_(gradients, float(len(rows[0])))
        # Reweighted wake-sleep has a loss for the model and one for the guide.
        losses = loss if isinstance(loss, tuple) else (loss,)
        return sum(float(part.detach()) if isinstance(part, Tensor) else float(part) for part in losses)

    def finite_gradients(self) -> bool:
        """Whether a step may be taken though the loss is not finite: some losses of Pyro's exist as gradients only."""
        if isinstance(self.objective, Objective):
            return False
        return all(bool(torch.isfinite(leaf.grad).all()) for leaf in self.leaves if leaf.grad is not None)


def _tell_what_is_sampled(q: Mapping[str, Site], p: Mapping[str, Site]) -> None:
    """Pyro samples the KL of a pair that torch has no formula for, without a word: say so."""
    for name, site in q.items():
        try:
            analytic_kl(site, p[name])
        except NotImplementedError:
            tell_sampled(site, p[name])


def _is_one(scale: Any) -> bool:
    return bool((torch.as_tensor(scale) == 1.0).all())


def explain(program: Program, rows: Rows) -> str | None:
    """Which site of this batch is not finite and what went into it; None if all of them are fine.

    Called with the random state that the failing step had, so that it meets the same draws.
    """
    with torch.no_grad(), pyro.validation_enabled(is_validate=False):
        q, p = sites_of(program.model, program.guide, rows, {})
    for where, sites in (("guide", q), ("model", p)):
        for site in sites.values():
            log_prob = site.distribution.log_prob(site.value)
            ranges = {name: _range(value) for name, value in _arguments(site)}
            if not bool(torch.isfinite(log_prob).all()) or any("not finite" in text for text in ranges.values()):
                told = ", ".join(f"{name} {text}" for name, text in ranges.items())
                return f"not finite at site {site.name!r} of the {where} ({site.family}: {told}); x {_range(rows[0])}"
    return None


def _arguments(site: Site) -> list[tuple[str, Tensor]]:
    inner = site.distribution
    while hasattr(inner, "base_dist"):
        inner = inner.base_dist
    named = [(name, getattr(inner, name, None)) for name in inner.arg_constraints]
    found = [(name, value) for name, value in named if isinstance(value, Tensor) and name in vars(inner)]
    return found or [("value", site.value)]


def _range(value: Tensor) -> str:
    """The range of a tensor in words."""
    finite = value[torch.isfinite(value)]
    span = f"in [{finite.min().item():.4g}, {finite.max().item():.4g}]" if finite.numel() else "nowhere finite"
    broken = value.numel() - finite.numel()
    return f"{span}, {broken} of {value.numel()} not finite" if broken and math.isfinite(broken) else span
