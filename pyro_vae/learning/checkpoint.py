"""Checkpoints: everything a run needs to go on as if it had never stopped, in one file that is replaced atomically.

Noise and order of a batch depend on (seed, epoch, batch) alone, so there is no random state to keep: parameters, buffers,
optimiser, learning-rate schedule, position and history are all there is.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyro_vae import files

NAME = "checkpoint.safetensors"

_PLAIN = (bool, int, float, str, list, tuple, Mapping)
_COUNTERS = ("steps_taken", "max_plate_nesting")  # what objectives change while they are used


def write(
    folder: Path,
    settings: Mapping[str, Any],
    state: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, Tensor]],
    optimiser: Optimizer,
    schedule: LRScheduler | None,
) -> None:
    """Write the checkpoint of `folder`.

    Args:
        folder: made where it is missing.
        settings: what a resumed run must agree on.
        state: position and history, JSON-able.
        tensors: groups ("parameter", "buffer", "best") of named tensors.
        optimiser: its state is kept exactly.
        schedule: likewise.

    Raises:
        OSError: it cannot be written; the checkpoint that was there is untouched.
        TypeError: an optimiser or schedule holds what JSON cannot.
    """
    flat = {f"{group}/{name}": value for group, named in tensors.items() for name, value in named.items()}
    about = optimiser.state_dict()
    numbers: dict[str, dict[str, Any]] = {}
    for index, entries in about["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                flat[f"optimiser/{index}/{key}"] = value
            else:
                numbers.setdefault(str(index), {})[key] = value
    header = {
        "settings": dict(settings),
        "state": dict(state),
        "optimiser": {"groups": about["param_groups"], "numbers": numbers},
        "schedule": None if schedule is None else schedule.state_dict(),
    }
    files.write(folder / NAME, "checkpoint", flat, header)


def read(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]] | None:
    """Header and groups of tensors of the checkpoint in `folder`; None where there is none yet."""
    if not (folder / NAME).exists():
        return None
    flat, header = files.read(folder / NAME, "checkpoint")
    groups: dict[str, dict[str, Tensor]] = {"parameter": {}, "buffer": {}, "best": {}, "optimiser": {}}
    for name, value in flat.items():
        group, _, rest = name.partition("/")
        groups[group][rest] = value
    return header, groups


def tidy(folder: Path) -> None:
    """Remove what a process killed in the middle of writing left in `folder`."""
    for left in folder.glob(f".{NAME}.*.tmp"):
        left.unlink(missing_ok=True)


def require_same(folder: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with other settings than the run was begun with.

    Raises:
        ValueError: names each setting that differs, with both values.
    """
    if ("engine" in then) != ("engine" in now):
        raise ValueError(f"{folder} holds a run of {'em.fit' if 'engine' in then else 'fit'}: use another folder.")
    different = [name for name in now if then.get(name) != now[name]]
    if different:
        told = "; ".join(f"{name} was {then.get(name)!r} and is {now[name]!r}" for name in different)
        raise ValueError(f"{folder} holds a run with other settings: {told}. Use another folder, or the same settings.")


def name_of(thing: Any) -> str:
    """A text for a setting that is the same in every process: no addresses, and nothing that running it changes."""
    if isinstance(thing, functools.partial):
        return f"{name_of(thing.func)}({name_of([*thing.args, thing.keywords])})"
    if isinstance(thing, Mapping):
        return f"{{{', '.join(f'{key}: {name_of(value)}' for key, value in thing.items())}}}"
    if isinstance(thing, (list, tuple)):
        return f"[{', '.join(map(name_of, thing))}]"
    if hasattr(thing, "__qualname__"):
        return str(thing.__qualname__)
    if " at 0x" not in repr(thing):
        return repr(thing)
    told = {
        key: value
        for key, value in sorted(getattr(thing, "__dict__", {}).items())
        if key[0] != "_" and key not in _COUNTERS
    }
    plain = {key: value for key, value in told.items() if isinstance(value, _PLAIN) or hasattr(value, "__qualname__")}
    return f"{type(thing).__qualname__}({', '.join(f'{key}={name_of(value)}' for key, value in plain.items())})"


def restore_optimiser(
    optimiser: Optimizer, schedule: LRScheduler | None, header: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Put the optimiser's and the schedule's state back."""
    state: dict[int, dict[str, Any]] = {int(i): dict(kept) for i, kept in header["optimiser"]["numbers"].items()}
    for name, value in tensors.items():
        index, _, key = name.partition("/")
        state.setdefault(int(index), {})[key] = value
    optimiser.load_state_dict({"state": state, "param_groups": header["optimiser"]["groups"]})
    # load_state_dict casts what it takes for a parameter's companion to that parameter's dtype; put the values back as
    # they were, so that the next step is the same to the bit.
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    for name, value in tensors.items():
        index, _, key = name.partition("/")
        kept = optimiser.state[parameters[int(index)]][key]
        optimiser.state[parameters[int(index)]][key] = value.to(kept.device)
    if schedule is not None:
        schedule.load_state_dict(_typed_as(schedule.state_dict(), header["schedule"]))


def _typed_as(fresh: Any, kept: Any) -> Any:
    """`kept`, which went through JSON, with the types of `fresh`: JSON makes texts of keys and dicts of counters."""
    if isinstance(fresh, Mapping):
        keys = {str(key): key for key in fresh}
        like = fresh.copy()  # type: ignore[attr-defined]
        like.clear()
        like.update({keys.get(name, name): _typed_as(fresh.get(keys.get(name)), value) for name, value in kept.items()})
        return like
    if isinstance(fresh, (list, tuple)) and len(fresh) == len(kept):
        return type(fresh)(_typed_as(old, new) for old, new in zip(fresh, kept, strict=True))
    return kept


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor with a NaN or an infinity, None where all are finite."""
    return next((n for n, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())), None)
