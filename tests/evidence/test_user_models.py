"""Models as users write them, through every way to log p(x), against quadrature over densities written out by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import log_normal
from torch import Tensor, nn

import pyro_vae as pv

NUM_ROWS = 24


@dataclass(frozen=True)
class UserModel:
    """A program, rows drawn from it, and log p(x, u) by hand on a grid of u, (P, D) -> (P, N)."""

    program: pv.Program
    x: Tensor
    log_joint: Callable[[Tensor, Tensor], Tensor]
    ends: tuple[tuple[float, float], ...]

    def log_p(self, x: Tensor) -> Tensor:
        """By the trapezoid rule; 301 points a dimension leave an error far below any Monte Carlo error here."""
        points = 301 if len(self.ends) == 2 else 20_001
        lines = [torch.linspace(*end, points, dtype=torch.float64) for end in self.ends]
        grid = torch.stack(torch.meshgrid(*lines, indexing="ij"), -1).reshape(-1, len(lines))
        with torch.no_grad():
            values = torch.cat([self.log_joint(x, part) for part in grid.split(30_000)])
        return torch.logsumexp(values, 0) + sum(math.log(float(line[1] - line[0])) for line in lines)


def net(*sizes: int, seed: int, scale: float = 1.5) -> nn.Sequential:
    """tanh layers in float64, weights drawn by `seed`: bent, and alike in no two directions."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layer = nn.Linear(a, b).double()
        with torch.no_grad():
            layer.weight.copy_(scale * torch.randn(b, a, generator=generator, dtype=torch.float64) / a**0.5)
            layer.bias.copy_(0.3 * torch.randn(b, generator=generator, dtype=torch.float64))
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def rows(program: pv.Program, like: Tensor) -> Tensor:
    return program.simulate(like, seed=11)[0][0]


def two_layers() -> UserModel:
    """Burda, Grosse & Salakhutdinov 2016: h2 ~ N(0, 1), h1 | h2 ~ N(m(h2), s(h2)), x | h1; guide h1 | x, then h2 | h1."""
    top, bottom = net(1, 6, 2, seed=1), net(1, 6, 4, seed=2, scale=2.0)
    up, upper = net(4, 6, 1, seed=3), net(1, 4, 1, seed=4)

    def between(h2: Tensor) -> tuple[Tensor, Tensor]:
        out = top(h2[..., None])
        return 1.5 * out[..., 0], torch.exp(0.4 * out[..., 1] - 0.5)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            h2 = pyro.sample("h2", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
            h1 = pyro.sample("h1", dist.Normal(*between(h2)))
            pyro.sample("x", dist.Normal(bottom(h1[..., None]), 0.4).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            h1 = pyro.sample("h1", dist.Normal(up(x)[..., 0], 0.8))
            pyro.sample("h2", dist.Normal(upper(h1[..., None])[..., 0], 0.9))

    def log_joint(x: Tensor, h: Tensor) -> Tensor:
        h2, h1 = h[:, 0], h[:, 1]
        latent = log_normal(h2, 0.0, 1.0) + log_normal(h1, *between(h2))
        return latent[:, None] + log_normal(x, bottom(h1[:, None])[:, None], 0.4).sum(-1)

    program = pv.Program(model, guide)
    x = rows(program, torch.zeros(NUM_ROWS, 4, dtype=torch.float64))
    return UserModel(program, x, log_joint, ((-7.0, 7.0), (-9.0, 9.0)))


def log_normal_latent() -> UserModel:
    """A scale that is positive: s ~ LogNormal(0.2, 0.7), x_j ~ N(0.5, s); u = log s in the quadrature."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            scale = pyro.sample("scale", dist.LogNormal(torch.tensor(0.2, dtype=x.dtype), 0.7))
            pyro.sample("x", dist.Normal(0.5, scale[..., None].expand(*scale.shape, 4)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("scale", dist.LogNormal(0.5 * torch.log(0.1 + x.var(-1)), 0.6))

    def log_joint(x: Tensor, u: Tensor) -> Tensor:
        scale = u.exp()
        return log_normal(u, 0.2, 0.7) + log_normal(x, 0.5, scale[..., None]).sum(-1)

    program = pv.Program(model, guide)
    x = rows(program, torch.zeros(NUM_ROWS, 4, dtype=torch.float64))
    return UserModel(program, x, log_joint, ((-7.0, 7.0),))


def plain_functions() -> UserModel:
    """Networks in closures, registered by pyro.module, a parameter by pyro.param; float32."""
    decoder, encoder = net(2, 8, 3, seed=5).float(), net(3, 8, 2, seed=6).float()

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        noise = pyro.param("noise", torch.tensor(0.5), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.tensor([0.5, -0.2]), torch.tensor([1.0, 1.4])).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), noise).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), 0.8).to_event(1))

    def log_joint(x: Tensor, z: Tensor) -> Tensor:
        latent = log_normal(z, torch.tensor([0.5, -0.2]), torch.tensor([1.0, 1.4])).sum(-1)
        return latent[:, None] + log_normal(x, decoder(z.float())[:, None], 0.5).sum(-1)

    program = pv.Program(model, guide)
    return UserModel(program, rows(program, torch.zeros(NUM_ROWS, 3)), log_joint, ((-7.0, 8.0), (-10.0, 10.0)))


def convolutions() -> UserModel:
    """Pictures of 6 x 6 from two latents, through ConvTranspose2d, which takes one batch dimension."""
    generator = torch.Generator().manual_seed(7)
    decoder = nn.Sequential(nn.ConvTranspose2d(2, 3, 3), nn.Tanh(), nn.ConvTranspose2d(3, 1, 2, stride=2)).double()
    encoder = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 2)).double()
    with torch.no_grad():
        for parameter in (*decoder.parameters(), *encoder.parameters()):
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))

    def picture(z: Tensor) -> Tensor:
        return decoder(z[:, :, None, None])

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(picture(z), 0.8).to_event(3), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.3 * encoder(x), 0.9).to_event(1))

    def log_joint(x: Tensor, z: Tensor) -> Tensor:
        squares = (picture(z).flatten(1)[:, None] - x.flatten(1)).square().sum(-1)
        likelihood = -0.5 * squares / 0.64 - 36 * math.log(0.8 * math.sqrt(2.0 * math.pi))
        return log_normal(z, 0.0, 1.0).sum(-1)[:, None] + likelihood

    program = pv.Program(model, guide)
    x = rows(program, torch.zeros(NUM_ROWS, 1, 6, 6, dtype=torch.float64))
    return UserModel(program, x, log_joint, ((-7.0, 7.0), (-7.0, 7.0)))


MODELS = {
    "two layers": two_layers,
    "log-normal latent": log_normal_latent,
    "plain functions": plain_functions,
    "convolutions": convolutions,
}
every_model = pytest.mark.parametrize("name", MODELS)


def require_right(estimate: pv.evidence.Estimate, truth: Tensor, share: float, astray: int = 0) -> None:
    """At least `share` of the rows are reliable; these but `astray` are within their errors, none is far from the truth."""
    trusted = estimate.reliable
    assert trusted.double().mean() >= share, str(estimate)
    gap = (estimate.log_p - truth).abs()
    inside = gap < 4.5 * estimate.standard_error + estimate.bias.abs()
    assert (~inside)[trusted].sum() <= astray, str(estimate)
    assert (gap < 0.5)[trusted & ~inside].all(), str(estimate)
    assert (estimate.standard_error < 0.5)[trusted].all()
    assert estimate.standard_error[trusted].median() < 0.2


@every_model
def test_the_cascade_is_right(name: str) -> None:
    """Shoulders that few draws reach are a matter of their own, see test_cascade.py."""
    user = MODELS[name]()
    estimate = pv.log_evidence(user.program, user.x, seed=2)
    require_right(estimate, user.log_p(user.x), 0.95, astray=1)
    assert (estimate.standard_error <= 0.05)[estimate.reliable].all()


@every_model
def test_laplace_is_right(name: str) -> None:
    user = MODELS[name]()
    method = pv.posterior.Laplace(num_starts=12)
    require_right(pv.log_evidence(user.program, user.x, method=method, num_particles=1000), user.log_p(user.x), 0.5)


@every_model
def test_annealing_is_right(name: str) -> None:
    user = MODELS[name]()
    for start in (pv.posterior.at_guide, pv.posterior.at_modes):
        method = pv.posterior.Annealed(start=start, most_steps=32)
        require_right(pv.log_evidence(user.program, user.x, method=method, num_particles=100), user.log_p(user.x), 0.6)


@every_model
def test_the_exact_method_is_the_same_quadrature(name: str) -> None:
    user = MODELS[name]()
    estimate = pv.log_evidence(user.program, user.x, method=pv.evidence.exact)
    gap = (estimate.log_p - user.log_p(user.x)).abs()
    assert estimate.reliable.all()
    assert (gap < 2.0 * estimate.standard_error + 1e-5).all()
    assert (estimate.standard_error < 1e-3).all()


@every_model
@pytest.mark.parametrize("real", [True, False])
def test_the_truth_lies_in_the_sandwich(name: str, *, real: bool) -> None:
    """On average over rows, on each side within the scatter of the rows."""
    user = MODELS[name]()
    if real:
        box = pv.evidence.sandwich(user.program, user.x, num_particles=50, seed=2)
    else:
        box = pv.evidence.sandwich(user.program, like=user.x, num_simulated=2 * NUM_ROWS, num_particles=50, seed=2)
    assert isinstance(box.x, Tensor)
    truth = user.log_p(box.x)
    met = torch.isfinite(box.upper)
    assert met.double().mean() > 0.9
    for side, sign in ((box.lower, 1.0), (box.upper, -1.0)):
        excess = (sign * (side - truth))[met]
        assert excess.mean() < 4.5 * excess.std() / len(excess) ** 0.5
    assert box.mean_width < 0.5
