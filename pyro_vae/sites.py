"""Sites of a Pyro program: what one run shows of them, the table people read, and the refusals.

A program fits the package when every sample site lies inside one plate over the rows, at dimension -1, keeps no other
batch dimension, and the latent sites of model and guide agree. `require_fit` says so, or raises a `ValueError` that
names the site, its shapes and the mend.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import Delta
from pyro.infer.autoguide import AutoGuide
from torch import Tensor
from torch.distributions import constraints

from pyro_vae.rows import Rows

Shape = tuple[int, ...]

_WRAPPERS = ("Independent", "MaskedDistribution", "ExpandedDistribution")


@dataclass(frozen=True)
class Plate:
    """A plate around a site: its name, dimension, rows it runs over and rows it stands for."""

    name: str
    dim: int | None
    size: int
    full_size: int


@dataclass(frozen=True)
class Site:
    """One sample site as one run of a model or guide met it, its distribution already broadcast by the plates."""

    name: str
    distribution: Any
    value: Tensor
    observed: bool
    auxiliary: bool
    scale: float | Tensor
    mask: bool | Tensor | None
    plates: tuple[Plate, ...]

    @classmethod
    def of(cls, message: Mapping[str, Any]) -> Site:
        """The site of one of Pyro's messages."""
        return cls(
            name=message["name"],
            distribution=message["fn"],
            value=message["value"],
            observed=message["is_observed"],
            auxiliary=bool((message["infer"] or {}).get("is_auxiliary")),
            scale=message["scale"],
            mask=message["mask"],
            plates=tuple(Plate(f.name, f.dim, f.size, f.full_size or f.size) for f in message["cond_indep_stack"]),
        )

    @property
    def batch_shape(self) -> Shape:
        """The distribution's batch shape; (N,) inside one plate."""
        return tuple(self.distribution.batch_shape)

    @property
    def event_shape(self) -> Shape:
        """Shape of one row's value."""
        return tuple(self.distribution.event_shape)

    @property
    def family(self) -> str:
        """Name of the distribution, without the wrappers that `to_event`, `expand` and `mask` put around it."""
        inner = self.distribution
        while type(inner).__name__ in _WRAPPERS:
            inner = inner.base_dist
        return type(inner).__name__

    @property
    def shapes(self) -> str:
        """Both shapes, as messages print them."""
        return f"batch shape {self.batch_shape}, event shape {self.event_shape}"


Sites = Mapping[str, Site]


def score(distribution: Any, value: Tensor, mask: Any) -> tuple[Tensor, Tensor]:
    """The log-density of each row's value, float64, and whether it lies in the support; masked rows have 0 and do."""
    log_prob = distribution.log_prob(value).double()
    inside = distribution.support.check(value)
    if inside.dim() > log_prob.dim():  # pyro.factor, and supports declared without event dimensions
        inside = inside.flatten(log_prob.dim()).all(-1)
    if mask is not None:
        mask = torch.as_tensor(mask, device=value.device)
        log_prob, inside = torch.where(mask, log_prob, 0.0), inside | ~mask
    return log_prob, inside


class CannotRun(ValueError):
    """A program fails on the rows it was given, perhaps by their values alone."""


class SiteTable:
    """The table that `pv.check` returns: prints itself, one line a site."""

    def __init__(self, model: Sites, guide: Sites, num_rows: int) -> None:
        self.model, self.guide, self.num_rows = dict(model), dict(guide), num_rows

    def rows(self) -> list[tuple[str, ...]]:
        """One tuple of texts a site: role, name, p(.), q(.), shape of one row, support."""
        table: list[tuple[str, ...]] = []
        for site in self.model.values():
            guide = "" if site.observed else self.guide[site.name].family
            role = "observed" if site.observed else "latent"
            table.append((role, site.name, site.family, guide, str(site.event_shape), _support(site)))
        return table

    def __repr__(self) -> str:
        """The table as text."""
        head = ("role", "site", "model", "guide", "event shape", "support")
        lines = [head, *self.rows()]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        plate = next(iter(self.model.values())).plates[0].name
        text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
        return "\n".join([f"checked on {self.num_rows} rows of plate {plate!r}", *text])


def _support(site: Site) -> str:
    support = site.distribution.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return str(support).removesuffix("()")


def require_fit(model: Sites, guide: Sites, num_rows: int) -> None:
    """Refuse a program the package cannot judge row by row.

    Raises:
        ValueError: the first misfit, with the site, its shapes and the mend.
    """
    latents = {name: site for name, site in model.items() if not site.observed}
    if len(latents) == len(model):
        raise ValueError(
            f"The model observes nothing (its sites are {sorted(model)}): give its data site obs=x, as in "
            "pyro.sample('x', ..., obs=x)."
        )
    if not latents:
        raise ValueError(
            f"The model has no latent site (its sites are {sorted(model)}): sample z in it with pyro.sample('z', ...), "
            "and in the guide."
        )
    for site in model.values():
        _require_row_site(site, "model", num_rows)
    _require_same_names(latents, guide)
    for site in guide.values():
        _require_row_site(site, "guide", num_rows)
    for name, site in latents.items():
        if site.event_shape != guide[name].event_shape:
            raise ValueError(
                f"Latent {name!r} has event shape {site.event_shape} in the model and {guide[name].event_shape} "
                "in the guide: give both the same, by their sizes and by .to_event()."
            )
        _require_inside(site, guide[name])


def _require_same_names(latents: Sites, guide: Sites) -> None:
    for name, site in guide.items():
        if site.auxiliary:
            raise ValueError(
                f"The guide's site {name!r} ({site.shapes}) is auxiliary, so that q(z|x) has no density in closed form: "
                "leave it out, or make it a latent of the model."
            )
    if missing := sorted(set(latents) - set(guide)):
        raise ValueError(
            f"The model's latent {missing[0]!r} ({latents[missing[0]].shapes}) is not in the guide, which samples "
            f"{sorted(guide) or 'nothing'}: add pyro.sample({missing[0]!r}, ...) to the guide, or observe it with obs=."
        )
    if extra := sorted(set(guide) - set(latents)):
        raise ValueError(
            f"The guide samples {extra[0]!r} ({guide[extra[0]].shapes}), which is no latent of the model (those are "
            f"{sorted(latents) or 'none'}): use the same name in both."
        )


def _require_row_site(site: Site, where: str, num_rows: int) -> None:
    kind = "observed site" if site.observed else "latent"
    here = f"The {where}'s {kind} {site.name!r} ({site.shapes})"
    if not site.observed and _is_discrete(site):
        raise ValueError(
            f"{here} is discrete ({site.family}): sum it out in the model, or replace it by a continuous relaxation."
        )
    if not site.observed and _is_point(site):
        raise ValueError(
            f"{here} is a Delta, which has no density: give it a scale, as dist.Normal(value, scale) has one, "
            "or make it no latent and compute it in the model."
        )
    if not site.plates:
        role = "would be shared by all rows (a global latent)" if not site.batch_shape else "lies outside every plate"
        raise ValueError(
            f"{here} {role}: sample it inside `with pyro.plate('data', len(x)):`, so that every row has its own."
        )
    if len(site.plates) > 1:
        names = ", ".join(repr(plate.name) for plate in site.plates)
        raise ValueError(
            f"{here} lies inside {len(site.plates)} plates ({names}): keep the one over the rows "
            "and make the others event dimensions with .to_event()."
        )
    plate = site.plates[0]
    if plate.dim != -1:
        raise ValueError(
            f"{here} lies in plate {plate.name!r} at dim={plate.dim}: leave `dim` out, so that it is -1, and make the "
            "dimensions on its right event dimensions with .to_event()."
        )
    if plate.size != num_rows:
        raise _plate_of_other_size(plate.name, plate.size, num_rows, where)
    if site.batch_shape != (num_rows,):
        raise _to_event_missing(site.name, site.batch_shape[:-1] or site.batch_shape, where)
    shape = site.batch_shape + site.event_shape
    if tuple(site.value.shape) != shape:
        raise ValueError(
            f"{here} is given a value of shape {tuple(site.value.shape)} on {num_rows} rows: give it one of shape {shape}, "
            "or a distribution of the value's shape."
        )


def require_call(function: Callable[..., Any], where: str, rows: Rows) -> None:
    """Refuse a model or guide (`where`) that is an autoguide, or takes another number of arguments than `rows` has.

    Raises:
        ValueError: names what it is or takes, and the mend.
    """
    if isinstance(function, AutoGuide):
        raise ValueError(
            f"The {where} is an {type(function).__name__}, whose parameters belong to the rows it was set up with: "
            "write an amortised guide(x) that samples the latents from a network of x."
        )
    try:
        inspect.signature(getattr(function, "forward", function)).bind(*rows)
    except TypeError as error:
        raise ValueError(
            f"The {where} cannot be called with the {len(rows)} tensor(s) of x ({error}): "
            "give x as a tuple of what model and guide both take."
        ) from error


def cannot_run(error: Exception, where: str, rows: Rows) -> ValueError:
    """The error for a model or guide (`where`) that fails on `rows`: Pyro's own, told in terms of rows."""
    shapes = ", ".join(str(tuple(part.shape)) for part in rows)
    subsample = re.search(r"subsample_size does not match len\(subsample\), (\d+) vs", str(error))
    if subsample is not None:
        return _plate_of_other_size(None, int(subsample[1]), len(rows[0]), where)
    mismatch = re.search(r"plate\('(.*)'\) at site (.*) dim -?\d+, (\d+) vs (\d+)", str(error))
    if mismatch is None:
        return CannotRun(
            f"The {where} cannot be run on {len(rows[0])} rows of x, shape {shapes} ({error}): "
            "give x the shape and the values that it was written for."
        )
    plate, site_name, size, found = mismatch[1], mismatch[2], int(mismatch[3]), int(mismatch[4])
    if size != len(rows[0]):
        return _plate_of_other_size(plate, size, len(rows[0]), where)
    row = tuple(rows[0].shape[1:])
    return _to_event_missing(site_name, row if where == "model" and row[-1:] == (found,) else (found,), where)


def _to_event_missing(name: str, extra: Shape, where: str) -> ValueError:
    """The error for a site that keeps batch dimensions `extra` besides the plate's own."""
    return ValueError(
        f"The {where}'s site {name!r} keeps {extra} as independent batch dimensions inside the plate over the rows, "
        f"which has room for the rows alone: add .to_event({len(extra)}) to its distribution."
    )


def _plate_of_other_size(plate: str | None, size: int, num_rows: int, where: str) -> ValueError:
    """The error for a plate that does not run over exactly the rows of x; Pyro does not always tell its name."""
    return ValueError(
        f"{'A plate' if plate is None else f'Plate {plate!r}'} runs over {size} rows, but the {where} was called with "
        f"{num_rows}: a subsampled plate or one of fixed size cannot be judged row by row, "
        f"make it pyro.plate({plate or 'data'!r}, len(x))."
    )


def _is_discrete(site: Site) -> bool:
    return bool(getattr(site.distribution, "has_enumerate_support", False)) or bool(
        getattr(site.distribution.support, "is_discrete", False)
    )


def _is_point(site: Site) -> bool:
    """Whether all mass is in one point, however it is wrapped or transformed."""
    inner = site.distribution
    while hasattr(inner, "base_dist"):
        inner = inner.base_dist
    return isinstance(inner, Delta)


def _require_inside(site: Site, guide: Site) -> None:
    """Draws of the guide must lie where the model's prior has mass."""
    inside = site.distribution.support.check(guide.value)
    if not bool(torch.as_tensor(inside).all()):
        raise ValueError(
            f"The guide's latent {site.name!r} ({guide.family}) was drawn outside the support of the model's "
            f"{site.family} ({_support(site)}): give the guide a distribution with that support."
        )
