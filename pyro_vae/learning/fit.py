"""Stochastic variational inference: `fit` maximises an ELBO over everything a program can be trained by.

The way of a batch: `Batches` draws its rows by index, `Stepper` turns them into gradients, the optimiser moves the leaves
where they are, `Training` keeps count, `History` keeps the figures, and a checkpoint keeps all of it.

Under `torchrun` (or a launcher that sets the same variables) the processes of a job fit together: each takes its own part
of every batch, gradients are those of the whole batch, and all end with the same parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyro_vae.graph import Compile, compile_mode
from pyro_vae.learning.batches import Batches, Source, Transform
from pyro_vae.learning.history import History
from pyro_vae.learning.objectives import ELBO
from pyro_vae.learning.precision import Precision
from pyro_vae.learning.preparation import forget_modules, place_of, require_no_closure, require_rows, require_sensible
from pyro_vae.learning.state import State
from pyro_vae.learning.training import Callback, Training
from pyro_vae.program import Program
from pyro_vae.rows import positive
from pyro_vae.seeds import seeded
from pyro_vae.team import Lost, Team, joined


def fit(
    program: Program,
    train: Source,
    valid: Source | None = None,
    *,
    objective: Any = None,
    epochs: int = 100,
    batch_size: int = 128,
    lr: float = 1e-3,
    seed: int = 0,
    device: str | torch.device = "auto",
    compile: Compile = "auto",
    precision: str = "full",
    optimiser: Callable[[Iterable[Tensor]], Optimizer] | None = None,
    schedule: Callable[[Optimizer], LRScheduler] | None = None,
    clip_norm: float | None = None,
    transform: Transform | None = None,
    patience: int | None = None,
    checkpoint: str | Path | None = None,
    log_dir: str | Path | None = None,
    callbacks: Sequence[Callback] = (),
    progress: bool | None = None,
) -> History:
    """Fit a program by stochastic gradients of an ELBO.

    Args:
        program: a `VAE` or any `Program`; its parameters are changed where they are.
        train: rows (N, ...): tensor, array, memory map, a tuple of them, or a map-style `torch.utils.data.Dataset`.
        valid: rows whose true ELBO is reported after each epoch.
        objective: what is maximised: `objectives.ELBO()` (the default) or any Pyro ELBO object.
        epochs: passes over the rows in all.
        batch_size: rows a step, of all processes together.
        lr: learning rate of the default optimiser, Adam.
        seed: of initial values in `pyro.param`, order and noise. The same seed gives the same parameters, to the bit, on
            the same machine.
        device: "auto" is CUDA where there is one; parameters and batches are moved there. "cuda" is the GPU of this
            process's number on its machine.
        compile: whether whole batches go through a graph of the step that is captured once and compiled: True from the
            second step on, "auto" after 100 steps if at least 8,000 are left, False never. Where that cannot be done the
            fit goes on eagerly and says why, once. Draws are the same either way, losses up to rounding.
        precision: of the training steps: "full", "tf32" (coarse matrix products, on GPUs that have them) or "bf16"
            (autocast); `history.precision_gap` says what it does to the ELBO. Validation is in full precision.
        optimiser: makes a `torch.optim` optimiser from the parameters, instead of Adam.
        schedule: makes a learning-rate schedule from the optimiser; stepped after each epoch (`ReduceLROnPlateau` by the
            validation ELBO, so with mode="max").
        clip_norm: largest norm of the gradient of a mean row.
        transform: applied to each batch of x, e.g. `pv.data.binarise`; validation rows too.
        patience: stop after so many epochs without a better validation ELBO, and go back to the best parameters.
        checkpoint: folder to save the run in after each epoch. The same call goes on from there; SIGINT and SIGTERM save
            before they end the run.
        log_dir: folder for TensorBoard scalars.
        callbacks: called after each epoch as `callback(epoch, history)`; one that returns True stops the run. Of several
            processes each calls its own, and one vote stops all.
        progress: show a bar; None shows it on terminals and in notebooks that have ipywidgets. Of several processes the
            first alone shows it, and writes `checkpoint` and `log_dir`.

    Returns:
        the history; `history.elbo` is the true ELBO (beta = 1) of a mean row in nats, whatever the objective.

    Raises:
        ValueError: unusable rows, arguments or program; a checkpoint of other settings.
        FloatingPointError: a loss that is not finite, with epoch, batch, site and ranges; the last good checkpoint stays.
        OSError: the checkpoint cannot be written; `pyro_vae.team.Lost`: another process of the job has ended.
    """
    positive(epochs=epochs, batch_size=batch_size)
    require_sensible(lr, clip_norm, patience, valid)
    compile_mode(compile)
    place = place_of(device)
    missing = bool(getattr(program, "missing", False))
    with _team(place, checkpoint) as team:
        batches = Batches(train, "train", batch_size, place, transform, missing=missing)
        held_out = None if valid is None else Batches(valid, "valid", batch_size, place, transform, missing=missing)
        if held_out is not None:
            held_out.widen()
        for module in program.modules_found().values():
            module.to(place)
        known = set(pyro.get_param_store().keys())
        with seeded(seed, place):
            require_rows(program, batches, held_out, team)
            program.check(batches.first(3))
            leaves = program.trainable(batches.first(3))
            if not leaves:
                raise ValueError("The program has no parameter with a gradient: there is nothing to fit.")
            for leaf in leaves.values():
                leaf.data = leaf.data.to(place)
            chosen = optimiser or functools.partial(torch.optim.Adam, lr=lr, fused=True)
            made = chosen(list(leaves.values()))
            require_no_closure(made)
            training = Training(
                state=State(program, leaves, made, None if schedule is None else schedule(made)),
                batches=batches,
                valid=held_out,
                objective=objective if objective is not None else ELBO(),
                seed=seed,
                clip_norm=clip_norm,
                patience=patience,
                checkpoint=None if checkpoint is None else Path(checkpoint),
                compile=compile,
                precision=Precision(precision, place).name,
                team=team,
            )
            try:
                return training.run(epochs, callbacks=callbacks, log_dir=log_dir, progress=progress)
            finally:
                forget_modules(program, known)


@contextmanager
def _team(device: torch.device, checkpoint: str | Path | None) -> Iterator[Team]:
    """The ranks that fit together; where one is lost the others say how to go on."""
    try:
        with joined(device) as team:
            yield team
    except Lost as error:
        anew = "begins anew; with checkpoint= it would go on."
        mend = anew if checkpoint is None else f"goes on from {checkpoint}."
        raise Lost(f"{error} The same command {mend}") from error
