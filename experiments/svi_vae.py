"""The one VAE that all contestants of svi_speed.py train, the order of their batches, and how they are judged.

It is Kingma & Welling 2014 (arXiv:1312.6114) with one hidden layer (SiLU) on each side, a Bernoulli likelihood with logits,
a standard normal prior and q(z | x) = N(mu(x), diag(sigma(x)^2)), sigma = softplus(.) + 1e-6. All start from the same
weights, see the same batches in the same order (pythae draws its own), use Adam with lr = 0.001, and are judged by the same
function, `mean_elbo`. A contestant is a function (size, rows) -> `Contestant`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEARNING_RATE = 1e-3
MINIMUM_SCALE = 1e-6


@dataclass(frozen=True)
class Size:
    """What decides the cost of a step: pixels, the width of both hidden layers, latent dimensions, rows a step."""

    pixels: int = 784
    hidden: int = 400
    latent: int = 20
    batch: int = 128

    @property
    def flops(self) -> int:
        """Floating-point operations in the matrix products of a step, forward and backward."""
        first, heads, back = self.pixels * self.hidden, 2 * self.hidden * self.latent, self.hidden * self.latent
        return 2 * self.batch * (2 * first + 3 * (heads + back + first))

    def __str__(self) -> str:
        """As it is written in text: 784-400-20, batch 128."""
        return f"{self.pixels}-{self.hidden}-{self.latent}, batch {self.batch}"


@dataclass(frozen=True)
class Contestant:
    """A VAE in training.

    Attributes:
        run: does so many steps, from drawing the batch to the optimiser's update, and returns when all are finished.
        weights: the present weights under the names of `Network`; empty for the matrix products, which learn nothing.
    """

    run: Callable[[int], None]
    weights: Callable[[], dict[str, Tensor]]


Builder = Callable[[Size, Tensor], Contestant]


class Encoder(nn.Module):
    """x -> mu, sigma of q(z | x): (N, pixels) -> two of (N, latent)."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.body = nn.Linear(size.pixels, size.hidden)
        self.loc = nn.Linear(size.hidden, size.latent)
        self.raw_scale = nn.Linear(size.hidden, size.latent)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, pixels) -> mu, sigma, each (N, latent)."""
        features = F.silu(self.body(x))
        return self.loc(features), F.softplus(self.raw_scale(features)) + MINIMUM_SCALE


class Decoder(nn.Module):
    """z -> logits of x: (N, latent) -> (N, pixels)."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.body = nn.Linear(size.latent, size.hidden)
        self.logits = nn.Linear(size.hidden, size.pixels)

    def forward(self, z: Tensor) -> Tensor:
        """(N, latent) -> (N, pixels)."""
        return self.logits(F.silu(self.body(z)))


class Network(nn.Module):
    """Encoder and decoder with torch's default initial weights, the same for every contestant."""

    def __init__(self, size: Size, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.encoder, self.decoder = Encoder(size), Decoder(size)

    def loss(self, x: Tensor) -> Tensor:
        """Minus the ELBO of a mean row, nats: one draw of z, exact KL. x (N, pixels) -> ()."""
        loc, scale = self.encoder(x)
        z = loc + scale * torch.randn_like(scale)
        error = F.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum")
        kl = (0.5 * (scale.square() + loc.square() - 1.0) - scale.log()).sum()
        return (error + kl) / len(x)

    def copied(self) -> dict[str, Tensor]:
        """The weights as they are now."""
        return {name: value.detach().clone() for name, value in self.state_dict().items()}


class Order:
    """Batches by index: the rows in random order, a new one each epoch, without the short last batch."""

    def __init__(self, num_rows: int, batch: int, seed: int = 0) -> None:
        self.num_rows, self.batch = num_rows, batch
        self.generator = torch.Generator().manual_seed(seed)
        self.left = torch.empty(0, batch, dtype=torch.long)

    def take(self, steps: int) -> Tensor:
        """The next batches, (steps, batch)."""
        while len(self.left) < steps:
            epoch = torch.randperm(self.num_rows, generator=self.generator)
            whole = epoch[: self.num_rows // self.batch * self.batch].view(-1, self.batch)
            self.left = torch.cat([self.left, whole])
        taken, self.left = self.left[:steps], self.left[steps:]
        return taken


def mean_elbo(size: Size, weights: dict[str, Tensor], x: Tensor) -> float:
    """Mean ELBO of validation rows x (N, pixels), nats; the same noise for every contestant."""
    network = Network(size)
    network.load_state_dict(weights)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        return -network.loss(x).item()
