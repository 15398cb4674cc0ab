"""The file format: exact, atomic, and closed to what is not ours."""

from __future__ import annotations

import ast
import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

import pyro_vae
from pyro_vae import files

HEADER = {"name": "a run", "numbers": [1, 2.5, None], "nested": {"deep": True}}


def tensors() -> dict[str, torch.Tensor]:
    return {
        "matrix": torch.arange(6.0).reshape(2, 3).T,  # not contiguous
        "scalar": torch.tensor(0.1, dtype=torch.float64),
        "count": torch.tensor([3, 4]),
        "flag": torch.tensor([True, False]),
        "nothing": torch.empty(0, 2),
        "odd": torch.tensor([float("nan"), -0.0, 1e-45]),
    }


def ours(path: Path) -> bytes:
    files.write(path, "vae", tensors(), HEADER)
    return path.read_bytes()


def in_folder(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_written_comes_back_to_the_bit(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folders" / "a.safetensors"
    ours(path)
    found, header = files.read(path, "vae")
    assert header == HEADER
    assert found.keys() == tensors().keys()
    for name, value in tensors().items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        assert found[name].contiguous().numpy().tobytes() == value.contiguous().numpy().tobytes()


def test_tensors_that_share_memory_can_be_written(tmp_path: Path) -> None:
    whole = torch.arange(4.0)
    files.write(tmp_path / "a.safetensors", "vae", {"whole": whole, "part": whole[1:3], "again": whole}, {})
    found, _ = files.read(tmp_path / "a.safetensors", "vae")
    assert found["part"].tolist() == [1.0, 2.0]
    assert found["again"].tolist() == found["whole"].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_a_file_has_the_rights_of_any_other_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        ours(tmp_path / "a.safetensors")
        kept = os.umask(0o027)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o640
    assert kept == 0o027


@pytest.mark.parametrize(
    ("given", "wanted"), [("a", "a.safetensors"), ("a.safetensors", "a.safetensors"), ("v1.2", "v1.2.safetensors")]
)
def test_suffix(given: str, wanted: str) -> None:
    assert files.with_suffix(Path("d") / given) == Path("d") / wanted


class FullDisk:
    """A file whose write, flush or close finds no space left."""

    def __init__(self, file: Any, where: str) -> None:
        self.file, self.where = file, where

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        if name == self.where:
            return self.fail
        return getattr(self.file, name)

    def fail(self, content: bytes = b"") -> None:
        self.file.write(content[: len(content) // 2])  # some of it still went to the disk
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["write", "flush", "fsync", "replace", "mkstemp"])
def test_full_disk_leaves_the_old_file_and_nothing_else(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    before = ours(path)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if where in ("write", "flush"):
        fdopen = os.fdopen
        monkeypatch.setattr(files.os, "fdopen", lambda handle, mode: FullDisk(fdopen(handle, mode), where))
    elif where == "mkstemp":
        monkeypatch.setattr(files.tempfile, "mkstemp", fail)
    else:
        monkeypatch.setattr(files.os, where, fail)
    with pytest.raises(OSError, match="No space left") as caught:
        files.write(path, "vae", {"other": torch.ones(1000)}, {})
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert in_folder(tmp_path) == ["a.safetensors"]
    assert files.read(path, "vae")[1] == HEADER


def test_an_interrupt_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = ours(tmp_path / "a.safetensors")

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write_bytes(tmp_path / "a.safetensors", b"other")
    assert (tmp_path / "a.safetensors").read_bytes() == before
    assert in_folder(tmp_path) == ["a.safetensors"]


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, dir: Path, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(dir))

    monkeypatch.setattr(files.tempfile, "mkstemp", refuse)
    with pytest.raises(PermissionError, match=rf"cannot write .*{tmp_path.name}.* \(Permission denied\): choose a folder"):
        files.write_bytes(tmp_path / "a.safetensors", b"content")


def test_a_folder_below_a_file_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match="file"):
        files.write(tmp_path / "file" / "a.safetensors", "vae", tensors(), HEADER)
    assert (tmp_path / "file").read_text() == "not a folder"


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no file .*absent\.safetensors"):
        files.read(tmp_path / "absent.safetensors", "vae")
    with pytest.raises(FileNotFoundError, match="There is no file"):
        files.read(tmp_path, "vae")


def about(**changes: Any) -> dict[str, str]:
    return {"pyro_vae": json.dumps({"kind": "vae", "version": files.FORMAT_VERSION, "header": {}} | changes)}


FOREIGN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "damaged or cut short"),
    "random bytes": (torch.randint(256, (500,), dtype=torch.uint8).numpy().tobytes(), "damaged or cut short"),
    "a text": (b"PK\x03\x04 this is a text, not tensors", "damaged or cut short"),
    "safetensors without metadata": (save({"a": torch.ones(2)}), "carries no pyro_vae header"),
    "safetensors of somebody else": (save({"a": torch.ones(2)}, {"format": "pt"}), "carries no pyro_vae header"),
    "header that is no JSON": (save({"a": torch.ones(2)}, {"pyro_vae": "{'kind'"}), "damaged or cut short"),
    "header that is a list": (save({"a": torch.ones(2)}, {"pyro_vae": "[1]"}), "damaged or cut short"),
    "header without version": (save({"a": torch.ones(2)}, {"pyro_vae": '{"kind": "vae"}'}), "damaged or cut short"),
    "version that is a text": (save({"a": torch.ones(2)}, about(version="new")), "damaged or cut short"),
    "another kind": (save({"a": torch.ones(2)}, about(kind="checkpoint")), "holds a checkpoint, not a vae"),
    "newer version": (save({"a": torch.ones(2)}, about(version=99)), "format version 99.*install a newer"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_what_is_not_ours_is_refused(what: str, tmp_path: Path) -> None:
    content, told = FOREIGN[what]
    path = tmp_path / "strange.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=told) as caught:
        files.read(path, "vae")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", [0.001, 0.01, 0.1, 0.5, 0.9, 0.999])
def test_a_file_cut_short_is_refused(part: float, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    content = ours(path)
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(ValueError, match="damaged or cut short") as caught:
        files.read(path, "vae")
    assert str(path) in str(caught.value)


def test_load_refuses_with_the_path(tmp_path: Path) -> None:
    (tmp_path / "vae.safetensors").write_bytes(b"nothing of ours")
    with pytest.raises(ValueError, match=r"vae\.safetensors"):
        pyro_vae.load(tmp_path / "vae")
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors"):
        pyro_vae.load(tmp_path / "absent")


def test_copy_into_copies_in_place_or_not_at_all() -> None:
    target = {"a": torch.zeros(2), "b": torch.zeros(3)}
    wrong: dict[str, tuple[dict[str, torch.Tensor], str]] = {
        "shape": ({"a": torch.ones(2), "b": torch.ones(2)}, r"'b' has shape \(2,\) there and \(3,\) here"),
        "missing": ({"a": torch.ones(2)}, "'b' is not in the file"),
        "more": ({"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(1)}, "'c' is only in the file"),
    }
    for source, told in wrong.values():
        with pytest.raises(ValueError, match=f"here.st.*{told}"):
            files.copy_into(target, source, Path("here.st"))
        assert float(target["a"].sum() + target["b"].sum()) == 0.0
    kept = target["a"]
    files.copy_into(target, {"a": torch.ones(2), "b": torch.ones(3)}, Path("here.st"))
    assert kept.tolist() == [1.0, 1.0]


ROOT = Path(pyro_vae.__path__[0])
UNSAFE: Callable[[str], bool] = {"pickle", "dill", "joblib", "cloudpickle", "marshal", "shelve"}.__contains__


@pytest.mark.parametrize("file", sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py")))
def test_nothing_is_pickled(file: str) -> None:
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not any(UNSAFE(alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not UNSAFE((node.module or "").split(".")[0])
        elif isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in ("torch.load", "torch.save")
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert ast.unparse(node.value) == "False"
