"""A variational auto-encoder: a prior, a likelihood and a guide, read as a Pyro program.

    model:  z_i ~ p(z),  x_i ~ p(x | z_i)   for the rows i of one plate "data"
    guide:  z_i ~ q(z | x_i)

For p(z) = N(0, I) and p(x | z) = N(f(z), s^2 I) this is Kingma & Welling, 2014 (arXiv:1312.6114). Any part may read
conditions y as well (Sohn, Lee & Yan 2015): x is then a tuple (rows, y), and p(x | y) is modelled.
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
from pyro_vae.model import conditions
from pyro_vae.model.component import ForeignError, describe, difference, rebuild
from pyro_vae.model.filling import Filling
from pyro_vae.model.fitting import as_parts, require_fit, row_shape
from pyro_vae.model.guides import Guide
from pyro_vae.model.imputation import draw_missing
from pyro_vae.model.likelihoods import Likelihood
from pyro_vae.model.priors import Prior
from pyro_vae.parameters import evaluating, register, require_place
from pyro_vae.posterior import laplace
from pyro_vae.posterior.engine import Engine
from pyro_vae.program import Program
from pyro_vae.rows import Data, Rows, as_rows, positive, require_finite
from pyro_vae.seeds import Seed, seeded

# Names in Pyro's param store, one for each VAE of the process. Kept outside of the objects, so that a deep copy, which is a
# VAE of its own, gets a name of its own and not its original's parameters.
_names: weakref.WeakKeyDictionary[VAE, str] = weakref.WeakKeyDictionary()
_count = itertools.count()


class VAE(nn.Module, Program):
    """A VAE as a `Program`: everything that takes a program takes it, and so does plain Pyro.

    A module of your own whose `forward` returns a distribution may stand for any of the three.

    Args:
        prior: p(z), e.g. `priors.StandardNormal(20)`.
        likelihood: p(x | z), e.g. `likelihoods.Normal(nets.MLP(20, 784, hidden=(400,)), scale=likelihoods.Learned())`.
        guide: q(z | x), e.g. `guides.DiagonalNormal(nets.MLP(784, hidden=(400,)), latent_dim=20)`.

    Raises:
        ValueError: parts that do not go together, both named: latent sizes or shapes of a row that differ, a distribution
            without a density where one is needed.

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

    def __init__(self, prior: Prior | nn.Module, likelihood: Likelihood | nn.Module, guide: Guide | nn.Module) -> None:
        nn.Module.__init__(self)
        self.prior, self.likelihood, self.encoder = as_parts(prior, likelihood, guide)
        like, given = self._place(), conditions.examples(self, self._place())
        shape = row_shape(self.prior.latent_dim, self.likelihood, like, given)
        self.filling = Filling(shape).to(like) if self.likelihood.missing else None
        with torch.no_grad(), evaluating({"vae": self}):
            require_fit(self, like.new_zeros(1, *shape), given)

    def __repr__(self) -> str:
        """The call that makes it."""
        return f"VAE(\n  prior={self.prior!r},\n  likelihood={self.likelihood!r},\n  guide={self.encoder!r},\n)"

    @property
    def missing(self) -> bool:
        """Whether NaN in x is a missing value."""
        return self.likelihood.missing

    def model(self, x: Tensor | None = None, *given: Tensor, size: int | None = None) -> Tensor:
        """The generative process, a Pyro model with one plate "data" and the sites "z" and "x".

        Args:
            x: rows to observe, (N, *event_shape); None draws them.
            given: the conditions that the parts read, each (N, ...).
            size: N where `x` is None.

        Returns:
            The rows, observed or drawn.
        """
        self._register("prior", self.prior)
        self._register("likelihood", self.likelihood)
        if x is None and size is None:
            raise ValueError("model() needs rows to observe, model(x), or a number of rows to draw, model(size=64).")
        with pyro.plate("data", len(x) if x is not None else size):
            z = pyro.sample("z", self.p_z(*given))
            told = x is not None and self.training
            p = self.likelihood.seeing(x, z, *given) if told else self.p_x(z, *given)  # type: ignore[arg-type]
            rows: Tensor = pyro.sample("x", p, obs=x)
        return rows

    def guide(self, x: Tensor, *given: Tensor, size: int | None = None) -> Tensor:
        """The encoder as a Pyro guide: draws "z" for the rows `x`, (N, *event_shape) -> (N, D). `size` is not used."""
        self._register("guide", self.encoder)
        if self.filling is not None:
            self._register("filling", self.filling)
        with pyro.plate("data", len(x)):
            z: Tensor = pyro.sample("z", self.q_z(x, *given))
        return z

    def p_z(self, *given: Tensor) -> Any:
        """p(z), batch shape () or, where the prior reads conditions, (N,); event shape (D,)."""
        return self.prior(self.encoder) if self.prior.reads_guide else conditions.apply(self.prior, given=given)

    def p_x(self, z: Tensor, *given: Tensor) -> Any:
        """p(x | z) of latents (..., N, D): batch shape (..., N)."""
        return self.likelihood(z, *given)

    def q_z(self, x: Tensor, *given: Tensor) -> Any:
        """q(z | x) of rows (N, *event_shape): batch shape (N,), event shape (D,)."""
        q = self.encoder(x if self.filling is None else self.filling(x), *given)
        return self.encoder.refine(q, lambda z: self.p_z(*given).log_prob(z) + self.p_x(z, *given).log_prob(x))

    def _register(self, role: str, module: nn.Module) -> None:
        """`pyro.module` under a name of this VAE's own."""
        if self not in _names:
            _names[self] = f"vae{next(_count)}"
        register(f"{_names[self]}.{role}", module)

    def generate(self, size: int, given: Data | None = None, *, seed: Seed = 0, noise: bool = True) -> Tensor:
        """Draws from the model, (size, *event_shape).

        Args:
            size: number of rows.
            given: what a conditional VAE reads beside its rows: a tensor (size, ...), or a tuple of them.
            seed: of the draws.
            noise: draw x ~ p(x | z); False gives the mean E[x | z], which pictures usually show.

        Raises:
            ValueError: conditions that are missing, not needed, or refused.
        """
        positive(size=size)
        told = () if given is None else tuple(map(torch.as_tensor, given if isinstance(given, (tuple, list)) else (given,)))
        self._require_given(told, size)
        with torch.no_grad(), evaluating({"vae": self}), seeded(seed, self._place().device):
            z = self.p_z(*told).expand((size,)).sample()
            distribution = self.p_x(z, *told)
            return distribution.sample() if noise else self.likelihood.centre(distribution)

    def encode(self, x: Data) -> Any:
        """q(z | x) as a distribution of batch shape (N,), no gradient."""
        rows = self._checked(x)
        with torch.no_grad(), evaluating({"vae": self}):
            return self.q_z(*rows)

    def reconstruct(self, x: Data) -> Tensor:
        """E[x | z] at z = E_q[z | x], (N, *event_shape); without such means, see the parts' `centre`."""
        rows = self._checked(x)
        with torch.no_grad(), evaluating({"vae": self}):
            z = self.encoder.centre(self.q_z(*rows))
            return self.likelihood.centre(self.p_x(z, *rows[1:]))

    def impute(
        self,
        x: Data,
        num_draws: int = 1,
        *,
        method: Engine = laplace,
        num_particles: int | None = None,
        seed: Seed = 0,
    ) -> Tensor:
        """Posterior draws of the missing values, NaN in x, given the values that were seen.

        Args:
            x: rows (N, *event_shape), or a tuple of them and conditions.
            num_draws: M.
            method: the engine that finds p(z | x_seen).
            num_particles: K of that engine, None for its default. Draws are taken from these K: well above M.
            seed: of all draws.

        Returns:
            rows without missing values, (M, N, *event_shape); what was seen is as it was.

        Raises:
            ValueError: the likelihood takes no missing values; rows that it cannot take.
            TypeError: `method` is no engine.
        """
        positive(num_draws=num_draws)
        if not self.missing:
            raise ValueError(f"The likelihood {self.likelihood!r} takes no missing values: build it with missing=True.")
        if not isinstance(method, Engine):
            raise TypeError(
                f"method={getattr(method, '__name__', repr(method))} draws no latents: give an engine of pv.posterior, "
                "such as pv.posterior.laplace."
            )
        return draw_missing(self, self.p_x, self._checked(x), num_draws, method, num_particles, seed)

    def usable_rows(self, rows: Rows) -> tuple[Tensor, list[str]]:
        """All rows, or a `ValueError`: a VAE knows what its likelihood takes and says so before any work."""
        self._checked(rows)
        count = len(rows[0])
        return torch.ones(count, dtype=torch.bool, device=rows[0].device), [""] * count

    def template(self, count: int) -> Rows:
        """See `Program.template`."""
        if needed := conditions.count_read(self):
            raise ValueError(
                f"This VAE reads {needed} tensor(s) beside its rows: give like=(x, y), some rows of real data."
            )
        return (self._place().new_zeros(count, *self._event_shape()),)

    def check_training(self, x: Data) -> None:
        """Refuse rows that the model cannot be fitted to.

        Raises:
            ValueError: as `usable_rows`, and data on which the likelihood has no finite maximum.
        """
        self.likelihood.check_training(self._checked(x)[0])

    def _checked(self, x: Data) -> Rows:
        rows = as_rows(x)
        conditions.check(self, rows[1:])
        require_place({"vae": self}, rows)
        event_shape = self._event_shape()
        if tuple(rows[0].shape[1:]) != event_shape:
            raise ValueError(
                f"x has rows of shape {tuple(rows[0].shape[1:])}, this VAE models rows of shape {event_shape}: "
                "reshape x, or build the decoder for it."
            )
        require_finite(rows, missing=self.missing)
        self.likelihood.check(rows[0])
        return rows

    def _require_given(self, given: Rows, size: int) -> None:
        if len(given) != (needed := conditions.count_read(self)):
            raise ValueError(
                f"This VAE reads {needed} tensor(s) beside its rows, and generate was given {len(given)}: "
                "give generate(size, given=y), or a tuple of them."
            )
        for part in given:
            if part.dim() == 0:
                raise ValueError(
                    f"given={part.item()} is a single number: give one condition for each row, "
                    f"torch.full(({size},), {part.item()})."
                )
            if len(part) != size:
                raise ValueError(f"given has {len(part)} rows and size={size}: give one condition for each row.")
        try:
            conditions.check(self, given)
        except ValueError as error:
            raise ValueError(f"{error} In `given`, x[1] is the first tensor, x[2] the second, and so on.") from error

    def _event_shape(self) -> tuple[int, ...]:
        """Shape of one row, as the likelihood draws it."""
        like = self._place()
        return row_shape(self.prior.latent_dim, self.likelihood, like, conditions.examples(self, like))

    def _place(self) -> Tensor:
        return next(itertools.chain(self.parameters(), self.buffers()))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write parameters and description to one file, `path` with the suffix ``.safetensors``, atomically.

        Raises:
            OSError: it cannot be written; what was there before is untouched.
        """
        files.write(files.with_suffix(path), "vae", self.state_dict(), _header(self))


def _header(vae: VAE) -> dict[str, Any]:
    """What a file says of a VAE beside its tensors."""
    parts = {"prior": vae.prior, "likelihood": vae.likelihood, "guide": vae.encoder}
    return {name: describe(part) for name, part in parts.items()}


def load(path: str | os.PathLike[str], into: VAE | None = None) -> VAE:
    """A VAE from a file that `VAE.save` wrote; on the CPU, in the dtype it was saved in.

    Args:
        path: as given to `save`.
        into: a VAE to fill, needed where it holds modules of your own, which the file cannot describe.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file of ours, damaged, cut short or of a newer version; or it does not fit `into`: other
            tensors, or other parts or settings, the first of which is named. Of modules of your own only the tensors are
            compared.
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
    else:
        for name, mine in _header(into).items():
            if found := difference(header[name], mine, name):
                raise ValueError(
                    f"{path} does not fit `into`, file and VAE differ in {found}: build the VAE as it was when saved."
                )
    files.copy_into(into.state_dict(), tensors, path)
    return into
