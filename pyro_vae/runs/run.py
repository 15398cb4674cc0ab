"""A run on the disk: a folder with its arguments, its model, its history and its figures.

    run.json                 what was asked for, and of which data
    checkpoint.safetensors   where the fit is
    vae.safetensors          the fitted VAE, for pv.load
    history.json             the learning curve in numbers

The arguments say which data, which split and which VAE; so whoever opens the folder later gets the held-out rows that the
fit never saw.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from pyro_vae.data import Data, Splits, binarise, dequantise, threshold
from pyro_vae.files import write_bytes
from pyro_vae.learning import checkpoint
from pyro_vae.learning.history import History
from pyro_vae.model.vae import VAE
from pyro_vae.model.vae import load as load_vae
from pyro_vae.runs.arguments import Arguments
from pyro_vae.seeds import derive

VIEW = 1
"""Sub-stream of a run's seed for the fixed view of held-out rows; `arguments` has the others."""


@dataclass(frozen=True)
class About:
    """What a run keeps of its data: the shape of a row, the number of grey levels, the fingerprint."""

    shape: tuple[int, ...]
    levels: int | None
    fingerprint: str

    @classmethod
    def of(cls, data: Data) -> About:
        """About `data`."""
        return cls(tuple(data.shape), data.levels, data.fingerprint())


@dataclass(frozen=True)
class Run:
    """A folder, its arguments, and what is known about its data."""

    folder: Path
    arguments: Arguments
    about: About

    @classmethod
    def begin(cls, folder: Path, arguments: Arguments, data: Data, *, write: bool = True) -> Run:
        """A new run on `data` in `folder`, or the same one again.

        Args:
            folder: of the run.
            arguments: what was asked for.
            data: as loaded.
            write: whether to write the record of a new run; of several processes one does.

        Raises:
            ValueError: the folder holds a run with other arguments or of other data; says which.
            OSError: it cannot be written.
        """
        run, record = cls(folder, arguments, About.of(data)), folder / "run.json"
        # Without a checkpoint the run never began: its fit refused the arguments, or was killed before the first step.
        if record.exists() and (folder / checkpoint.NAME).exists():
            then = cls.open(folder)
            if differ := arguments.differences(then.arguments):
                raise ValueError(f"{folder} holds another run: {'; '.join(differ)}. Give another --out.")
            then._require_same(run.about)
        elif write:
            kept = {"arguments": asdict(arguments), "data": asdict(run.about)}
            write_bytes(record, json.dumps(kept, indent=2).encode())
        return run

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
            asked, about = kept["arguments"], kept["data"]
            arguments = Arguments(**{**asked, "hidden": tuple(asked["hidden"])})
            return cls(folder, arguments, About(**{**about, "shape": tuple(about["shape"])}))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{record} is no record of a run ({error}).") from error

    def data(self) -> tuple[Data, Splits]:
        """The data as loaded, and its split.

        Raises:
            ValueError: they are not what they were when the run began.
        """
        data, splits = self.arguments.read()
        self._require_same(About.of(data))
        return data, splits

    def _require_same(self, now: About) -> None:
        if now != self.about:
            raise ValueError(
                f"{self.arguments.data} has changed since the fit in {self.folder}: it was {self.about.fingerprint}, "
                f"and is {now.fingerprint}. Restore it, or fit again to another --out."
            )

    def view(self, x: Tensor) -> Tensor:
        """Held-out rows as the likelihood sees them: the run's transform, drawn once from the run's seed."""
        with_seed = derive(self.arguments.seed, VIEW)
        if self.arguments.transform == "binarise":
            return binarise(x, seed=with_seed)
        if self.arguments.transform == "dequantise":
            return dequantise(x, self.about.levels or 256, seed=with_seed)
        return threshold(x) if self.arguments.transform == "threshold" else x

    def transform(self) -> Callable[[Tensor], Tensor] | None:
        """What `fit` does to each batch, or None."""
        known: dict[str, Callable[[Tensor], Tensor] | None] = {
            "none": None,
            "binarise": binarise,
            "threshold": threshold,
            "dequantise": Dequantise(self.about.levels or 256),
        }
        return known[self.arguments.transform]

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
