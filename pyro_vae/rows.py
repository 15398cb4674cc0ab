"""Rows: what the package means by "x".

A data argument is one tensor whose first dimension counts the rows, or a tuple of tensors with the same number of rows
(a conditional model: ``model(*x)``, ``guide(*x)``). Inside the package it is always the tuple; `as_rows` is the one
place where the two meet and where unusable input is refused. Only the first tensor must be floating point; what
follows it (labels, library sizes) may be anything.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

Rows = tuple[Tensor, ...]
"""The rows inside the package: tensors of shape (N, ...), the same N in each."""

Data = Tensor | np.ndarray[Any, Any] | Sequence[Tensor | np.ndarray[Any, Any]]
"""What a user may hand over as `x`."""

PRECISIONS = (torch.float32, torch.float64)

_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)


def as_rows(x: Data, name: str = "x") -> Rows:
    """The rows of `x` as a tuple of tensors, nothing copied.

    Args:
        x: a tensor or NumPy array (a memory map too) of shape (N, ...), or a tuple of them.
        name: what to call it in a message.

    Raises:
        TypeError: `x` holds something else than tensors or arrays.
        ValueError: no rows, no row dimension, numbers of rows that differ, an integer or half-precision first tensor, an
            array that torch cannot take.
    """
    given = x if isinstance(x, (tuple, list)) else (x,)
    if not given:
        raise ValueError(f"{name} is an empty tuple: give at least one tensor of rows.")
    rows = tuple(_as_tensor(part, name if len(given) == 1 else f"{name}[{i}]") for i, part in enumerate(given))
    for i, part in enumerate(rows):
        if part.dim() == 0:
            raise ValueError(f"{name} is a single number, not rows: give a tensor of shape (N, ...).")
        if len(part) != len(rows[0]):
            raise ValueError(
                f"{name}[0] has {len(rows[0])} rows and {name}[{i}] has {len(part)}: all must have the same number."
            )
    first = rows[0]
    if len(first) == 0:
        raise ValueError(f"{name} has shape {tuple(first.shape)}, that is no rows: give at least one.")
    if not first.dtype.is_floating_point:
        raise ValueError(f"{name} has dtype {first.dtype}: densities need floating point, give {name}.float().")
    if first.dtype not in PRECISIONS:
        raise ValueError(f"{name} has dtype {first.dtype}, too coarse for log-densities: give {name}.float().")
    return rows


def _as_tensor(part: object, name: str) -> Tensor:
    if isinstance(part, Tensor):
        return part
    if isinstance(part, np.ndarray):
        with warnings.catch_warnings():
            # torch warns that it could write to a read-only memory map; the package only reads.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            try:
                return torch.from_numpy(part)
            except (TypeError, ValueError) as error:  # objects, texts, foreign byte order, negative or odd strides
                raise ValueError(
                    f"{name} is an array of dtype {part.dtype.str!r} ({part.dtype.name}) and strides {part.strides}, which "
                    f"torch cannot take: give np.ascontiguousarray({name}, dtype=np.float32)."
                ) from error
    if hasattr(part, "to_numpy"):
        raise TypeError(f"{name} is a {type(part).__name__}: give {name}.to_numpy().")
    whole = name.split("[")[0]
    raise TypeError(f"{name} is a {type(part).__name__}: give a tensor or a tuple of tensors, as torch.as_tensor({whole}).")


def take(rows: Rows, index: Tensor | slice) -> Rows:
    """The rows at `index`, from every tensor of the tuple, wherever it and the index live."""
    if isinstance(index, slice) or index.dtype is not torch.int64:
        return tuple(part[index] for part in rows)
    # Several times faster than indexing, but not for every dtype, and only by an index on the same device.
    return tuple(part[index] if part.dtype in _UNSIGNED else part.index_select(0, index.to(part.device)) for part in rows)


def probe(rows: Rows, count: int) -> Rows:
    """The first `count` rows, from the beginning again where there are fewer."""
    return take(rows, torch.arange(count) % len(rows[0]))


def position(rows: Rows, part: Tensor) -> int | None:
    """Which tensor of the tuple `part` is: the object itself, else one of equal values; None if there is none."""
    same = [i for i, mine in enumerate(rows) if mine is part]
    equal = [i for i, mine in enumerate(rows) if mine.shape == part.shape and torch.equal(mine, part)]
    return next(iter(same + equal), None)


def replace(rows: Rows, drawn: Mapping[str, tuple[Tensor, Tensor]]) -> Rows:
    """The rows with what a model observes replaced by draws: {site: (observed, draw)}.

    Raises:
        ValueError: a site observes what is not among the rows.
    """
    fresh = list(rows)
    for name, (data, draw) in drawn.items():
        match = position(tuple(fresh), data)
        if match is None:
            raise ValueError(
                f"Cannot simulate rows: the model observes {name!r} with shape {tuple(data.shape)}, which is not x "
                f"of shape {tuple(rows[0].shape)} as the guide reads it: observe x itself, unchanged."
            )
        fresh[match] = draw
    return tuple(fresh)


def row_blocks(count: int, size: int = 8192) -> Iterator[slice]:
    """Slices of at most `size` rows that cover `count` rows in order, so that a memory map is never read whole."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def even_blocks(index: Tensor, most: int) -> Iterator[Tensor]:
    """`index` (n,) in the fewest parts of at most `most` entries, evened out; none of an empty one."""
    parts = -(-len(index) // most)
    return iter(index.split(-(-len(index) // parts)) if parts else ())


def finite_rows(rows: Rows, *, missing: bool = False) -> Tensor:
    """Which rows hold no NaN and no infinity, boolean (N,); with `missing`, NaN in the first tensor is a missing value."""
    good = torch.ones(len(rows[0]), dtype=torch.bool, device=rows[0].device)
    for number, part in enumerate(rows):
        if not part.dtype.is_floating_point:
            continue
        for at in row_blocks(len(part)):
            fine = ~part[at].isinf() if missing and number == 0 else torch.isfinite(part[at])
            good[at] &= fine.flatten(1).all(-1) if part.dim() > 1 else fine
    return good


def require_finite(rows: Rows, name: str = "x", *, missing: bool = False) -> None:
    """Refuse infinities, and NaN unless it is a missing value (in the first tensor, with `missing`).

    Raises:
        ValueError: names the tensor, the first such row and how many there are.
    """
    for number, part in enumerate(rows):
        good = finite_rows((part,), missing=missing and number == 0)
        if bool(good.all()):
            continue
        bad = (~good).nonzero().flatten()
        told = "infinite" if missing and number == 0 else "NaN or infinite"
        # Only the rows that are modelled may have values that were not seen.
        mend = (
            ", or, where NaN means a missing value, give the likelihood missing=True" if number == 0 and not missing else ""
        )
        raise ValueError(
            f"{name if number == 0 else f'{name}[{number}]'} has {told} values in {len(bad)} of {len(good)} rows, "
            f"first in row {int(bad[0])}: remove these rows or fill the values in{mend}."
        )


def positive(**counts: int) -> None:
    """Refuse counts below one.

    Raises:
        ValueError: names the argument and its value.
    """
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1.")
