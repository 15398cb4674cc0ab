"""Where z can be, given x: every engine takes a program and rows and returns `Particles`.

An engine is a function ``engine(program, x, *, num_particles, seed, memory) -> Particles``. Its weights make
``mean(exp(log_weights))`` an unbiased estimate of p(x), row by row.
"""

from pyro_vae.posterior.annealing import annealed, at_modes, at_prior
from pyro_vae.posterior.mixture import laplace
from pyro_vae.posterior.particles import Particles
from pyro_vae.posterior.proposals import from_guide, from_prior

__all__ = ["Particles", "annealed", "at_modes", "at_prior", "from_guide", "from_prior", "laplace"]
