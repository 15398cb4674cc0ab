"""An estimate of log p(x), row by row, with what is known about its error."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from pyro_vae.evidence import weights
from pyro_vae.posterior.particles import Particles

if TYPE_CHECKING:
    import pandas as pd

MINIMUM_ESS = 10.0
"""Below this many effective particles neither the estimate nor its error means anything."""

DENSITY = -1
"""Dimensions of a row whose p(x) is a density, which has no bits; no number of discrete values is negative."""

TENSORS = ("log_p", "standard_error", "bias", "ess", "pareto_k", "lower", "upper", "evaluations", "dimensions")
TEXTS = ("engine", "reasons")
"""Fields of an `Estimate`, each with N entries."""


@dataclass(frozen=True, repr=False)
class Estimate:
    """log p(x) of N rows, in nats. All tensors are (N,), float64 where not said otherwise.

    Attributes:
        log_p: the estimate.
        standard_error: its Monte Carlo error, the rounding of the networks included.
        bias: estimated expectation of log_p minus log p(x): negative for the log of a mean.
        ess: effective number of particles.
        pareto_k: k-hat of the weights, see `weights.pareto_k`; NaN where there are none.
        lower: at most log p(x) in expectation; NaN where there is no such bound.
        upper: at least log p(x) in expectation; NaN where there is no such bound.
        evaluations: what the row cost: passes through the decoder, forwards or backwards, for one particle; integer.
        engine: what answered, N texts.
        reasons: N texts, why a row is not reliable; empty where it is.
        dimensions: d, how many discrete numbers the row observes, missing ones not counted; integer, `DENSITY` (-1) where
            p(x) is a density, 0 where nothing of the row was seen. `log_evidence` counts them; an estimate made by hand
            has -1.
    """

    log_p: Tensor
    standard_error: Tensor
    bias: Tensor
    ess: Tensor
    pareto_k: Tensor
    lower: Tensor
    upper: Tensor
    evaluations: Tensor
    engine: tuple[str, ...]
    reasons: tuple[str, ...]
    dimensions: Tensor = cast(Tensor, None)  # noqa: RUF009 - a tensor as soon as the object is made

    def __post_init__(self) -> None:
        """Where the dimensions were not counted it is as with a density."""
        if self.dimensions is None:
            object.__setattr__(self, "dimensions", torch.full_like(self.log_p, DENSITY).long())

    @classmethod
    def from_particles(cls, particles: Particles) -> Estimate:
        """The estimate that weighted particles make, reduced to one number a row."""
        log_weights = particles.log_weights
        # A decoder that overflows gives NaN: such a particle has no weight that could be believed, and the row says so.
        broken = log_weights.isnan() | log_weights.isposinf()
        clean = torch.where(broken, -torch.inf, log_weights)
        log_p, ess, k = weights.log_mean_exp(clean), weights.ess(clean), weights.pareto_k(clean)
        # Weights that differ by rounding alone have no tail, and the shape of what rounding left means nothing.
        bias = weights.bias(clean, particles.strata)
        flat = clean.amax(0) - clean.amin(0) <= 100.0 * particles.rounding
        k = torch.where(flat & ~k.isnan(), -torch.inf, k)
        error = torch.hypot(weights.standard_error(clean, particles.strata), particles.rounding)
        count = len(log_p)
        doubts = particles.info.get("doubts", ("",) * count)
        told = _judge(broken.sum(0), ess, k, len(log_weights))
        return cls(
            log_p=log_p,
            standard_error=torch.where(error.isnan(), torch.inf, error),
            bias=torch.where(bias.isnan(), -torch.inf, bias),
            ess=ess,
            pareto_k=k,
            lower=log_p,
            upper=torch.full_like(log_p, torch.nan),
            evaluations=(torch.zeros_like(log_p) + particles.info.get("evaluations", 0)).long(),
            engine=(str(particles.info.get("engine", "particles")),) * count,
            reasons=tuple(own or doubt for own, doubt in zip(told, doubts, strict=True)),
        )

    @classmethod
    def known(cls, log_p: Tensor, standard_error: Tensor, engine: str, evaluations: int) -> Estimate:
        """Values that carry rounding error alone, (N,): closed forms and quadrature."""
        nothing = torch.full_like(log_p, torch.nan)
        return cls(
            log_p=log_p,
            standard_error=standard_error,
            bias=torch.zeros_like(log_p),
            ess=nothing,
            pareto_k=nothing,
            lower=log_p,
            upper=log_p,
            evaluations=torch.full_like(log_p, evaluations).long(),
            engine=(engine,) * len(log_p),
            reasons=("",) * len(log_p),
        )

    @classmethod
    def nothing(cls, reasons: Sequence[str], device: torch.device) -> Estimate:
        """N rows that were not evaluated: -inf outside the support, as the reason says, and NaN elsewhere."""
        count = len(reasons)
        impossible = torch.tensor(["support" in reason for reason in reasons], device=device)
        none = torch.full((count,), torch.nan, dtype=torch.float64, device=device)
        log_p, zero = torch.where(impossible, -torch.inf, none), torch.zeros_like(none)
        return cls(
            log_p=log_p,
            standard_error=torch.where(impossible, zero, torch.inf),
            bias=zero,
            ess=zero,
            pareto_k=none,
            lower=log_p,
            upper=log_p,
            evaluations=zero.long(),
            engine=("none",) * count,
            reasons=tuple(reasons),
        )

    @classmethod
    def cat(cls, parts: Sequence[Estimate]) -> Estimate:
        """One estimate of all rows of `parts`, in order."""
        tensors: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts]) for name in TENSORS}
        texts: dict[str, Any] = {name: tuple(text for part in parts for text in getattr(part, name)) for name in TEXTS}
        return cls(**tensors, **texts)

    def rows(self, count: int) -> Estimate:
        """The first `count` rows."""
        return Estimate(**{f.name: getattr(self, f.name)[:count] for f in fields(self)})

    def take(self, index: Tensor) -> Estimate:
        """The rows at `index`."""
        texts: dict[str, Any] = {name: tuple(getattr(self, name)[i] for i in index.tolist()) for name in TEXTS}
        tensors: dict[str, Any] = {name: getattr(self, name)[index] for name in TENSORS}
        return Estimate(**tensors, **texts)

    def put(self, index: Tensor, other: Estimate) -> Estimate:
        """This estimate with the rows at `index` from `other`, in its order."""
        where = {row: i for i, row in enumerate(index.tolist())}
        texts: dict[str, Any] = {
            name: tuple(
                getattr(other, name)[where[i]] if i in where else text for i, text in enumerate(getattr(self, name))
            )
            for name in TEXTS
        }
        return Estimate(
            **{name: getattr(self, name).index_copy(0, index, getattr(other, name)) for name in TENSORS}, **texts
        )

    def doubted(self, reasons: Sequence[str]) -> Estimate:
        """The same, with N more reasons: each counts where the row has none yet and the text is not empty."""
        return replace(self, reasons=tuple(own or new for own, new in zip(self.reasons, reasons, strict=True)))

    def __len__(self) -> int:
        """N."""
        return len(self.log_p)

    @property
    def reliable(self) -> Tensor:
        """Which rows may be believed, boolean (N,): k-hat, effective particles and finiteness all pass."""
        return torch.tensor([not reason for reason in self.reasons], device=self.log_p.device)

    @property
    def mean(self) -> float:
        """Mean of log_p in nats over the rows that have a number (see `str`); -inf if one of them is impossible."""
        return float(self.log_p[~self.log_p.isnan()].mean())

    @property
    def mean_standard_error(self) -> float:
        """Monte Carlo error of `mean`: rows are independent."""
        errors = self.standard_error[~self.log_p.isnan()]
        return float(errors.square().sum().sqrt() / len(errors)) if len(errors) else math.nan

    @property
    def data_standard_error(self) -> float:
        """Error of `mean` as an estimate for other data of the same kind: sd(log_p) / sqrt(N)."""
        values = self.log_p[~self.log_p.isnan()]
        return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan

    @property
    def discrete(self) -> bool:
        """Whether log p(x) is that of discrete data, so that `bits_per_dimension` exists."""
        return bool((self.dimensions != DENSITY).any())

    @property
    def bits_per_dimension(self) -> Tensor:
        """-log p(x) / (d ln 2) of each row, (N,): less is better; NaN where a row observes nothing.

        Raises:
            ValueError: p(x) is a density.
        """
        self._require_discrete()
        # Of a row of which nothing was seen log p(x) = 0 up to rounding, and rounding has no bits.
        return torch.where(self.dimensions > 0, -self.log_p / (self.dimensions * math.log(2.0)), torch.nan)

    @property
    def mean_bits_per_dimension(self) -> float:
        """Bits of all rows that have a number by the dimensions of all these rows; NaN where they observe nothing.

        Raises:
            ValueError: p(x) is a density.
        """
        self._require_discrete()
        known = ~self.log_p.isnan() & (self.dimensions > 0)
        return float(-self.log_p[known].sum() / (self.dimensions[known].sum() * math.log(2.0)))

    def _require_discrete(self) -> None:
        if not self.discrete:
            raise ValueError(
                "p(x) is a density, which depends on the unit of x, so that it has no bits per dimension: give a "
                "likelihood of discrete data, such as Bernoulli, or see `log_p` in nats."
            )

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Ends of the interval log_p - bias +- z standard errors that covers log p(x) with probability `level`."""
        if not 0.0 < level < 1.0:
            raise ValueError(f"level={level} must lie between 0 and 1.")
        z = math.sqrt(2.0) * float(torch.erfinv(torch.tensor(level, dtype=torch.float64)))
        centre = self.log_p - self.bias
        return centre - z * self.standard_error, centre + z * self.standard_error

    def to_dataframe(self) -> pd.DataFrame:
        """One line a row: row, log_p, standard_error, bias, lower, upper, ess, pareto_k, evaluations, engine, reliable.

        Then reason and, of discrete data, dimensions and bits_per_dimension.
        """
        import pandas as pd

        columns = ["log_p", "standard_error", "bias", "lower", "upper", "ess", "pareto_k", "evaluations"]
        frame = pd.DataFrame({name: getattr(self, name).cpu().numpy() for name in columns})
        frame.insert(0, "row", range(len(self)))
        frame = frame.assign(engine=self.engine, reliable=self.reliable.cpu().numpy(), reason=self.reasons)
        if self.discrete:
            frame["dimensions"] = self.dimensions.cpu().numpy()
            frame["bits_per_dimension"] = self.bits_per_dimension.cpu().numpy()
        return frame

    def __repr__(self) -> str:
        """Value, errors, diagnostics and, where there is one, the warning."""
        reliable = int(self.reliable.sum())
        counts = Counter(self.engine)
        engines = ", ".join(name if len(counts) == 1 else f"{count} by {name}" for name, count in counts.items())
        bits = f", {self.mean_bits_per_dimension:.3f} bits per dimension" if self.discrete else ""
        lines = [
            f"log p(x) = {self.mean:.4f} nats a row{bits} ({engines}, {len(self)} rows)",
            f"  Monte Carlo error {self.mean_standard_error:.2g}, data error {self.data_standard_error:.2g}, "
            f"mean bias {float(self.bias.mean()):.2g}",
        ]
        if not bool(self.ess.isnan().all()):
            k = self.pareto_k[~self.pareto_k.isnan()]
            tail = f"k-hat: median {float(k.median()):.2f}, largest {float(k.max()):.2f}" if len(k) else "no k-hat"
            lines.append(
                f"  effective particles: median {float(self.ess.median()):.1f}, least {float(self.ess.min()):.1f}; {tail}"
            )
        if reliable == len(self):
            lines.append("  all rows reliable")
        else:
            told = "; ".join(f"{count} x {reason}" for reason, count in Counter(filter(None, self.reasons)).items())
            lines.append(f"  WARNING: {len(self) - reliable} of {len(self)} rows are not reliable: {told}")
        if missing := int(self.log_p.isnan().sum()):
            lines.append(f"  {missing} of them have no value and are not in the mean")
        return "\n".join(lines)


def _judge(broken: Tensor, ess: Tensor, k: Tensor, num_particles: int) -> tuple[str, ...]:
    """Why each row is not reliable, one text a row."""
    threshold = weights.pareto_threshold(num_particles)
    reasons = []
    for bad, effective, tail in zip(broken.tolist(), ess.tolist(), k.tolist(), strict=True):
        if bad:
            reasons.append("particles with NaN or infinite density")
        elif effective == 0.0:
            reasons.append("all weights are zero")
        elif math.isnan(tail):
            reasons.append("too few particles to judge")
        elif tail > threshold:
            reasons.append(f"k-hat above {threshold:.2f}")
        elif effective < MINIMUM_ESS:
            reasons.append(f"fewer than {MINIMUM_ESS:.0f} effective particles")
        else:
            reasons.append("")
    return tuple(reasons)
