"""Claim: EM with particles and variational inference raise the same log p(x); what differs is what a pass and a second buy.

    PYRO_VAE_DATA=... python experiments/em_vs_svi.py [--seconds 50] [--quick]

Kingma & Welling (2014, section 5) fit a decoder of 3 latents and 100 hidden units to 1,000 and to 50,000 MNIST images by
SVI and by Monte Carlo EM whose E-step is Hamiltonian Monte Carlo: 10 leapfrog steps, then 5 weight updates. Here the same
decoder is fitted by that, by Monte Carlo EM with `laplace`, by SVI and by IWAE, to binarised images. A linear decoder with
Gaussian noise on dequantised images is fitted besides, where EM is exact: its closed form is the end of all of them.

Each method has the same number of seconds (a linear fit half of them), batches of 100 and Adam of the same learning rate,
and is eager: no graph is compiled. A pass over the images is not the same work everywhere: Monte Carlo EM takes 5 gradient
steps a batch and costs hundreds of passes through the decoder for each image, which the seconds tell. Parameters are copied
as they move; log p(x) of held-out images is found afterwards, by the cascade (by the closed form where the decoder is
linear). Numbers go to experiments/results/em_vs_svi.json, with a figure. With 50 seconds it takes about a quarter
of an hour on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from em_figure import draw
from torch import Tensor

import pyro_vae as pv

RESULTS = Path(__file__).parent / "results"
LATENT, HIDDEN, PIXELS, BATCH = 3, 100, 784, 100
LR, GROWTH = {"network": 2e-3, "linear": 1e-2}, 1.7
CHAINS = pv.posterior.Annealed(start=pv.posterior.at_points, num_leapfrog=5, first_steps=2, most_steps=2)
"""Two transitions of five leapfrog steps, weighted, from the point of the epoch before."""


@dataclass(frozen=True)
class Snapshot:
    """How far a fit is: seconds and passes over the training rows so far; held-out log p(x) in nats and its errors."""

    method: str
    decoder: str
    rows: int
    seconds: float
    passes: float
    log_p: float
    monte_carlo_error: float
    data_error: float
    reliable: int


class TimeIsUp(Exception):
    """Leaves a fit."""


class Clock:
    """A transform that leaves rows as they are, and copies the parameters as time goes by.

    Both `pv.fit` and `pv.em.fit` call it once a batch, so that an epoch need not end for a look. The first copy is made
    when 2 % of the time is spent, the others each time it is `GROWTH` times as much; the fit ends when all of it is.
    """

    def __init__(self, vae: pv.VAE, rows: int, seconds: float) -> None:
        self.vae, self.rows, self.seconds = vae, rows, seconds
        self.copies: list[tuple[float, float, dict[str, Tensor]]] = []
        self.seen, self.next, self.start, self.away = 0, 0.02 * seconds, time.perf_counter(), 0.0

    def __call__(self, x: Tensor) -> Tensor:
        """A batch of x, (n, 784), as it is."""
        if len(x) != BATCH:  # a look at some rows before the first step, or the whole set
            return x
        now = time.perf_counter() - self.start - self.away
        if now >= self.next or now >= self.seconds:
            self.copies.append((now, self.seen / self.rows, {n: v.clone() for n, v in self.vae.state_dict().items()}))
            self.next = GROWTH * now
            self.away = time.perf_counter() - self.start - now
        if now >= self.seconds:
            raise TimeIsUp
        self.seen += BATCH
        return x


Fit = Callable[[pv.VAE, Tensor, Clock, float], object]
FOREVER = 10**6


def by_em(engine: pv.posterior.Engine, num_particles: int) -> Fit:
    """Monte Carlo EM, five steps on each batch's particles."""
    settings: dict[str, Any] = {"epochs": FOREVER, "batch_size": BATCH, "m_steps": 5, "progress": False}
    return lambda vae, x, clock, lr: pv.em.fit(
        vae, x, engine=engine, num_particles=num_particles, transform=clock, lr=lr, **settings
    )


def by_gradient(objective: Callable[[], Any]) -> Fit:
    """`pv.fit`, eager."""
    settings = {"epochs": FOREVER, "batch_size": BATCH, "compile": False, "progress": False}
    return lambda vae, x, clock, lr: pv.fit(vae, x, objective=objective(), transform=clock, lr=lr, **settings)


METHODS: dict[str, Fit] = {
    "EM, Hamiltonian E-step": by_em(CHAINS, 16),
    "EM, Laplace E-step": by_em(pv.em.monte_carlo.WARM, 16),
    "SVI": by_gradient(pv.objectives.ELBO),
    "IWAE, 8 particles": by_gradient(lambda: pv.objectives.IWAE(8)),
}


def build(decoder: str) -> pv.VAE:
    """The same first weights for all methods."""
    torch.manual_seed(0)
    hidden = (HIDDEN,) if decoder == "network" else ()
    net = pv.nets.MLP(LATENT, PIXELS, hidden=hidden)
    likelihood = (
        pv.likelihoods.Bernoulli(net)
        if decoder == "network"
        else pv.likelihoods.Normal(net, scale=pv.likelihoods.Learned(initial=0.3))
    )
    guide = pv.guides.DiagonalNormal(pv.nets.MLP(PIXELS, hidden=(HIDDEN,)), latent_dim=LATENT)
    return pv.VAE(prior=pv.priors.StandardNormal(LATENT), likelihood=likelihood, guide=guide)


def judged(program: pv.Program, test: Tensor, decoder: str) -> dict[str, Any]:
    """Held-out log p(x)."""
    method = {"method": pv.evidence.exact} if decoder == "linear" else {}
    estimate = pv.log_evidence(program, test, seed=1, **method)
    return {
        "log_p": estimate.mean,
        "monte_carlo_error": estimate.mean_standard_error,
        "data_error": estimate.data_standard_error,
        "reliable": int(estimate.reliable.sum()),
    }


def run(method: str, decoder: str, x: Tensor, test: Tensor, seconds: float) -> list[Snapshot]:
    """Fit for so many seconds, then judge every copy."""
    vae = build(decoder)
    clock = Clock(vae, len(x), seconds)
    try:
        METHODS[method](vae, x, clock, LR[decoder])
    except TimeIsUp:
        pass
    found = []
    for spent, passes, copy in clock.copies:
        vae.load_state_dict(copy)
        found.append(Snapshot(method, decoder, len(x), spent, passes, **judged(vae, test, decoder)))
    return found


def by_exact_em(x: Tensor, test: Tensor) -> list[Snapshot]:
    """Textbook EM for the linear decoder, each iteration a pass, and the closed form at the end."""
    found, spent, program = [], 0.0, None
    done = 0
    for upto in (1, 2, 4, 8, 16, 32, 64, 128):
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="EM ended")  # it is asked to
            program = pv.em.ppca(x, LATENT, max_iterations=upto - done, accelerate=False, initial=program)
        spent, done = spent + time.perf_counter() - start, upto
        found.append(Snapshot("exact EM", "linear", len(x), spent, done, **judged(program, test, "linear")))
    start = time.perf_counter()
    program = pv.em.ppca(x, LATENT)
    spent = time.perf_counter() - start
    found.append(Snapshot("closed form", "linear", len(x), spent, 1.0, **judged(program, test, "linear")))
    return found


def table(found: list[Snapshot]) -> None:
    """The last copy of every fit."""
    heads = f"{'decoder':10}{'images':>8}  {'method':26}{'seconds':>9}{'passes':>9}"
    print(f"{heads}{'log p(x)':>11}{'± MC':>9}{'± data':>8}{'reliable':>10}")
    last = {(each.decoder, each.rows, each.method): each for each in found}
    for each in last.values():
        print(
            f"{each.decoder:10}{each.rows:8}  {each.method:26}{each.seconds:9.2f}{each.passes:9.2f}{each.log_p:11.2f}"
            f"{each.monte_carlo_error:9.3f}{each.data_error:8.2f}{each.reliable:10}"
        )


def main() -> None:
    """Fit, judge, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=50.0, help="of each fit")
    parser.add_argument("--rows", type=int, default=100, help="held-out images")
    parser.add_argument("--quick", action="store_true", help="5 seconds each, 30 held-out images; other files are written")
    options = parser.parse_args()
    seconds, rows = (5.0, 30) if options.quick else (options.seconds, options.rows)
    data = pv.data.load("mnist").split(valid=1 / 6, seed=0)
    train, test = data.train.x, data.test.x[:rows]
    found: list[Snapshot] = []
    for decoder, size, share in (("linear", 1000, 0.5), ("network", 1000, 1.0), ("network", len(train), 1.0)):
        seen = pv.data.binarise if decoder == "network" else pv.data.dequantise
        x, held_out = seen(train[:size], seed=7), seen(test, seed=7)
        if decoder == "linear":
            found += by_exact_em(x, held_out)
        for method in METHODS:
            found += run(method, decoder, x, held_out, share * seconds)
            print(
                f"{decoder}, {size} images, {method}: {found[-1].log_p:.2f} nats after {found[-1].passes:.2f} passes",
                flush=True,
            )
    table(found)
    name = "em_vs_svi_quick" if options.quick else "em_vs_svi"
    RESULTS.mkdir(exist_ok=True)
    budget = {"seconds": seconds, "held_out": rows, "batch": BATCH, "latent": LATENT, "hidden": HIDDEN}
    if not all(map(math.isfinite, (each.log_p for each in found))):
        print("WARNING: some log p(x) are not finite")
    content = {"budget": budget, "fits": [asdict(each) for each in found]}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    draw(content["fits"], RESULTS / f"{name}.png")


if __name__ == "__main__":
    main()
