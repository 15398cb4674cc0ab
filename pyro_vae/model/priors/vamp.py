"""The variational mixture of posteriors of Tomczak & Welling 2018 (arXiv:1705.07120)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pyro_vae.model.conditions import count_read
from pyro_vae.model.families.mixture import Mixture
from pyro_vae.model.guides import Guide
from pyro_vae.model.priors.prior import Prior
from pyro_vae.rows import positive
from pyro_vae.seeds import Seed, seeded


class VampPrior(Prior):
    """z ~ (1 / M) sum_m q(z | u_m), eq. 9 of the paper: the guide at M learned pseudo-inputs u_m.

    The pseudo-inputs are the only parameters of this prior. The guide is the VAE's own, which hands it to `forward`; its
    parameters stay the guide's, and p(z) gives them a gradient. A semi-amortised guide serves by its amortised part.

    The pseudo-inputs start at draws of N(0, 1), by torch's ambient generator; `from_rows` starts them at data.

    Args:
        latent_dim: D.
        shape: of one row of data, as the guide reads it; a number of columns or several dimensions.
        num_inputs: M.

    Examples:
        >>> VampPrior(2, 784, num_inputs=10)
        VampPrior(latent_dim=2, shape=(784,), num_inputs=10)
    """

    reads_guide: ClassVar[bool] = True

    def __init__(self, latent_dim: int, shape: int | Sequence[int], num_inputs: int = 50) -> None:
        super().__init__()
        positive(latent_dim=latent_dim, num_inputs=num_inputs)
        self.latent_dim, self.num_inputs = latent_dim, num_inputs
        self.shape = (shape,) if isinstance(shape, int) else tuple(shape)
        for size in self.shape:
            positive(shape=size)
        self.inputs = nn.Parameter(torch.randn(num_inputs, *self.shape))

    @classmethod
    def from_rows(cls, x: Tensor, latent_dim: int, num_inputs: int = 50, seed: Seed = 0) -> VampPrior:
        """A VampPrior whose pseudo-inputs start at rows of `x`, chosen by chance and all different rows.

        Args:
            x: data, (N, *shape), N at least `num_inputs`; without missing values.
            latent_dim: D.
            num_inputs: M.
            seed: of the choice.

        Raises:
            ValueError: fewer rows than pseudo-inputs, or values that are not finite in the rows that were chosen.
        """
        if len(x) < num_inputs:
            raise ValueError(f"x has {len(x)} rows, fewer than num_inputs={num_inputs}: give more rows, or fewer inputs.")
        if not x.is_floating_point():
            raise ValueError(f"x has dtype {x.dtype}, and pseudo-inputs are floating point numbers: give x.float().")
        with seeded(seed, x.device):
            prior = cls(latent_dim, tuple(x.shape[1:]), num_inputs).to(x)
            chosen = torch.randperm(len(x), device=x.device)[:num_inputs]
        if not bool(x[chosen].isfinite().all()):
            raise ValueError("A row of x that was chosen as a pseudo-input has NaN or infinite values: give complete rows.")
        with torch.no_grad():
            prior.inputs.copy_(x[chosen])
        return prior

    def settings(self) -> dict[str, Any]:
        """See `Component.settings`."""
        return {"latent_dim": self.latent_dim, "shape": self.shape, "num_inputs": self.num_inputs}

    def forward(self, guide: Guide | None = None) -> Any:
        """The mixture, event shape (D,).

        Args:
            guide: q(z | x) of the VAE that this prior is part of.

        Raises:
            ValueError: no guide, or one that reads conditions, which pseudo-inputs do not have.
        """
        if guide is None:
            raise ValueError(f"{self!r} is made of the guide of a VAE: call vae.p_z(), or forward(guide).")
        if count_read(guide):
            raise ValueError(f"{self!r} has no conditions for its pseudo-inputs, and the guide {guide!r} reads them")
        return Mixture(self.inputs.new_zeros(self.num_inputs), guide(self.inputs))
