"""The seam with Pyro: a model and a guide, seen as densities of rows.

For rows x_1 .. x_N with local latents z the package needs four things of a (model, guide) pair, and this file is the only
one that opens Pyro's effect handlers to get them:

* draws z ~ q(z | x) with log q(z | x)                  `Program.sample`
* draws z ~ p(z) with log p(x | z)                      `Program.sample_prior`
* log p(x, z) as a function of one unconstrained vector `Program.log_joint`
* draws (x, z) from the model                           `Program.simulate`

Every density is per row, shape (K, N) for K particles and N rows, float64, from the unscaled log-probabilities: scales of
plates and handlers belong to objectives, not to probabilities (masks are honoured). Particles are a left-most batch
dimension; whether the networks take one is found out by comparison with single runs, see `Layout`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pyro_vae.layouts import Layout, PyroCallable, Run, Values, find_layout, run
from pyro_vae.log_joint import LogJoint, Place, make_slots, place_values
from pyro_vae.parameters import evaluating, find_modules, judging, require_place, used_leaves
from pyro_vae.rows import Data, Rows, as_rows, finite_rows, take
from pyro_vae.seeds import Seed, seeded
from pyro_vae.sites import Plate, Site, SiteTable, plate_of_other_size, require_fit, to_event_missing

PROBE_ROWS = 3
"""Checks run on this many rows: enough to tell rows from other dimensions, cheap on any data."""


class _AllDrawn(Exception):
    """Leaves a model as soon as its latents are drawn."""


class _Densities(Messenger):
    """Adds up the per-row log-densities of one run; `place` decides the latents, else they are drawn.

    Args:
        place: decides each latent.
        simulate: draw what the program observes.
        latents: leave the run when these are drawn, so that the decoder does not run (`_AllDrawn`).
    """

    def __init__(
        self, place: Place | None = None, *, simulate: bool = False, latents: frozenset[str] = frozenset()
    ) -> None:
        super().__init__()
        self.place, self.simulate, self.latents = place, simulate, latents
        self.latent: Tensor | float = 0.0
        self.observed: Tensor | float = 0.0
        self.values: Values = {}
        self.data: Values = {}
        self.unsupported: Tensor | None = None

    def _pyro_sample(self, msg: Any) -> None:
        if not _is_row_site(msg):
            return
        if msg["is_observed"]:
            if self.simulate:
                self.data[msg["name"]] = msg["value"]
                msg["is_observed"], msg["value"] = False, None
        elif self.place is not None:
            msg["value"], jacobian = self.place(msg["name"], msg["fn"])
            self.latent = self.latent + jacobian

    def _pyro_post_sample(self, msg: Any) -> None:
        if not _is_row_site(msg):
            return
        value, distribution = msg["value"], msg["fn"]
        log_prob = distribution.log_prob(value).double()
        if msg["mask"] is not None:
            log_prob = torch.where(torch.as_tensor(msg["mask"], device=value.device), log_prob, 0.0)
        if msg["is_observed"]:
            self.observed = self.observed + log_prob
            outside = ~distribution.support.check(value)
            self.unsupported = outside if self.unsupported is None else self.unsupported | outside
        else:
            self.values[msg["name"]] = value
            # Validation is off in here (see `judging`), so a draw outside the prior's support must be caught by hand.
            inside = distribution.support.check(value)
            self.latent = self.latent + torch.where(inside, log_prob, -torch.inf)
            if self.latents and self.latents == self.values.keys():
                raise _AllDrawn

    def __exit__(self, *error: Any) -> bool:  # type: ignore[override]
        super().__exit__(*error)
        return error[0] is _AllDrawn


class _Recorder(Messenger):
    """Keeps what one run shows of its sites and parameters; replays `values` where it is given any."""

    def __init__(self, values: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.replayed = values or {}
        self.sites: dict[str, Site] = {}
        self.parameters: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if _is_row_site(msg) and not msg["is_observed"] and msg["name"] in self.replayed:
            msg["value"] = self.replayed[msg["name"]]

    def _pyro_post_sample(self, msg: Any) -> None:
        if not _is_row_site(msg):
            return
        plates = tuple(Plate(f.name, f.dim, f.size, f.full_size or f.size) for f in msg["cond_indep_stack"])
        self.sites[msg["name"]] = Site(
            name=msg["name"],
            distribution=msg["fn"],
            value=msg["value"],
            observed=msg["is_observed"],
            auxiliary=bool((msg["infer"] or {}).get("is_auxiliary")),
            scale=msg["scale"],
            mask=msg["mask"],
            plates=plates,
        )

    def _pyro_post_param(self, msg: Any) -> None:
        value = msg["value"]
        if value is not None:
            self.parameters[msg["name"]] = value.unconstrained() if hasattr(value, "unconstrained") else value


def _is_row_site(msg: Any) -> bool:
    return not site_is_subsample(msg) and not (msg["infer"] or {}).get("_deterministic")


def record(
    function: PyroCallable,
    rows: Rows,
    values: Mapping[str, Tensor] | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Site]:
    """The sample sites of one run of `function`, latents at `values` where given; gradients flow, as objectives need."""
    with _Recorder(values) as recorder:
        function(*rows, **(kwargs or {}))
    return recorder.sites


class Program:
    """A Pyro model and its guide: p(x, z) and q(z | x) for rows that are independent given the parameters.

    Args:
        model: `model(x, ...)` with one plate over the rows of `x`; observes `x`, samples continuous latents.
        guide: `guide(x, ...)` with the same latents, amortised over the rows.

    Both may be functions, bound methods or modules, with parameters wherever Pyro users keep them.
    """

    model: PyroCallable
    guide: PyroCallable

    def __init__(self, model: PyroCallable, guide: PyroCallable) -> None:
        self.model, self.guide = model, guide

    def __repr__(self) -> str:
        """Both callables by name."""
        names = (getattr(f, "__name__", type(f).__name__) for f in (self.model, self.guide))
        return f"Program({', '.join(names)})"

    def modules_found(self) -> dict[str, nn.Module]:
        """The outermost modules that model and guide can reach, by name."""
        return find_modules({"model": self.model, "guide": self.guide})

    def trainable(self, x: Data) -> dict[str, Tensor]:
        """Every leaf tensor with a gradient that the program uses, by a name that is the same in every process.

        Modules reachable from the callables, `pyro.module`, `pyro.param` (its unconstrained value) and any other leaf
        the log-densities are computed from. Runs the program on a few rows; entries it makes in the param store stay.
        """
        rows = take(as_rows(x), slice(PROBE_ROWS))
        modules = self.modules_found()
        with torch.enable_grad(), evaluating(modules), _Recorder() as recorder:
            with _Densities() as guide:
                self.guide(*rows)
            with _Densities(place_values(guide.values)) as model:
                self.model(*rows)
        leaves: dict[str, Tensor] = {
            f"{at}.{name}": leaf for at, module in modules.items() for name, leaf in module.named_parameters()
        }
        leaves |= recorder.parameters
        total = sum(torch.as_tensor(part).sum() for part in (guide.latent, model.latent, model.observed))
        leaves |= {f"leaf{i}": leaf for i, leaf in enumerate(used_leaves(torch.as_tensor(total)))}
        first_name = {id(leaf): name for name, leaf in reversed(leaves.items())}
        return {name: leaf for name, leaf in leaves.items() if leaf.requires_grad and first_name[id(leaf)] == name}

    def check(self, x: Data) -> SiteTable:
        """The table of sites and shapes of this program on the first rows of `x`.

        Raises:
            ValueError: the program does not fit (see `pyro_vae.sites`), or cannot be run on `x`.
        """
        if isinstance(self.guide, AutoGuide):
            raise ValueError(
                f"The guide is an {type(self.guide).__name__}, whose parameters belong to the rows it was set up with: "
                "write an amortised guide(x) that samples the latents from a network of x."
            )
        everything = as_rows(x)
        require_place(self.modules_found(), everything)
        rows = take(everything, slice(PROBE_ROWS))
        with torch.no_grad(), seeded(0, rows[0].device), judging(self.modules_found(), validate=True):
            guide = _run_checked(self.guide, rows, "guide", {})
            model = _run_checked(self.model, rows, "model", {name: site.value for name, site in guide.items()})
        require_fit(model, guide, len(rows[0]))
        return SiteTable(model, guide, len(everything[0]))

    def usable_rows(self, rows: Rows) -> tuple[Tensor, list[str]]:
        """Which rows can be judged, boolean (N,), and one text a row: why not, empty where it can.

        A bare program answers; a `VAE` raises instead, because it knows what its likelihood accepts.
        """
        good = finite_rows(rows)
        reasons = ["" if ok else "NaN or infinite values" for ok in good.tolist()]
        for part in good.nonzero().flatten().split(1024):
            for row in part[self._unsupported(take(rows, part))].tolist():
                reasons[row] = "outside the support of the likelihood"
                good[row] = False
        return good, reasons

    def _unsupported(self, rows: Rows) -> Tensor:
        with torch.no_grad(), seeded(0, rows[0].device), judging(self.modules_found()):
            with _Densities() as guide:
                self.guide(*rows)
            with _Densities(place_values(guide.values)) as model:
                self.model(*rows)
        return torch.as_tensor(model.unsupported).expand(len(rows[0]))

    def sample(self, x: Data, num_particles: int) -> tuple[Values, Tensor]:
        """Draws from the guide, by torch's ambient generator; the guide runs once however large K is.

        Returns:
            z: latents by name, each (K, N, *event_shape), in their own support.
            log_q: log q(z | x), (K, N), float64.
        """
        rows = as_rows(x)
        layout = self.layout(rows)[1]
        with torch.no_grad(), judging(self.modules_found()):
            drawn = run(self.guide, rows, num_particles, layout, lambda _: _Densities())
        return drawn.values, drawn.latent

    def sample_prior(self, x: Data, num_particles: int) -> tuple[Values, Tensor]:
        """Draws from the model's prior, by torch's ambient generator; the decoder is not run.

        Returns:
            z: latents by name, each (K, N, *event_shape).
            log_p: log p(z), (K, N), float64.
        """
        rows = as_rows(x)
        layout = self.layout(rows)[0]
        names = frozenset(self._latents(rows))
        with torch.no_grad(), judging(self.modules_found()):
            drawn = run(self.model, rows, num_particles, layout, lambda _: _Densities(latents=names))
        return drawn.values, drawn.latent

    def _latents(self, rows: Rows) -> dict[str, Site]:
        probe = take(rows, slice(PROBE_ROWS))
        with torch.no_grad(), seeded(0, rows[0].device), judging(self.modules_found()):
            draws = {name: site.value for name, site in record(self.guide, probe).items()}
            return {name: site for name, site in record(self.model, probe, draws).items() if not site.observed}

    def log_joint(self, x: Data) -> LogJoint:
        """log p(x, z) per row as a function of one unconstrained vector, (K, N, D) -> (K, N)."""
        rows = as_rows(x)
        layout, modules = self.layout(rows)[0], self.modules_found()

        def densities(particles: Mapping[str, Tensor], place_from: Callable[[Values], Place]) -> Run:
            num_particles = len(next(iter(particles.values())))
            with judging(modules):
                return run(self.model, rows, num_particles, layout, lambda part: _Densities(place_from(part)), particles)

        return LogJoint(densities, make_slots(self._latents(rows)), len(rows[0]))

    def log_weights(self, x: Data, num_particles: int, seed: Seed = 0) -> tuple[Tensor, Values]:
        """log p(x, z) - log q(z | x) for K draws of the guide, (K, N) float64, and the draws."""
        rows = as_rows(x)
        with seeded(seed, rows[0].device):
            z, log_q = self.sample(rows, num_particles)
        with torch.no_grad():
            return self.log_joint(rows).of_sites(z) - log_q, z

    def simulate(self, x: Data, seed: Seed = 0) -> tuple[Rows, Values]:
        """Fresh data from the model, one row for each row of `x`, and the latents (N, ...) they came from.

        `x` gives the number of rows, the shapes and whatever the model is conditioned on; what the model observes of it
        is replaced.

        Raises:
            ValueError: what the model observes is not `x` itself, so that the guide could not read a fresh draw.
        """
        rows = as_rows(x)
        simulation = _Densities(simulate=True)
        with torch.no_grad(), seeded(seed, rows[0].device), judging(self.modules_found()), simulation:
            self.model(*rows)
        fresh = list(rows)
        for name, data in simulation.data.items():
            match = [i for i, part in enumerate(rows) if part.shape == data.shape and torch.equal(part, data)]
            if not match:
                raise ValueError(
                    f"Cannot simulate rows: the model observes {name!r} with shape {tuple(data.shape)}, which is not x "
                    f"of shape {tuple(rows[0].shape)} as the guide reads it: observe x itself, unchanged."
                )
            fresh[match[0]] = simulation.values.pop(name)
        return tuple(fresh), simulation.values

    def layout(self, rows: Rows) -> tuple[Layout, Layout]:
        """How particles go through the model and the guide, found out once for each shape of row and set of networks."""
        modules = self.modules_found()
        cache: dict[Any, tuple[Layout, Layout]] = self.__dict__.setdefault("_layouts", {})
        networks = tuple(id(m) for outer in modules.values() for m in outer.modules())
        key = (*((part.shape[1:], part.dtype) for part in rows), networks)
        if key not in cache:
            self.check(rows)
            probe = take(rows, slice(PROBE_ROWS))
            with torch.no_grad(), seeded(0, rows[0].device), judging(modules):
                draws = run(self.guide, probe, 2, Layout.LOOPED, lambda _: _Densities()).values

                def handler(part: Values) -> _Densities:
                    return _Densities(place_values(part))

                eps = torch.finfo(rows[0].dtype).eps
                model = find_layout(lambda layout: run(self.model, probe, 2, layout, handler, draws), eps)
                guide = find_layout(lambda layout: run(self.guide, probe, 2, layout, handler, draws), eps)
            cache[key] = (model, guide)
        return cache[key]


def check(program: Program, x: Data) -> SiteTable:
    """The table of sites and shapes of `program` on `x`, or a `ValueError` that names the site and the mend."""
    return program.check(x)


def _run_checked(function: PyroCallable, rows: Rows, where: str, values: Values) -> dict[str, Site]:
    """`record` with Pyro's errors told in terms of rows."""
    try:
        inspect.signature(function).bind(*rows)
    except TypeError as error:
        raise ValueError(f"The {where} cannot be called with {len(rows)} tensor(s) of rows: {error}.") from error
    try:
        sites = record(function, rows, values)
        for site in sites.values():
            site.distribution.log_prob(site.value)
    except (ValueError, RuntimeError, IndexError) as error:
        mismatch = re.search(r"plate\('(.*)'\) at site (.*) dim -?\d+, (\d+) vs (\d+)", str(error))
        if mismatch is None:
            shapes = ", ".join(str(tuple(part.shape)) for part in rows)
            raise ValueError(f"The {where} cannot be run on {len(rows[0])} rows of shape {shapes}: {error}") from error
        plate, site_name, size, found = mismatch[1], mismatch[2], int(mismatch[3]), int(mismatch[4])
        if size != len(rows[0]):
            raise plate_of_other_size(plate, size, len(rows[0])) from error
        raise to_event_missing(site_name, (found,), where) from error
    return sites
