r"""Data sets as rows of numbers, and what is done to the rows before a model sees them.

A data set is a matrix x of shape (N, d): one row for each image or line of a table, images flattened. `load` reads it,
`Data.split` parts it. NaN in a file is for the model to judge.

>>> load("digits")
digits: 1797 rows of 8 x 8, 17 grey levels
>>> [len(part) for part in load("digits").split(seed=0)]
[1437, 180, 180]

Images hold grey levels n in {0, ..., L - 1}, stored as x = n / (L - 1). Neither a density nor a likelihood for bits
fits these as they are. There are two honest ways out, whose log-probabilities cannot be compared:

* *bits*, for a Bernoulli likelihood: `binarise` draws b ~ Bernoulli(x) afresh at every call, `threshold` cuts;
* *densities*: `dequantise` adds noise u ~ U[0, 1)^d, y = (n + u) / L. By Jensen's inequality a density p(y) then bounds
  the probability of the grey levels, log P(n) = log \int p((n + u) / L) L^-d du >= E_u[log p(y)] - d log L.
"""

from __future__ import annotations

import csv
import gzip
import math
import mmap
import os
import sys
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MAP_BYTES = 2**28  # an .npy file of this size or more is mapped into memory, not read
_OPENML = {"mnist": "mnist_784", "fashion-mnist": "Fashion-MNIST"}
NAMES = ("digits", *_OPENML)  # what `load` takes for a name, whatever files there are
_LABELS = ("label", "labels", "class", "target")
_Array: TypeAlias = NDArray[Any]
_Raw: TypeAlias = tuple[_Array, _Array | None, int]  # rows, labels, number of trailing test rows


class Splits(NamedTuple):
    """The disjoint parts of a data set, each a `Data`."""

    train: Data
    valid: Data
    test: Data


@dataclass(frozen=True, eq=False, repr=False)
class Data:
    """Rows of numbers and what they are. Shapes that contradict each other raise ValueError."""

    name: str
    x: Tensor  # float32 (N, d), images flattened; a mapped float64 file stays float64
    labels: Tensor | None  # int64 (N,)
    shape: tuple[int, ...]  # of one row before it was flattened: (28, 28), or (d,)
    levels: int | None  # the number L of grey levels: x among 0, 1/(L-1), ..., 1; None for plain numbers
    num_test: int = 0  # how many trailing rows the source itself declares its test set

    def __post_init__(self) -> None:
        """Refuse shapes that contradict each other."""
        x, y = tuple(self.x.shape), self.x.shape[:1] if self.labels is None else self.labels.shape
        if len(x) != 2 or x[1] != math.prod(self.shape) or y != x[:1] or not 0 <= self.num_test <= x[0]:
            got = f"x {x}, labels {tuple(y)}, shape {self.shape}, num_test {self.num_test}"
            raise ValueError(f"{self.name}: x (N, d), labels (N,), d = product of shape, num_test <= N; got {got}")

    def __len__(self) -> int:
        """Return the number of rows N."""
        return self.x.shape[0]

    def __repr__(self) -> str:
        """Return one line: name, rows, grey levels, declared test rows."""
        return f"{self.name}: {self._sizes()}"

    def _sizes(self) -> str:
        grey = f", {self.levels} grey levels" if self.levels else ""
        test = f", the last {self.num_test} are its test set" if self.num_test else ""
        return f"{len(self)} rows of {' x '.join(map(str, self.shape))}{grey}{test}"

    def fingerprint(self) -> str:
        """Return a short text that differs for other data: the sizes and a checksum over up to 256 rows, evenly spaced."""
        some = torch.linspace(0, len(self) - 1, min(len(self), 256), dtype=torch.float64, device="cpu").long()
        checksum = zlib.crc32(self.x[some].cpu().numpy().tobytes())
        return f"{self._sizes()}, checksum {checksum:08x}"

    def rows(self, index: Tensor | slice | Sequence[int] | _Array) -> Data:
        """Return the rows at `index`, integers `(M,)`, booleans `(N,)` or a slice (a view); `num_test` is then 0."""
        at = index if isinstance(index, Tensor | slice) else torch.from_numpy(np.asarray(index))
        return replace(self, x=self.x[at], labels=None if self.labels is None else self.labels[at], num_test=0)

    def split(self, valid: float = 0.1, test: float = 0.1, seed: int = 0) -> Splits:
        """Part the rows at random into train, valid and test: disjoint, and together all rows.

        `valid` and `test` are fractions of the rows, rounded to whole rows; NaN, infinity, an empty part raise ValueError.
        Declared test rows (`num_test > 0`) are the test part, in order; `test` is then ignored, `valid` a fraction of
        the others. The test part does not depend on `valid`. Parts are copies: slice what is larger than memory.
        """
        for name, fraction in (("valid", valid), ("test", test)):
            if not math.isfinite(fraction):
                raise ValueError(f"{name}={fraction} is no fraction of the rows: choose one between 0 and 1")
        free = len(self) - self.num_test
        num_valid, drawn = round(valid * free), 0 if self.num_test else round(test * free)
        if min(num_valid, self.num_test + drawn, free - num_valid - drawn) < 1:
            raise ValueError(f"valid={valid}, test={test} leave a part of {self} empty: choose other fractions")
        order = torch.randperm(free, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
        held_out, order = self.rows(slice(free, None) if self.num_test else order[:drawn]), order[drawn:]
        return Splits(self.rows(order[num_valid:]), self.rows(order[:num_valid]), held_out)


def load(source: str | Path, *, root: Path | None = None) -> Data:
    """Read a data set by name or from a path, names first ("./digits" is a path).

    * `"digits"`: scikit-learn's 1,797 digits, with 17 grey levels;
    * `"mnist"`, `"fashion-mnist"`: 60,000 + 10,000 images, from IDX files in the subfolder of that name of `root` or of
      the folder in the environment variable PYRO_VAE_DATA; if there is no such subfolder, from OpenML;
    * a folder of IDX files under MNIST's names, each plain or .gz; the t10k files and the labels may be missing;
    * `.npy`; `.npz` with rows in `x` (or the only array besides the labels), labels in `y` or `labels`;
    * `.csv` (names or none, empty is NaN), `.parquet`: numbers; labels in a column label, labels, class or target.

    Arrays of uint8 are images, divided by 255; all other numbers, and all tables, become float32 as they are. A `.npy`
    file of 256 MiB or more is mapped: C-contiguous float32 or float64 then stays in the file, at any size.

    Raises:
        FileNotFoundError: if there is no such name, file or folder, or no IDX training images in the folder.
        ValueError: if a file is damaged, empty, of an unknown kind or not numeric, or labels do not fit the rows.
        ConnectionError, ImportError: if OpenML cannot be reached; if pyarrow is missing for a `.parquet`.
    """
    path = Path(source).expanduser()
    if source == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        return replace(_data(path, digits.images / 16, digits.target), levels=17)
    if isinstance(source, str) and source in _OPENML:
        local = Path(root or os.environ.get("PYRO_VAE_DATA") or os.devnull).expanduser() / source
        return _data(path, *(_idx(local) if local.is_dir() else _openml(source)))
    if path.is_dir():
        return _data(path.resolve(), *_idx(path))
    readers = {".npy": _numpy, ".npz": _numpy, ".csv": _csv, ".parquet": _parquet}
    known = f"a file ends in {', '.join(readers)}, a folder holds IDX files, the names are {', '.join(NAMES)}"
    if not path.exists():
        raise FileNotFoundError(f"there is no data set, file or folder {str(source)!r}: {known}")
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path} has the unknown suffix {path.suffix!r}: {known}")
    return _data(path, *readers[path.suffix.lower()](path))


def binarise(x: Tensor, *, seed: int | None = None) -> Tensor:
    """Draw a bit from Bernoulli(x) for every entry, "dynamic binarisation": in training anew for every epoch.

    Takes probabilities x in [0, 1], floating, of any shape; returns zeros and ones of the same shape, dtype and device.
    `seed` is of a generator of its own; None draws from torch's ambient one. ValueError if x leaves [0, 1] or is NaN.
    Salakhutdinov & Murray, ICML 2008; Burda, Grosse & Salakhutdinov, "Importance weighted autoencoders", ICLR 2016.

    >>> binarise(torch.tensor([0.0, 1.0]), seed=0)
    tensor([0., 1.])
    """
    _check(x, (x >= 0) & (x <= 1), "lie in [0, 1]")
    return torch.bernoulli(x, generator=None if seed is None else torch.Generator(x.device).manual_seed(seed))


def threshold(x: Tensor, at: float = 0.5) -> Tensor:
    """Return 1 where floating x exceeds `at`, else 0, in x's shape, dtype and device; ValueError if x has NaN.

    >>> threshold(torch.tensor([0.2, 0.5, 0.7]))
    tensor([0., 0., 1.])
    """
    _check(x, ~x.isnan(), "have no missing entries")
    return (x > at).to(x.dtype)


def dequantise(x: Tensor, levels: int = 256, *, seed: int | None = None) -> Tensor:
    """Spread each grey level n = x (levels - 1) evenly over its cell: y = (n + u) / levels, u ~ U[0, 1).

    Takes floating x of any shape, entries among 0, 1/(levels - 1), ..., 1; returns y in (0, 1) of the same shape, dtype
    and device. `seed` as in `binarise`. ValueError if x (levels - 1) is more than 1e-3 off every grey level, if
    levels < 2, or if they are too many for the dtype (16-bit images need float64).

    For a density p(y) on rows of d entries, log P(n) >= E_u[log p(y)] - d log(levels) in nats, with equality where p is
    constant on the cell of n (Uria et al. 2013, arXiv:1306.0186; Theis et al. 2016, arXiv:1511.01844). u is the middle
    of one of 2^14 equal parts of [0, 1) (for float32, 256 levels): floor(y * levels) is n whatever the rounding.

    >>> (dequantise(torch.tensor([0.0, 0.5, 1.0]), levels=3, seed=0) * 3).floor()
    tensor([0., 1., 2.])
    """
    if levels < 2:
        raise ValueError(f"levels={levels} must be at least 2")
    grey = x * float(levels - 1)
    n = grey.round()
    _check(x, ((grey - n).abs() <= 1e-3) & (n >= 0) & (n < levels), f"be among 0, 1/{levels - 1}, ..., 1 ({levels=})")
    bits = round(-math.log2(torch.finfo(x.dtype).eps)) - 1 - (levels - 1).bit_length()
    if bits < 1:
        raise ValueError(f"levels={levels} are too many for {x.dtype}: pass x as torch.float64")
    u = torch.empty_like(x).uniform_(generator=None if seed is None else torch.Generator(x.device).manual_seed(seed))
    return (n + ((u * (1 << bits)).floor() + 0.5) / (1 << bits)) / levels


def _check(x: Tensor, good: Tensor, what: str) -> None:
    if not (x.is_floating_point() and bool(good.all())):
        raise ValueError(f"x must be floating and {what}, but is {x.dtype} with entries like {x[~good][:3].tolist()}")


@contextmanager
def _reading(path: Path, *errors: type[Exception]) -> Iterator[None]:
    try:
        yield
    except errors as error:
        raise ValueError(f"{path} is damaged or not what its name says ({error}): write or fetch it again") from error


def _data(path: Path, array: _Array, labels: _Array | None = None, num_test: int = 0) -> Data:
    if array.dtype.kind not in "biuf" or array.ndim == 0 or array.size == 0:
        raise ValueError(f"{path} has no rows of numbers, but {array.dtype} of shape {array.shape}: store some")
    if labels is not None:
        numbers = labels.dtype.kind in "biuf" and labels.size == len(array) and bool(np.isfinite(labels).all())
        if not numbers or bool((labels != np.trunc(labels)).any()):
            raise ValueError(f"{path}: label {len(array)} rows by whole numbers, not by {labels.shape} {labels.dtype}")
    name, image = path.name if path.is_dir() else path.stem, array.dtype == np.uint8
    mapped = isinstance(array, np.memmap) and array.dtype == np.float64 and array.flags.c_contiguous
    x = torch.from_numpy(array if mapped else np.ascontiguousarray(array, dtype=np.float32))
    x = (x.div_(255) if image else x).reshape(len(array), -1)
    y = None if labels is None else torch.from_numpy(labels.reshape(-1).astype(np.int64))
    return Data(name, x, y, array.shape[1:] or (1,), 256 if image else None, num_test)


def _idx(folder: Path) -> _Raw:
    pairs = [[_idx_file(folder, f"{part}-{kind}") for kind in ("images", "labels")] for part in ("train", "t10k")]
    images, labels = [x for x, _ in pairs if x is not None], [y for x, y in pairs if x is not None and y is not None]
    if pairs[0][0] is None:
        raise FileNotFoundError(f"{folder} has no train-images-idx3-ubyte, plain or .gz: pass a folder of IDX files")
    if len({x.shape[1:] for x in images}) > 1 or [len(y) for y in labels] not in ([], [len(x) for x in images]):
        got = f"images {[x.shape for x in images]}, labels {[y.shape for y in labels]}"
        raise ValueError(f"{folder} has train and t10k files that do not match, {got}: fetch all from one source")
    return np.concatenate(images), np.concatenate(labels) if labels else None, sum(map(len, images[1:]))


def _idx_file(folder: Path, stem: str) -> _Array | None:
    """Read 0, 0, 8 (for uint8) and ndim, a byte each, then the dimensions as big-endian uint32, then the entries."""
    ndim = 3 if stem.endswith("images") else 1
    names = [f"{stem}{mark}idx{ndim}-ubyte{suffix}" for mark in "-." for suffix in ("", ".gz")]
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        return None
    with _reading(path, EOFError, zlib.error, gzip.BadGzipFile):
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    magic, start = bytes((0, 0, 8, ndim)), 4 + 4 * ndim
    if raw[:4] != magic:
        raise ValueError(f"{path} has the magic number 0x{raw[:4].hex()}, not 0x{magic.hex()}: it is not this IDX file")
    shape = tuple(np.frombuffer(raw[4:start].ljust(4 * ndim, b"\0"), ">u4").tolist())
    if len(raw) != start + math.prod(shape):
        raise ValueError(f"{path} is truncated or too long: {len(raw)} bytes for shape {shape}: fetch it again")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def _openml(name: str) -> _Raw:
    from sklearn.datasets import fetch_openml

    try:
        found = fetch_openml(_OPENML[name], version=1, as_frame=False, parser="auto")
    except (OSError, EOFError, HTTPException, ValueError) as error:
        mend = f"load a folder of its IDX files, or set PYRO_VAE_DATA to a folder whose subfolder {name} has them"
        raise ConnectionError(f"{name} could not be fetched from OpenML ({error}): {mend}") from error
    return found.data.astype(np.uint8).reshape(-1, 28, 28), found.target.astype(np.int64), 10_000


def _numpy(path: Path) -> _Raw:
    with _reading(path, ValueError, EOFError, zipfile.BadZipFile, zlib.error), path.open("rb") as file:
        if path.suffix.lower() == ".npy" and path.stat().st_size >= MAP_BYTES:
            return _map(path, file.fileno()), None, 0
        found = np.load(file, allow_pickle=False)
        arrays = {"x": found} if isinstance(found, np.ndarray) else dict(found)
    labels = [key for key in ("y", "labels") if key in arrays and len(arrays) > 1]
    rows = ["x"] if "x" in arrays else [key for key in arrays if key not in labels]
    if len(rows) != 1 or len(labels) > 1:
        raise ValueError(f"{path} has the arrays {', '.join(arrays)}: call the rows x and the labels y")
    return arrays[rows[0]], arrays[labels[0]] if labels else None, 0


def _map(path: Path, file: int) -> _Array:
    """Map privately, so that writes stay in memory; NumPy's mode "c" reserves it for all, and fails on large files."""
    if sys.platform == "win32":
        return np.lib.format.open_memmap(path, mode="c")
    array = np.lib.format.open_memmap(path, mode="r")
    flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
    pages = mmap.mmap(file, 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return np.ndarray(array.shape, array.dtype, pages, array.offset, array.strides).view(np.memmap)


def _csv(path: Path) -> _Raw:
    names, rows = list[str](), list[_Array]()
    with _reading(path, UnicodeDecodeError, csv.Error), path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        for line in filter(None, reader):
            values, where = [_float(cell) for cell in line], f"{path}, line {reader.line_num}"
            if not names:
                named = not {cell.strip().lower() for cell in line}.isdisjoint(_LABELS)
                header = named or (None in values and all(value is None or math.isnan(value) for value in values))
                names = line if header else [str(column + 1) for column in range(len(line))]
                if header:
                    continue
            if len(line) != len(names):
                raise ValueError(f"{where} has {len(line)} cells, not {len(names)}: mend it")
            if None in values:
                at = values.index(None)
                raise ValueError(f"{where}: column {names[at]!r} has {line[at]!r}, no number: drop or number it")
            rows.append(np.array(values, dtype=np.float64))
    return _table(path, names, np.stack(rows) if rows else np.empty((0, len(names))))


def _float(cell: str) -> float | None:
    try:
        return float(cell.strip() or "nan")
    except ValueError:
        return None


def _parquet(path: Path) -> _Raw:
    try:
        import pandas
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{path} needs pandas and pyarrow ({error}): pip install 'pyro-vae[parquet]'") from error
    with _reading(path, OSError, ValueError):
        frame = pandas.read_parquet(path, engine="pyarrow")
    if words := [repr(name) for name, kind in frame.dtypes.items() if kind.kind not in "biuf"]:
        raise ValueError(f"{path}: column {', '.join(words)} does not hold numbers: remove or number it")
    return _table(path, [str(name) for name in frame.columns], frame.to_numpy(dtype=np.float64, na_value=np.nan))


def _table(path: Path, names: list[str], values: _Array) -> _Raw:
    found = [column for column, name in enumerate(names) if name.strip().lower() in _LABELS]
    if len(found) > 1:
        raise ValueError(f"{path} has the label columns {', '.join(names[i] for i in found)}: rename all but one")
    return np.delete(values, found, axis=1), values[:, found[0]] if found else None, 0
