"""The one file format: tensors and a JSON header in a single safetensors file, replaced atomically.

Writing goes to a temporary file beside the target, is flushed to the disk and then renamed over it, so that whoever
kills the process, or whatever fills the disk, leaves either the old file or the new one, never half of one. Nothing that
is read here can run code: there is no pickle.
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

FORMAT_VERSION = 1
SUFFIX = ".safetensors"


def with_suffix(path: str | os.PathLike[str]) -> Path:
    """`path` ending in ``.safetensors``, appended where it is missing."""
    path = Path(path)
    return path if path.suffix == SUFFIX else path.with_name(path.name + SUFFIX)


def write(path: Path, kind: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a JSON-able header to `path` in one atomic step; missing folders are made.

    Args:
        path: the file to make or to replace.
        kind: what the file is ("vae", "checkpoint"), checked when it is read.
        tensors: written as they are, on the CPU; shapes and dtypes kept.
        header: anything JSON can hold.

    Raises:
        OSError: no permission, no space: what was at `path` before is untouched.
    """
    metadata = {"pyro_vae": json.dumps({"kind": kind, "version": FORMAT_VERSION, "header": header})}
    plain = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    write_bytes(path, save(plain, metadata))


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` in one atomic step (see `write`)."""
    try:
        _replace(path, content)
    except OSError as error:
        # What the system says names a temporary file; the user asked for `path`.
        mend = "free some space" if error.errno == errno.ENOSPC else "choose a folder that you may write to"
        raise type(error)(error.errno, f"cannot write {path} ({error.strerror}): {mend}") from error


def _replace(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes the file private; what the user sees should have the rights of any other file of theirs.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    current = os.umask(0o022)
    os.umask(current)
    return current


def read(path: Path, kind: str) -> tuple[dict[str, Tensor], Any]:
    """Tensors (on the CPU) and header of a file that `write` made.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not ours, is damaged or cut short, holds another kind, or was written by a newer version.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if "pyro_vae" not in metadata:
                raise ValueError(f"{path} was not written by pyro_vae: it carries no pyro_vae header.")
            about = json.loads(metadata["pyro_vae"])
            if about["version"] > FORMAT_VERSION:
                raise ValueError(
                    f"{path} has format version {about['version']}, this pyro_vae reads up to {FORMAT_VERSION}: "
                    "install a newer pyro_vae."
                )
            if about["kind"] != kind:
                raise ValueError(f"{path} holds a {about['kind']}, not a {kind}.")
            return {name: file.get_tensor(name) for name in file.keys()}, about["header"]
    except (SafetensorError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no pyro_vae file, or it is damaged or cut short ({error}).") from error


def copy_into(target: Mapping[str, Tensor], source: Mapping[str, Tensor], path: Path) -> None:
    """Copy `source` into the tensors of `target` in place; both must have the same names and shapes.

    Raises:
        ValueError: names and both shapes of the first tensor that does not fit.
    """
    if missing := sorted(set(target) ^ set(source)):
        where = "not in the file" if missing[0] in target else "only in the file"
        raise ValueError(f"{path} does not fit: {missing[0]!r} is {where} ({len(missing)} names differ).")
    for name, value in source.items():
        if target[name].shape != value.shape:
            raise ValueError(
                f"{path} does not fit: {name!r} has shape {tuple(value.shape)} there and {tuple(target[name].shape)} here."
            )
    with torch.no_grad():
        for name, value in source.items():
            target[name].copy_(value)
