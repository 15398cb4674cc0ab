"""What `fit` and `em.fit` ask for before they begin, and what they put away at their end."""

from __future__ import annotations

import inspect

import pyro
import torch
from torch.optim import Optimizer

from pyro_vae.launch import Place
from pyro_vae.learning.batches import Batches
from pyro_vae.parameters import forget
from pyro_vae.program import Program
from pyro_vae.rows import positive
from pyro_vae.team import Team, standing


def forget_modules(program: Program, known: set[str]) -> None:
    """Take out of the param store what `pyro.module` put there during the fit: the modules hold these values themselves."""
    store = pyro.get_param_store()
    held = {id(leaf) for module in program.modules_found().values() for leaf in module.parameters()}
    forget(name for name in set(store.keys()) - known if id(store[name]) in held)


def require_no_closure(optimiser: Optimizer) -> None:
    """Refuse optimisers that evaluate the loss themselves, as L-BFGS does."""
    if inspect.signature(optimiser.step).parameters["closure"].default is inspect.Parameter.empty:
        raise ValueError(
            f"{type(optimiser).__name__} needs a closure at each step: give an optimiser that does not, as Adam."
        )


def require_sensible(lr: float, clip_norm: float | None, patience: int | None, valid: object) -> None:
    """Refuse numbers that nothing can be fitted with."""
    if not 0.0 < lr < float("inf"):
        raise ValueError(f"lr={lr} must be positive and finite.")
    if clip_norm is not None and not clip_norm > 0.0:
        raise ValueError(f"clip_norm={clip_norm} must be positive, or None.")
    if patience is not None:
        positive(patience=patience)
        if valid is None:
            raise ValueError(f"patience={patience} goes by the validation ELBO: give validation rows as well.")


def place_of(device: str | torch.device) -> torch.device:
    """The device of that name; where a machine has several ranks, each takes the GPU of its number there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
        if place.type == "cuda" and place.index is None and standing().size > 1:
            place = _own_gpu(standing())
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={str(device)!r} cannot be used here: give 'cpu' or 'auto'.") from error
    if place.type == "meta":
        raise ValueError("device='meta' holds no numbers, so nothing can be fitted there: give 'cpu' or 'auto'.")
    return place


def _own_gpu(here: Place) -> torch.device:
    """The GPU of a rank among those of its machine."""
    if here.local >= (count := torch.cuda.device_count()):
        raise ValueError(
            f"Process {here.local} of this machine finds {count} GPUs, one for each process and none for itself: start "
            "fewer processes on a machine, or give device='cpu'."
        )
    return torch.device("cuda", here.local)


def require_rows(program: Program, train: Batches, valid: Batches | None, team: Team) -> None:
    """Rows of both sets have the same shapes, there are some for every rank, and the program takes them."""
    for count, what in ((train.batch_size, "a batch has"), (train.num_rows, f"{train.name} has")):
        if count < team.size:
            raise ValueError(f"{what.capitalize()} {count} rows, fewer than the {team.size} ranks: start fewer processes.")
    if valid is not None:
        shapes = [tuple(tuple(part.shape[1:]) for part in batches.first(1)) for batches in (train, valid)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"Rows of {train.name} have shapes {shapes[0]}, rows of {valid.name} {shapes[1]}: they must be the same."
            )
    check = getattr(program, "check_training", None)
    if check is None:
        return
    for batches, judge in ((train, check), (valid, program.usable_rows)):
        if batches is None:
            continue
        whole = batches.tensors if batches.transform is None else None
        rows = whole if whole is not None else batches.spread(1024)
        part = "" if len(rows[0]) == batches.num_rows else f" ({len(rows[0])} of its rows, evenly spread)"
        try:
            judge(rows)
        except ValueError as error:
            raise ValueError(f"In {batches.name}{part}: {error}") from error
