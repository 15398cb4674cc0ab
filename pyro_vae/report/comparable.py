"""What can be seen of whether programs may be compared, before any work; each refusal names the programs and the mend."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from pyro_vae.evidence.observed import Observed, observed_sites
from pyro_vae.program import Program
from pyro_vae.rows import Data, Rows, as_rows, row_blocks, take


def require_programs(programs: Mapping[str, Program]) -> None:
    """Refuse what is no mapping of names to programs, or fewer than two.

    Raises:
        ValueError: names what was given.
    """
    if not isinstance(programs, Mapping):
        raise ValueError(f"programs is a {type(programs).__name__}: give names to them, as {{'a': program, 'b': other}}.")
    for name, program in programs.items():
        if not isinstance(name, str):
            raise ValueError(f"programs has the name {name!r}, a {type(name).__name__}: give texts as names.")
        if not isinstance(program, Program):
            raise ValueError(
                f"programs[{name!r}] is a {type(program).__name__}: give a VAE, or pv.Program(model, guide) of a Pyro pair."
            )
    if len(programs) < 2:
        raise ValueError(f"programs has {len(programs)} entries ({', '.join(map(repr, programs))}): give at least two.")


def rows_of(programs: Mapping[str, Program], x: Data | Mapping[str, Data]) -> dict[str, Rows]:
    """The rows of each program; what is modelled, the first tensor, is the same in all.

    Args:
        programs: by name.
        x: rows for all of them, or rows by name, for programs that take different tuples.

    Raises:
        ValueError: a name is missing or strange, or the rows differ in number, shape or values.
    """
    if not isinstance(x, Mapping):
        same = as_rows(x)
        return dict.fromkeys(programs, same)
    if missing := [name for name in programs if name not in x]:
        raise ValueError(
            f"x has no rows for {missing[0]!r} (it has {sorted(map(str, x))}): give x[{missing[0]!r}], or one x for all."
        )
    if strange := [name for name in x if name not in programs]:
        raise ValueError(
            f"x has rows for {strange[0]!r}, which is no program (those are {sorted(programs)}): leave them out."
        )
    rows = {name: as_rows(x[name], f"x[{name!r}]") for name in programs}
    for first, second in pairwise(programs):
        _require_same(first, rows[first][0], second, rows[second][0])
    return rows


def _require_same(first: str, a: Tensor, second: str, b: Tensor) -> None:
    if a is b:
        return
    if len(a) != len(b):
        raise ValueError(f"x of {first!r} has {len(a)} rows and x of {second!r} has {len(b)}: give both the same rows.")
    if a.shape != b.shape:
        raise ValueError(
            f"x of {first!r} has rows of shape {tuple(a.shape[1:])} and x of {second!r} of shape {tuple(b.shape[1:])}: "
            "log p(x) of different things does not compare, give both the same x."
        )
    differs = _differing(a, b)
    if bool(differs.any()):
        raise ValueError(
            f"x of {first!r} and x of {second!r} hold other values in {int(differs.sum())} of {len(a)} rows, first in row "
            f"{int(differs.nonzero()[0])}: give both the same rows; if they are dequantised or binarised draws, draw them "
            "once and give the same draws to all."
        )


def _differing(a: Tensor, b: Tensor) -> Tensor:
    """Which rows hold other values, boolean (N,), of tensors of one shape; NaN equals NaN."""
    coarse = torch.float32 if torch.float32 in (a.dtype, b.dtype) else torch.float64
    differs = torch.zeros(len(a), dtype=torch.bool)
    for at in row_blocks(len(a)):
        one, other = a[at].cpu().to(coarse), b[at].cpu().to(coarse)
        same = (one == other) | (one.isnan() & other.isnan())
        differs[at] = ~same.reshape(len(same), -1).all(-1)
    return differs


def remarks_on(rows: Mapping[str, Rows]) -> tuple[str, ...]:
    """What the conditions, the tensors after the first of a program's rows, make of its log p(x), one sentence each.

    Args:
        rows: by name, as `rows_of` has them.
    """
    told = []
    for name, (_, *mine) in rows.items():
        lacking = {
            other: places
            for other, (_, *theirs) in rows.items()
            if (places := [i for i, one in enumerate(mine, 1) if not any(_same_condition(one, two) for two in theirs)])
        }
        if lacking:
            places = sorted({place for some in lacking.values() for place in some})
            one = len(lacking) == 1
            told.append(
                f"{name!r} is told {_listed(places)} and {', '.join(map(repr, lacking))} {'is' if one else 'are'} not: its "
                f"number is log p(x | y), and y may tell of x what the other{' has' if one else 's have'} to find out."
            )
    return (*told, *_sums_told(rows))


def _sums_told(rows: Mapping[str, Rows]) -> list[str]:
    """Which conditions are the row sums of x, as library sizes are; those of a single row would be so by chance."""
    x = next(iter(rows.values()))[0]
    if len(x) < 2 or all(len(mine) == 1 for mine in rows.values()):
        return []
    sums = torch.cat([x[at].cpu().double().reshape(len(x[at]), -1).nansum(-1) for at in row_blocks(len(x))])
    found: dict[int, list[str]] = {}
    for name, (_, *mine) in rows.items():
        for place, one in enumerate(mine, 1):
            if one.numel() == len(sums) and torch.allclose(one.cpu().double().reshape(-1), sums, rtol=1e-5):
                found.setdefault(place, []).append(repr(name))
    return [
        f"x[{place}] of {', '.join(names)} is the sum of each row of x, a function of x: log p(x | x[{place}]) leaves out "
        "how likely that sum is, so it is no log p(x)."
        for place, names in found.items()
    ]


def _same_condition(a: Tensor, b: Tensor) -> bool:
    if a is b:
        return True
    return a.numel() == b.numel() and not bool(_differing(a.reshape(len(a), -1), b.reshape(len(b), -1)).any())


def _listed(places: list[int]) -> str:
    return ", ".join(f"x[{place}]" for place in places)


def require_comparable(programs: Mapping[str, Program], rows: Mapping[str, Rows]) -> dict[str, Observed]:
    """What each program observes: x itself and nothing else, as a density in all programs or as a mass function in all.

    Raises:
        ValueError: a program does not fit or refuses the rows (see `Program.check`), observes something else than x, or
            observes it as another kind of thing than the others.
    """
    seen = {name: _observed(name, program, rows[name]) for name, program in programs.items()}
    for (first, one), (second, other) in pairwise(seen.items()):
        if one.discrete != other.discrete:
            kinds = [f"a mass function ({s.family})" if s.discrete else f"a density ({s.family})" for s in (one, other)]
            raise ValueError(
                f"{first!r} gives x {kinds[0]} and {second!r} {kinds[1]}, which do not compare: give both a likelihood of "
                "discrete data, or both one of continuous data."
            )
        if one.discrete and one.dimensions != other.dimensions:
            raise ValueError(
                f"A row of x has {one.dimensions} dimensions in {first!r} ({one.family}) and {other.dimensions} in "
                f"{second!r} ({other.family}): give both a likelihood of the same coding."
            )
    return seen


def _observed(name: str, program: Program, rows: Rows) -> Observed:
    """The one site that observes x."""
    try:
        good, _ = program.usable_rows(rows)
    except ValueError as error:
        raise ValueError(f"Program {name!r}: {error}") from error
    # Where no row can be judged any will do to see the sites: they are run without validation.
    sites = observed_sites(program, take(rows, good.nonzero().flatten()[:8]) if bool(good.any()) else rows)
    for site in sites:
        if site.family == "Unit":
            raise ValueError(
                f"Program {name!r} has the factor {site.name!r}, so that its log p may be no log-density of x: write the "
                "likelihood as one distribution and observe x, pyro.sample('x', ..., obs=x)."
            )
        if site.place != 0:
            shape = tuple(rows[0].shape[1:])
            raise ValueError(
                f"Program {name!r} observes {site.name!r} with rows of shape {site.shape}, which are not x with rows of "
                f"shape {shape}: let every program observe x itself, unchanged, and nothing else."
            )
    if len(sites) > 1:
        raise ValueError(
            f"Program {name!r} observes x {len(sites)} times (sites {', '.join(repr(site.name) for site in sites)}), "
            "which gives no density of x: observe it once."
        )
    return sites[0]
