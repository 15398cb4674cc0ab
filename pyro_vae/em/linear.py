"""The linear-Gaussian program: factor analysis and probabilistic PCA, with their exact posterior as the guide.

    model:  z_i ~ N(0, I_D),  x_i ~ N(W z_i + m, Psi),  Psi = diag(s^2), for the rows i of one plate "data"
    guide:  z_i | x_i ~ N(M^-1 W' Psi^-1 (x_i - m), M^-1),  M = I + W' Psi^-1 W

so that x ~ N(m, W W' + Psi). Of a row with missing values (NaN) the sums over columns, among them those inside M, have the
columns that were seen alone: the model leaves a factor p(x_j | z) out for each that was not.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, final

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.model import kl  # noqa: F401 - registers the exact KL of a full-covariance Normal
from pyro_vae.model.families.covariance import LowRankNormal
from pyro_vae.model.families.partial import Partial
from pyro_vae.parameters import register, require_place
from pyro_vae.program import Program
from pyro_vae.rows import Data, Rows, as_rows, require_finite, row_blocks

BLOCK = 256
"""Rows at a time where each row has a covariance of its own."""

# Names in Pyro's param store, one for each program of the process; outside of the objects, as a deep copy needs its own.
_names: weakref.WeakKeyDictionary[LinearGaussian, str] = weakref.WeakKeyDictionary()
_count = itertools.count()


@final
class LinearGaussian(nn.Module, Program):
    """A `Program` whose guide is its exact posterior: importance weights through it have no noise.

    `pv.fit` trains it further, and the guide stays exact: it has no parameters of its own.

    Args:
        weight: W, (d, D).
        mean: m, (d,).
        noise: s, positive, (d,), or () for one scale that all columns share.
        log_likelihood: what `log_likelihood` shall be; None if no fit led here.
        converged: what `converged` shall be.

    Attributes:
        weight: a parameter.
        mean: a parameter.
        log_noise: log s, a parameter of the shape that `noise` was given in.
        log_likelihood: mean of log p(x_i) over the rows of the fit in nats, before the first iteration and after each,
            (T + 1,), float64; (1,) for a closed form, (0,) if no fit led here.
        converged: whether the fit reached its tolerance.

    Raises:
        ValueError: shapes that do not go together; a scale that is not positive.

    Examples:
        >>> import torch
        >>> program = LinearGaussian(torch.tensor([[1.0], [2.0]]), torch.zeros(2), torch.tensor([0.5, 0.4]))
        >>> program.log_p(torch.tensor([[0.0, 0.0], [1.0, torch.nan]])).shape
        torch.Size([2])
    """

    def __init__(
        self,
        weight: Tensor,
        mean: Tensor,
        noise: Tensor,
        *,
        log_likelihood: Tensor | None = None,
        converged: bool = True,
    ) -> None:
        nn.Module.__init__(self)
        if weight.dim() != 2 or mean.shape != weight.shape[:1] or noise.shape not in (mean.shape, ()):
            raise ValueError(
                f"weight {tuple(weight.shape)}, mean {tuple(mean.shape)} and noise {tuple(noise.shape)} do not go together"
                ": give (d, D), (d,) and (d,), or () for a noise that all columns share."
            )
        if not bool((noise > 0.0).all()):
            raise ValueError(f"noise={noise.min():.3g} must be positive: it is a standard deviation.")
        self.weight = nn.Parameter(weight.detach().clone())
        self.mean = nn.Parameter(mean.detach().clone())
        self.log_noise = nn.Parameter(noise.detach().log())
        self.log_likelihood = weight.new_zeros(0).double() if log_likelihood is None else log_likelihood
        self.converged = converged

    def __repr__(self) -> str:
        """Sizes, the range of the noise, and how the fit ended."""
        noise = self.noise.detach()
        told = [
            f"{len(noise)} columns, latent_dim={self.weight.shape[1]}",
            f"noise {noise.min():.3g}" + ("" if self.log_noise.dim() == 0 else f" .. {noise.max():.3g}"),
        ]
        if steps := len(self.log_likelihood):
            how = f"after {steps - 1} iterations" if steps > 1 else "in closed form"
            told.append(f"{self.log_likelihood[-1]:.6g} nats a row {how}{'' if self.converged else ', NOT CONVERGED'}")
        return f"LinearGaussian({', '.join(told)})"

    @property
    def missing(self) -> bool:
        """NaN in x is a missing value."""
        return True

    @property
    def noise(self) -> Tensor:
        """s, (d,)."""
        return self.log_noise.exp().expand_as(self.mean)

    def model(self, x: Tensor | None = None, *, size: int | None = None) -> Tensor:
        """The generative process, a Pyro model with one plate "data" and the sites "z" and "x".

        Args:
            x: rows to observe, (N, d), NaN where a value is missing; None draws them.
            size: N where `x` is None.

        Returns:
            The rows, observed or drawn.
        """
        self._register()
        if x is None and size is None:
            raise ValueError("model() needs rows to observe, model(x), or a number of rows to draw, model(size=64).")
        with pyro.plate("data", len(x) if x is not None else size):
            z = pyro.sample("z", self.p_z())
            rows: Tensor = pyro.sample("x", self.p_x(z), obs=x)
        return rows

    def guide(self, x: Tensor, *, size: int | None = None) -> Tensor:
        """The exact posterior as a Pyro guide: draws "z" for the rows `x`, (N, d) -> (N, D). `size` is not used."""
        self._register()
        with pyro.plate("data", len(x)):
            z: Tensor = pyro.sample("z", self.q_z(x))
        return z

    def p_z(self) -> Any:
        """p(z) = N(0, I), batch shape (), event shape (D,)."""
        zero = self.weight.new_zeros(self.weight.shape[1])
        return dist.Normal(zero, torch.ones_like(zero)).to_event(1)

    def p_x(self, z: Tensor) -> Any:
        """p(x | z) of latents (..., N, D), whose density is that of the values seen: batch shape (..., N)."""
        return Partial(dist.Normal(z @ self.weight.mT + self.mean, self.noise)).to_event(1)

    def q_z(self, x: Tensor) -> Any:
        """p(z | x_seen) of rows (N, d), exact: batch shape (N,), event shape (D,). M^-1 is the covariance."""
        seen = ~x.isnan()
        residual = torch.where(seen, torch.where(seen, x, 0.0) - self.mean, 0.0)
        scaled = self.weight / self.noise[:, None]
        # Sums over the columns seen as one product of matrices, (N, d) by (d, D D), instead of N factors (d, D).
        squares = (scaled[:, :, None] * scaled[:, None, :]).flatten(1)
        identity = torch.eye(scaled.shape[1], dtype=x.dtype, device=x.device)
        precision = identity + (seen.to(x) @ squares).unflatten(-1, identity.shape)
        told = (residual / self.noise) @ scaled
        loc = torch.cholesky_solve(told[..., None], torch.linalg.cholesky(precision))[..., 0]
        return dist.MultivariateNormal(loc, precision_matrix=precision)

    def log_p(self, x: Data) -> Tensor:
        """log p(x_seen), the exact log marginal density of each row in nats, (N,), float64; 0 where nothing was seen.

        Gradients flow to the parameters.

        Raises:
            ValueError: rows of another size, or with infinities.
        """
        (rows,) = self._checked(x)
        parameters = self.mean.double(), self.weight.double(), self.noise.double()
        if not bool(rows.isnan().any()):
            whole: Tensor = LowRankNormal(*parameters).log_prob(rows.double())
            return whole
        marginal = LowRankNormal(*parameters, missing=True)
        return torch.cat([marginal.log_prob(rows[at].double()) for at in row_blocks(len(rows), BLOCK)])

    def usable_rows(self, rows: Rows) -> tuple[Tensor, list[str]]:
        """All rows, or a `ValueError`: what the program takes is known before any work."""
        self._checked(rows)
        count = len(rows[0])
        return torch.ones(count, dtype=torch.bool, device=rows[0].device), [""] * count

    def check_training(self, x: Data) -> None:
        """Refuse rows that it cannot be fitted to.

        Raises:
            ValueError: rows of another size, or with infinities.
        """
        self._checked(x)

    def template(self, count: int) -> Rows:
        """See `Program.template`."""
        return (self.mean.new_zeros(count, len(self.mean)),)

    def _checked(self, x: Data) -> Rows:
        rows = as_rows(x)
        require_place({"program": self}, rows)
        if len(rows) != 1 or rows[0].shape[1:] != self.mean.shape:
            raise ValueError(
                f"x has {len(rows)} tensor(s) of shape {', '.join(str(tuple(part.shape)) for part in rows)}, this program "
                f"models rows of {len(self.mean)} numbers: give one tensor (N, {len(self.mean)})."
            )
        require_finite(rows, missing=True)
        return rows

    def _register(self) -> None:
        """`pyro.module` under a name of this program's own, so that plain `SVI` finds the parameters."""
        if self not in _names:
            _names[self] = f"linear_gaussian{next(_count)}"
        register(_names[self], self)
