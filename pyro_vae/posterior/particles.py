"""Weighted particles: draws z_k ~ r(z | x) and log w_k = log p(x, z_k) - log r(z_k | x).

E_r[w] = p(x) whatever r is, as long as it covers the posterior, so the mean weight estimates p(x) without bias, and the
particles, drawn again in proportion to their weights, are approximate draws of p(z | x).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_vae.rows import positive
from pyro_vae.seeds import Seed, seeded


@dataclass(frozen=True, repr=False)
class Particles:
    """K weighted particles for each of N rows.

    Attributes:
        log_weights: log w, (K, N), float64, in nats.
        z: latents by site name, each (K, N, *event_shape), in their own support.
        rounding: (N,), the error in nats that the arithmetic of the networks leaves in each log-weight.
        info: what the engine says about itself; "engine" is its name, "evaluations" the decoder runs a row.
        strata: which stratum each draw belongs to, (K, N), integers; None where draws are independent and alike.
    """

    log_weights: Tensor
    z: Mapping[str, Tensor]
    rounding: Tensor
    info: Mapping[str, Any] = field(default_factory=dict)
    strata: Tensor | None = None

    def __post_init__(self) -> None:
        """Refuse tensors that do not belong together."""
        shape = self.log_weights.shape
        for name, value in self.z.items():
            if value.shape[:2] != shape:
                raise ValueError(f"z[{name!r}] has shape {tuple(value.shape)}, log_weights {tuple(shape)}.")

    def __repr__(self) -> str:
        """Engine, sizes and latents."""
        count, rows = self.log_weights.shape
        latents = ", ".join(f"{name} {tuple(value.shape[2:])}" for name, value in self.z.items())
        return f"Particles({self.info.get('engine', '?')}: {count} for each of {rows} rows; {latents})"

    def resample(self, num_draws: int, seed: Seed = 0) -> dict[str, Tensor]:
        """Approximate posterior draws, by multinomial resampling in proportion to the weights.

        Args:
            num_draws: M.
            seed: of the draws.

        Returns:
            latents by name, each (M, N, *event_shape).
        """
        positive(num_draws=num_draws)
        probabilities = torch.softmax(self.log_weights, dim=0).T
        with seeded(seed, self.log_weights.device):
            index = torch.multinomial(probabilities, num_draws, replacement=True).T
        column = torch.arange(index.shape[1], device=index.device)
        return {name: value[index, column] for name, value in self.z.items()}


def rounding_error(log_p: Tensor, log_q: Tensor, dtype: torch.dtype) -> Tensor:
    """The rounding error of log p - log q in nats, (K, N), (K, N) -> (N,).

    Both are sums computed in `dtype`; each carries a relative error of a few machine epsilons, four say, which particles
    share, so that averaging over them does not remove it.
    """
    size = torch.nan_to_num(log_p.abs() + log_q.abs(), nan=0.0, posinf=0.0)
    return 4.0 * torch.finfo(dtype).eps * (1.0 + size.mean(0))
