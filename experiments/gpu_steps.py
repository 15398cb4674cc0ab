"""What gpu_check.py measures: the VAE of svi_speed.py on a device, its captured step, and the steps of others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.infer
import pyro.optim
import torch
from svi_vae import LEARNING_RATE, Network, Size
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.learning.capture import CapturedStep
from pyro_vae.learning.engine import EagerStep
from pyro_vae.learning.precision import NAMES, Precision
from pyro_vae.learning.steps import Stepper
from pyro_vae.learning.updates import Update

SIZES = (Size(), Size(pixels=64, hidden=64, latent=8, batch=64))
Run = Callable[[int], None]


class Bench:
    """Where and how long to measure."""

    def __init__(self, device: torch.device, *, quick: bool) -> None:
        self.device, self.on_cuda = device, device.type == "cuda"
        self.rounds, self.steps = (3, 20) if quick else (9, 300)
        self.rows, self.particles = (16, 100) if quick else (200, 1000)
        self.sizes = SIZES[1:] if quick else SIZES

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.on_cuda:
            torch.cuda.synchronize(self.device)


def vae_of(size: Size, *, noisy: bool = False) -> pv.VAE:
    """The VAE of svi_speed.py with torch's initial values; `noisy`: BatchNorm and dropout in the encoder."""
    torch.manual_seed(0)
    body: nn.Module = pv.nets.MLP(size.pixels, hidden=size.hidden)
    if noisy:
        layers = (nn.BatchNorm1d(size.pixels), nn.Linear(size.pixels, size.hidden), nn.Tanh(), nn.Dropout(0.2))
        body = nn.Sequential(*layers)
    return pv.VAE(
        prior=pv.priors.StandardNormal(size.latent),
        likelihood=pv.likelihoods.Bernoulli(pv.nets.MLP(size.latent, size.pixels, hidden=size.hidden)),
        guide=pv.guides.DiagonalNormal(body, latent_dim=size.latent, features=size.hidden),
    )


def images(count: int, size: Size, device: torch.device | str = "cpu") -> Tensor:
    """Binary rows (count, pixels) with four kinds of images among them."""
    generator = torch.Generator().manual_seed(1)
    kinds = torch.rand(4, size.pixels, generator=generator)
    return torch.bernoulli(kinds[torch.arange(count) % 4], generator=generator).to(device)


def captured(vae: pv.VAE, rows: Tensor, precision: str = "full", optimiser: Any = None) -> CapturedStep:
    """The step of `pv.fit`, after one eager step."""
    vae.to(rows.device)
    stepper = Stepper(vae, pv.objectives.ELBO(), vae.trainable(rows), (rows,), Precision(precision, rows.device))
    make = optimiser or (lambda leaves: torch.optim.Adam(leaves, lr=LEARNING_RATE, fused=True))
    update = Update(stepper.leaves, make(stepper.leaves))
    EagerStep(stepper, update).take((rows,), 0)
    return CapturedStep(stepper, update, (rows,), 1)


def contestants(size: Size, bench: Bench) -> dict[str, Run]:
    """Blocks of steps, from taking the rows by index to the update."""
    rows = images(10 * size.batch, size, bench.device)

    def indices(steps: int) -> Iterator[Tensor]:
        for _ in range(steps):
            yield rows.index_select(0, torch.randint(len(rows), (size.batch,), device=bench.device))

    def by_hand(loss: Callable[[Tensor], Tensor], network: nn.Module) -> Run:
        optimiser = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE, fused=True)

        def run(steps: int) -> None:
            for x in indices(steps):
                optimiser.zero_grad()
                loss(x).backward()
                optimiser.step()

        return run

    vae = vae_of(size).to(bench.device)
    svi = pyro.infer.SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": LEARNING_RATE}), pyro.infer.TraceMeanField_ELBO())
    networks = [Network(size).to(bench.device) for _ in range(3)]
    modes = zip(networks[1:], (None, "reduce-overhead"), strict=True)
    compiled = [torch.compile(each.loss, dynamic=False, mode=mode) for each, mode in modes]

    def ours(precision: str) -> Run:
        step = captured(vae_of(size), rows[: size.batch], precision)

        def run(steps: int) -> None:
            for number, x in enumerate(indices(steps), start=1):
                step.take((x,), number)
                if number % step.interval == 0:
                    step.read()

        return run

    return {
        "Pyro SVI.step": lambda steps: [svi.step(x) for x in indices(steps)] and None,
        "PyTorch eager": by_hand(networks[0].loss, networks[0]),
        "PyTorch compiled": by_hand(compiled[0], networks[1]),
        "PyTorch reduce-overhead": by_hand(compiled[1], networks[2]),
        **{f"pyro_vae, {name}": ours(name) for name in NAMES},
    }
