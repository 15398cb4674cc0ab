"""What `pyro-vae fit` is asked for, and what it makes of it: the data, their split, the VAE and the objective."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from pyro_vae.data import NAMES, Data, Splits, load
from pyro_vae.learning.objectives import ELBO, Objective
from pyro_vae.model import nets
from pyro_vae.model.vae import VAE
from pyro_vae.rows import positive
from pyro_vae.runs import parts
from pyro_vae.seeds import derive

DATA, WEIGHTS = 0, 2
"""Sub-streams of a run's seed: the split, the initial weights."""


@dataclass(frozen=True)
class Arguments:
    """What `pyro-vae fit` was asked for.

    A path in `data` is made absolute, so that it means the same file from everywhere; `scale` None is "learned" where the
    likelihood has one. `parts` says what the names mean.

    Raises:
        ValueError: an option that the part it is for does not have, or two that do not go together.
    """

    data: str
    latent: int = 20
    prior: str = "standard"
    likelihood: str = "normal"
    scale: str | None = None
    guide: str = "diagonal"
    missing: bool = False
    hidden: tuple[int, ...] = (400,)
    transform: str = "none"
    objective: str = "elbo"
    beta: float = 1.0
    free_bits: float = 0.0
    particles: int | None = None
    epochs: int = 40
    batch_size: int = 128
    lr: float = 1e-3
    clip_norm: float | None = None
    patience: int | None = None
    valid: float = 0.1
    test: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        """Make what has several spellings one."""
        object.__setattr__(self, "data", _located(self.data))
        if self.likelihood in parts.SCALED:
            object.__setattr__(self, "scale", "learned" if self.scale is None else self.scale)
        elif self.scale is not None:
            raise ValueError(
                f"--scale {self.scale} is for --likelihood {', '.join(parts.SCALED)} alone: leave it out with "
                f"--likelihood {self.likelihood}."
            )
        if self.missing and self.transform != "none":
            raise ValueError(f"--transform {self.transform} takes no missing values: leave it out, or leave out --missing.")
        weighted = self.beta != 1.0 or self.free_bits != 0.0
        if self.objective != "elbo" and weighted:
            raise ValueError(
                f"--beta and --free-bits are for --objective elbo alone: leave them out with {self.objective}."
            )

    def read(self) -> tuple[Data, Splits]:
        """The data as loaded, and its split."""
        data = load(self.data)
        return data, data.split(valid=self.valid, test=self.test, seed=derive(self.seed, DATA))

    def build(self, data: Data) -> VAE:
        """A new VAE for the rows of `data`, its weights drawn from the seed."""
        positive(latent=self.latent)
        size = data.x.shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(self.seed, WEIGHTS))
            sizes = parts.Sizes(self.latent, size, self.hidden, data.levels or 256)
            likelihood = parts.LIKELIHOODS[self.likelihood](sizes, self.scale, self.missing)
            body = nets.MLP(size, hidden=self.hidden)
            encoder = nets.Log1p(body) if self.likelihood in parts.COUNTS else body
            return VAE(
                prior=parts.PRIORS[self.prior](sizes),
                likelihood=likelihood,
                guide=parts.GUIDES[self.guide](encoder, self.latent),
            )

    def aim(self, vae: VAE) -> Objective:
        """The objective for the VAE that `build` made: its KL exact where there is a formula."""
        if self.objective != "elbo":
            return parts.objective(self.objective, self.particles)
        kl = parts.kl_for(vae)
        return ELBO(kl=kl, beta=self.beta, free_bits=self.free_bits, num_particles=self.particles or 1)

    def differences(self, then: Arguments) -> list[str]:
        """What is other than it was `then`, each as the command line calls it."""
        return [
            f"{'DATA' if name == 'data' else '--' + name.replace('_', '-')} was {old!r} and is {getattr(self, name)!r}"
            for name, old in vars(then).items()
            if old != getattr(self, name)
        ]


def _located(data: str) -> str:
    """The absolute path of a file or folder; a name, or what is not there, as it is."""
    path = Path(data).expanduser()
    if data in NAMES or not path.exists():
        return data
    # A link to a file keeps its own name: the suffix says how to read it.
    return str(path.resolve() if path.is_dir() else path.parent.resolve() / path.name)
