"""Data sets: every format, every refusal, honest splits, bits and noise."""

from __future__ import annotations

import ast
import gzip
import http.client
import math
import os
import re
import struct
import sys
import urllib.error
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import sklearn.datasets
import torch

from pyro_vae import data
from pyro_vae.data import Data, binarise, dequantise, load, threshold

RNG = np.random.default_rng(0)
TRAIN, TEST = RNG.integers(0, 256, (5, 4, 3), dtype=np.uint8), RNG.integers(0, 256, (2, 4, 3), dtype=np.uint8)
TRAIN_LABELS, TEST_LABELS = np.array([5, 0, 4, 1, 9], np.uint8), np.array([7, 2], np.uint8)


def idx_bytes(array: np.ndarray, magic: int | None = None) -> bytes:
    magic = 0x800 + array.ndim if magic is None else magic
    return struct.pack(f">I{array.ndim}I", magic, *array.shape) + array.tobytes()


def write_idx(folder: Path, mark: str = "-", suffix: str = "", **replaced: bytes | None) -> Path:
    """Write MNIST's four files; `replaced` gives other bytes for one of them, or None to leave it out."""
    arrays = {"train_images": TRAIN, "train_labels": TRAIN_LABELS, "t10k_images": TEST, "t10k_labels": TEST_LABELS}
    content = {key: idx_bytes(array) for key, array in arrays.items()} | replaced
    folder.mkdir(parents=True, exist_ok=True)
    for key, raw in content.items():
        if raw is not None:
            name = f"{key.replace('_', '-')}{mark}idx{3 if 'images' in key else 1}-ubyte{suffix}"
            (folder / name).write_bytes(gzip.compress(raw) if suffix else raw)
    return folder


def rows_of(count: int, **kwargs: Any) -> Data:
    """Rows that carry their own number, in x and in the labels."""
    number = torch.arange(count)
    return Data("rows", number[:, None].float(), kwargs.pop("labels", number), (1,), None, **kwargs)


def numbers(part: Data) -> list[int]:
    assert part.labels is not None
    assert torch.equal(part.x[:, 0].long(), part.labels)
    return part.labels.tolist()


# Data and its parts


def test_data_prints_itself() -> None:
    x = torch.zeros(4, 6)
    assert str(Data("toy", x, None, (2, 3), 17)) == "toy: 4 rows of 2 x 3, 17 grey levels"
    assert str(Data("toy", x, None, (6,), None)) == "toy: 4 rows of 6"
    assert repr(Data("toy", x, None, (6,), 2, 1)) == "toy: 4 rows of 6, 2 grey levels, the last 1 are its test set"


@pytest.mark.parametrize(
    "wrong",
    [
        {"x": torch.zeros(4)},
        {"x": torch.zeros(4, 2, 3)},
        {"shape": (2, 2)},
        {"labels": torch.zeros(3, dtype=torch.long)},
        {"labels": torch.zeros(4, 1, dtype=torch.long)},
        {"num_test": 5},
        {"num_test": -1},
    ],
)
def test_data_refuses_shapes_that_contradict_each_other(wrong: dict[str, Any]) -> None:
    right = {"name": "toy", "x": torch.zeros(4, 6), "labels": torch.zeros(4).long(), "shape": (2, 3), "levels": None}
    assert len(Data(**right)) == 4
    with pytest.raises(ValueError, match=r"toy: x \(N, d\), labels \(N,\).*; got x"):
        Data(**right | wrong)


@pytest.mark.parametrize(
    "index", [[4, 0], (4, 0), np.array([4, 0]), torch.tensor([4, 0]), range(4, -1, -4)], ids=lambda i: type(i).__name__
)
def test_rows_takes_whole_numbers_in_any_container(index: Any) -> None:
    part = rows_of(5, num_test=2).rows(index)
    assert numbers(part) == [4, 0]
    assert part.num_test == 0


def test_rows_takes_masks_and_slices() -> None:
    whole = rows_of(5)
    assert numbers(whole.rows(torch.tensor([True, False, False, True, False]))) == [0, 3]
    part = whole.rows(slice(1, None, 2))
    assert numbers(part) == [1, 3]
    assert part.x.untyped_storage().data_ptr() == whole.x.untyped_storage().data_ptr()  # a view
    assert whole.rows([0]).x.untyped_storage().data_ptr() != whole.x.untyped_storage().data_ptr()
    assert rows_of(5, labels=None).rows([1]).labels is None


def test_rows_that_do_not_exist_are_refused() -> None:
    with pytest.raises(IndexError):
        rows_of(5).rows([5])


def test_split_is_disjoint_covers_all_rows_and_obeys_its_fractions() -> None:
    parts = rows_of(101).split(valid=0.2, test=0.3, seed=4)
    assert [len(part) for part in parts] == [51, 20, 30]
    assert sorted(number for part in parts for number in numbers(part)) == list(range(101))
    assert numbers(parts.test) != sorted(numbers(parts.test))  # so that the first rows of a part are random, too


def test_split_is_decided_by_its_seed_alone() -> None:
    first = rows_of(50).split(seed=1)
    torch.manual_seed(12345)
    again, other = rows_of(50).split(seed=1), rows_of(50).split(seed=2)
    assert [numbers(part) for part in first] == [numbers(part) for part in again]
    assert set(numbers(first.test)) != set(numbers(other.test))
    assert numbers(first.test) == numbers(rows_of(50).split(valid=0.5, seed=1).test)


def test_split_keeps_the_declared_test_set() -> None:
    parts = rows_of(30, num_test=10).split(valid=0.25, test=0.9, seed=0)
    assert numbers(parts.test) == list(range(20, 30))
    assert len(parts.valid) == 5
    assert sorted(numbers(parts.train) + numbers(parts.valid)) == list(range(20))
    assert [part.num_test for part in parts] == [0, 0, 0]


@pytest.mark.parametrize(
    ("count", "num_test", "fractions"),
    [
        (2, 0, {"valid": 0.5, "test": 0.5}),
        (10, 0, {"valid": 0.0}),
        (10, 0, {"test": 0.0}),
        (10, 0, {"test": -0.3}),
        (10, 0, {"valid": -0.3}),
        (10, 0, {"valid": 0.5, "test": 0.5}),
        (10, 0, {"valid": 0.9, "test": 0.9}),
        (4, 0, {}),
        (10, 9, {"valid": 0.5}),
        (10, 10, {}),
    ],
)
def test_split_refuses_an_empty_part(count: int, num_test: int, fractions: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"leave a part of rows: {count} rows of 1.* empty: choose other fractions"):
        rows_of(count, num_test=num_test).split(**fractions)


@pytest.mark.parametrize("fraction", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["valid", "test"])
@pytest.mark.parametrize("num_test", [0, 3])
def test_split_refuses_what_is_no_fraction(fraction: float, name: str, num_test: int) -> None:
    with pytest.raises(ValueError, match=f"{name}={fraction} is no fraction of the rows: choose one between 0 and 1"):
        rows_of(10, num_test=num_test).split(**{name: fraction})


def test_split_of_three_rows_gives_one_row_each() -> None:
    assert [len(part) for part in rows_of(3).split(valid=1 / 3, test=1 / 3)] == [1, 1, 1]


def test_the_fingerprint_tells_data_apart() -> None:
    x = torch.arange(3000.0).reshape(500, 6)
    data = Data("toy", x, None, (2, 3), 17, 20)
    assert re.fullmatch(
        "500 rows of 2 x 3, 17 grey levels, the last 20 are its test set, checksum [0-9a-f]{8}", data.fingerprint()
    )
    same = [Data("other", x.clone(), torch.arange(500), (2, 3), 17, 20), Data("toy", x.T.clone().T, None, (2, 3), 17, 20)]
    assert {other.fingerprint() for other in same} == {data.fingerprint()}
    last = x.clone()
    last[-1, -1] = 0
    others = [
        Data("toy", x, None, (3, 2), 17, 20),
        Data("toy", x, None, (2, 3), 16, 20),
        Data("toy", x, None, (2, 3), 17, 21),
        Data("toy", x[:499], None, (2, 3), 17, 20),
        Data("toy", x.flip(0), None, (2, 3), 17, 20),
        Data("toy", last, None, (2, 3), 17, 20),
    ]
    assert len({other.fingerprint() for other in [data, *others]}) == 7


def test_the_fingerprint_of_more_rows_than_float32_counts() -> None:
    count = 2**25 + 2
    x = torch.zeros(1, 1).expand(count, 1)
    assert Data("many", x, None, (1,), None).fingerprint().startswith(f"{count} rows of 1, checksum ")


# Names


def test_digits() -> None:
    digits = load("digits")
    source = sklearn.datasets.load_digits()
    assert str(digits) == "digits: 1797 rows of 8 x 8, 17 grey levels"
    assert digits.x.dtype == torch.float32
    np.testing.assert_array_equal(digits.x.numpy() * 16, source.data)
    assert digits.labels is not None
    assert digits.labels.dtype == torch.int64
    np.testing.assert_array_equal(digits.labels.numpy(), source.target)


def test_a_path_is_told_from_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_idx(tmp_path / "digits")
    write_idx(tmp_path / "mnist", t10k_images=None, t10k_labels=None)
    monkeypatch.setenv("PYRO_VAE_DATA", str(write_idx(tmp_path / "elsewhere" / "mnist").parent))
    assert [len(load(source)) for source in ("digits", "./digits", Path("digits"))] == [1797, 7, 7]
    assert [len(load(source)) for source in ("mnist", "./mnist", Path("mnist"))] == [7, 5, 5]


def test_unknown_sources_are_refused_with_what_is_known(tmp_path: Path) -> None:
    for source in ("minst", str(tmp_path / "rows.npy"), tmp_path / "rows"):
        with pytest.raises(FileNotFoundError) as caught:
            load(source)
        for word in (repr(str(source)), "digits", "mnist", "fashion-mnist", ".npy", ".npz", ".csv", ".parquet", "IDX"):
            assert word in str(caught.value)


def test_an_unknown_suffix_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.xlsx"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"rows.xlsx has the unknown suffix '.xlsx': a file ends in .npy, .npz, .csv"):
        load(path)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_named_images_are_read_from_a_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, **kwargs: Any) -> Any:
        raise AssertionError(f"OpenML was asked for {name}")

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", refuse)
    write_idx(tmp_path / "a" / name)
    write_idx(tmp_path / "b" / name, t10k_images=None, t10k_labels=None)
    monkeypatch.setenv("PYRO_VAE_DATA", str(tmp_path / "a"))
    assert str(load(name)) == f"{name}: 7 rows of 4 x 3, 256 grey levels, the last 2 are its test set"
    assert len(load(name, root=tmp_path / "b")) == 5  # an argument goes before the environment
    monkeypatch.delenv("PYRO_VAE_DATA")
    with pytest.raises(AssertionError, match="OpenML was asked"):
        load(name)


@pytest.mark.parametrize(("name", "openml_name"), [("mnist", "mnist_784"), ("fashion-mnist", "Fashion-MNIST")])
def test_named_images_come_from_openml(
    name: str, openml_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    pixels = RNG.integers(0, 256, (10_003, 784))  # int64 or float64, and labels as strings, are what OpenML gives
    target = np.array([str(i % 10) for i in range(10_003)], dtype=object)

    def fetch_openml(name: str, **kwargs: Any) -> Any:
        asked.append((name, kwargs))
        return SimpleNamespace(data=pixels.astype(np.float64), target=target)

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch_openml)
    monkeypatch.setenv("PYRO_VAE_DATA", str(tmp_path))  # has no such subfolder
    images = load(name)
    assert asked == [(openml_name, {"version": 1, "as_frame": False, "parser": "auto"})]
    assert str(images) == f"{name}: 10003 rows of 28 x 28, 256 grey levels, the last 10000 are its test set"
    np.testing.assert_array_equal((images.x * 255).round().numpy(), pixels)
    assert images.labels is not None
    assert images.labels[:12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]


@pytest.mark.parametrize(
    "failure",
    [
        urllib.error.URLError("no route to host"),
        OSError("no route to host"),
        TimeoutError("no route to host"),
        http.client.HTTPException("no route to host"),
        EOFError("no route to host"),
        ValueError("no route to host"),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_without_a_network_openml_says_how_to_mend_it(failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch_openml(name: str, **kwargs: Any) -> Any:
        raise failure

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch_openml)
    monkeypatch.delenv("PYRO_VAE_DATA", raising=False)
    with pytest.raises(ConnectionError, match=r"fashion-mnist .*no route to host.*folder.*PYRO_VAE_DATA") as caught:
        load("fashion-mnist")
    assert caught.value.__cause__ is failure


def test_the_real_mnist(mnist_root: Path) -> None:
    mnist = load("mnist", root=mnist_root.parent)
    assert str(mnist) == "mnist: 70000 rows of 28 x 28, 256 grey levels, the last 10000 are its test set"
    assert mnist.labels is not None
    assert mnist.labels[:5].tolist() == [5, 0, 4, 1, 9]
    first = 0
    for part, count in (("train", 60_000), ("t10k", 10_000)):
        path = next(mnist_root.glob(f"{part}-images*"))
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        pixels = np.frombuffer(raw, np.uint8, offset=16)
        rows = mnist.x[first : first + count]
        assert int((rows * 255).round().sum(dtype=torch.float64)) == int(pixels.sum(dtype=np.int64))
        np.testing.assert_array_equal((rows[:1000] * 255).round().numpy().ravel(), pixels[: 1000 * 784])
        first += count
    assert [len(part) for part in mnist.split(valid=1 / 6)] == [50_000, 10_000, 10_000]


# IDX


@pytest.mark.parametrize("mark", ["-", "."])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx(mark: str, suffix: str, tmp_path: Path) -> None:
    images = load(write_idx(tmp_path / "letters.v2", mark, suffix))
    assert str(images) == "letters.v2: 7 rows of 4 x 3, 256 grey levels, the last 2 are its test set"
    assert images.x.dtype == torch.float32
    wanted = np.concatenate([TRAIN, TEST]).reshape(7, 12) / 255
    np.testing.assert_allclose(images.x.numpy(), wanted, rtol=1e-7)
    assert images.labels is not None
    assert images.labels.dtype == torch.int64
    assert images.labels.tolist() == [5, 0, 4, 1, 9, 7, 2]


def test_idx_takes_the_folder_it_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_idx(tmp_path / "here"))
    assert load(".").name == "here"


def test_idx_without_labels_or_test_images(tmp_path: Path) -> None:
    no_labels = load(write_idx(tmp_path / "a", train_labels=None, t10k_labels=None))
    assert (len(no_labels), no_labels.labels, no_labels.num_test) == (7, None, 2)
    train = load(write_idx(tmp_path / "b", t10k_images=None, t10k_labels=None))
    assert (len(train), train.num_test) == (5, 0)
    assert train.labels is not None
    assert train.labels.tolist() == [5, 0, 4, 1, 9]


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"train_images": idx_bytes(TRAIN, 0x801)}, r"train-images-.* magic number 0x00000801, not 0x00000803"),
        ({"train_images": idx_bytes(TRAIN, 0xD03)}, r"magic number 0x00000d03, not 0x00000803"),
        ({"t10k_labels": idx_bytes(TEST_LABELS, 0x803)}, r"t10k-labels-.* magic number 0x00000803, not 0x00000801"),
        ({"train_images": b""}, r"magic number 0x, not 0x00000803"),
        ({"train_images": idx_bytes(TRAIN)[:4]}, r"train-images-.* truncated or too long: 4 bytes"),
        ({"train_images": idx_bytes(TRAIN)[:15]}, r"truncated or too long: 15 bytes"),
        ({"train_images": idx_bytes(TRAIN)[:-1]}, r"truncated or too long: 75 bytes for shape \(5, 4, 3\)"),
        ({"train_images": idx_bytes(TRAIN) + b"\0"}, r"truncated or too long: 77 bytes for shape \(5, 4, 3\)"),
        ({"t10k_labels": idx_bytes(TEST_LABELS)[:-1]}, r"t10k-labels-.* truncated or too long: 9 bytes"),
        ({"train_labels": idx_bytes(TRAIN_LABELS[:4])}, r"do not match.*\(5, 4, 3\).*\(4,\)"),
        # six labels for five images, one for two: right in sum only
        (
            {"train_labels": idx_bytes(np.zeros(6, np.uint8)), "t10k_labels": idx_bytes(np.zeros(1, np.uint8))},
            r"do not match.*\(6,\), \(1,\)",
        ),
        ({"train_labels": None}, "do not match"),
        ({"t10k_labels": None}, "do not match"),
        ({"t10k_images": idx_bytes(TEST.reshape(2, 3, 4))}, r"do not match.*\(5, 4, 3\), \(2, 3, 4\)"),
        (
            {"train_images": idx_bytes(TRAIN[:0]), "train_labels": None, "t10k_images": None, "t10k_labels": None},
            "no rows",
        ),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_that_is_damaged_is_refused(
    replaced: dict[str, bytes | None], message: str, suffix: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load(write_idx(tmp_path, suffix=suffix, **replaced))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("damage", ["truncated", "not gzip", "flipped"])
def test_a_damaged_gz_is_refused_by_name(damage: str, tmp_path: Path) -> None:
    path = write_idx(tmp_path, suffix=".gz") / "t10k-images-idx3-ubyte.gz"
    raw = path.read_bytes()
    middle = bytes(255 - byte for byte in raw[12:20])
    path.write_bytes({"truncated": raw[:-12], "not gzip": b"<html>", "flipped": raw[:12] + middle + raw[20:]}[damage])
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte.gz is damaged .*fetch it again"):
        load(tmp_path)


def test_a_folder_without_training_images_is_refused(tmp_path: Path) -> None:
    for replaced in ({"train_images": None}, dict.fromkeys(("train_images", "t10k_images", "t10k_labels"))):
        folder = write_idx(tmp_path / str(len(replaced)), **replaced)
        with pytest.raises(FileNotFoundError, match=r"has no train-images-idx3-ubyte"):
            load(folder)


# NumPy


@pytest.mark.parametrize(
    ("array", "levels", "shape", "wanted"),
    [
        (TRAIN, 256, (4, 3), TRAIN / 255),
        (TRAIN.astype(np.int64) - 100, None, (4, 3), TRAIN.astype(float) - 100),
        (TRAIN.astype(np.uint16), None, (4, 3), TRAIN),
        (TRAIN > 100, None, (4, 3), TRAIN > 100),
        (TRAIN.astype(np.float64) / 7, None, (4, 3), TRAIN / 7),
        (TRAIN.astype(np.float16), None, (4, 3), TRAIN),
        (TRAIN.astype(">f4"), None, (4, 3), TRAIN),
        (np.asfortranarray(TRAIN, dtype=np.float32), None, (4, 3), TRAIN),
        (np.asfortranarray(TRAIN, dtype=np.float64), None, (4, 3), TRAIN),
        (TRAIN.reshape(5, 12).astype(np.float32), None, (12,), TRAIN),
        (np.array([1.5, np.nan, np.inf]), None, (1,), np.array([1.5, np.nan, np.inf])),
        (np.ones((3, 2, 2, 2), np.float32), None, (2, 2, 2), np.ones((3, 8))),
    ],
    ids=lambda value: f"{value.dtype}-{value.shape}" if isinstance(value, np.ndarray) else "",
)
@pytest.mark.parametrize("mapped", [False, True])
def test_npy(
    array: np.ndarray,
    levels: int | None,
    shape: tuple[int, ...],
    wanted: np.ndarray,
    mapped: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(data, "MAP_BYTES", 0 if mapped else 2**60)
    np.save(tmp_path / "rows.npy", array)
    rows = load(tmp_path / "rows.npy")
    assert (rows.name, rows.shape, rows.levels, rows.labels, rows.num_test) == ("rows", shape, levels, None, 0)
    kept = mapped and array.dtype == np.float64 and array.flags.c_contiguous
    assert rows.x.dtype == (torch.float64 if kept else torch.float32)
    np.testing.assert_allclose(rows.x.numpy(), wanted.reshape(len(array), -1), rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_large_npy_stays_in_its_file(dtype: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large.NPY"
    array = RNG.normal(size=(6, 2, 3)).astype(dtype)
    with path.open("wb") as file:
        np.save(file, array)
    monkeypatch.setattr(data, "MAP_BYTES", path.stat().st_size)
    x = load(path).x
    with path.open("r+b") as file:  # pages that were not written to show the file, so nothing was copied
        np.save(file, array + 1)
    np.testing.assert_array_equal(x.numpy(), (array + 1).reshape(6, 6))
    x[0] = 0.0  # allowed, and the file does not see it
    np.testing.assert_array_equal(np.load(path), array + 1)

    monkeypatch.setattr(data, "MAP_BYTES", path.stat().st_size + 1)
    x = load(path).x
    with path.open("r+b") as file:
        np.save(file, array)
    np.testing.assert_array_equal(x.numpy(), (array + 1).astype(np.float32).reshape(6, 6))


@pytest.mark.skipif(sys.platform != "linux", reason="needs sparse files and the size of the memory")
def test_an_npy_larger_than_memory(tmp_path: Path) -> None:
    if Path("/proc/sys/vm/overcommit_memory").read_text(encoding="ascii").strip() == "2":
        pytest.skip("this system maps no more than its memory")
    count = 4 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4096
    path = tmp_path / "large.npy"
    with path.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (count, 1024)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + 4096 * count)  # a hole, without blocks on the disk
        file.seek(-4, os.SEEK_END)
        file.write(np.float32(2.5).tobytes())
    rows = load(path)
    assert str(rows) == f"large: {count} rows of 1024"
    assert rows.rows(slice(-2, None)).x.sum() == 2.5


@pytest.mark.parametrize(
    ("arrays", "labels"),
    [
        ({"x": TRAIN}, None),
        ({"images": TRAIN}, None),
        ({"y": TRAIN}, None),
        ({"x": TRAIN, "y": TRAIN_LABELS}, [5, 0, 4, 1, 9]),
        ({"labels": TRAIN_LABELS.astype(float), "images": TRAIN}, [5, 0, 4, 1, 9]),
        ({"other": TEST, "x": TRAIN, "y": TRAIN_LABELS[:, None]}, [5, 0, 4, 1, 9]),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_npz(arrays: dict[str, np.ndarray], labels: list[int] | None, tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "rows.npz", **arrays)
    rows = load(str(tmp_path / "rows.npz"))
    assert str(rows) == "rows: 5 rows of 4 x 3, 256 grey levels"
    np.testing.assert_array_equal((rows.x * 255).round().numpy(), TRAIN.reshape(5, 12))
    assert (None if rows.labels is None else rows.labels.tolist()) == labels
    assert rows.labels is None or rows.labels.dtype == torch.int64


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": TRAIN, "b": TRAIN}, "has the arrays a, b: call the rows x"),
        ({"x": TRAIN, "y": TRAIN_LABELS, "labels": TRAIN_LABELS}, "has the arrays x, y, labels: call"),
        ({}, "has the arrays"),
        ({"x": TRAIN, "y": TRAIN_LABELS[:4]}, r"label 5 rows by whole numbers, not by \(4,\) uint8"),
        ({"x": TRAIN, "y": np.zeros((5, 2), int)}, r"label 5 rows by whole numbers, not by \(5, 2\) int"),
        ({"x": TRAIN, "y": np.array([0, 1, 2, 3, 4.5])}, "whole numbers, not by .* float64"),
        ({"x": TRAIN, "y": np.array([0, 1, 2, 3, np.nan])}, "whole numbers, not by .* float64"),
        ({"x": TRAIN, "y": np.array([0, 1, 2, 3, np.inf])}, "whole numbers, not by .* float64"),
        ({"x": TRAIN, "y": np.array(list("abcde"))}, "whole numbers, not by .* <U1"),
        ({"x": TRAIN[:0]}, r"no rows of numbers, but uint8 of shape \(0, 4, 3\)"),
        ({"x": np.zeros((3, 0))}, r"no rows of numbers, but float64 of shape \(3, 0\)"),
        ({"x": np.float64(3)}, r"no rows of numbers, but float64 of shape \(\)"),
        ({"x": np.array(["a", "b"])}, "no rows of numbers, but <U1"),
        ({"x": np.zeros(3, complex)}, "no rows of numbers, but complex128"),
        ({"x": np.array([{}, {}])}, "damaged or not what its name says .*allow_pickle=False"),
    ],
)
def test_npz_that_does_not_fit_is_refused(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", **arrays)
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path / "rows.npz")
    assert "rows.npz" in str(caught.value)


@pytest.mark.parametrize("kind", ["short.npy", "short.npz", "flipped.npz", "pickle.npy", "text.npy", "empty.npy"])
def test_a_damaged_numpy_file_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    path = tmp_path / kind
    if path.suffix == ".npz":
        np.savez_compressed(path, x=TRAIN)
    else:
        np.save(path, np.array([{}], dtype=object) if kind == "pickle.npy" else TRAIN, allow_pickle=True)
    raw = path.read_bytes()
    start = 30 + sum(struct.unpack("<2H", raw[26:30]))  # of the deflated array in a zip file
    damaged = {
        "short": raw[:-30],
        "flipped": raw[:start] + b"\xff" * 8 + raw[start + 8 :],
        "pickle": raw,
        "text": b"1,2,3\n" * 99,
        "empty": b"",
    }
    path.write_bytes(damaged[path.stem])
    with pytest.raises(ValueError, match=rf"{kind} is damaged or not what its name says .*write or fetch it again"):
        load(path)


# Tables


@pytest.mark.parametrize(
    ("text", "x", "labels"),
    [
        ("1,2\n3,4.5\n", [[1, 2], [3, 4.5]], None),
        ("a,b\n1,2\n3,4.5\n", [[1, 2], [3, 4.5]], None),
        ("\ufefflabel,b\r\n1,2\r\n", [[2]], [1]),
        ("a,Label,b\n1,7,2\n3,8,4\n", [[1, 2], [3, 4]], [7, 8]),
        ("0,1, TARGET \n1,2,7\n", [[1, 2]], [7]),
        ('"class","a"\n"3","-1e3"\n', [[-1000]], [3]),
        ("labels,a\n-2,1\n", [[1]], [-2]),
        ("a,b\n 1 , 2\n\n3,4\n\n", [[1, 2], [3, 4]], None),
        ("a,b\n,nan\nNaN,inf\n", [[math.nan, math.nan], [math.nan, math.inf]], None),
        (",2\n3,\n", [[math.nan, 2], [3, math.nan]], None),
        (",\n3,4\n", [[math.nan, math.nan], [3, 4]], None),
        ("a\n1\n", [[1]], None),
        (",a\n0,1\n", [[0, 1]], None),
    ],
)
def test_csv(text: str, x: list[list[float]], labels: list[int] | None, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(text.encode())
    rows = load(path)
    assert (rows.name, rows.shape, rows.levels, rows.num_test) == ("table", (len(x[0]),), None, 0)
    assert rows.x.dtype == torch.float32
    np.testing.assert_array_equal(rows.x.numpy(), np.array(x, np.float32))
    assert (None if rows.labels is None else rows.labels.tolist()) == labels


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a,b\n1,2\n3,x y\n", r"table.csv, line 3: column 'b' has 'x y', no number"),
        (b"1,2\n3,red\n", r"table.csv, line 2: column '2' has 'red', no number"),
        (b"1,red\n2,3\n", r"table.csv, line 1: column '2' has 'red', no number"),  # a mistake, not a line of names
        (b"a,label\n1,cat\n", r"line 2: column 'label' has 'cat', no number"),
        (b"a,b\n1\n", r"table.csv, line 2 has 1 cells, not 2"),
        (b"a,b\n1,2\n1,2,3\n", r"table.csv, line 3 has 3 cells, not 2"),
        (b"1,2\n1\n", r"table.csv, line 2 has 1 cells, not 2"),
        (b"", r"table.csv has no rows of numbers"),
        (b"a,b\n", r"table.csv has no rows of numbers, but float64 of shape \(0, 2\)"),
        (b"label\n1\n", r"table.csv has no rows of numbers, but float64 of shape \(1, 0\)"),
        (b"label,a\n0.5,1\n", "whole numbers"),
        (b"label,a\n,1\n", "whole numbers"),
        (b"label,Class,a\n0,1,2\n", "has the label columns label, Class: rename all but one"),
        (b"a;b\n1;2\n", "column 'a;b' has '1;2', no number"),
        (b"\x89PNG\xff\xfe", r"table.csv is damaged or not what its name says"),
        (b'a,b\n1,"' + b"2" * 200_000 + b'"\n', r"table.csv is damaged or not what its name says .*field larger"),
    ],
)
def test_csv_that_does_not_fit_is_refused(text: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=message):
        load(path)


def test_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    frame = pd.DataFrame(
        {
            "a": [1.5, np.nan, 3.0],
            "Target": [4, 2**40, 6],
            "b": np.array([7, 8, 9], np.uint8),  # a table, not an image: as it is
            "c": pd.array([1, None, 3], dtype="Int64"),
            "d": [True, False, True],
        },
        index=["p", "q", "r"],
    )
    frame.to_parquet(tmp_path / "table.parquet")
    rows = load(tmp_path / "table.parquet")
    assert str(rows) == "table: 3 rows of 4"
    assert rows.x.dtype == torch.float32
    wanted = [[1.5, 7, 1, 1], [np.nan, 8, np.nan, 0], [3, 9, 3, 1]]
    np.testing.assert_array_equal(rows.x.numpy(), np.array(wanted, np.float32))
    assert rows.labels is not None
    assert rows.labels.tolist() == [4, 2**40, 6]


def test_parquet_with_numbers_for_names(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    pd.DataFrame(np.eye(2)).to_parquet(tmp_path / "table.parquet")
    rows = load(tmp_path / "table.parquet")
    assert rows.labels is None
    assert torch.equal(rows.x, torch.eye(2))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"a": [1.0], "b": ["x"], "c": [2]}, r"table.parquet: column 'b' does not hold numbers"),
        ({"a": pd.to_datetime(["2024-01-01"])}, r"column 'a' does not hold numbers"),
        ({"a": pd.Categorical(["x"])}, r"column 'a' does not hold numbers"),
        ({"a": np.empty(0)}, r"table.parquet has no rows of numbers"),
        ({"label": [1.0]}, r"table.parquet has no rows of numbers"),
        ({"label": [0.5], "a": [1.0]}, "whole numbers"),
        ({"label": [1.0], "target": [1.0]}, "has the label columns label, target"),
    ],
)
def test_parquet_that_does_not_fit_is_refused(columns: dict[str, Any], message: str, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    pd.DataFrame(columns).to_parquet(tmp_path / "table.parquet")
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "table.parquet")


def test_a_damaged_parquet_is_refused_by_name(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "table.parquet"
    pd.DataFrame({"a": [1.0]}).to_parquet(path)
    for raw in (path.read_bytes()[:-20], b"", b"a,b\n1,2\n"):
        path.write_bytes(raw)
        with pytest.raises(ValueError, match=r"table.parquet is damaged or not what its name says"):
            load(path)


@pytest.mark.parametrize("missing", ["pandas", "pyarrow"])
def test_parquet_names_the_extra_that_is_missing(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.parquet"
    path.write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf"table.parquet needs .*{missing}.*pip install 'pyro-vae\[parquet\]'"):
        load(path)


def test_the_module_itself_needs_only_numpy_and_torch() -> None:
    tree = ast.parse(Path(data.__file__).read_text(encoding="utf-8"))
    names = [node.module for node in tree.body if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
    assert {name.split(".")[0] for name in names} - sys.stdlib_module_names == {"numpy", "torch"}


# What is done to rows


def test_binarise_has_the_mean_it_should() -> None:
    p = torch.tensor([0.0, 0.03, 0.25, 0.9, 1.0], dtype=torch.float64)
    count = 40_000
    bits = binarise(p.expand(count, 5), seed=3)
    assert set(bits.unique().tolist()) == {0.0, 1.0}
    error = (p * (1 - p) / count).sqrt()
    assert ((bits.mean(0) - p).abs() <= 4 * error).all()
    covariance = torch.cov(bits[:, 1:4].T)  # entries are independent of each other
    off = covariance / torch.outer(error[1:4], error[1:4]) / count
    assert (off - torch.diag(off.diag())).abs().max() < 4 / math.sqrt(count)


def test_dequantise_fills_the_cell_of_each_level_evenly() -> None:
    count, levels = 40_000, 5
    n = torch.arange(levels, dtype=torch.float64)
    y = dequantise((n / (levels - 1)).expand(count, levels), levels, seed=3)
    assert (y > 0).all()
    assert (y < 1).all()
    u = y * levels - n
    error = 1 / math.sqrt(12 * count)
    assert ((u.mean(0) - 1 / 2).abs() < 4 * error).all()
    assert ((u.var(0) - 1 / 12).abs() < 4 / math.sqrt(180 * count)).all()
    steps = torch.linspace(0, 1, 41, dtype=torch.float64)[1:-1]  # Kolmogorov's distance, for each level
    share = (u[:, :, None] < steps).double().mean(0)
    assert ((share - steps).abs() < 4 * (steps * (1 - steps) / count).sqrt()).all()


@pytest.mark.parametrize("levels", [2, 3, 17, 255, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", [0, None])
def test_dequantise_is_undone_by_floor(levels: int, dtype: torch.dtype, seed: int | None) -> None:
    n = torch.arange(levels).repeat(2000, 1)
    y = dequantise(n.to(dtype) / (levels - 1), levels, seed=seed)
    assert y.dtype == dtype
    assert torch.equal((y * levels).floor().long(), n)


@pytest.mark.parametrize("u", [0.0, 1 - 2.0**-24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dequantise_survives_the_extreme_draws(u: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, *, generator: self.fill_(u))
    for levels in range(2, 1025):
        n = torch.arange(levels)
        y = dequantise(n.to(dtype) / (levels - 1), levels, seed=0)
        assert torch.equal((y * levels).floor().long(), n), levels
        assert ((y * levels - n - u).abs() < 1e-2).all(), levels  # and the midpoint lies next to the draw


def test_dequantised_density_bounds_the_mass_of_the_grey_level() -> None:
    """For p(y) = 2 y on [0, 1], P(n) = (2 n + 1) / L^2, and the bound E log p(y) - log L has a closed form, too."""
    levels, count = 4, 40_000
    n = torch.arange(levels, dtype=torch.float64)
    log_p = (2 * dequantise((n / 3).expand(count, levels), levels, seed=1)).log()
    bound = log_p.mean(0) - math.log(levels)
    antiderivative = lambda v: torch.xlogy(v, v) - v  # noqa: E731
    exact = antiderivative(n + 1) - antiderivative(n) + math.log(2 / levels) - math.log(levels)
    assert ((bound - exact).abs() < 4 * log_p.std(0) / math.sqrt(count)).all()
    assert (exact < ((2 * n + 1) / levels**2).log()).all()
    assert ((2 * n + 1) / levels**2).sum() == 1


def test_threshold() -> None:
    x = torch.tensor([[0.0, 0.5, 0.50001, 1.0]], dtype=torch.float64)
    assert torch.equal(threshold(x), torch.tensor([[0.0, 0.0, 1.0, 1.0]], dtype=torch.float64))
    assert torch.equal(threshold(x, 0.0), torch.tensor([[0.0, 1.0, 1.0, 1.0]], dtype=torch.float64))
    assert threshold(x).dtype == torch.float64
    assert torch.equal(threshold(torch.tensor([-math.inf, 7.0]), at=2), torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match=r"no missing entries.*nan"):
        threshold(torch.tensor([math.nan]))


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("function", [binarise, threshold, lambda x: dequantise(x, 2)])
def test_shape_and_dtype_are_kept(function: Callable, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    result = function(torch.ones(shape, dtype=dtype))
    assert result.shape == shape
    assert result.dtype == dtype
    assert (result > 0.5).all()


@pytest.mark.parametrize("wrong", [-1e-3, 1.001, math.nan, math.inf])
def test_binarise_refuses_what_is_no_probability(wrong: float) -> None:
    with pytest.raises(ValueError, match=r"x must be floating and lie in \[0, 1\].*\[" + f"{wrong:.3g}"):
        binarise(torch.tensor([0.5, wrong]))


@pytest.mark.parametrize(
    ("x", "levels"), [(0.502, 256), (0.5, 256), (1 / 16, 16), (-1 / 255, 256), (256 / 255, 256), (math.nan, 256)]
)
def test_dequantise_refuses_what_is_off_the_grid(x: float, levels: int) -> None:
    with pytest.raises(ValueError, match=rf"be among 0, 1/{levels - 1}, ..., 1 \(levels={levels}\)"):
        dequantise(torch.tensor([0.0, x, 1.0]), levels)


def test_dequantise_allows_for_rounding() -> None:
    assert dequantise(torch.tensor([0.0, (128 + 9e-4) / 255])).shape == (2,)
    with pytest.raises(ValueError, match="be among"):
        dequantise(torch.tensor([0.0, (128 + 1.2e-3) / 255]))


@pytest.mark.parametrize("levels", [1, 0, -3])
def test_dequantise_needs_two_levels(levels: int) -> None:
    with pytest.raises(ValueError, match=f"levels={levels} must be at least 2"):
        dequantise(torch.zeros(3), levels)


def test_dequantise_refuses_levels_beyond_the_dtype() -> None:
    x = torch.tensor([0.0, 1.0])
    with pytest.raises(ValueError, match=r"levels=4194304 are too many for torch.float32: pass x as torch.float64"):
        dequantise(x, 2**22)
    assert torch.equal((dequantise(x.double(), 2**22) * 2**22).floor(), torch.tensor([0.0, 2**22 - 1]).double())


@pytest.mark.parametrize("function", [binarise, threshold, dequantise])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_whole_number_types_are_refused(function: Callable, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"x must be floating .*{dtype}"):
        function(torch.tensor([0, 1]).to(dtype))


# Random numbers


@pytest.mark.parametrize("function", [binarise, lambda x, seed: dequantise(x, 3, seed=seed)])
def test_a_seed_decides_the_draw_and_leaves_the_global_state_alone(function: Callable) -> None:
    x = torch.full((100,), 0.5)
    before = torch.get_rng_state()
    first = function(x, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(function(x, seed=7), first)
    assert not torch.equal(function(x, seed=8), first)


@pytest.mark.parametrize("function", [binarise, lambda x: dequantise(x, 3)])
def test_without_a_seed_the_ambient_generator_decides(function: Callable) -> None:
    x = torch.full((100,), 0.5)
    torch.manual_seed(5)
    first, second = function(x), function(x)
    torch.manual_seed(5)
    assert torch.equal(function(x), first)
    assert not torch.equal(first, second)


def test_loading_and_splitting_draw_nothing_from_the_global_generators(tmp_path: Path) -> None:
    numpy_state = lambda: str(np.random.get_state())  # noqa: E731, NPY002
    before, before_numpy = torch.get_rng_state(), numpy_state()
    load("digits").split(seed=3)
    load(write_idx(tmp_path)).split(valid=0.4, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert numpy_state() == before_numpy


def test_results_do_not_depend_on_the_default_dtype(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        digits = load("digits")
        assert digits.x.dtype == torch.float32
        assert dequantise(digits.x, 17, seed=0).dtype == torch.float32
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
