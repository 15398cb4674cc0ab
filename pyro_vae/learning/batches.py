"""Batches of rows: drawn by index from tensors, memory maps or a data set, moved to the device, transformed.

Nothing is collated item by item unless the source is a `torch.utils.data.Dataset` without a batched access of its own.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from pyro_vae.rows import Data, Rows, as_rows, require_finite, take
from pyro_vae.seeds import Seed, derive
from pyro_vae.team import ALONE, Team

WIDE = 2**23
"""Bytes of rows in a wide batch."""

RESIDENT = 2**30
"""Rows of at most so many bytes live on the device as a whole."""

Transform = Callable[[Tensor], Tensor]
Source = Data | Dataset[Any]


class Batches:
    """Rows in batches.

    Args:
        source: a tensor, array or memory map (N, ...), a tuple of them, or a map-style `Dataset` of rows or tuples.
        name: what to call it in messages.
        batch_size: rows a batch; the last may have fewer.
        device: where batches go.
        transform: applied to the first tensor of each batch, e.g. `pv.data.binarise`, with the ambient generator.
        missing: whether NaN in the first tensor is a missing value.

    Raises:
        ValueError: unusable rows (see `as_rows`), NaN or infinite values.
    """

    def __init__(
        self,
        source: Source,
        name: str,
        batch_size: int,
        device: torch.device,
        transform: Transform | None = None,
        *,
        missing: bool = False,
    ) -> None:
        self.name, self.batch_size, self.device, self.transform = name, batch_size, device, transform
        self._dataset = source if isinstance(source, Dataset) else None
        self._rows = None if isinstance(source, Dataset) else as_rows(source, name)
        if self._rows is not None:
            require_finite(self._rows, name, missing=missing)
            self.num_rows = len(self._rows[0])
            self._rows = tuple(part.detach() for part in self._rows)
            if device.type != "cpu" and sum(part.nbytes for part in self._rows) <= RESIDENT:
                self._rows = tuple(part.to(device) for part in self._rows)
        else:
            if not hasattr(source, "__len__"):
                raise TypeError(f"{name} is a {type(source).__name__} without a length: give a map-style Dataset.")
            self.num_rows = len(source)
            if self.num_rows == 0:
                raise ValueError(f"{name} is a data set without rows: give at least one.")

    @property
    def num_batches(self) -> int:
        """Batches an epoch."""
        return -(-self.num_rows // self.batch_size)

    @property
    def tensors(self) -> Rows | None:
        """All rows, untransformed, where they are tensors."""
        return self._rows

    def widen(self) -> None:
        """Make batches larger where nothing but speed hangs on it: up to 1,024 rows, as far as they fit `WIDE` bytes."""
        row = sum(part.nbytes for part in self.first(1))
        self.batch_size = max(self.batch_size, min(1024, WIDE // max(1, row)))

    def first(self, count: int) -> Rows:
        """The first rows as a batch, transformed."""
        return self._fetch(torch.arange(min(count, self.num_rows)))

    def spread(self, count: int) -> Rows:
        """Up to `count` rows, evenly spread over all, as a batch, transformed."""
        return self._fetch(torch.linspace(0, self.num_rows - 1, min(count, self.num_rows)).long())

    def order(self, seed: Seed, epoch: int) -> Tensor:
        """The permutation of the rows in an epoch, (N,): the same whenever it is asked for."""
        generator = torch.Generator().manual_seed(derive(seed, epoch))
        order = torch.randperm(self.num_rows, generator=generator)
        return order if self._rows is None else order.to(self._rows[0].device)

    def at(self, order: Tensor, batch: int, team: Team = ALONE) -> Rows:
        """Batch number `batch` of an epoch in the order `order`, or of it what is this rank's; that may be no rows."""
        index = order[batch * self.batch_size : (batch + 1) * self.batch_size]
        if team.size > 1:
            index = index[team.part(len(index))]
        return self._fetch(index) if len(index) else take(self.first(1), slice(0))

    def _fetch(self, index: Tensor) -> Rows:
        rows = self._collate(index) if self._rows is None else take(self._rows, index.to(self._rows[0].device))
        if any(part.device != self.device for part in rows):
            rows = tuple(part.to(self.device) for part in rows)
        return rows if self.transform is None else (self.transform(rows[0]), *rows[1:])

    def _collate(self, index: Tensor) -> Rows:
        places = index.tolist()
        batched = getattr(self._dataset, "__getitems__", None)
        items = batched(places) if batched is not None else [self._dataset[i] for i in places]  # type: ignore[index]
        collated = default_collate(items)
        rows = as_rows(tuple(collated) if isinstance(collated, list) else collated, self.name)
        return tuple(part.detach() for part in rows)

    def fingerprint(self) -> str:
        """A short text that differs for other data: sizes, dtypes and a checksum over up to 256 rows."""
        some = torch.linspace(0, self.num_rows - 1, min(self.num_rows, 256)).long()
        rows = take(self._rows, some.to(self._rows[0].device)) if self._rows is not None else self._collate(some)
        checksum = 0
        for part in rows:
            checksum = zlib.crc32(part.contiguous().cpu().numpy().tobytes(), checksum)
        shapes = "; ".join(f"{tuple(part.shape[1:])} {part.dtype}" for part in rows)
        return f"{self.num_rows} rows of {shapes}, checksum {checksum:08x}"
