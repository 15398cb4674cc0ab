"""Likelihoods of counts: events without an upper limit, and successes among n."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pyro_vae.model.conditions import apply
from pyro_vae.model.families import counts as families
from pyro_vae.model.families.saddle import log_softplus
from pyro_vae.model.likelihoods.likelihood import Elementwise
from pyro_vae.model.likelihoods.scaled import as_scale, require_columns
from pyro_vae.model.scales import Learned, Optimal, Scale
from pyro_vae.rows import Rows, positive


class Counts(Elementwise):
    """Counts 0, 1, 2, ... with mean m(z), held as floating point numbers: to add one, implement `elements`.

    Without a library size m_j = softplus(f(z)_j). With one, m_j = l softmax(f(z))_j, the softmax over all numbers of a
    row: l is what the row sums to in expectation, and f says how it is shared out (Lopez et al. 2018, scVI).

    Args:
        decoder: f, (..., D) -> (..., *event_shape).
        library: the position, in x = (counts, y_1, y_2, ...), of the library sizes l, (N,) or (N, 1): 1 is the first tensor
            after the counts. None for none.
        missing: whether NaN in x is a missing value.
    """

    discrete: ClassVar[bool] = True
    takes = "counts 0, 1, 2, ... alone"
    mend = "give the raw counts, not normalised or log-transformed ones (x.round() if rounding is what they lack)"
    reads: tuple[int, ...]  # exists where there is a library size

    def __init__(self, decoder: nn.Module, library: int | None = None, *, missing: bool = False) -> None:
        super().__init__(decoder, missing=missing)
        self.library = library
        if library is not None:
            positive(library=library)
            self.reads = (library,)

    def settings(self) -> dict[str, Any]:
        """See `Component.settings`."""
        return {"decoder": self.decoder, "library": self.library, "missing": self.missing}

    def log_mean(self, z: Tensor, given: Rows) -> Tensor:
        """log m(z), (..., *event_shape)."""
        decoded = self.decode(z, given)
        if self.library is None:
            return log_softplus(decoded)
        if len(given) < self.library:
            raise ValueError(
                f"library={self.library} is not among the {len(given)} condition(s) given: give x as (counts, library)."
            )
        sizes = given[self.library - 1].to(decoded)
        shape = decoded.shape[z.dim() - 1 :]
        shares = decoded.reshape(*z.shape[:-1], -1).log_softmax(-1).reshape(decoded.shape)
        return sizes.log().reshape(-1, *(1,) * len(shape)) + shares

    def example(self, like: Tensor) -> Tensor:
        """See `conditions.Reader`: a library size of 1."""
        return like.new_ones(1)

    def check_given(self, given: Rows) -> None:
        """Refuse library sizes that are not positive numbers, one a row.

        Raises:
            ValueError: names the first value and the mend.
        """
        if self.library is None:
            return
        sizes = given[self.library - 1]
        if sizes.numel() != len(sizes):
            raise ValueError(
                f"The library sizes, x[{self.library}], have shape {tuple(sizes.shape)}: give one number a row, (N,) or "
                "(N, 1), such as counts.sum(-1)."
            )
        outside = ~((sizes > 0) & torch.isfinite(sizes)).reshape(-1)
        if bool(outside.any()):
            row = int(outside.nonzero()[0])
            raise ValueError(
                f"The library size of row {row}, in x[{self.library}], is {float(sizes.reshape(-1)[row]):.4g} and must be "
                "positive and finite: remove rows without counts."
            )

    def inside(self, x: Tensor) -> Tensor:
        """See `Likelihood.inside`."""
        return (x >= 0) & (x == torch.floor(x)) & torch.isfinite(x)


class Poisson(Counts):
    """x_j ~ Poisson(m(z)_j): P(x) = m^x exp(-m) / x!, variance m. See `Counts` for m(z).

    Args:
        decoder: f, (..., D) -> (..., *event_shape).
        library: see `Counts`.
        missing: whether NaN in x is a missing value.
    """

    def elements(self, z: Tensor, *given: Tensor) -> Any:
        """Poisson(m(z))."""
        return families.Poisson(self.log_mean(z, given))


class NegativeBinomial(Counts):
    """x_j ~ NB with mean m(z)_j and variance m + a m^2: a Poisson with a Gamma distributed rate. See `Counts` for m(z).

    P(x) = Γ(x + 1/a) / (Γ(1/a) x!) (1 + a m)^(-1/a) (a m / (1 + a m))^x; a is the dispersion, and 1/a what scVI calls the
    inverse dispersion theta (Lopez et al. 2018). a -> 0 is Poisson.

    Args:
        decoder: f, (..., D) -> (..., *event_shape).
        dispersion: a: a number (fixed), or a `Scale`; `Learned(d)` is one for each dimension, None is `Learned()`.
        library: see `Counts`.
        missing: whether NaN in x is a missing value.
    """

    def __init__(
        self,
        decoder: nn.Module,
        dispersion: float | Scale | None = None,
        library: int | None = None,
        *,
        missing: bool = False,
    ) -> None:
        super().__init__(decoder, library, missing=missing)
        self.dispersion = make_dispersion(dispersion, decoder)

    def settings(self) -> dict[str, Any]:
        """See `Component.settings`."""
        own = {"dispersion": self.dispersion, "library": self.library}
        return {"decoder": self.decoder, **own, "missing": self.missing}

    def elements(self, z: Tensor, *given: Tensor) -> Any:
        """NB by mean and dispersion."""
        return families.NegativeBinomial(self.log_mean(z, given), self.dispersion(z, *given))


class ZeroInflatedNegativeBinomial(Counts):
    """x_j = 0 with probability g_j, else a draw of `NegativeBinomial` (Lopez et al. 2018, scVI, for drop-outs).

    P(x) = g 1(x = 0) + (1 - g) NB(x; m(z), a). See `Counts` for m(z).

    Args:
        decoder: f, (..., D) -> (..., *event_shape).
        dispersion: a, see `NegativeBinomial`.
        gate: a network for the logits of g, (..., D) -> (..., *event_shape); None is one learned number for all
            dimensions, which starts at g = 0.12.
        library: see `Counts`.
        missing: whether NaN in x is a missing value.
    """

    def __init__(
        self,
        decoder: nn.Module,
        dispersion: float | Scale | None = None,
        gate: nn.Module | None = None,
        library: int | None = None,
        *,
        missing: bool = False,
    ) -> None:
        super().__init__(decoder, library, missing=missing)
        self.dispersion = make_dispersion(dispersion, decoder)
        self.gate = gate
        self.gate_logit = nn.Parameter(torch.tensor(-2.0)) if gate is None else None

    def settings(self) -> dict[str, Any]:
        """See `Component.settings`."""
        own = {"dispersion": self.dispersion, "gate": self.gate, "library": self.library}
        return {"decoder": self.decoder, **own, "missing": self.missing}

    def elements(self, z: Tensor, *given: Tensor) -> Any:
        """NB, with more zeros."""
        base = families.NegativeBinomial(self.log_mean(z, given), self.dispersion(z, *given))
        gate = self.gate_logit if self.gate_logit is not None else apply(self.gate, z, given=given)
        return families.ZeroInflated(base, gate)


class Binomial(Elementwise):
    """x_j ~ Binomial(n, sigmoid(f(z)_j)): successes among n tries, held as floating point numbers.

    P(x) = C(n, x) p^x (1 - p)^(n - x).

    Args:
        decoder: f, the logits, (..., D) -> (..., *event_shape).
        total_count: n, one number or one for each dimension of the event.
        missing: whether NaN in x is a missing value.
    """

    discrete: ClassVar[bool] = True
    mend = "give the number of successes, or a larger total_count"
    n: Tensor

    def __init__(self, decoder: nn.Module, total_count: int | Sequence[int], *, missing: bool = False) -> None:
        super().__init__(decoder, missing=missing)
        # Read on the CPU: a tensor on the default device may have no values to read ("meta").
        numbers = torch.as_tensor(total_count, device="cpu")
        if not bool(((numbers >= 1) & (numbers == numbers.floor())).all()):
            raise ValueError(f"total_count={total_count} must be a whole number of at least 1.")
        self.total_count = numbers.tolist()
        self.takes = f"the counts 0, 1, ..., {self.total_count} alone"
        self.register_buffer("n", torch.as_tensor(total_count, dtype=torch.get_default_dtype()))

    def settings(self) -> dict[str, Any]:
        """See `Component.settings`."""
        return {"decoder": self.decoder, "total_count": self.total_count, "missing": self.missing}

    def elements(self, z: Tensor, *given: Tensor) -> Any:
        """Binomial with logits f(z)."""
        return families.Binomial(self.n, self.decode(z, given))

    def inside(self, x: Tensor) -> Tensor:
        """See `Likelihood.inside`."""
        return (x >= 0) & (x <= self.n) & (x == torch.floor(x))


def make_dispersion(dispersion: float | Scale | None, decoder: nn.Module) -> Scale:
    """A dispersion as a `Scale`.

    Raises:
        ValueError: one that is no dispersion, or does not fit the decoder.
    """
    scale = Learned() if dispersion is None else as_scale(dispersion, "dispersion")
    if isinstance(scale, Optimal):
        raise ValueError(f"dispersion={scale!r} is the optimal scale of a Normal: give Learned().")
    require_columns("dispersion", scale, decoder)
    return scale
