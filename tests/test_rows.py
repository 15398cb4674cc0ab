"""Rows: what is accepted as x, and every refusal."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pyro_vae.rows import as_rows, finite_rows, position, positive, probe, require_finite, row_blocks, take

X = torch.arange(6.0).reshape(3, 2)


def test_one_tensor_is_a_tuple_of_one() -> None:
    (rows,) = as_rows(X)
    assert rows is X


@pytest.mark.parametrize("container", [tuple, list])
def test_tuples_stay(container: type) -> None:
    y = torch.tensor([1, 0, 2])
    first, second = as_rows(container([X, y]))
    assert first is X
    assert second is y


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numpy_is_not_copied(dtype: type) -> None:
    array = np.arange(6, dtype=dtype).reshape(3, 2)
    (rows,) = as_rows(array)
    array[1, 1] = 50
    assert rows[1, 1] == 50
    assert rows.dtype == torch.as_tensor(array).dtype


def test_a_read_only_memory_map_is_accepted_without_a_warning(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(6, dtype=np.float32).reshape(3, 2))
    array = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert not array.flags.writeable
    (rows,) = as_rows(array)
    assert torch.equal(rows, X)
    assert torch.equal(as_rows((X, array))[1], X)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (X.long(), ValueError, r"^x has dtype torch.int64: densities need floating point, give x.float\(\).$"),
        (X.bool(), ValueError, r"^x has dtype torch.bool: .* give x.float\(\).$"),
        (X.numpy().astype(np.uint8), ValueError, r"^x has dtype torch.uint8: .* give x.float\(\).$"),
        (X.half(), ValueError, r"^x has dtype torch.float16, too coarse for log-densities: give x.float\(\).$"),
        (X.bfloat16(), ValueError, r"^x has dtype torch.bfloat16, too coarse for log-densities: give x.float\(\).$"),
        (X.to(torch.complex64), ValueError, r"^x has dtype torch.complex64: densities need floating point"),
        (X[:0], ValueError, r"^x has shape \(0, 2\), that is no rows: give at least one.$"),
        (X[0, 0], ValueError, r"^x is a single number, not rows: give a tensor of shape \(N, ...\).$"),
        ((), ValueError, r"^x is an empty tuple: give at least one tensor of rows.$"),
        ((X, X[:2]), ValueError, r"^x\[0\] has 3 rows and x\[1\] has 2: all must have the same number.$"),
        ((X, torch.tensor(1)), ValueError, r"^x is a single number, not rows"),
        ([[1.0, 2.0]], TypeError, r"^x is a list: give a tensor or a tuple of tensors, as torch.as_tensor\(x\).$"),
        ([1.0, 2.0], TypeError, r"^x\[0\] is a float: give a tensor or a tuple of tensors, as torch.as_tensor\(x\).$"),
        ("rows.npy", TypeError, r"^x is a str: give a tensor"),
        ({"x": X}, TypeError, r"^x is a dict: give a tensor"),
        (None, TypeError, r"^x is a NoneType: give a tensor"),
        ((X, [1, 2, 3]), TypeError, r"^x\[1\] is a list: give a tensor"),
    ],
)
def test_refusals(x: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        as_rows(x)


@pytest.mark.parametrize(
    ("array", "told"),
    [
        (X.numpy().astype(object), r"dtype '\|O' \(object\)"),
        (X.numpy().astype(str), r"dtype '<U\d+' \(str\d+\)"),
        (X.numpy().astype(">f4"), r"dtype '>f4' \(float32\)"),
        (X.numpy()[::-1], r"dtype '<f4' \(float32\) and strides \(-8, 4\)"),
        (X.numpy()[:, ::-1], r"strides \(8, -4\)"),
    ],
    ids=["objects", "texts", "byte order", "rows reversed", "columns reversed"],
)
def test_arrays_that_torch_cannot_take(array: Any, told: str) -> None:
    mend = r" and strides \(.*\), which torch cannot take: give np.ascontiguousarray\(x, dtype=np.float32\).$"
    with pytest.raises(ValueError, match=rf"^x is an array of .*{told}") as refusal:
        as_rows(array)
    assert re.search(mend, str(refusal.value))
    rows = as_rows(np.ascontiguousarray(array, dtype=np.float32))  # the mend mends
    assert torch.equal(rows[0], torch.from_numpy(array.astype(np.float32).copy()))
    with pytest.raises(ValueError, match=r"^x\[1\] is an array .*ascontiguousarray\(x\[1\], dtype=np.float32\).$"):
        as_rows((X, array))


def test_tables_are_told_how_to_become_arrays() -> None:
    class DataFrame:
        def to_numpy(self) -> Any:
            return X.numpy()

    with pytest.raises(TypeError, match=r"^x is a DataFrame: give x.to_numpy\(\).$"):
        as_rows(DataFrame())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^x\[1\] is a DataFrame: give x\[1\].to_numpy\(\).$"):
        as_rows((X, DataFrame()))  # type: ignore[arg-type]


def test_refusals_use_the_name_they_are_given() -> None:
    with pytest.raises(ValueError, match=r"^valid has dtype torch.int64: .*give valid.float\(\)"):
        as_rows(X.long(), "valid")
    with pytest.raises(TypeError, match=r"^valid\[1\] is a int: .*torch.as_tensor\(valid\)"):
        as_rows((X, 3), "valid")  # type: ignore[arg-type]


def test_only_the_first_tensor_must_be_floating_point() -> None:
    for second in (torch.tensor([1, 0, 2]), X.half(), X > 2):
        assert as_rows((X, second))[1] is second
    with pytest.raises(ValueError, match=r"^x has dtype torch\.int64"):
        as_rows((torch.tensor([1, 0, 2]), X))


def test_take_takes_from_every_tensor() -> None:
    y = torch.tensor([5, 6, 7])
    first, second = take((X, y), torch.tensor([2, 0]))
    assert first.tolist() == [[4, 5], [0, 1]]
    assert second.tolist() == [7, 5]
    first, second = take((X, y), slice(1, None))
    assert first.tolist() == [[2, 3], [4, 5]]
    assert second.tolist() == [6, 7]


def test_an_index_on_the_cpu_takes_rows_of_a_gpu() -> None:
    """torch's fake tensors refuse what a GPU would refuse, without one."""
    with FakeTensorMode():
        rows = torch.empty(5, 2, device="cuda"), torch.empty(5)
        for few in (take(rows, torch.arange(3)), probe(rows, 3)):
            assert [part.device.type for part in few] == ["cuda", "cpu"]
            assert [len(part) for part in few] == [3, 3]


def test_probe_repeats_rows_where_there_are_few() -> None:
    assert probe((X,), 2)[0].tolist() == [[0, 1], [2, 3]]
    assert probe((X[:2], torch.tensor([7, 8])), 3)[1].tolist() == [7, 8, 7]
    assert probe((X[:1],), 3)[0].tolist() == [[0, 1]] * 3


def test_position_prefers_the_object_to_its_equals() -> None:
    copy, nan = X.clone(), torch.full((3, 2), math.nan)
    assert position((X, copy), copy) == 1
    assert position((X, copy), X) == 0
    assert position((X, copy), X.clone()) == 0
    assert position((X, nan), nan) == 1
    assert position((X,), X[:, :1]) is None
    assert position((X,), X + 1) is None


@pytest.mark.parametrize(("count", "sizes"), [(0, []), (1, [1]), (6, [3, 3]), (7, [3, 3, 1])])
def test_row_blocks_cover_all_rows_in_order(count: int, sizes: list[int]) -> None:
    parts = [list(range(count))[at] for at in row_blocks(count, 3)]
    assert [len(part) for part in parts] == sizes
    assert [row for part in parts for row in part] == list(range(count))
    assert [at.stop for at in row_blocks(20000)] == [8192, 16384, 20000]


def test_finite_rows_finds_each_bad_row_and_no_other() -> None:
    count = 2 * 8192 + 1  # two blocks and a single row
    x, y = torch.zeros(count, 2, 3), torch.zeros(count, dtype=torch.float64)
    bad = {0: math.nan, 8191: math.inf, 8192: -math.inf, 16384: math.nan}
    for row, value in bad.items():
        x[row, row % 2, row % 3] = value
    y[12000] = math.nan
    good = finite_rows((x, torch.zeros(count, dtype=torch.long), y))
    assert (~good).nonzero().flatten().tolist() == [0, 8191, 8192, 12000, 16384]


def test_require_finite_names_the_first_and_the_number() -> None:
    require_finite((X,))
    x = X.clone()
    x[1, 0], x[2, 1] = math.nan, math.inf
    message = r"^x has NaN or infinite values in 2 of 3 rows, first in row 1: remove these rows or fill the values in, or"
    with pytest.raises(ValueError, match=message):
        require_finite((x,))
    with pytest.raises(ValueError, match=r"^valid has NaN or infinite values in 2 of 3 rows"):
        require_finite((x,), "valid")


def test_require_finite_names_the_tensor_and_offers_missing_values_where_there_may_be_some() -> None:
    bad = X.clone()
    bad[1, 0] = math.nan
    with pytest.raises(ValueError, match=r"^x has NaN .* in 1 of 3 rows, .* give the likelihood missing=True\.$"):
        require_finite((bad, X))
    for missing in (False, True):
        with pytest.raises(
            ValueError, match=r"^x\[1\] has NaN .* in 1 of 3 rows, first in row 1: .* fill the values in\.$"
        ):
            require_finite((X, bad), missing=missing)
    require_finite((bad, X), missing=True)
    with pytest.raises(ValueError, match=r"^x has infinite .* fill the values in\.$"):
        require_finite((X / 0.0, X), missing=True)


@pytest.mark.parametrize("value", [0, -3, 1.5, 2.0, "4", None, True, np.int64(0)])
def test_positive_refuses(value: Any) -> None:
    with pytest.raises(ValueError, match=rf"epochs=.*{value}.* must be a whole number of at least 1"):
        positive(batch_size=1, epochs=value)


def test_positive_accepts() -> None:
    positive(epochs=1, batch_size=10**12, num_particles=np.int64(3))  # type: ignore[arg-type]
