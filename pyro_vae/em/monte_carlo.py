"""Monte Carlo EM for any decoder: why one would like EM, and what it costs where p(z | x) is not known.

EM (Dempster, Laird & Rubin 1977) raises the likelihood by raising Q(theta) = sum_i E[log p_theta(x_i, z) | x_i, theta_old].
Where the expectation has no closed form, weighted particles stand for it (Wei & Tanner 1990, J. Am. Stat. Assoc. 85:699):
the E-step is any engine of `posterior` (`weighing`), the M-step gradient steps (`maximising`), both on one batch of rows
after the other (`epochs`). No guide is needed but as a place to begin; with `fit_guide` it learns from the particles. With
`Annealed(start=at_points)` as the engine this is EM with Hamiltonian Monte Carlo, which Kingma & Welling 2014
(arXiv:1312.6114, section 5) compare with variational inference.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyro_vae.em.epochs import Callback, Training
from pyro_vae.em.maximising import MStep, leaves_that_move
from pyro_vae.em.record import EMHistory
from pyro_vae.em.weighing import EStep
from pyro_vae.learning import checkpoint as checkpoints
from pyro_vae.learning.batches import Batches, Source, Transform
from pyro_vae.learning.preparation import forget_modules, place_of, require_no_closure, require_rows, require_sensible
from pyro_vae.learning.updates import Update
from pyro_vae.memory import BUDGET
from pyro_vae.model.scales import Optimal
from pyro_vae.posterior.chains import Hamiltonian
from pyro_vae.posterior.engine import Engine
from pyro_vae.posterior.local import Laplace
from pyro_vae.program import Program
from pyro_vae.rows import Rows, positive
from pyro_vae.seeds import seeded
from pyro_vae.team import ALONE, standing

WARM = Laplace(num_starts=2, num_further=0)
"""The default engine: modes from the point of the last epoch and the centre of the guide."""


def fit(
    program: Program,
    x: Source,
    valid: Source | None = None,
    *,
    engine: Engine = WARM,
    num_particles: int = 64,
    epochs: int = 20,
    batch_size: int = 128,
    m_steps: int = 5,
    lr: float = 1e-3,
    fit_guide: bool = False,
    seed: int = 0,
    device: str | torch.device = "auto",
    optimiser: Callable[[Iterable[Tensor]], Optimizer] | None = None,
    schedule: Callable[[Optimizer], LRScheduler] | None = None,
    clip_norm: float | None = None,
    transform: Transform | None = None,
    memory: int = BUDGET,
    checkpoint: str | Path | None = None,
    callbacks: Sequence[Callback] = (),
    progress: bool | None = None,
) -> EMHistory:
    """Fit a program's model by Monte Carlo EM.

    An epoch visits every batch of rows once: an E-step on that batch, then `m_steps` gradient steps on its particles.
    Networks are in `eval()` in both, so that BatchNorm and dropout stay as they are.

    Args:
        program: a `VAE` or any `Program`; its parameters are changed where they are.
        x: rows (N, ...): tensor, array, memory map, a tuple of them, or a map-style `torch.utils.data.Dataset`.
        valid: rows whose log p(x) is reported after each epoch, by the same engine; nothing is chosen by it.
        engine: of the E-step: `posterior.Laplace()`, `posterior.from_guide`, `Annealed(start=at_points)`, ... In the first
            epoch it begins as always, later near a particle of the row from the epoch before: (N, D) numbers are kept.
        num_particles: K of a row.
        epochs: passes over the rows in all.
        batch_size: rows a batch. Its particles, K for each row, are held at once.
        m_steps: gradient steps on the particles of a batch.
        lr: learning rate of the default optimiser, Adam.
        fit_guide: whether the guide is fitted to the particles as well, by sum_k w_k log q(z_k | x) (wake-phi of reweighted
            wake-sleep). Else only what the model's density depends on moves. Where the guide is the engine as well, few
            particles and a large lr may run downhill together: `log_p` then falls.
        seed: of initial values in `pyro.param`, order and draws. The same seed gives the same parameters, to the bit, on
            the same machine.
        device: "auto" is CUDA where there is one; parameters and batches are moved there.
        optimiser: makes a `torch.optim` optimiser from the parameters that move, instead of Adam.
        schedule: makes a learning-rate schedule from the optimiser; stepped after each epoch (`ReduceLROnPlateau` by log
            p(x), so with mode="max").
        clip_norm: largest norm of the gradient of a mean row.
        transform: applied to each batch of x, e.g. `pv.data.binarise`; validation rows too.
        memory: byte budget of densities and gradients, besides the particles of a batch.
        checkpoint: folder to save the run in after each epoch. The same call goes on from there; SIGINT and SIGTERM save
            before they end the run.
        callbacks: called after each epoch as `callback(epoch, history)`; one that returns True stops the run.
        progress: show a bar; None shows it on terminals and in notebooks that have ipywidgets.

    Returns:
        the history; `history.log_p` is log p(x) of a mean row by the weights of the E-steps, while the parameters moved.

    Raises:
        ValueError: unusable rows, arguments or program; a checkpoint of other settings; several processes.
        TypeError: `engine` is no engine.
        FloatingPointError: densities or parameters that are not finite, with epoch and batch.
        OSError: the checkpoint cannot be written.
    """
    positive(num_particles=num_particles, epochs=epochs, batch_size=batch_size, m_steps=m_steps, memory=memory)
    require_sensible(lr, clip_norm, None, valid)
    _require_serves(program, engine)
    place = place_of(device)
    missing = bool(getattr(program, "missing", False))
    batches = Batches(x, "x", batch_size, place, transform, missing=missing)
    held_out = None if valid is None else Batches(valid, "valid", batch_size, place, transform, missing=missing)
    for module in program.modules_found().values():
        module.to(place)
    known = set(pyro.get_param_store().keys())
    with seeded(seed, place):
        require_rows(program, batches, held_out, ALONE)
        leaves = _leaves(program, batches.first(3), place, fit_guide=fit_guide)
        made = (optimiser or functools.partial(torch.optim.Adam, lr=lr, fused=True))(list(leaves.values()))
        require_no_closure(made)
        update = Update(list(leaves.values()), made, clip_norm)
        rows, dim = batches.first(3), program.log_joint(batches.first(3)).dim

        def estep(source: Batches) -> EStep:
            points = rows[0].new_full((source.num_rows, dim), torch.nan)
            return EStep(program, engine, num_particles, memory, points)

        training = Training(
            program=program,
            estep=estep(batches),
            mstep=MStep(program, update, m_steps, memory, fit_guide=fit_guide),
            leaves=leaves,
            optimiser=made,
            schedule=None if schedule is None else schedule(made),
            batches=batches,
            valid=None if held_out is None else (held_out, estep(held_out)),
            seed=seed,
            checkpoint=None if checkpoint is None else Path(checkpoint),
            settings={},
        )
        training.settings = _settings(training, clip_norm)
        try:
            return training.run(epochs, callbacks=callbacks, progress=progress)
        finally:
            forget_modules(program, known)


def _require_serves(program: Program, engine: object) -> None:
    """Refuse what a fit would fail with later, or learn nothing by."""
    if not isinstance(engine, Engine):
        hint = (
            "; Hamiltonian chains have no weights, Annealed(start=at_points) has" if isinstance(engine, Hamiltonian) else ""
        )
        raise TypeError(
            f"engine={engine!r} is no engine: give pv.posterior.laplace, pv.posterior.from_guide or such{hint}."
        )
    if not isinstance(program, Program):
        raise TypeError(f"program={type(program).__name__} is no Program: give a pv.VAE or pv.Program(model, guide).")
    if (size := standing().size) > 1:
        raise ValueError(f"em.fit runs in one process, and this is one of {size}: start it without torchrun.")
    for name, module in program.modules_found().items():
        if any(isinstance(inner, Optimal) for inner in module.modules()):
            raise ValueError(
                f"{name} has the scale Optimal(), which is set by residuals in training mode and not by an M-step: "
                "give pv.likelihoods.Learned()."
            )


def _leaves(program: Program, rows: Rows, place: torch.device, *, fit_guide: bool) -> dict[str, Tensor]:
    """The parameters that move, by name, on their device."""
    program.check(rows)
    leaves = program.trainable(rows)
    for leaf in leaves.values():
        leaf.data = leaf.data.to(place)
    return leaves_that_move(program, rows, leaves, fit_guide=fit_guide)


def _settings(training: Training, clip_norm: float | None) -> dict[str, Any]:
    """What a resumed run must agree on."""
    name, optimiser, mstep = checkpoints.name_of, training.optimiser, training.mstep
    defaults = {key: value for key, value in optimiser.defaults.items() if key != "lr"}
    return {
        "x": training.batches.fingerprint(),
        "valid": None if training.valid is None else training.valid[0].fingerprint(),
        "batch_size": training.batches.batch_size,
        "transform": name(training.batches.transform),
        "engine": name(training.estep.engine),
        "num_particles": training.estep.num_particles,
        "m_steps": mstep.num_steps,
        "fit_guide": mstep.fit_guide,
        "optimiser": f"{name(type(optimiser))}({name(defaults)})",
        "lr": [group.get("initial_lr", group["lr"]) for group in optimiser.param_groups],
        "schedule": name(training.schedule),
        "clip_norm": clip_norm,
        "memory": training.estep.memory,
        "seed": training.seed,
        "parameters": {name: list(leaf.shape) for name, leaf in training.leaves.items()},
        "modules": {at: " ".join(repr(m).split()) for at, m in training.program.modules_found().items()},
    }
