"""A variational auto-encoder: a prior, a likelihood and a guide, read as a Pyro program.

    model:  z_i ~ p(z),  x_i ~ p(x | z_i)   for the rows i of one plate "data"
    guide:  z_i ~ q(z | x_i)

For p(z) = N(0, I) and p(x | z) = N(f(z), s^2 I) this is Kingma & Welling, 2014 (arXiv:1312.6114).
"""

from __future__ import annotations

import itertools
import os
import weakref
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyro_vae import files
from pyro_vae.model.component import ForeignError, describe, rebuild
from pyro_vae.model.guides import Guide
from pyro_vae.model.likelihoods import Likelihood
from pyro_vae.model.priors import Prior
from pyro_vae.parameters import evaluating, require_place
from pyro_vae.program import Program
from pyro_vae.rows import Data, Rows, as_rows, positive, require_finite
from pyro_vae.seeds import Seed, seeded

# Names in Pyro's param store, one for each VAE of the process. Kept outside of the objects, so that a deep copy, which is a
# VAE of its own, gets a name of its own and not its original's parameters.
_names: weakref.WeakKeyDictionary[VAE, str] = weakref.WeakKeyDictionary()
_count = itertools.count()


class VAE(nn.Module, Program):
    """A VAE as a `Program`: everything that takes a program takes it, and so does plain Pyro.

    Args:
        prior: p(z), e.g. `priors.StandardNormal(20)`.
        likelihood: p(x | z), e.g. `likelihoods.Normal(nets.MLP(20, 784, hidden=(400,)), scale=likelihoods.Learned())`.
        guide: q(z | x), e.g. `guides.DiagonalNormal(nets.MLP(784, hidden=(400,)), latent_dim=20)`.

    Raises:
        ValueError: the parts disagree on the number of latent dimensions.

    Examples:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE(
        ...     prior=pv.priors.StandardNormal(2),
        ...     likelihood=pv.likelihoods.Normal(pv.nets.MLP(2, 5, hidden=(8,)), scale=0.5),
        ...     guide=pv.guides.DiagonalNormal(pv.nets.MLP(5, hidden=(8,)), latent_dim=2),
        ... )
        >>> vae.generate(3).shape
        torch.Size([3, 5])
    """

    def __init__(self, prior: Prior, likelihood: Likelihood, guide: Guide) -> None:
        nn.Module.__init__(self)
        for name, part, kind in (
            ("prior", prior, Prior),
            ("likelihood", likelihood, Likelihood),
            ("guide", guide, Guide),
        ):
            if not isinstance(part, kind):
                raise TypeError(f"{name} is a {type(part).__name__}: give a {kind.__module__}.{kind.__name__}.")
        sizes = {f"prior {prior!r}": prior.latent_dim, f"guide {guide!r}": guide.latent_dim}
        decoder_size = getattr(likelihood.decoder, "in_features", None)
        if isinstance(decoder_size, int):
            sizes[f"decoder {likelihood.decoder!r}"] = decoder_size
        if len(set(sizes.values())) > 1:
            told = "; ".join(f"{part} has {size}" for part, size in sizes.items())
            raise ValueError(f"The parts disagree on the number of latent dimensions: {told}.")
        self.prior = prior
        self.likelihood = likelihood
        self.encoder = guide
        self._event_shape()

    def __repr__(self) -> str:
        """The call that makes it."""
        return f"VAE(\n  prior={self.prior!r},\n  likelihood={self.likelihood!r},\n  guide={self.encoder!r},\n)"

    def model(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """The generative process, a Pyro model with one plate "data" and the sites "z" and "x".

        Args:
            x: rows to observe, (N, *event_shape); None draws them.
            size: N where `x` is None.

        Returns:
            The rows, observed or drawn.
        """
        self._register("prior", self.prior)
        self._register("likelihood", self.likelihood)
        if x is None and size is None:
            raise ValueError("model() needs rows to observe, model(x), or a number of rows to draw, model(size=64).")
        with pyro.plate("data", len(x) if x is not None else size):
            z = pyro.sample("z", self.prior())
            rows: Tensor = pyro.sample("x", self.likelihood(z), obs=x)
        return rows

    def guide(self, x: Tensor, size: int | None = None) -> Tensor:
        """The encoder as a Pyro guide: draws "z" for the rows `x`, (N, *event_shape) -> (N, D). `size` is not used."""
        self._register("guide", self.encoder)
        with pyro.plate("data", len(x)):
            z: Tensor = pyro.sample("z", self.encoder(x))
        return z

    def _register(self, role: str, module: nn.Module) -> None:
        """`pyro.module` under a name of this VAE's own, after a look that no entry stands for a parameter it had before."""
        if self not in _names:
            _names[self] = f"vae{next(_count)}"
        name, store = f"{_names[self]}.{role}", pyro.get_param_store()
        for inner, parameter in module.named_parameters():
            entry = f"{name}$$${inner}"
            if entry in store and store[entry] is not parameter:
                del store[entry]
        pyro.module(name, module)

    def generate(self, size: int, *, seed: Seed = 0, noise: bool = True) -> Tensor:
        """Draws from the model, (size, *event_shape).

        Args:
            size: number of rows.
            seed: of the draws.
            noise: draw x ~ p(x | z); False gives the mean E[x | z], which pictures usually show.
        """
        positive(size=size)
        with torch.no_grad(), evaluating({"vae": self}), seeded(seed, self._place().device):
            distribution = self.likelihood(self.prior().sample((size,)))
            rows: Tensor = distribution.sample() if noise else distribution.mean
        return rows

    def encode(self, x: Data) -> Any:
        """q(z | x) as a distribution of batch shape (N,), no gradient."""
        rows = self._checked(x)
        with torch.no_grad(), evaluating({"vae": self}):
            return self.encoder(rows[0])

    def reconstruct(self, x: Data) -> Tensor:
        """E[x | z] at z = E_q[z | x], (N, *event_shape)."""
        q = self.encode(x)
        with torch.no_grad(), evaluating({"vae": self}):
            mean: Tensor = self.likelihood(q.mean).mean
        return mean

    def usable_rows(self, rows: Rows) -> tuple[Tensor, list[str]]:
        """All rows, or a `ValueError`: a VAE knows what its likelihood takes and says so before any work."""
        self._checked(rows)
        count = len(rows[0])
        return torch.ones(count, dtype=torch.bool, device=rows[0].device), [""] * count

    def template(self, count: int) -> Rows:
        """See `Program.template`."""
        return (self._place().new_zeros(count, *self._event_shape()),)

    def check_training(self, x: Data) -> None:
        """Refuse rows that the model cannot be fitted to.

        Raises:
            ValueError: as `usable_rows`, and data on which the likelihood has no finite maximum.
        """
        self.likelihood.check_training(self._checked(x)[0])

    def _checked(self, x: Data) -> Rows:
        rows = as_rows(x)
        if len(rows) != 1:
            raise ValueError(
                f"This VAE models one tensor of rows, but was given a tuple of {len(rows)}: give the first alone "
                "(of a data set: items that are rows, without labels)."
            )
        require_place({"vae": self}, rows)
        event_shape = self._event_shape()
        if tuple(rows[0].shape[1:]) != event_shape:
            raise ValueError(
                f"x has rows of shape {tuple(rows[0].shape[1:])}, this VAE models rows of shape {event_shape}: "
                "reshape x, or build the decoder for it."
            )
        require_finite(rows)
        self.likelihood.check(rows[0])
        return rows

    def _event_shape(self) -> tuple[int, ...]:
        """Shape of one row, as the likelihood draws it.

        Raises:
            ValueError: the likelihood cannot be computed from the prior's latents.
        """
        z = self._place().new_zeros(1, self.prior.latent_dim)
        try:
            with torch.no_grad(), evaluating({"vae": self}), pyro.validation_enabled(is_validate=False):
                return tuple(self.likelihood(z).event_shape)
        except (RuntimeError, ValueError) as error:
            told = str(error).rstrip(".")
            raise ValueError(
                f"The likelihood {self.likelihood!r} cannot take latents of shape {tuple(z.shape)}: {told}."
            ) from error

    def _place(self) -> Tensor:
        return next(itertools.chain(self.parameters(), self.buffers()))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write parameters and description to one file, `path` with the suffix ``.safetensors``, atomically.

        Raises:
            OSError: it cannot be written; what was there before is untouched.
        """
        parts = {"prior": self.prior, "likelihood": self.likelihood, "guide": self.encoder}
        header = {name: describe(part) for name, part in parts.items()}
        files.write(files.with_suffix(path), "vae", self.state_dict(), header)


def load(path: str | os.PathLike[str], into: VAE | None = None) -> VAE:
    """A VAE from a file that `VAE.save` wrote; on the CPU, in the dtype it was saved in.

    Args:
        path: as given to `save`.
        into: a VAE to fill, needed where it holds modules of your own, which the file cannot describe.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file of ours, damaged, cut short or of a newer version; or it does not fit `into`.
    """
    path = files.with_suffix(path)
    tensors, header = files.read(path, "vae")
    if into is None:
        try:
            into = VAE(**{name: rebuild(header[name]) for name in ("prior", "likelihood", "guide")})
        except ForeignError as error:
            raise ValueError(
                f"{path} holds a {error.args[0]} of your own, which a file cannot describe: "
                "build the VAE and call pv.load(path, into=vae)."
            ) from error
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            told = str(error).rstrip(".")
            raise ValueError(f"{path} describes a VAE that this pyro_vae cannot build: {told}.") from error
        floating = [value.dtype for value in tensors.values() if value.dtype.is_floating_point]
        into = into.to(floating[0]) if floating else into
    files.copy_into(into.state_dict(), tensors, path)
    return into
