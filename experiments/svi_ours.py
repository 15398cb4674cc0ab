"""The contestants of svi_speed.py that are this package."""

from __future__ import annotations

import torch
from svi_vae import LEARNING_RATE, Builder, Contestant, Network, Order, Size
from torch import Tensor

import pyro_vae as pv
from pyro_vae.learning.capture import CapturedStep
from pyro_vae.learning.engine import EagerStep
from pyro_vae.learning.steps import Stepper
from pyro_vae.learning.updates import Update

NAMES = {
    "encoder.body": "encoder.encoder.layers.0",
    "encoder.loc": "encoder.loc",
    "encoder.raw_scale": "encoder.raw_scale",
    "decoder.body": "likelihood.decoder.layers.0",
    "decoder.logits": "likelihood.decoder.layers.2",
}
"""The layers of `Network`, and what they are called in the VAE."""


def vae_of(size: Size) -> pv.VAE:
    """The common VAE with the common initial weights."""
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(size.latent),
        likelihood=pv.likelihoods.Bernoulli(pv.nets.MLP(size.latent, size.pixels, hidden=size.hidden)),
        guide=pv.guides.DiagonalNormal(pv.nets.MLP(size.pixels, hidden=size.hidden), latent_dim=size.latent),
    )
    start = Network(size)
    for theirs, ours_ in NAMES.items():
        vae.get_submodule(ours_).load_state_dict(start.get_submodule(theirs).state_dict())
    return vae


def weights_of(vae: pv.VAE) -> dict[str, Tensor]:
    """Its weights under the names of `Network`."""
    return {
        f"{theirs}.{name}": value.detach().clone()
        for theirs, ours_ in NAMES.items()
        for name, value in vae.get_submodule(ours_).state_dict().items()
    }


def ours(size: Size, rows: Tensor) -> Contestant:
    """The captured step of `pv.fit`: one eager step, then the graph."""
    vae, order = vae_of(size), Order(len(rows), size.batch)
    optimiser = torch.optim.Adam(vae.parameters(), lr=LEARNING_RATE, fused=True)
    first = (rows[: size.batch],)
    stepper = Stepper(vae, pv.objectives.ELBO(), dict(vae.named_parameters()), first)
    update = Update(stepper.leaves, optimiser)
    captured: list[CapturedStep] = []

    def run(steps: int) -> None:
        if not captured:
            EagerStep(stepper, update).take(first, 0)
            captured.append(CapturedStep(stepper, update, first, 1))
        for number, index in enumerate(order.take(steps), start=1):
            captured[0].take((rows.index_select(0, index),), number)
            if number % captured[0].interval == 0 or number == steps:
                captured[0].read()

    return Contestant(run, lambda: weights_of(vae))


OURS: dict[str, Builder] = {"pyro_vae": ours}
