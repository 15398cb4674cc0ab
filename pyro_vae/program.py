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

import functools
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pyro_vae.layouts import KEPT, Layout, PyroCallable, Run, Values, draw, find_layout, run
from pyro_vae.log_joint import Layouts, LogJoint, Place, make_slots, place_values
from pyro_vae.parameters import evaluating, find_modules, judging, name_leaves, require_place, versions
from pyro_vae.recording import HandOn, Recording
from pyro_vae.rows import Data, Rows, as_rows, finite_rows, probe, replace, take
from pyro_vae.seeds import Seed, seeded
from pyro_vae.sites import CannotRun, Site, SiteTable, cannot_run, require_call, require_fit, score

PARTICLES = "_particles"
"""The plate of K particles, at dimension -2."""

PROBES = (3, 2)
"""Checks run on this many rows: few, so that they are cheap; twice, so that no other dimension has the same size."""


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
        log_prob, inside = score(msg["fn"], msg["value"], msg["mask"])
        if msg["is_observed"]:
            self.observed = self.observed + log_prob
            self.unsupported = ~inside if self.unsupported is None else self.unsupported | ~inside
        else:
            self.values[msg["name"]] = msg["value"]
            # Validation is off in here (see `judging`), so a draw outside the prior's support must be caught by hand.
            self.latent = self.latent + torch.where(inside, log_prob, -torch.inf)
            if self.latents and self.latents == self.values.keys():
                raise _AllDrawn

    def __exit__(self, *error: Any) -> bool:  # type: ignore[override]
        super().__exit__(*error)
        return error[0] is _AllDrawn


class _Recorder(Messenger):
    """Keeps what one run shows of its parameters and of its sites, with the settings of `Recording`."""

    def __init__(self, values: Mapping[str, Tensor] | None = None, **settings: Any) -> None:
        super().__init__()
        self.sites, self.parameters = Recording(values, **settings), Values()

    def _pyro_sample(self, msg: Any) -> None:
        self.sites.replay(msg, is_plate=site_is_subsample(msg))

    def _pyro_post_sample(self, msg: Any) -> None:
        if _is_row_site(msg) or site_is_subsample(msg):
            self.sites.keep(msg, is_plate=site_is_subsample(msg))

    def _pyro_post_param(self, msg: Any) -> None:
        value = msg["value"]
        if value is not None:
            self.parameters[msg["name"]] = value.unconstrained() if hasattr(value, "unconstrained") else value


def _is_row_site(msg: Any) -> bool:
    return not site_is_subsample(msg) and not (msg["infer"] or {}).get("_deterministic")


def record(
    function: PyroCallable, rows: Rows, values: Mapping[str, Tensor] | None = None,
    kwargs: Mapping[str, Any] | None = None, num_particles: int | None = None, *, hand_on: HandOn | None = None,
) -> Recording:  # fmt: skip
    """The sites of one run, latents and plates at `values` where given; gradients flow, as objectives need.

    With `num_particles` it runs in a left-most plate of so many, and latents are (K, N, ...); see `Recording` for the rest.
    """
    particles = pyro.plate(PARTICLES, num_particles, dim=-2) if num_particles else nullcontext()
    with _Recorder(values, hand_on=hand_on) as recorder, particles:
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
        rows, modules = probe(as_rows(x), PROBES[0]), self.modules_found()
        with torch.enable_grad(), evaluating(modules), _Recorder() as recorder:
            guide, model = self._run_once(rows)
        total = sum(torch.as_tensor(part).sum() for part in (guide.latent, model.latent, model.observed))
        return name_leaves(modules, recorder.parameters, torch.as_tensor(total))

    def _run_once(self, rows: Rows) -> tuple[_Densities, _Densities]:
        with _Densities() as guide:
            self.guide(*rows)
        with _Densities(place_values(guide.values)) as model:
            self.model(*rows)
        return guide, model

    def check(self, x: Data) -> SiteTable:
        """The table of sites and shapes of this program on the first rows of `x`.

        Raises:
            ValueError: the program does not fit (see `pyro_vae.sites`), or cannot be run on `x`.
        """
        everything = as_rows(x)
        require_place(self.modules_found(), everything)
        for count in PROBES:
            rows = probe(everything, count)
            with torch.no_grad(), seeded(0, rows[0].device), judging(self.modules_found(), validate=True):
                guide = _run_checked(self.guide, rows, "guide", {})
                model = _run_checked(self.model, rows, "model", {name: site.value for name, site in guide.items()})
            require_fit(model, guide, count)
        return SiteTable(model, guide, len(everything[0]))

    def usable_rows(self, rows: Rows) -> tuple[Tensor, list[str]]:
        """Which rows can be judged, boolean (N,), and one text a row: why not, empty where it can.

        A bare program answers; a `VAE` raises instead, because it knows what its likelihood accepts.

        Raises:
            ValueError: as `check`, which no row that cannot be judged makes fail.
        """
        good = finite_rows(rows)
        reasons = ["" if ok else "NaN or infinite values" for ok in good.tolist()]
        parts = good.nonzero().flatten().split(1024) if bool(good.any()) else ()
        for number, part in enumerate(parts):
            if number == 0:
                self._check_inside(take(rows, part))
            for row in part[self._unsupported(take(rows, part))].tolist():
                reasons[row] = "outside the support of the likelihood"
                good[row] = False
        return good, reasons

    def _check_inside(self, rows: Rows) -> None:
        """`check`, but on rows inside the support where there are others: these may be why it cannot be run."""
        try:
            self.check(rows)
        except CannotRun:
            inside = torch.ones(len(rows[0]), dtype=torch.bool)
            with suppress(Exception):
                inside = ~self._unsupported(rows)
            if bool(inside.all()):
                raise
            if bool(inside.any()):
                self.check(take(rows, inside))

    def _unsupported(self, rows: Rows) -> Tensor:
        with torch.no_grad(), seeded(0, rows[0].device), judging(self.modules_found()):
            unsupported = self._run_once(rows)[1].unsupported
        return torch.as_tensor(unsupported).expand(len(rows[0]))

    def sample(self, x: Data, num_particles: int) -> tuple[Values, Tensor]:
        """Draws from the guide, by torch's ambient generator; it runs once, or once a piece where it needs copies of x.

        Returns:
            z: latents by name, each (K, N, *event_shape), in their own support.
            log_q: log q(z | x), (K, N), float64.
        """
        rows = as_rows(x)
        layout = self.layout(rows).guide
        with torch.no_grad(), judging(self.modules_found()):
            drawn = draw(self.guide, rows, num_particles, layout, _Densities)
        return drawn.values, drawn.latent

    def sample_prior(self, x: Data, num_particles: int) -> tuple[Values, Tensor]:
        """The same from the model's prior, with log p(z), (K, N); the decoder is not run."""
        layouts = self.layout(rows := as_rows(x))
        with torch.no_grad(), judging(self.modules_found()):
            prior = functools.partial(_Densities, latents=frozenset(layouts.slots))
            drawn = draw(self.model, rows, num_particles, layouts.prior, prior)
        return drawn.values, drawn.latent

    def log_joint(self, x: Data) -> LogJoint:
        """log p(x, z) per row as a function of one unconstrained vector, (K, N, D) -> (K, N)."""
        layouts = self.layout(rows := as_rows(x))
        return self._density(self.model, rows, layouts, layouts.model, layouts.prior)

    def guide_density(self, x: Data) -> LogJoint:
        """log q(z | x) in the same form: of one unconstrained vector, or of named latents by `of_sites`."""
        layouts = self.layout(rows := as_rows(x))
        return self._density(self.guide, rows, layouts, layouts.guide, layouts.guide)

    def _density(self, function: PyroCallable, rows: Rows, layouts: Layouts, whole: Layout, latents: Layout) -> LogJoint:
        """The density of a model or guide, in the layouts that serve it as a whole and up to its latents."""
        modules = self.modules_found()

        def densities(
            particles: Mapping[str, Tensor], place_from: Callable[[Values], Place], until: frozenset[str] = frozenset()
        ) -> Run:
            def handler(part: Values) -> _Densities:
                return _Densities(place_from(part), latents=until)

            num_particles, layout = len(next(iter(particles.values()))), latents if until else whole
            # Nothing is drawn but indices of a plate and what the store lacks: the same each time, by seed.
            with seeded(0, rows[0].device), judging(modules):
                return run(function, rows, num_particles, layout, handler, particles)

        def rows_at(index: Tensor) -> LogJoint:
            return self._density(function, take(rows, index), layouts, whole, latents)

        return LogJoint(densities, layouts.slots, len(rows[0]), rows_at)

    def log_weights(self, x: Data, num_particles: int, seed: Seed = 0) -> tuple[Tensor, Values]:
        """log p(x, z) - log q(z | x) for K draws of the guide, (K, N) float64, and the draws."""
        rows = as_rows(x)
        with seeded(seed, rows[0].device):
            z, log_q = self.sample(rows, num_particles)
        with torch.no_grad():
            return self.log_joint(rows).of_sites(z) - log_q, z

    def simulate(self, x: Data, seed: Seed = 0) -> tuple[Rows, Values]:
        """Fresh data from the model, one row for each row of `x`, and the latents (N, ...) they came from.

        `x` gives the shapes and whatever the model is conditioned on; what the model observes of it is replaced.

        Raises:
            ValueError: what the model observes is not `x` itself, so that the guide could not read a fresh draw.
        """
        rows = as_rows(x)
        simulation = _Densities(simulate=True)
        with torch.no_grad(), seeded(seed, rows[0].device), judging(self.modules_found()), simulation:
            self.model(*rows)
        drawn = {name: (data, simulation.values.pop(name)) for name, data in simulation.data.items()}
        return replace(rows, drawn), simulation.values

    def template(self, count: int) -> Rows:
        """Rows to simulate `count` rows by, see `simulate`; a `VAE` has them."""
        raise ValueError(f"The shapes of {count} simulated rows are not known: give like=x, some rows of real data.")

    def layout(self, rows: Rows) -> Layouts:
        """How particles go through this program: found out once for each shape of row and state of the parameters.

        A network that is hardly trained may look right in a layout that it is wrong in later.
        """
        cache: dict[Any, Layouts] = self.__dict__.setdefault("_layouts", {})
        key = (*((part.shape[1:], part.dtype) for part in rows), *versions(self.modules_found()))
        if key not in cache:
            cache[key] = self._find_layouts(rows)
            for old in list(cache)[:-KEPT]:
                del cache[old]
        return cache[key]

    def _find_layouts(self, rows: Rows) -> Layouts:
        slots = make_slots({name: site for name, site in self.check(rows).model.items() if not site.observed})
        with torch.no_grad(), seeded(0, rows[0].device), judging(self.modules_found()):
            few = [probe(rows, count) for count in PROBES]
            probes = [(part, run(self.guide, part, 2, Layout.LOOPED, lambda _: _Densities()).values) for part in few]

            def find(function: PyroCallable, until: frozenset[str] = frozenset()) -> Layout:
                return find_layout(function, probes, lambda values: _Densities(place_values(values), latents=until))

            return Layouts(find(self.model), find(self.guide), find(self.model, frozenset(slots)), slots)


def check(program: Program, x: Data) -> SiteTable:
    """The table of sites and shapes of `program` on `x`, or a `ValueError` that names the site and the mend."""
    return program.check(x)


def _run_checked(function: PyroCallable, rows: Rows, where: str, values: Values) -> dict[str, Site]:
    """The sites of one run, its errors told in terms of rows."""
    require_call(function, where, rows)
    try:
        with _Recorder(values, lenient=True) as recorder:
            function(*rows)
    except (ValueError, RuntimeError, IndexError, TypeError) as error:
        raise cannot_run(error, where, rows) from error
    return recorder.sites
