"""Importance sampling from the two distributions a program has anyway: its prior and its guide.

* `from_prior`: w = p(x | z), z ~ p(z). Naive Monte Carlo, unbiased for p(x) and hopeless where the posterior is a
  small part of the prior, that is nearly always.
* `from_guide`: w = p(x, z) / q(z | x), z ~ q(z | x). The importance-weighted bound of Burda, Grosse & Salakhutdinov 2016
  (arXiv:1509.00519); its log is below log p(x) in expectation, by much where q is narrower than the posterior.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae.layouts import Values
from pyro_vae.log_joint import LogJoint
from pyro_vae.memory import BUDGET, in_chunks
from pyro_vae.posterior.engine import Engine, Sampler
from pyro_vae.posterior.particles import Particles, rounding_error
from pyro_vae.program import Program
from pyro_vae.rows import Rows, take
from pyro_vae.seeds import Seed, seeded


class Proposal(Sampler):
    """Draws from the prior or the guide of a program, ready from the beginning."""

    def __init__(self, program: Program, rows: Rows, memory: int, *, guided: bool) -> None:
        self.program, self.rows, self.memory, self.guided = program, rows, memory, guided
        self.cost = torch.zeros(len(rows[0]), dtype=torch.long, device=rows[0].device)
        self.doubts = ("",) * len(rows[0])

    def draw(self, num_particles: int, seed: Seed, exact: Values | None = None) -> Particles:
        """See `Sampler.draw`; the guide runs once a row."""
        drawn = self.program.sample if self.guided else self.program.sample_prior
        with seeded(seed, self.rows[0].device):
            z, log_q = drawn(self.rows, num_particles)
        if exact is not None:
            z = {name: torch.cat([exact[name][None], value[1:]]) for name, value in z.items()}
            with torch.no_grad():
                first = self.program.guide_density(self.rows).of_sites({name: value[:1] for name, value in z.items()})
            log_q = torch.cat([first, log_q[1:]])
        # Of the prior's draws log p(z) cancels; leaving it out of both leaves its rounding out as well.
        density = _joint if self.guided else _likelihood
        log_p = in_chunks(self.program, self.rows, z, density, self.memory)
        log_q = log_q if self.guided else torch.zeros_like(log_p)
        return Particles(
            log_p - log_q,
            z,
            rounding_error(log_p, log_q, self.rows[0].dtype),
            info={"engine": "guide" if self.guided else "prior", "evaluations": self.cost + num_particles},
        )

    def log_density(self, u: Tensor, index: Tensor) -> Tensor:
        """See `Sampler.log_density`."""
        rows = take(self.rows, index)
        with torch.no_grad():
            return self.program.guide_density(rows)(u) if self.guided else self.program.log_joint(rows).prior(u)

    def take(self, index: Tensor) -> Proposal:
        """See `Sampler.take`."""
        return Proposal(self.program, take(self.rows, index), self.memory, guided=self.guided)


def _joint(log_joint: LogJoint, z: Values) -> Tensor:
    return log_joint.of_sites(z)


def _likelihood(log_joint: LogJoint, z: Values) -> Tensor:
    return log_joint.likelihood_of_sites(z)


@dataclass(frozen=True)
class FromPrior(Engine):
    """K draws of the prior, weighted by the likelihood: log w = log p(x | z), in nats. The guide is not used."""

    name = "prior"
    default_particles = 10_000

    def prepare(
        self, program: Program, rows: Rows, *, seed: Seed = 0, memory: int = BUDGET, near: Tensor | None = None
    ) -> Proposal:
        """See `Engine.prepare`; `near` is of no use here."""
        return Proposal(program, rows, memory, guided=False)


@dataclass(frozen=True)
class FromGuide(Engine):
    """K draws of the guide, weighted by p(x, z) / q(z | x): log w = log p(x, z) - log q(z | x), in nats.

    Under a guide that is too narrow few rows meet the large weights that they lack. Those that met none pass for reliable,
    and are the ones that are low: judge on one set of draws and report another, as the cascade does.
    """

    name = "guide"
    default_particles = 1_000

    def prepare(
        self, program: Program, rows: Rows, *, seed: Seed = 0, memory: int = BUDGET, near: Tensor | None = None
    ) -> Proposal:
        """See `Engine.prepare`; `near` is of no use here."""
        return Proposal(program, rows, memory, guided=True)


from_prior, from_guide = FromPrior(), FromGuide()
