"""Likelihoods of numbers on a grid, such as grey levels: a logistic density integrated over the grid's steps."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pyro_vae.model.component import positive_from
from pyro_vae.model.families import levels as families
from pyro_vae.model.likelihoods.likelihood import Elementwise
from pyro_vae.model.likelihoods.scaled import Scaled
from pyro_vae.model.scales import Scale
from pyro_vae.rows import positive


def require_multiple(decoder: nn.Module, size: int, name: str) -> None:
    """Refuse a decoder whose number of columns is no multiple of `size`.

    Raises:
        ValueError: names both numbers.
    """
    columns = getattr(decoder, "out_features", None)
    if columns is not None and columns % size:
        raise ValueError(f"{name} needs {size} outputs of the decoder for each column of x, and it has {columns}.")


def make_grid(levels: int, top: float) -> families.Grid:
    """The grid k top / (levels - 1).

    Raises:
        ValueError: names the value.
    """
    if isinstance(levels, bool) or not isinstance(levels, int) or levels < 2:
        raise ValueError(f"levels={levels!r} must be a whole number of at least 2.")
    if not 0.0 < top < float("inf"):
        raise ValueError(f"top={top} must be positive and finite: it is the largest value that x can have.")
    return families.Grid(levels, float(top))


def describe_grid(grid: families.Grid) -> tuple[str, str]:
    """`takes` and `mend` of a likelihood on the grid."""
    step = f"{grid.top:g} / {grid.levels - 1}"
    takes = f"the {grid.levels} levels 0, {step}, ..., {grid.top:g} alone"
    mend = (
        f"rescale it to [0, {grid.top:g}] and round it, (x * {(grid.levels - 1) / grid.top:g}).round() * {step}, give the "
        "levels= and top= that it has, or take a density such as Normal"
    )
    return takes, mend


class DiscretisedLogistic(Scaled):
    """P(x_j | z) = sigmoid((x_j + h - f(z)_j) / s) - sigmoid((x_j - h - f(z)_j) / s), h half a step of the grid.

    At 0 without the second term, at the top with 1 for the first, so that the levels' probabilities sum to one (Kingma et
    al. 2016, arXiv:1606.04934; Salimans et al. 2017, arXiv:1701.05517, eq. 2). A probability, so
    log p(x) can be given in bits per dimension.

    Args:
        decoder: f, (..., D) -> (..., *event_shape), in the units of x.
        scale: s: a number (fixed), or a `Scale`: `Fixed`, `Learned` (shared or per dimension), `FromNetwork`.
        levels: how many levels x has: k top / (levels - 1), k = 0, ..., levels - 1.
        top: the largest of them.
        missing: whether NaN in x is a missing value.
    """

    discrete: ClassVar[bool] = True

    def __init__(
        self, decoder: nn.Module, scale: float | Scale, levels: int = 256, top: float = 1.0, *, missing: bool = False
    ) -> None:
        super().__init__(decoder, scale, missing=missing)
        self.grid = make_grid(levels, top)
        self.takes, self.mend = describe_grid(self.grid)

    def settings(self) -> dict[str, Any]:
        """See `Component.settings`."""
        grid = {"levels": self.grid.levels, "top": self.grid.top}
        return {"decoder": self.decoder, "scale": self.scale, **grid, "missing": self.missing}

    def elements(self, z: Tensor, *given: Tensor) -> Any:
        """The logistic at f(z), on the grid."""
        return families.DiscretisedLogistic(self.decode(z, given), self.scale(z, *given), self.grid)

    def inside(self, x: Tensor) -> Tensor:
        """See `Likelihood.inside`."""
        return self.grid.check(x)


class DiscretisedLogisticMixture(Elementwise):
    """P(x_j | z) = sum_m w_m P(x_j; mu_m, s_m), M discretised logistics (Salimans et al. 2017, arXiv:1701.05517, sec. 2.1).

    From the 3 M outputs (w', mu', s') of the decoder for a number of x,

        w = softmax(w'),    mu_m = top ((m - 1/2) / M + mu'_m),    s_m = top softplus(s'_m) / M + step / 20,

    so that a decoder near zero has its components spread over the range.

    Args:
        decoder: 3 M outputs for each number of x, side by side in the last dimension, (..., D) -> (..., d * 3 M) for rows
            (d,), in general (..., D) -> (..., *event_shape[:-1], event_shape[-1] * 3 M).
        num_components: M.
        levels: how many levels x has: k top / (levels - 1), k = 0, ..., levels - 1.
        top: the largest of them.
        missing: whether NaN in x is a missing value.
    """

    discrete: ClassVar[bool] = True
    starts: Tensor

    def __init__(
        self, decoder: nn.Module, num_components: int = 5, levels: int = 256, top: float = 1.0, *, missing: bool = False
    ) -> None:
        super().__init__(decoder, missing=missing)
        positive(num_components=num_components)
        require_multiple(decoder, 3 * num_components, f"num_components={num_components}")
        self.num_components, self.grid = num_components, make_grid(levels, top)
        self.takes, self.mend = describe_grid(self.grid)
        self.register_buffer("starts", (torch.arange(num_components) + 0.5) / num_components)

    def settings(self) -> dict[str, Any]:
        """See `Component.settings`."""
        return {
            "decoder": self.decoder,
            "num_components": self.num_components,
            "levels": self.grid.levels,
            "top": self.grid.top,
            "missing": self.missing,
        }

    def elements(self, z: Tensor, *given: Tensor) -> Any:
        """The mixture, on the grid."""
        outputs = self.decode(z, given).unflatten(-1, (-1, 3, self.num_components))
        logits, means, scales = outputs.unbind(-2)
        top, least = self.grid.top, 0.05 * self.grid.top / (self.grid.levels - 1)
        scale = positive_from(scales, 0.0) * (top / self.num_components) + least
        return families.DiscretisedLogisticMixture(logits, top * (self.starts + means), scale, self.grid)

    def inside(self, x: Tensor) -> Tensor:
        """See `Likelihood.inside`."""
        return self.grid.check(x)
