"""A run on the disk: a folder with its arguments, its model, its history and its figures.

    run.json                 what was asked for
    checkpoint.safetensors   where the fit is
    vae.safetensors          the fitted VAE, for pv.load
    history.json             the learning curve in numbers

The arguments say which data, which split and which VAE; so whoever opens the folder later gets the held-out rows that the
fit never saw. This is the one place where names turn into objects.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from pyro_vae.data import Data, Splits, binarise, dequantise, load, threshold
from pyro_vae.files import write_bytes
from pyro_vae.learning import checkpoint
from pyro_vae.learning.history import History
from pyro_vae.model import guides, likelihoods, nets, priors
from pyro_vae.model.vae import VAE
from pyro_vae.model.vae import load as load_vae
from pyro_vae.rows import positive
from pyro_vae.seeds import derive

DATA, VIEW, WEIGHTS = 0, 1, 2
"""Sub-streams of a run's seed: the split, the fixed view of held-out rows, the initial weights."""


@dataclass(frozen=True)
class Arguments:
    """What `pyro-vae fit` was asked for."""

    data: str
    latent: int = 20
    likelihood: str = "normal"
    scale: str = "learned"
    guide: str = "diagonal"
    hidden: tuple[int, ...] = (400,)
    transform: str = "none"
    beta: float = 1.0
    epochs: int = 40
    batch_size: int = 128
    lr: float = 1e-3
    clip_norm: float | None = None
    patience: int | None = None
    valid: float = 0.1
    test: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class Run:
    """A folder and its arguments."""

    folder: Path
    arguments: Arguments

    @classmethod
    def begin(cls, folder: Path, arguments: Arguments) -> Run:
        """A new run in `folder`, or the same one again.

        Raises:
            ValueError: the folder holds a run with other arguments; says which.
            OSError: it cannot be written.
        """
        record = folder / "run.json"
        # Without a checkpoint the run never began: its fit refused the arguments, or was killed before the first step.
        if record.exists() and (folder / checkpoint.NAME).exists():
            then = cls.open(folder).arguments
            differ = [
                f"--{name.replace('_', '-')} was {old!r} and is {getattr(arguments, name)!r}"
                for name, old in vars(then).items()
                if old != getattr(arguments, name)
            ]
            if differ:
                raise ValueError(f"{folder} holds another run: {'; '.join(differ)}. Give another --out.")
        else:
            write_bytes(record, json.dumps(asdict(arguments), indent=2).encode())
        return cls(folder, arguments)

    @classmethod
    def open(cls, folder: Path) -> Run:
        """The run in `folder`.

        Raises:
            FileNotFoundError: there is none.
            ValueError: its run.json cannot be read.
        """
        record = folder / "run.json"
        if not record.is_file():
            raise FileNotFoundError(f"{folder} holds no run: there is no {record.name} in it. Begin with `pyro-vae fit`.")
        try:
            kept = json.loads(record.read_text())
            return cls(folder, Arguments(**{**kept, "hidden": tuple(kept["hidden"])}))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{record} is no record of a run ({error}).") from error

    def data(self) -> tuple[Data, Splits]:
        """The data as loaded, and its split."""
        data = load(self.arguments.data)
        a = self.arguments
        return data, data.split(valid=a.valid, test=a.test, seed=derive(a.seed, DATA))

    def view(self, x: Tensor) -> Tensor:
        """Held-out rows as the likelihood sees them: the run's transform, drawn once from the run's seed."""
        with_seed = derive(self.arguments.seed, VIEW)
        if self.arguments.transform == "binarise":
            return binarise(x, seed=with_seed)
        if self.arguments.transform == "dequantise":
            return dequantise(x, self._levels(), seed=with_seed)
        return threshold(x) if self.arguments.transform == "threshold" else x

    def transform(self, data: Data) -> Callable[[Tensor], Tensor] | None:
        """What `fit` does to each batch, or None."""
        chosen = self.arguments.transform
        if chosen == "none":
            return None
        known: dict[str, Callable[[Tensor], Tensor]] = {
            "binarise": binarise,
            "threshold": threshold,
            "dequantise": Dequantise(data.levels or 256),
        }
        return known[chosen]

    def _levels(self) -> int:
        return load(self.arguments.data).levels or 256

    def build(self, data: Data) -> VAE:
        """A new VAE for the rows of `data`, its weights drawn from the run's seed."""
        a = self.arguments
        positive(latent=a.latent)
        size = data.x.shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(a.seed, WEIGHTS))
            decoder = nets.MLP(a.latent, size, hidden=a.hidden[::-1])
            encoder = nets.MLP(size, hidden=a.hidden)
            kinds = {"diagonal": guides.DiagonalNormal, "full": guides.FullNormal}
            likelihood: likelihoods.Likelihood
            if a.likelihood == "bernoulli":
                likelihood = likelihoods.Bernoulli(decoder)
            else:
                likelihood = likelihoods.Normal(decoder, scale=_scale(a.scale, a, size))
            return VAE(
                prior=priors.StandardNormal(a.latent),
                likelihood=likelihood,
                guide=kinds[a.guide](encoder, latent_dim=a.latent),
            )

    def finish(self, vae: VAE, history: History) -> None:
        """Write the fitted VAE and the history."""
        vae.save(self.folder / "vae")
        write_bytes(self.folder / "history.json", json.dumps(history.to_dict(), indent=2).encode())

    def fitted(self) -> VAE:
        """The fitted VAE.

        Raises:
            FileNotFoundError: the fit has not ended yet.
        """
        try:
            return load_vae(self.folder / "vae")
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{self.folder} has no fitted VAE yet: let the same `pyro-vae fit` command end first."
            ) from error


@dataclass(frozen=True)
class Dequantise:
    """`data.dequantise` with its number of grey levels, as a transform that names itself in checkpoints."""

    levels: int

    def __call__(self, x: Tensor) -> Tensor:
        """Rows of grey levels to rows of densities, same shape."""
        return dequantise(x, self.levels)


def _scale(name: str, a: Arguments, size: int) -> likelihoods.Scale:
    """A scale by its name on the command line, or a number."""
    if name == "learned":
        return likelihoods.Learned()
    if name == "per-dimension":
        return likelihoods.Learned(size)
    if name == "network":
        return likelihoods.FromNetwork(nets.MLP(a.latent, size, hidden=a.hidden[::-1]))
    try:
        return likelihoods.Fixed(float(name))
    except ValueError as error:
        raise ValueError(f"--scale {name!r} is none of learned, per-dimension, network, nor a positive number.") from error
