"""Layouts: the fastest one that is right is found, and every one gives what single runs give."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import Calls, Networks, log_normal, weights
from torch import Tensor, nn

from pyro_vae import Program
from pyro_vae.layouts import Layout, find_layout, run

CLOSE = {"rtol": 1e-5, "atol": 1e-4}


class ConvDecoder(nn.Module):
    """Images from codes by a reshape that knows of one batch dimension only."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 3 * 4 * 4)
        self.conv = nn.ConvTranspose2d(3, 1, 2, stride=2)

    def forward(self, z: Tensor) -> Tensor:
        return self.conv(self.linear(z).view(len(z), 3, 4, 4))[:, 0]


class Centred(nn.Module):
    """Subtracts the mean over the rows: neither copies of the rows nor another dimension leave it as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 3)

    def forward(self, z: Tensor) -> Tensor:
        return self.linear(z - z.mean(0))


class OnlySoMany(nn.Module):
    """Takes (N, D) and no more than so many rows, so that neither K copies nor a dimension of particles pass."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows, self.linear = rows, nn.Linear(2, 3)

    def forward(self, z: Tensor) -> Tensor:
        if z.dim() != 2 or len(z) > self.rows:
            raise RuntimeError(f"cannot take {tuple(z.shape)}")
        return self.linear(z)


class SoftmaxOfDimensionOne(nn.Module):
    """Right on (N, D), and of rows instead of columns on (K, N, D), without a word."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 3)

    def forward(self, z: Tensor) -> Tensor:
        return self.linear(z).softmax(1)


def norm(width: int, *, trained: bool) -> nn.Module:
    """A network with BatchNorm1d over `width` features, with statistics that differ between them if `trained`."""
    layer = nn.BatchNorm1d(width)
    if trained:
        layer.running_mean.copy_(torch.linspace(-1.0, 2.0, width))
        layer.running_var.copy_(torch.linspace(0.2, 3.0, width))
    return nn.Sequential(nn.Linear(2, width), layer, nn.Tanh(), nn.Linear(width, 3))


def flat_encoder(columns: int = 3) -> nn.Module:
    return nn.Sequential(nn.Flatten(1), nn.Linear(columns, 2))


CASES = {
    "MLP": (lambda: nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3)), (3,), Layout.BATCHED),
    "convolution": (ConvDecoder, (8, 8), Layout.TILED),
    "BatchNorm of 5 on 5 rows": (lambda: norm(5, trained=True), (3,), Layout.TILED),
    "BatchNorm of 3 on 5 rows": (lambda: norm(3, trained=True), (3,), Layout.TILED),
    "softmax over dimension 1": (SoftmaxOfDimensionOne, (3,), Layout.TILED),
    "rows that see each other": (Centred, (3,), Layout.LOOPED),
    "only so many rows": (lambda: OnlySoMany(5), (3,), Layout.LOOPED),
}


@pytest.mark.parametrize("name", CASES)
def test_every_layout_gives_what_single_runs_give(name: str) -> None:
    make, shape, expected_layout = CASES[name]
    networks = Networks(make(), flat_encoder(shape[0] if len(shape) == 1 else 64), 2)
    x, z = weights(5, *shape), 2.0 * weights(7, 5, 2, seed=1)
    expected = networks.log_joint(x, z)
    networks.decoder.train()
    log_joint = networks.program.log_joint(x)
    assert networks.program.layout((x,))[0] is expected_layout
    with torch.no_grad():
        torch.testing.assert_close(log_joint(z), expected, **CLOSE)
        torch.testing.assert_close(log_joint.of_sites({"z": z}), expected, **CLOSE)
        torch.testing.assert_close(log_joint.flatten({"z": z}), z)
        torch.testing.assert_close(log_joint.unflatten(z)["z"], z)


def test_log_weights_and_draws_in_every_layout() -> None:
    for make, shape, _ in CASES.values():
        networks = Networks(make(), flat_encoder(shape[0] if len(shape) == 1 else 64), 2)
        x = weights(2, *shape)
        log_weights, z = networks.program.log_weights(x, 6)
        log_q = log_normal(z["z"], networks.encoder(x).detach(), 0.6).sum(-1)
        torch.testing.assert_close(log_weights, networks.log_joint(x, z["z"]) - log_q, **CLOSE)
        prior, log_p = networks.program.sample_prior(x, 4)
        assert prior["z"].shape == (4, 2, 2)
        torch.testing.assert_close(log_p, log_normal(prior["z"], 0.0, 1.0).sum(-1), **CLOSE)


@pytest.mark.parametrize("width", [2, 3])
@pytest.mark.parametrize("rows", [2, 3, 7])
def test_batch_norm_is_known_before_it_is_trained(width: int, rows: int) -> None:
    """Fresh statistics are the same for all features, so that on `width` rows nothing is wrong to see yet."""
    networks = Networks(norm(width, trained=False), flat_encoder(), 2)
    x, z = weights(rows, 3), 2.0 * weights(4, rows, 2, seed=1)
    log_joint = networks.program.log_joint(x)
    networks.decoder[1].running_mean.copy_(torch.linspace(-1.0, 2.0, width))
    networks.decoder[1].running_var.copy_(torch.linspace(0.2, 3.0, width))
    expected = networks.log_joint(x, z)
    with torch.no_grad():
        torch.testing.assert_close(log_joint(z), expected, **CLOSE)
        torch.testing.assert_close(networks.program.log_joint(x)(z), expected, **CLOSE)


def test_a_layout_found_on_one_row_serves_many() -> None:
    networks = Networks(Centred(), flat_encoder(), 2)
    x, z = weights(5, 3), weights(4, 5, 2)
    networks.program.log_joint(x[:1])
    assert networks.program.layout((x,))[0] is Layout.LOOPED
    with torch.no_grad():
        torch.testing.assert_close(networks.program.log_joint(x)(z), networks.log_joint(x, z), **CLOSE)


def test_a_new_network_gets_a_layout_of_its_own() -> None:
    networks = Networks(nn.Linear(2, 3), flat_encoder(), 2)
    x = weights(5, 3)
    assert networks.program.layout((x,))[0] is Layout.BATCHED
    networks.decoder = Centred()
    assert networks.program.layout((x,))[0] is Layout.LOOPED


def test_gradients_in_every_layout() -> None:
    for make, shape in ((nn.Linear, (3,)), (ConvDecoder, (8, 8)), (Centred, (3,))):
        decoder = make(2, 3) if make is nn.Linear else make()
        networks = Networks(decoder, flat_encoder(shape[0] if len(shape) == 1 else 64), 2)
        x, u = weights(4, *shape), weights(3, 4, 2).requires_grad_()
        (gradient,) = torch.autograd.grad(networks.program.log_joint(x)(u).sum(), u)
        means = torch.stack([decoder(one) for one in u])
        formula = log_normal(u, 0.0, 1.0).sum() + log_normal(x, means, 0.5).sum()
        torch.testing.assert_close(gradient, *torch.autograd.grad(formula, u), rtol=1e-4, atol=1e-4)


# How often networks run


@pytest.mark.parametrize("num_particles", [10, 1000])
@pytest.mark.parametrize("make", [lambda: nn.Linear(2, 3), lambda: norm(5, trained=True)], ids=["batched", "tiled"])
def test_the_guide_runs_once_however_many_particles(make: object, num_particles: int) -> None:
    networks = Networks(make(), flat_encoder(), 2)  # type: ignore[operator]
    x = weights(5, 3)
    networks.program.layout((x,))
    guide, decoder = Calls(networks.encoder), Calls(networks.decoder)
    z, _ = networks.program.sample(x, num_particles)
    assert z["z"].shape == (num_particles, 5, 2)
    assert (guide.count, guide.rows) == (1, 5)
    assert decoder.count == 0
    networks.program.log_weights(x, num_particles)
    assert (guide.count, guide.rows) == (2, 10)
    assert decoder.count == 1


@pytest.mark.parametrize("make", [lambda: nn.Linear(2, 3), ConvDecoder, Centred], ids=["batched", "tiled", "looped"])
def test_the_prior_is_drawn_without_the_decoder(make: object) -> None:
    decoder = make()  # type: ignore[operator]
    shape = (8, 8) if isinstance(decoder, ConvDecoder) else (3,)
    networks = Networks(decoder, flat_encoder(64 if shape == (8, 8) else 3), 2)
    x = weights(5, *shape)
    networks.program.layout((x,))
    calls, guide = Calls(decoder), Calls(networks.encoder)
    networks.program.sample_prior(x, 20)
    networks.program.log_joint(x)
    assert calls.count == guide.count == 0


def test_a_hierarchical_guide_whose_network_reads_a_latent() -> None:
    """torch.cat of (K, N, 1) and (N, 3) raises, and K = N is no coincidence to fall for."""
    net, first = nn.Linear(4, 1), nn.Linear(3, 1)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            b = pyro.sample("b", dist.Normal(a, 0.5).to_event(1))
            pyro.sample("x", dist.Normal(torch.cat([a, b, a * b], -1), 0.5).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(first(x), 1.0).to_event(1))
            pyro.sample("b", dist.Normal(net(torch.cat([a, x], -1)), 1.0).to_event(1))

    program, x = Program(model, guide), weights(5, 3)
    assert [layout.name for layout in program.layout((x,))[:2]] == ["BATCHED", "TILED"]
    log_weights, z = program.log_weights(x, 5)
    a, b = z["a"], z["b"]
    log_q = log_normal(a, first(x), 1.0) + log_normal(b, net(torch.cat([a, x.expand(5, 5, 3)], -1)), 1.0)
    log_p = log_normal(a, 0.0, 1.0) + log_normal(b, a, 0.5)
    log_p = log_p[..., 0] + log_normal(x, torch.cat([a, b, a * b], -1), 0.5).sum(-1)
    torch.testing.assert_close(log_weights, (log_p - log_q[..., 0]).detach(), **CLOSE)


# The functions by themselves


class Sum:
    """A handler that adds up what `function` returns, to see what the layouts hand it."""

    values: dict[str, Tensor]

    def __init__(self, z: Tensor) -> None:
        self.z, self.latent, self.observed, self.values = z, z.new_zeros(()), z.new_zeros(()), {"z": z}

    def __enter__(self) -> Sum:
        stack.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        stack.pop()


stack: list[Sum] = []


@pytest.mark.parametrize("layout", list(Layout))
def test_run_keeps_rows_and_particles_in_their_places(layout: Layout) -> None:
    def function(x: Tensor, y: Tensor) -> None:
        here = stack[-1]
        here.latent = here.z[..., 0] * x[:, 0]
        here.observed = here.z[..., 1] + y

    x, y, z = weights(3, 1), torch.tensor([10, 20, 30]), weights(4, 3, 2, seed=1)
    done = run(function, (x, y), 4, layout, lambda values: Sum(values["z"]), {"z": z})
    assert torch.equal(done.latent, z[..., 0] * x[:, 0])
    assert torch.equal(done.observed, z[..., 1] + y)
    assert torch.equal(done.values["z"], z)


def test_find_layout_wants_every_probe_right() -> None:
    def function(x: Tensor) -> None:
        here = stack[-1]
        wrong = len(x) == 2 and here.z.dim() == 3  # batched particles of two rows
        here.latent, here.observed = here.z[..., 0] * x[:, 0] + float(wrong), here.z[..., 1]

    def probe(rows: int) -> tuple[tuple[Tensor], dict[str, Tensor]]:
        return (weights(rows, 1),), {"z": weights(2, rows, 2)}

    handler = lambda values: Sum(values["z"])  # noqa: E731
    assert find_layout(function, [probe(3)], handler) is Layout.BATCHED
    assert find_layout(function, [probe(3), probe(2)], handler) is Layout.TILED
