"""What engines share: made ready for some rows once, they draw weighted particles as often as asked.

    engine = Laplace(num_starts=8)                    an object with its settings; `posterior.laplace` is one with defaults
    sampler = engine.prepare(program, rows)           modes found, step sizes tuned: all of it frozen from here on
    pilot = sampler.draw(64, seed=1)                  to judge by
    sampler.adapt(pilot).draw(500, seed=2)            to report

Nothing that a draw is made with depends on that draw, so the mean weight of each is unbiased for p(x). `engine(program, x)`
does all of it in one call.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import Tensor

from pyro_vae.layouts import Values
from pyro_vae.memory import BUDGET
from pyro_vae.posterior.particles import Particles
from pyro_vae.program import Program
from pyro_vae.rows import Data, Rows, as_rows, positive
from pyro_vae.seeds import Seed, derive

PREPARED, PILOT, REPORTED = 0, 1, 2
"""Sub-streams of an engine's seed."""


class Sampler(ABC):
    """An engine made ready for N rows.

    Attributes:
        cost: decoder evaluations spent on making ready, integers (N,); a forward pass counts one and a backward pass one.
        doubts: N texts, why the sampler itself is not sure of a row; empty where it is.
    """

    cost: Tensor
    doubts: tuple[str, ...]

    @abstractmethod
    def draw(self, num_particles: int, seed: Seed, exact: Values | None = None) -> Particles:
        """K fresh weighted particles for each row.

        Args:
            num_particles: K.
            seed: of the draws.
            exact: one draw of p(z | x) for each row, by site name, (N, *event_shape). It takes the place of one particle,
                and the mean of log p-hat is then not below but above log p(x), see `evidence.sandwich`.
        """

    @abstractmethod
    def take(self, index: Tensor) -> Sampler:
        """The same for some of the rows."""

    @abstractmethod
    def log_density(self, u: Tensor, index: Tensor) -> Tensor:
        """log of the density that draws begin with, of the rows at `index` (n,): u (K, n, D) -> (K, n), float64."""

    def sure(self, index: Tensor) -> Self:
        """The same without the doubts of the rows at `index`."""
        cleared, other = set(index.tolist()), copy.copy(self)
        other.doubts = tuple("" if i in cleared else doubt for i, doubt in enumerate(self.doubts))
        return other

    def widen(self, index: Tensor, u: Tensor) -> Sampler:
        """A sampler that covers u (n, D) in the rows at `index` (n,), if this kind of sampler can."""
        return self

    def adapt(self, pilot: Particles) -> Sampler:
        """A sampler that has learnt a little from `pilot`, draws that are not reported."""
        return self

    def refine(self, pilot: Particles) -> Sampler:
        """A sampler that has learnt all it can from `pilot`: for rows that the pilot shows to be hard."""
        return self.adapt(pilot)


@dataclass(frozen=True)
class Engine(ABC):
    """A way to weighted particles, with its settings.

    To add one: subclass as a frozen dataclass whose fields are the settings, name it, return a `Sampler` from `prepare`,
    and add a line to the table of engines in tests/posterior/test_engines.py.
    """

    name: ClassVar[str]
    default_particles: ClassVar[int]
    pilot_particles: ClassVar[int] = 0

    @abstractmethod
    def prepare(
        self, program: Program, rows: Rows, *, seed: Seed = 0, memory: int = BUDGET, near: Tensor | None = None
    ) -> Sampler:
        """A sampler for these rows; what it tunes is tuned in here, with `seed`, within `memory` bytes.

        `near` (S, N, D), unconstrained, are points where the posterior is likely to be, those of an earlier call say: an
        engine that searches may begin there, others leave them aside. They must not depend on the draws to come.
        """

    def __call__(
        self,
        program: Program,
        x: Data,
        *,
        num_particles: int | None = None,
        seed: Seed = 0,
        memory: int = BUDGET,
        near: Tensor | None = None,
        **settings: Any,
    ) -> Particles:
        """K weighted particles for each row.

        Args:
            program: model and guide.
            x: rows, (N, ...).
            num_particles: K; None for the engine's own default.
            seed: of everything.
            memory: byte budget of the evaluations, besides the particles themselves.
            near: points (S, N, D) where to begin, see `prepare`.
            settings: replace fields of the engine for this call.

        Returns:
            Particles with log w in nats, (K, N); the mean weight is unbiased for p(x).
        """
        count = self.default_particles if num_particles is None else num_particles
        positive(num_particles=count, memory=memory)
        engine = replace(self, **settings) if settings else self
        begin = {} if near is None else {"near": near}  # an engine that was written without it still serves
        sampler = engine.prepare(program, as_rows(x), seed=derive(seed, PREPARED), memory=memory, **begin)
        if engine.pilot_particles:
            sampler = sampler.adapt(sampler.draw(engine.pilot_particles, derive(seed, PILOT)))
        return sampler.draw(count, derive(seed, REPORTED))
