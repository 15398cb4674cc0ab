"""Where z can be, given x: every engine takes a program and rows and returns `Particles`.

An engine is an object that is called, ``engine(program, x, num_particles=K, seed=0) -> Particles``. Its weights make
``mean(exp(log_weights))`` an unbiased estimate of p(x), row by row. `Laplace(num_starts=16)` is `laplace` with other
settings, and serves wherever an engine is asked for. `hamiltonian` makes `Chains` instead, which have no weights.
"""

from pyro_vae.posterior.annealing import Annealed, annealed
from pyro_vae.posterior.chains import Chains, Hamiltonian, hamiltonian
from pyro_vae.posterior.engine import Engine, Sampler
from pyro_vae.posterior.local import Laplace, laplace
from pyro_vae.posterior.particles import Particles
from pyro_vae.posterior.proposals import FromGuide, FromPrior, from_guide, from_prior
from pyro_vae.posterior.starts import at_guide, at_modes, at_points, at_prior

__all__ = [
    "Annealed",
    "Chains",
    "Engine",
    "FromGuide",
    "FromPrior",
    "Hamiltonian",
    "Laplace",
    "Particles",
    "Sampler",
    "annealed",
    "at_guide",
    "at_modes",
    "at_points",
    "at_prior",
    "from_guide",
    "from_prior",
    "hamiltonian",
    "laplace",
]
