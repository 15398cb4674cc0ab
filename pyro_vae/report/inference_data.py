"""A program's draws, densities and data in the groups that ArviZ reads.

    posterior, sample_stats      z given x: chains, weighted particles drawn again, or draws of the guide
    log_likelihood               log p(x | z) of each draw and row, in nats
    posterior_predictive         x drawn from p(x | z) at these z
    prior, prior_predictive      z ~ p(z) and x ~ p(x | z)
    observed_data, constant_data what the program observes, and the other tensors of x
    log_evidence                 log p(x) of each row, with its error: it has no draws

Only Hamiltonian chains are chains. Particles and draws of the guide are independent, one chain, and have no R-hat: cutting
them into chains would make it 1 whatever is wrong with them.

Compare models by `pv.compare`, not by `az.loo`. Held-out log p(x) is no leave-one-out: the parameters were fitted to other
rows, and nothing is left out of these. And `az.loo` reads log_likelihood as that of drawn parameters that all rows share,
while each latent belongs to one row: without that row nothing but its prior is left.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.evidence.blocks import log_evidence
from pyro_vae.evidence.estimate import Estimate
from pyro_vae.evidence.observed import Observed, discrete_dimensions, observed_sites
from pyro_vae.layouts import Values
from pyro_vae.log_joint import LogJoint
from pyro_vae.memory import BUDGET, in_chunks
from pyro_vae.posterior.chains import Hamiltonian, hamiltonian
from pyro_vae.posterior.engine import Engine
from pyro_vae.program import Program
from pyro_vae.report.groups import ROW, Coords, Dims, Labels, gathered
from pyro_vae.report.posterior_draws import PosteriorDraws, by_chains, by_guide, by_particles
from pyro_vae.report.predictive import draw_observed, observed_values
from pyro_vae.rows import Data, Rows, as_rows, positive
from pyro_vae.seeds import Seed, derive, seeded

if TYPE_CHECKING:
    import xarray as xr

GROUPS = (
    "posterior",
    "sample_stats",
    "log_likelihood",
    "posterior_predictive",
    "prior",
    "prior_predictive",
    "observed_data",
    "constant_data",
    "log_evidence",
)
"""In the order in which they come."""

SEEN = ("observed_data", "posterior_predictive", "prior_predictive")
"""Groups of what the program observes."""

POSTERIOR, PRIOR, PREDICTED, PRIOR_PREDICTED, EVIDENCE = range(5)
"""Sub-streams of the seed."""


def to_arviz(
    program: Program,
    x: Data,
    *,
    method: Hamiltonian | Engine | Callable[..., Any] = hamiltonian,
    num_draws: int = 500,
    num_chains: int | None = None,
    estimate: Estimate | bool = False,
    dims: Dims | None = None,
    coords: Coords | None = None,
    leave_out: Collection[str] = (),
    seed: Seed = 0,
    memory: int = BUDGET,
) -> Any:
    """Posterior and prior draws, predictive draws, densities and data of `x`, for ArviZ.

    Every drawn variable has the dimensions chain, draw and row, then those of one row's value. What a discrete likelihood
    observes and predicts has an integer type, unless values are missing or are not whole numbers.

    ArviZ 1.x draws `plot_ppc_pit` and `plot_ppc_interval` of data with one dimension only. Where a row has several numbers,
    give one row, `az.plot_ppc_pit(data, coords={"row": 0})`, or for the PIT of all numbers together `method="prit_c"`.

    Args:
        program: a `VAE` or any `Program`.
        x: rows, (N, ...), or a tuple of tensors with N rows each.
        method: where the posterior draws come from. `posterior.hamiltonian`, or `posterior.Hamiltonian(warm_up=1000)`:
            chains. An engine such as `posterior.laplace`: particles, four times as many as draws, drawn again by their
            weights. `program.guide`: its draws as they are.
        num_draws: S, of a chain; of the prior as well.
        num_chains: C; None for 4 chains, and for the one that particles and draws of the guide make.
        estimate: log p(x), as `log_evidence` returns it; True to have it computed by the cascade. Where False, that of the
            particles or of the guide's weights, if there are any.
        dims: names for the dimensions of one row's value, by variable: {"z": ["factor"]}.
        coords: labels along dimensions: {"row": names, "factor": ["a", "b"]}.
        leave_out: groups that are not wanted, of `GROUPS`.
        seed: of all draws.
        memory: byte budget of the evaluations, and of the predictive draws, which are kept.

    Returns:
        an `arviz.InferenceData` where ArviZ is older than 1.0, else an `xarray.DataTree`. `sample_stats` has of chains
        lp = log p(x, u) of the unconstrained latents u, acceptance_rate, step_size and n_steps; of particles and the guide
        log_weight of each draw (before it was drawn again), and pareto_k and ess of each row.

    Raises:
        ValueError: a number below one, several chains of what makes one, a row that cannot be judged, an estimate of other
            rows, names that fit nothing, predictive draws that `memory` does not hold.
    """
    rows = as_rows(x)
    chains = _num_chains(method, program, num_chains)
    positive(num_draws=num_draws, num_chains=chains, memory=memory)
    leave_out = (leave_out,) if isinstance(leave_out, str) else leave_out
    if unknown := sorted(set(leave_out) - set(GROUPS)):
        raise ValueError(f"leave_out has {unknown[0]!r}, which is no group: there are {', '.join(GROUPS)}.")
    if isinstance(estimate, Estimate) and len(estimate) != len(rows[0]):
        raise ValueError(f"estimate is of {len(estimate)} rows and x has {len(rows[0])}: give that of the same rows.")
    _require_usable(program, rows)
    export = _Export(program, rows, dims, coords, memory)
    wanted = [name for name in GROUPS if name not in leave_out]
    export.require_room(wanted, chains, num_draws)
    posterior = None
    if {"posterior", "sample_stats", "log_likelihood", "posterior_predictive", "log_evidence"} & set(wanted):
        posterior = _draws(program, rows, method, chains, num_draws, derive(seed, POSTERIOR), memory)
    number = posterior.estimate if posterior is not None else None
    if isinstance(estimate, Estimate):
        number = estimate
    elif estimate and "log_evidence" in wanted:
        number = log_evidence(program, rows, seed=derive(seed, EVIDENCE), memory=memory)
    return gathered(export.groups(wanted, posterior, number, num_draws, seed))


class _Export:
    """The groups of one program and its rows."""

    def __init__(self, program: Program, rows: Rows, dims: Dims | None, coords: Coords | None, memory: int) -> None:
        self.program, self.rows, self.memory = program, rows, memory
        latents = {name: site for name, site in program.check(rows).model.items() if not site.observed}
        # A factor is observed as far as Pyro goes, but there is nothing to see.
        self.sites = {site.name: site for site in observed_sites(program, rows) if site.family != "Unit"}
        shapes = {name: site.event_shape for name, site in latents.items()}
        shapes |= {name: site.shape for name, site in self.sites.items()}
        self.given = _conditions(program, rows, self.sites.values(), set(shapes))
        self.latents = tuple(latents)
        shapes |= {name: tuple(value.shape[1:]) for name, value in self.given.items()}
        self.labels = Labels(shapes, len(rows[0]), dims, coords)

    def require_room(self, wanted: list[str], num_chains: int, num_draws: int) -> None:
        """Refuse predictive draws of more bytes than the budget."""
        times = {"posterior_predictive": num_chains * num_draws, "prior_predictive": num_draws}
        count = sum(times[name] for name in wanted if name in times) * len(self.rows[0])
        size = count * sum(_numbers(site) for site in self.sites.values()) * self.rows[0].element_size()
        if size > self.memory:
            raise ValueError(
                f"The predictive draws take {size:,} bytes and memory={self.memory:,}: give fewer rows or draws, "
                "leave_out=('posterior_predictive', 'prior_predictive'), or more memory."
            )

    def groups(
        self, wanted: list[str], posterior: PosteriorDraws | None, estimate: Estimate | None, num_draws: int, seed: Seed
    ) -> dict[str, Any]:
        """Datasets by name, in the order of `wanted`; a group without variables is left out."""
        found: dict[str, Any] = {}
        if posterior is not None:
            found = self._of_posterior(wanted, posterior, seed)
        if {"prior", "prior_predictive"} & set(wanted):
            found |= self._of_prior(wanted, num_draws, seed)
        if "observed_data" in wanted and self.sites:
            found["observed_data"] = self.labels.dataset(self._observed(), (ROW,))
        for site in self.sites.values():
            if site.discrete:
                _count([found[name] for name in SEEN if name in found], site.name)
        if self.given:
            found["constant_data"] = self.labels.dataset(self.given, (ROW,))
        if estimate is not None:
            found["log_evidence"] = self.labels.dataset(_columns(estimate), (ROW,))
        return {name: found[name] for name in wanted if name in found}

    def _of_posterior(self, wanted: list[str], posterior: PosteriorDraws, seed: Seed) -> dict[str, Any]:
        """The groups that have a value for each posterior draw."""
        labels, z = self.labels, {name: posterior.z[name] for name in self.latents}
        chains = next(iter(z.values())).shape[:2]
        flat = {name: value.flatten(0, 1) for name, value in z.items()}
        drawn = labels.dataset(z, method=posterior.method)
        stats = labels.dataset(posterior.drawn, method=posterior.method)
        found = {"posterior": drawn, "sample_stats": stats.merge(labels.dataset(posterior.by_row, (ROW,)))}
        if "log_likelihood" in wanted:
            density = in_chunks(self.program, self.rows, flat, _likelihood, self.memory).unflatten(0, chains)
            # Of several sites together: it is one row's probability that is meant, and the sites are its parts.
            name = next(iter(self.sites)) if len(self.sites) == 1 else "observed"
            rows_alone = Labels({}, len(self.rows[0]), coords={ROW: self.labels.coords[ROW]})
            found["log_likelihood"] = rows_alone.dataset({name: density})
        if "posterior_predictive" in wanted:
            draws = self._predicted(flat, "posterior_predictive", derive(seed, PREDICTED))
            found["posterior_predictive"] = labels.dataset({k: v.unflatten(0, chains) for k, v in draws.items()})
        return found

    def _of_prior(self, wanted: list[str], num_draws: int, seed: Seed) -> dict[str, Any]:
        """One chain of prior draws, and what they predict."""
        with seeded(seed, self.rows[0].device, PRIOR):
            z = self.program.sample_prior(self.rows, num_draws)[0]
        found = {"prior": self.labels.dataset({name: z[name][None] for name in self.latents})}
        if "prior_predictive" in wanted:
            draws = self._predicted(z, "prior_predictive", derive(seed, PRIOR_PREDICTED))
            found["prior_predictive"] = self.labels.dataset({name: value[None] for name, value in draws.items()})
        return found

    def _predicted(self, z: Values, group: str, seed: Seed) -> Values:
        try:
            return draw_observed(self.program, self.rows, z, tuple(self.sites), seed)
        except NotImplementedError as error:
            families = ", ".join(sorted({site.family for site in self.sites.values()}))
            raise ValueError(
                f"What the program observes ({families}) cannot be drawn: give leave_out=({group!r},) or a .sample()."
            ) from error

    def _observed(self) -> dict[str, Tensor]:
        with torch.no_grad(), seeded(0, self.rows[0].device):
            z = {name: value[0] for name, value in self.program.sample(self.rows, 1)[0].items()}
        return observed_values(self.program, self.rows, z, tuple(self.sites))


def _count(datasets: list[xr.Dataset], name: str) -> None:
    """Make a discrete variable an integer where all its values are whole: ArviZ tells counts from densities by the type."""
    counts = []
    for dataset in datasets:
        value = dataset[name].values
        with np.errstate(invalid="ignore"):  # NaN
            counts.append(value.astype(f"int{8 * value.itemsize}") if value.dtype.kind == "f" else value)
        if not np.array_equal(counts[-1], value):
            return
    for dataset, count in zip(datasets, counts, strict=True):
        dataset[name] = dataset[name].copy(data=count)


def _likelihood(log_joint: LogJoint, z: Values) -> Tensor:
    return log_joint.likelihood_of_sites(z)


def _numbers(site: Observed) -> int:
    return int(torch.Size(site.shape).numel())


def _num_chains(method: Any, program: Program, num_chains: int | None) -> int:
    """C, after a look at what is asked for."""
    if isinstance(method, Hamiltonian):
        return 4 if num_chains is None else num_chains
    if not isinstance(method, Engine) and method != program.guide:
        raise ValueError(
            f"method={method!r} makes no posterior draws: give pv.posterior.hamiltonian, an engine such as "
            "pv.posterior.laplace, or program.guide."
        )
    if num_chains is not None and num_chains > 1:
        raise ValueError(
            f"num_chains={num_chains}, but particles and draws of the guide are one chain, which has no R-hat: leave "
            "num_chains out, or give method=pv.posterior.hamiltonian."
        )
    return 1 if num_chains is None else num_chains


def _require_usable(program: Program, rows: Rows) -> None:
    good, reasons = program.usable_rows(rows)
    if not bool(good.all()):
        bad = (~good).nonzero().flatten()
        raise ValueError(
            f"{len(bad)} of {len(good)} rows of x cannot be judged, first row {int(bad[0])} ({reasons[int(bad[0])]}): "
            "leave them out."
        )


def _draws(
    program: Program, rows: Rows, method: Any, num_chains: int, num_draws: int, seed: int, memory: int
) -> PosteriorDraws:
    """Posterior draws by whatever method."""
    if isinstance(method, Hamiltonian):
        return by_chains(method, program, rows, num_chains, num_draws, seed, memory)
    if isinstance(method, Engine):
        found = by_particles(method, program, rows, num_draws, seed, memory)
    else:
        found = by_guide(program, rows, num_draws, seed, memory)
    if found.estimate is None:
        return found
    dimensions = discrete_dimensions(program, rows, torch.arange(len(rows[0]), device=rows[0].device))
    return replace(found, estimate=replace(found.estimate, dimensions=dimensions))


def _conditions(program: Program, rows: Rows, sites: Collection[Observed], taken: set[str]) -> dict[str, Tensor]:
    """The tensors of x that no site observes, by the names that the model's arguments have."""
    observed = {site.place for site in sites}
    names: list[str] = []
    for parameter in inspect.signature(getattr(program.model, "forward", program.model)).parameters.values():
        missing = len(rows) - len(names)
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [parameter.name if missing == 1 else f"{parameter.name}_{i + 1}" for i in range(missing)]
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD) and missing:
            names.append(parameter.name)
    names = [f"{name}_given" if name in taken else name for name in names]
    return {name: part for i, (name, part) in enumerate(zip(names, rows, strict=True)) if i not in observed}


def _columns(estimate: Estimate) -> dict[str, Any]:
    """What is known of log p(x), by name, each (N,)."""
    names = ["log_p", "standard_error", "bias", "lower", "upper", "ess", "pareto_k", "evaluations", "reliable"]
    columns: dict[str, Any] = {name: getattr(estimate, name) for name in names}
    if estimate.discrete:
        columns["bits_per_dimension"] = estimate.bits_per_dimension
    return columns | {"engine": list(estimate.engine), "reason": list(estimate.reasons)}
