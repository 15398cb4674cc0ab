"""Batches: every row once an epoch, the same rows whatever the source."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from pyro_vae.learning.batches import Batches

CPU = torch.device("cpu")
X = torch.arange(22.0).reshape(11, 2)
LABELS = torch.arange(11)


class Items(Dataset[Any]):
    """One row at a time."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.x[index]


class Pairs(Items):
    """Rows with a label, and many at once."""

    def __init__(self, x: torch.Tensor) -> None:
        super().__init__(x)
        self.asked: list[list[int]] = []

    def __getitems__(self, index: list[int]) -> list[tuple[torch.Tensor, int]]:
        self.asked.append(index)
        return [(self.x[i], i) for i in index]


def memory_map(folder: Path) -> Any:
    np.save(folder / "x.npy", X.numpy())
    return np.load(folder / "x.npy", mmap_mode="r")


def epoch(batches: Batches, number: int = 0) -> list[tuple[torch.Tensor, ...]]:
    order = batches.order(3, number)
    return [batches.at(order, i) for i in range(batches.num_batches)]


@pytest.mark.parametrize("batch_size", [1, 4, 11, 100])
def test_an_epoch_has_every_row_once(batch_size: int) -> None:
    batches = Batches((X, LABELS), "train", batch_size, CPU)
    parts = epoch(batches)
    sizes = [len(part[0]) for part in parts]
    assert sizes == [batch_size] * (11 // batch_size) + ([11 % batch_size] if 11 % batch_size else [])
    x, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    assert sorted(labels.tolist()) == list(range(11))
    assert torch.equal(x, X[labels])


def test_order_depends_on_seed_and_epoch_alone() -> None:
    batches = Batches(X, "train", 4, CPU)
    torch.manual_seed(5)
    first = batches.order((1, 2), 0)
    torch.manual_seed(6)
    assert torch.equal(batches.order((1, 2), 0), first)
    others = [batches.order((1, 2), 1), batches.order((1, 3), 0), batches.order((2, 2), 0)]
    assert not any(torch.equal(other, first) for other in others)


@pytest.mark.parametrize("source", ["array", "memory map", "items", "TensorDataset"])
def test_every_source_gives_the_same_batches(source: str, tmp_path: Path) -> None:
    sources = {
        "array": lambda: X.numpy(),
        "memory map": lambda: memory_map(tmp_path),
        "items": lambda: Items(X),
        "TensorDataset": lambda: TensorDataset(X),
    }
    given, plain = Batches(sources[source](), "train", 4, CPU), Batches(X, "train", 4, CPU)
    assert given.num_rows == plain.num_rows == 11
    assert given.fingerprint() == plain.fingerprint()
    for mine, theirs in zip(epoch(given), epoch(plain), strict=True):
        assert len(mine) == 1
        assert mine[0].dtype == torch.float32
        assert torch.equal(mine[0], theirs[0])


def test_a_data_set_with_batched_access_is_asked_once_a_batch() -> None:
    pairs = Pairs(X)
    x, labels = Batches(pairs, "train", 4, CPU).at(torch.tensor([3, 1, 10, 0, 2]), 0)
    assert pairs.asked == [[3, 1, 10, 0]]
    assert labels.tolist() == [3, 1, 10, 0]
    assert torch.equal(x, X[labels])


def test_only_the_first_tensor_is_transformed() -> None:
    def double(x: torch.Tensor) -> torch.Tensor:
        return 2.0 * x

    batches = Batches((X, X), "train", 4, CPU, double)
    changed, kept = batches.first(3)
    assert torch.equal(changed, 2.0 * X[:3])
    assert torch.equal(kept, X[:3])
    assert batches.tensors is not None
    assert torch.equal(batches.tensors[0], X)
    assert Batches(Items(X), "train", 4, CPU).tensors is None


def test_first_gives_no_more_rows_than_there_are() -> None:
    assert len(Batches(X, "train", 4, CPU).first(100)[0]) == 11


def test_batches_carry_no_graph_of_the_data() -> None:
    batches = Batches(X.clone().requires_grad_(), "train", 4, CPU)
    assert not batches.first(2)[0].requires_grad


def test_fingerprints_tell_data_apart() -> None:
    changed = X.clone()
    changed[7, 1] += 1e-3
    different = [X, changed, X.double(), X[:10], X.reshape(11, 2, 1), (X, LABELS), (X, LABELS + 1)]
    prints = [Batches(x, "train", 4, CPU).fingerprint() for x in different]
    assert len(set(prints)) == len(prints)
    assert Batches(X.clone(), "valid", 2, CPU).fingerprint() == prints[0]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        yield from X


@pytest.mark.parametrize(
    ("source", "error", "told"),
    [
        (Items(X[:0]), ValueError, "train is a data set without rows: give at least one"),
        (Stream(), TypeError, "train is a Stream without a length: give a map-style Dataset"),
        (X[:0], ValueError, r"train has shape \(0, 2\), that is no rows: give at least one"),
        ((X, LABELS[:5]), ValueError, r"train\[0\] has 11 rows and train\[1\] has 5"),
        (X.log(), ValueError, "train has NaN or infinite values in 1 of 11 rows, first in row 0: remove"),
        (X.long(), ValueError, r"train has dtype torch.int64: .*train\.float\(\)"),
        (X.tolist(), TypeError, r"give a .*tensor.*torch\.as_tensor\(train\)"),
    ],
)
def test_unusable_sources(source: Any, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        Batches(source, "train", 4, CPU)


def test_items_of_a_data_set_are_checked_as_rows() -> None:
    with pytest.raises(ValueError, match=r"train has dtype torch.int64: .*train\.float\(\)"):
        Batches(Items(X.long()), "train", 4, CPU).first(2)
