"""Importance sampling from the two distributions a program has anyway: its prior and its guide.

* `from_prior`: w = p(x | z), z ~ p(z). Naive Monte Carlo, unbiased for p(x) and hopeless where the posterior is a
  small part of the prior, that is nearly always.
* `from_guide`: w = p(x, z) / q(z | x), z ~ q(z | x). The importance-weighted bound of Burda, Grosse & Salakhutdinov 2016
  (arXiv:1509.00519); its log is below log p(x) in expectation, by much where q is narrower than the posterior.
"""

from __future__ import annotations

import torch

from pyro_vae.log_joint import LogJoint
from pyro_vae.memory import BUDGET, in_chunks
from pyro_vae.posterior.particles import Particles, rounding_error
from pyro_vae.program import Program
from pyro_vae.rows import Data, as_rows, positive
from pyro_vae.seeds import Seed, seeded


def from_prior(
    program: Program, x: Data, *, num_particles: int = 10_000, seed: Seed = 0, memory: int = BUDGET
) -> Particles:
    """K draws of the prior, weighted by the likelihood.

    Args:
        program: the model; its guide is not used.
        x: rows, (N, ...).
        num_particles: K.
        seed: of the draws.
        memory: byte budget of the evaluations, besides the particles themselves.

    Returns:
        Particles with log w = log p(x | z), in nats.
    """
    positive(num_particles=num_particles, memory=memory)
    rows = as_rows(x)
    with seeded(seed, rows[0].device):
        z, _ = program.sample_prior(rows, num_particles)
    log_weights = in_chunks(program, rows, z, LogJoint.likelihood_of_sites, memory)
    rounding = rounding_error(log_weights, torch.zeros_like(log_weights), rows[0].dtype)
    return Particles(log_weights, z, rounding, info={"engine": "prior", "evaluations": num_particles})


def from_guide(program: Program, x: Data, *, num_particles: int = 1_000, seed: Seed = 0, memory: int = BUDGET) -> Particles:
    """K draws of the guide, weighted by p(x, z) / q(z | x); the guide runs once a row.

    Args:
        program: model and guide.
        x: rows, (N, ...).
        num_particles: K.
        seed: of the draws.
        memory: byte budget of the evaluations, besides the particles themselves.

    Returns:
        Particles with log w = log p(x, z) - log q(z | x), in nats.
    """
    positive(num_particles=num_particles, memory=memory)
    rows = as_rows(x)
    with seeded(seed, rows[0].device):
        z, log_q = program.sample(rows, num_particles)
    log_p = in_chunks(program, rows, z, LogJoint.of_sites, memory)
    return Particles(
        log_p - log_q,
        z,
        rounding_error(log_p, log_q, rows[0].dtype),
        info={"engine": "guide", "evaluations": num_particles},
    )
