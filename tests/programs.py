"""Small Pyro programs with every density written out by hand, none of them symmetric."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vae import Program

Values = dict[str, Tensor]


def log_normal(value: Tensor, loc: Any, scale: Any) -> Tensor:
    """The log-density of N(loc, scale^2), elementwise, in float64."""
    value, loc, scale = (torch.as_tensor(part).double() for part in (value, loc, scale))
    return -0.5 * ((value - loc) / scale) ** 2 - scale.log() - 0.5 * math.log(2.0 * math.pi)


def weights(*shape: int, seed: int = 0) -> Tensor:
    """Fixed numbers, float32."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Curved:
    """One latent z in R^2 with a shifted prior, x in R^3 through a bent decoder; the guide's scale depends on x."""

    prior_loc, prior_scale = torch.tensor([0.5, -1.0]), torch.tensor([1.5, 0.7])
    noise = torch.tensor([0.3, 0.5, 0.9])

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.decoder, self.encoder, self.spread = (
            weights(*shape, seed=i).to(dtype) for i, shape in enumerate([(2, 3), (3, 2), (3, 2)])
        )
        self.prior_loc, self.prior_scale, self.noise = (
            part.to(dtype) for part in (self.prior_loc, self.prior_scale, self.noise)
        )
        self.program = Program(self.model, self.guide)

    def mean(self, z: Tensor) -> Tensor:
        return torch.tanh(z @ self.decoder) + 0.2 * (z**2).sum(-1, keepdim=True)

    def q(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x @ self.encoder + 0.1, 0.4 * torch.exp(0.3 * x @ self.spread)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.prior_loc, self.prior_scale).to_event(1))
            pyro.sample("x", dist.Normal(self.mean(z), self.noise).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(*self.q(x)).to_event(1))

    def log_prior(self, z: Tensor) -> Tensor:
        return log_normal(z, self.prior_loc, self.prior_scale).sum(-1)

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        return log_normal(x, self.mean(z), self.noise).sum(-1)

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        return self.log_prior(z) + self.log_likelihood(x, z)

    def log_q(self, x: Tensor, z: Tensor) -> Tensor:
        return log_normal(z, *self.q(x)).sum(-1)


class Several:
    """Five latents: z1 real, z2 | z1 in R^2, a positive rate, a share in (0, 1), a simplex of three; x in R^4."""

    names = ("z1", "z2", "rate", "share", "simplex")
    noise = 0.4

    def __init__(self) -> None:
        self.program = Program(self.model, self.guide)

    @staticmethod
    def mean(z: Values) -> Tensor:
        mixed = z["simplex"] @ torch.tensor([1.0, -2.0, 3.0]).to(z["z1"].dtype)
        parts = (z["z2"][..., 0] + z["rate"].log(), z["z2"][..., 1] * z["share"], mixed, z["z1"])
        return torch.stack(parts, -1)

    @staticmethod
    def prior_of_z2(z1: Tensor) -> tuple[Tensor, Tensor]:
        return torch.stack([z1, -(z1**2)], -1), torch.tensor([0.5, 0.8])

    def model(self, x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = {"z1": pyro.sample("z1", dist.Normal(0.3, 1.2))}
            z["z2"] = pyro.sample("z2", dist.Normal(*self.prior_of_z2(z["z1"])).to_event(1))
            z["rate"] = pyro.sample("rate", dist.Gamma(2.0, 1.5))
            z["share"] = pyro.sample("share", dist.Beta(2.0, 3.0))
            z["simplex"] = pyro.sample("simplex", dist.Dirichlet(torch.tensor([1.5, 2.0, 3.0])))
            pyro.sample("x", dist.Normal(self.mean(z), self.noise).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("simplex", dist.Dirichlet(1.0 + x[:, :3].exp()))
            z1 = pyro.sample("z1", dist.Normal(x[:, 3], 0.5))
            pyro.sample("z2", dist.Normal(torch.stack([z1, x[:, 0]], -1), 0.7).to_event(1))
            pyro.sample("rate", dist.LogNormal(0.2 * x[:, 0], 0.6))
            pyro.sample("share", dist.Beta(2.0, 1.0 + x[:, 1].exp()))

    def log_joint(self, x: Tensor, z: Values) -> Tensor:
        """log p(x, z) from the formulas of the densities."""
        rate, share, simplex = (z[name].double() for name in ("rate", "share", "simplex"))
        alpha = torch.tensor([1.5, 2.0, 3.0], dtype=torch.float64)
        return (
            log_normal(z["z1"], 0.3, 1.2)
            + log_normal(z["z2"], *self.prior_of_z2(z["z1"])).sum(-1)
            + 2.0 * math.log(1.5) + rate.log() - 1.5 * rate - math.lgamma(2.0)
            + share.log() + 2.0 * (1.0 - share).log() + math.lgamma(5.0) - math.lgamma(2.0) - math.lgamma(3.0)
            + ((alpha - 1.0) * simplex.log()).sum(-1) + math.lgamma(6.5) - sum(math.lgamma(a) for a in (1.5, 2.0, 3.0))
            + log_normal(x, self.mean(z), self.noise).sum(-1)
        )  # fmt: skip

    def log_q(self, x: Tensor, z: Values) -> Tensor:
        rate, share, simplex = (z[name].double() for name in ("rate", "share", "simplex"))
        alpha, b, x = 1.0 + x[:, :3].exp().double(), 1.0 + x[:, 1].exp().double(), x.double()
        loc = torch.stack([z["z1"].double(), x[:, 0].expand(z["z1"].shape)], -1)
        two = torch.tensor(2.0, dtype=torch.float64)
        return (
            log_normal(z["z1"], x[:, 3], 0.5)
            + log_normal(z["z2"], loc, 0.7).sum(-1)
            + log_normal(rate.log(), 0.2 * x[:, 0], 0.6) - rate.log()
            + share.log() + (b - 1.0) * (1.0 - share).log() + (two + b).lgamma() - two.lgamma() - b.lgamma()
            + ((alpha - 1.0) * simplex.log()).sum(-1) + alpha.sum(-1).lgamma() - alpha.lgamma().sum(-1)
        )  # fmt: skip


class Networks:
    """A program around any decoder and encoder: z in R^D standard normal, x ~ N(decoder(z), 0.5^2)."""

    noise = 0.5

    def __init__(self, decoder: nn.Module, encoder: nn.Module, latent_dim: int) -> None:
        self.decoder, self.encoder, self.latent_dim = decoder, encoder, latent_dim
        self.program = Program(self.model, self.guide)

    def model(self, x: Tensor) -> None:
        zero = torch.zeros(self.latent_dim)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(zero, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), self.noise).to_event(x.dim() - 1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), 0.6).to_event(1))

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x, z) with the decoder run once for each of the K particles."""
        self.decoder.eval()
        with torch.no_grad():
            means = torch.stack([self.decoder(one) for one in z])
        return log_normal(z, 0.0, 1.0).sum(-1) + log_normal(x, means, self.noise).flatten(2).sum(-1)


class Calls:
    """Counts how often a module is called, and with how many rows in all."""

    def __init__(self, module: nn.Module) -> None:
        self.count = self.rows = 0
        module.register_forward_hook(self._called)

    def _called(self, _: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> None:
        self.count += 1
        self.rows += len(inputs[0])


class Learned(PyroModule):
    """A module with an ordinary weight and a constrained PyroParam."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = PyroModule[nn.Linear](2, 3)
        self.scale = PyroParam(torch.tensor([0.3, 0.5, 0.9]), constraint=constraints.positive)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(z), self.scale


class Decoders:
    """Bound methods and a list of modules."""

    def __init__(self) -> None:
        self.stages = [nn.Linear(2, 4), nn.Linear(4, 3)]
        self.frozen = nn.Linear(3, 3).requires_grad_(requires_grad=False)

    def decode(self, z: Tensor) -> Tensor:
        return self.frozen(self.stages[1](torch.tanh(self.stages[0](z))))


global_shift = nn.Linear(1, 3)
decode = nn.Linear(2, 3)  # a global that bears the name of an attribute used below, and is itself not used


def every_kind_of_parameter() -> tuple[Program, dict[str, Tensor]]:
    """A program that keeps parameters in all the places where Pyro users do, and these by where they are."""
    decoders, learned, encoder = Decoders(), Learned(), nn.Linear(3, 2)
    registered = nn.Linear(3, 2)
    plain = torch.full((3,), 0.1, requires_grad=True)
    frozen = torch.full((3,), 0.1)

    def model(x: Tensor, *, bias: Tensor) -> None:
        loc = pyro.param("prior loc", lambda: torch.tensor([0.5, -0.5]))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
            mean, scale = learned(z)
            mean = mean + decoders.decode(z) + global_shift(z[..., :1]) + bias + frozen
            pyro.sample("x", dist.Normal(mean, scale).to_event(1), obs=x)

    def guide(net: nn.Module, x: Tensor) -> None:
        pyro.module("registered", registered)
        scale = pyro.param("guide scale", torch.tensor([0.5, 0.7]), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x) + registered(x), scale).to_event(1))

    program = Program(functools.partial(model, bias=plain), functools.partial(guide, encoder))
    modules = {"stage 0": decoders.stages[0], "stage 1": decoders.stages[1], "learned": learned, "encoder": encoder}
    modules |= {"registered": registered, "global": global_shift}
    leaves = {f"{at}.{name}": leaf for at, module in modules.items() for name, leaf in module.named_parameters()}
    return program, leaves | {"plain": plain}


def names_of_every_kind() -> list[str]:
    """Names of the parameters in `every_kind_of_parameter`; another process must give the same."""
    program, _ = every_kind_of_parameter()
    return list(program.trainable(weights(5, 3)))


def with_plate(plate: Callable[[Tensor], Any]) -> Program:
    """`Curved` with another plate around its sites."""
    curved = Curved()

    def model(x: Tensor) -> None:
        with plate(x):
            z = pyro.sample("z", dist.Normal(curved.prior_loc, curved.prior_scale).to_event(1))
            pyro.sample("x", dist.Normal(curved.mean(z), curved.noise).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with plate(x):
            pyro.sample("z", dist.Normal(*curved.q(x)).to_event(1))

    return Program(model, guide)
