"""Layouts: the fastest one that is right is found, and every one gives what single runs give."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import Calls, Networks, log_normal, weights
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_vae import Program, layouts
from pyro_vae.layouts import KEPT, Layout, find_layout, run
from pyro_vae.memory import bytes_allocated
from pyro_vae.posterior import from_guide, from_prior

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


class CentredColumns(nn.Module):
    """Subtracts the mean over dimension 1, which are the rows of batched particles; zero until it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(2, 3)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, z: Tensor) -> Tensor:
        h = self.last(z)
        return h - h.mean(1, keepdim=True)


def train(networks: Networks, x: Tensor) -> None:
    optimizer = torch.optim.Adam(networks.decoder.parameters(), lr=0.3)
    for _ in range(3):
        optimizer.zero_grad()
        ((networks.decoder(weights(len(x), 2)) - x) ** 2).sum().backward()
        optimizer.step()


def load(networks: Networks, _: Tensor) -> None:
    networks.decoder.load_state_dict({"last.weight": weights(3, 2), "last.bias": weights(3)})


@pytest.mark.parametrize("change", [train, load])
def test_a_layout_is_found_again_when_parameters_have_changed(change: Callable[[Networks, Tensor], None]) -> None:
    networks = Networks(CentredColumns(), flat_encoder(), 2)
    x, z = weights(5, 3), 2.0 * weights(4, 5, 2, seed=1)
    assert networks.program.layout((x,)).model is Layout.BATCHED  # nothing is wrong to see
    change(networks, x)
    assert networks.program.layout((x,)).model is Layout.TILED
    with torch.no_grad():
        torch.testing.assert_close(networks.program.log_joint(x)(z), networks.log_joint(x, z), **CLOSE)


def test_a_layout_is_found_again_when_the_param_store_has_changed() -> None:
    def model(x: Tensor) -> None:
        slope = pyro.param("slope", torch.zeros(2, 3))
        with pyro.plate("data", len(x)):
            h = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1)) @ slope
            pyro.sample("x", dist.Normal(h - h.mean(1, keepdim=True), 0.5).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, :2], 0.6).to_event(1))

    program, x = Program(model, guide), weights(5, 3)
    pyro.param("slope", torch.zeros(2, 3))
    assert program.layout((x,)).model is Layout.BATCHED
    with torch.no_grad():
        pyro.param("slope").add_(weights(2, 3))
    assert program.layout((x,)).model is Layout.TILED
    pyro.get_param_store()["slope"] = torch.zeros(2, 3)
    assert program.layout((x,)).model is Layout.BATCHED


def test_layouts_are_remembered_but_not_for_ever() -> None:
    networks = Networks(nn.Linear(2, 3), flat_encoder(), 2)
    x = weights(5, 3)
    for _ in range(3 * KEPT):
        networks.program.layout((x,))
        calls = Calls(networks.decoder)
        networks.program.layout((x,))
        assert calls.count == 0
        train(networks, x)
    assert len(vars(networks.program)["_layouts"]) == KEPT


def test_rounding_is_no_difference_and_a_thousandth_is_one() -> None:
    """Of a log-density of 1: a hundred epsilons are let pass, five hundred are not."""
    for epsilons, expected in ((50, Layout.BATCHED), (500, Layout.TILED)):

        def function(x: Tensor, epsilons: int = epsilons) -> None:
            here = stack[-1]
            here.latent, here.observed = torch.ones(here.z.shape[:-1]), torch.zeros(here.z.shape[:-1])
            if here.z.dim() == 3:
                here.latent = here.latent + epsilons * torch.finfo(torch.float32).eps

        probe = ((weights(3, 1),), {"z": weights(2, 3, 2)})
        assert find_layout(function, [probe], lambda values: Sum(values["z"])) is expected


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


# How much is drawn at a time


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return out


class ImageEncoder(nn.Module):
    """Takes (N, H, W) and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.view(len(x), 64))


class ReadsLatent(nn.Module):
    """A guide of two latents, the second by a network of the first and the image: it needs copies of the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 1), nn.Linear(65, 1)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(self.first(x.flatten(1)), 1.0).to_event(1))
            pyro.sample("b", dist.Normal(self.second(torch.cat([a, x.flatten(1)], -1)), 1.0).to_event(1))


def image_program() -> tuple[Program, ReadsLatent]:
    decoder, guide = ConvDecoder(), ReadsLatent()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            b = pyro.sample("b", dist.Normal(a, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(torch.cat([a, b], -1)), 0.5).to_event(2), obs=x)

    return Program(model, guide), guide


def test_the_prior_is_drawn_without_copies_of_the_rows() -> None:
    networks = Networks(ConvDecoder(), ImageEncoder(), 2)
    x = weights(5, 8, 8)
    layouts = networks.program.layout((x,))
    assert (layouts.model, layouts.prior) == (Layout.TILED, Layout.BATCHED)
    with Largest() as largest:
        z, log_p = networks.program.sample_prior(x, 400)
    assert largest.elements <= 2 * z["z"].numel()  # and not 400 x 5 x 64
    torch.testing.assert_close(log_p, log_normal(z["z"], 0.0, 1.0).sum(-1), **CLOSE)
    assert bytes_allocated(lambda: networks.program.sample_prior(x, 400)) < 400 * x.nbytes


def test_codes_become_vectors_and_back_without_copies_of_the_rows() -> None:
    log_joint = Networks(ConvDecoder(), ImageEncoder(), 2).program.log_joint(weights(5, 8, 8))
    z = weights(400, 5, 2)
    with Largest() as largest:
        assert torch.equal(log_joint.unflatten(log_joint.flatten({"z": z}))["z"], z)
    assert largest.elements <= 2 * z.numel()


@pytest.mark.parametrize("num_particles", [1, 7, 8, 23])
def test_copies_of_the_rows_are_made_in_pieces(num_particles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "COPIED", 8 * 5 * 64 - 1)  # seven particles of five rows
    program, guide = image_program()
    x = weights(5, 8, 8)
    assert program.layout((x,)).guide is Layout.TILED
    calls = Calls(guide.first)
    torch.manual_seed(3)
    with Largest() as largest:
        z, log_q = program.sample(x, num_particles)
    assert calls.count == -(-num_particles // 7)
    assert largest.elements <= 7 * 5 * 65
    assert z["a"].shape == z["b"].shape == (num_particles, 5, 1)
    flat = x.flatten(1)
    with torch.no_grad():
        copies = flat.expand(num_particles, 5, 64)
        expected = log_normal(z["a"], guide.first(flat), 1.0)
        expected = expected + log_normal(z["b"], guide.second(torch.cat([z["a"], copies], -1)), 1.0)
    torch.testing.assert_close(log_q, expected[..., 0], **CLOSE)
    assert len(z["a"].unique()) == z["a"].numel()  # no piece repeats another
    torch.manual_seed(3)
    assert torch.equal(program.sample(x, num_particles)[0]["b"], z["b"])


def test_what_is_drawn_does_not_depend_on_the_budget() -> None:
    program, _ = image_program()
    x = weights(5, 8, 8)
    for engine in (from_guide, from_prior):
        large, small = (engine(program, x, num_particles=30, memory=memory) for memory in (2**30, 2**16))
        assert torch.equal(large.z["b"], small.z["b"])


def test_no_particles_are_refused() -> None:
    networks = Networks(nn.Linear(2, 3), flat_encoder(), 2)
    for draw in (networks.program.sample, networks.program.sample_prior):
        with pytest.raises(ValueError, match=r"num_particles=0 must be a whole number of at least 1"):
            draw(weights(5, 3), 0)


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


def test_nan_in_the_same_places_is_no_difference() -> None:
    """Where all is NaN there is nothing to compare, and runs are single; NaN against a number is a difference."""

    def function(x: Tensor, above: float = 0.0, batched_above: float = 0.0) -> None:
        here = stack[-1]
        bound = batched_above if here.z.dim() == 3 else above
        here.latent, here.observed = torch.where(here.z[..., 0] > bound, torch.nan, here.z[..., 0]), here.z[..., 1]

    z = torch.tensor([[[-1.0, 0.5], [2.0, 0.1], [0.3, 0.2]], [[0.7, 1.0], [-0.4, 2.0], [-2.0, 0.3]]])
    probe, handler = ((weights(3, 1),), {"z": z}), lambda values: Sum(values["z"])
    assert find_layout(function, [probe], handler) is Layout.BATCHED
    assert find_layout(functools.partial(function, batched_above=0.5), [probe], handler) is Layout.TILED
    nowhere = functools.partial(function, above=-torch.inf, batched_above=-torch.inf)
    assert find_layout(nowhere, [probe], handler) is Layout.LOOPED
