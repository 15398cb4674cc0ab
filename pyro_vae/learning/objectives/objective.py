"""What all objectives have in common: they read sites of guide and model, and report the true ELBO beside their loss."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyro.infer
import torch
from torch import Tensor

from pyro_vae.layouts import Layout
from pyro_vae.learning.objectives.schedules import Schedule
from pyro_vae.program import Program, record
from pyro_vae.recording import HandOn, Recording
from pyro_vae.rows import as_rows
from pyro_vae.sites import Site
from pyro_vae.tracing import CannotCapture


class Pair(NamedTuple):
    """One run of the guide, and of the model at the guide's draws: for one particle, or for K in a left-most plate."""

    q: Recording
    p: Recording


class Objective(pyro.infer.ELBO):
    """A loss for a model and guide that also reports the true ELBO. To add one, implement `loss_and_elbo`.

    What changes from step to step is a schedule of a name in `schedules`, read by `scheduled`: a captured step, which runs
    no Python, takes it as an input.
    """

    _steps_taken: int = 0
    _scheduled: Mapping[str, Tensor] | None = None
    _batched: tuple[tuple[Any, ...], bool] | None = None

    @property
    def steps_taken(self) -> int:
        """Gradient steps so far, what schedules go by; `pv.fit` sets it, `loss_and_grads` counts it.

        Raises:
            CannotCapture: it is read while a step is captured, which would keep this number for good.
        """
        if self._scheduled is not None:
            raise CannotCapture(f"{type(self).__name__} reads steps_taken, which only `schedules` may")
        return self._steps_taken

    @steps_taken.setter
    def steps_taken(self, steps: int) -> None:
        self._steps_taken = steps

    def schedules(self) -> dict[str, Schedule]:
        """Numbers that depend on how many steps were taken, by name."""
        return {}

    def scheduled(self, name: str) -> float | Tensor:
        """The number of the schedule `name` at this step; in a captured step a tensor, ()."""
        return self._scheduled[name] if self._scheduled is not None else self.schedules()[name](self.steps_taken)

    @contextmanager
    def given(self, numbers: Mapping[str, Tensor]) -> Iterator[None]:
        """For the time of a capture: the scheduled numbers, each (), whatever `steps_taken` says."""
        self._scheduled = numbers
        try:
            yield
        finally:
            self._scheduled = None

    @abstractmethod
    def loss_and_elbo(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The loss to be minimised, summed over the rows with Pyro's scales, and the detached mean ELBO of a row."""

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The loss as a tensor with a graph."""
        return self.loss_and_elbo(model, guide, *args, **kwargs)[0]

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The loss as a number."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The loss as a number; its gradients are added to the parameters' `.grad`."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        loss.backward()
        self.steps_taken += 1
        return float(loss.detach())

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        raise TypeError(f"{type(self).__name__} reads sites, not traces: use it as the loss of SVI or pv.fit.")

    def _pairs(self, model: Any, guide: Any, args: Any, kwargs: Any, hand_on: HandOn | None = None) -> list[Pair]:
        """Runs for all particles: one with a left-most dimension where both networks take it, else one a particle.

        All of them take the same rows of a subsampled plate.
        """
        count = self.num_particles
        if count > 1 and self._takes_particles(model, guide, args, kwargs):
            return [_run(model, guide, args, kwargs, count, hand_on=hand_on)]
        pairs = [_run(model, guide, args, kwargs, hand_on=hand_on)]
        while len(pairs) < count:
            pairs.append(_run(model, guide, args, kwargs, plates=pairs[0].q.plates, hand_on=hand_on))
        return pairs

    def _takes_particles(self, model: Any, guide: Any, args: Any, kwargs: Any) -> bool:
        """Whether K particles may be a left-most dimension, see `pyro_vae.layouts`; found out once for a program and shape.

        Copies of the rows, the third layout, are of no use here: a plate's scale counts rows.
        """
        shapes = [(part.shape[1:], part.dtype) if isinstance(part, Tensor) else type(part) for part in args]
        key = (model, guide, *shapes, *sorted(kwargs))
        if self._batched is None or self._batched[0] != key:
            self._batched = key, _is_batched(model, guide, args, kwargs)
        return self._batched[1]


def sites_of(model: Any, guide: Any, args: Any, kwargs: Any) -> Pair:
    """One run of the guide, and of the model at the guide's draws and rows: the sites of both."""
    return _run(model, guide, args, kwargs)


def require_reparametrised(q: Mapping[str, Site]) -> None:
    """Refuse a latent that cannot be reparametrised: the gradient of the caller's estimator would miss it.

    Raises:
        ValueError: names the latent, its family and the objectives that do without.
    """
    for site in q.values():
        if not getattr(site.distribution, "has_rsample", False):
            raise ValueError(
                f"Latent {site.name!r} of the guide ({site.family}) cannot be reparametrised: use "
                "objectives.ScoreFunction(), objectives.ReweightedWakeSleep() or pyro.infer.Trace_ELBO() as the objective."
            )


def _run(
    model: Any,
    guide: Any,
    args: Any,
    kwargs: Any,
    num_particles: int | None = None,
    *,
    plates: Mapping[str, Tensor] | None = None,
    hand_on: HandOn | None = None,
) -> Pair:
    q = record(guide, args, plates, kwargs, num_particles, hand_on=hand_on)
    p = record(model, args, q.given, kwargs, num_particles)
    latents = {name for name, site in p.items() if not site.observed}
    if odd := sorted(latents ^ q.keys()):
        where = "model but not of the guide" if odd[0] in latents else "guide but no latent of the model"
        raise ValueError(f"Site {odd[0]!r} is a latent of the {where}: sample the same latents in both.")
    return Pair(q, p)


def _is_batched(model: Any, guide: Any, args: Any, kwargs: Any) -> bool:
    bound = (functools.partial(function, **kwargs) if kwargs else function for function in (model, guide))
    try:
        layouts = Program(*bound).layout(as_rows(args))
    except Exception:  # arguments that are no rows, several plates, whatever a network raises: Pyro's way always works
        return False
    return layouts.model is Layout.BATCHED and layouts.guide is Layout.BATCHED
