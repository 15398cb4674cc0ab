"""fit: it learns, it reports the true ELBO, it leaves the world as it was, and it refuses what cannot work."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, StepLR
from torch.utils.data import Dataset, TensorDataset

import pyro_vae as pv
from pyro_vae.learning import checkpoint
from pyro_vae.learning.history import History

D, LATENT = 4, 2


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads only get into each other's way in networks this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rows(count: int = 96, seed: int = 1) -> Tensor:
    """Rows near a plane, none of the columns alike."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(count, LATENT, generator=generator)
    mixing = torch.tensor([[1.0, 0.5, 0.0, -2.0], [0.0, 1.5, 1.0, 0.3]])
    return z @ mixing + torch.tensor([0.5, 0.0, -1.0, 2.0]) + 0.2 * torch.randn(count, D, generator=generator)


def make_vae(likelihood: str = "normal", norm: bool = False, seed: int = 0) -> pv.VAE:
    torch.manual_seed(seed)
    decoder = pv.nets.MLP(LATENT, D, hidden=(8,))
    body: nn.Module = pv.nets.MLP(D, hidden=(8,))
    if norm:
        body = nn.Sequential(nn.BatchNorm1d(D), body)
    scale = pv.likelihoods.Learned()
    return pv.VAE(
        prior=pv.priors.StandardNormal(LATENT),
        likelihood=pv.likelihoods.Bernoulli(decoder)
        if likelihood == "bernoulli"
        else pv.likelihoods.Normal(decoder, scale),
        guide=pv.guides.DiagonalNormal(body, latent_dim=LATENT, features=8),
    )


def values(vae: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in vae.state_dict().items()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def terms(vae: pv.VAE, x: Tensor, seed: int = 9) -> tuple[Tensor, Tensor]:
    """log p(x | z) and KL by hand, (N,) each, from the networks' outputs alone."""
    with torch.no_grad():
        features = vae.encoder.encoder(x)
        mean = vae.encoder.loc(features)
        s = nn.functional.softplus(vae.encoder.raw_scale(features)) + 1e-6
        z = mean + s * torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed))
        f = vae.likelihood.decoder(z)
        sigma = nn.functional.softplus(vae.likelihood.scale.raw) + 1e-3
        log_p = -((x - f) ** 2 / (2 * sigma**2) + sigma.log() + 0.5 * math.log(2 * math.pi)).sum(-1)
        return log_p, 0.5 * (s**2 + mean**2 - 1.0 - (s**2).log()).sum(-1)


def elbo_of(vae: pv.VAE, x: Tensor) -> float:
    log_p, kl = terms(vae, x)
    return float((log_p - kl).mean())


class Pin:
    """A program whose ELBO is known: z ~ N(0, 1), x ~ N(z, 1); q = N(a x, 1e-4) with one parameter a."""

    def __init__(self, a: float = 0.8) -> None:
        self.a = torch.tensor(a, requires_grad=True)
        self.program = pv.Program(self.model, self.guide)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.a * x, 1e-4))

    def elbo(self, x: Tensor) -> Tensor:
        """(N,), up to the guide's noise of 1e-4."""
        log_p = -0.5 * (x - self.a * x) ** 2 - 0.5 * math.log(2 * math.pi)
        return log_p - 0.5 * ((self.a * x) ** 2 + 1e-8 - 1.0 - 2 * math.log(1e-4))


# What fit does

OBJECTIVES: dict[str, Callable[[], Any]] = {
    "ELBO": lambda: None,
    "beta": lambda: pv.objectives.ELBO(beta=0.5),
    "warm-up": lambda: pv.objectives.ELBO(beta=pv.objectives.warm_up(20)),
    "Trace_ELBO": lambda: Trace_ELBO(num_particles=2),
    "TraceMeanField_ELBO": lambda: TraceMeanField_ELBO(),
    "TraceGraph_ELBO": lambda: TraceGraph_ELBO(),
    "RenyiELBO": lambda: RenyiELBO(alpha=0.5, num_particles=2),
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_parameter_moves_and_the_elbo_rises(objective: str) -> None:
    x, vae = rows(), make_vae()
    before, elbo = values(vae), elbo_of(vae, x)
    history = pv.fit(vae, x, rows(30, 2), objective=OBJECTIVES[objective](), epochs=15, batch_size=32, lr=1e-2)
    assert not [name for name, value in before.items() if torch.equal(value, values(vae)[name])]
    assert elbo_of(vae, x) > elbo + 1.0
    assert history.epoch == list(range(1, 16))
    assert history.valid_elbo[-1] > history.valid_elbo[0] + 0.5
    assert history.elbo[-1] > history.elbo[0] + 0.5
    assert {len(part) for part in vars(history).values() if isinstance(part, list)} == {15}
    assert sorted(history.seconds) == history.seconds
    assert history.seconds[0] > 0.0


@pytest.mark.parametrize("kind", ["BatchNorm", "plain"])
def test_the_seed_decides(kind: str) -> None:
    def run(seed: int, drawn: int) -> tuple[dict[str, Tensor], History]:
        vae = make_vae(norm=kind == "BatchNorm")
        torch.rand(drawn)  # the ambient state has no say
        history = pv.fit(vae, rows(), rows(20, 2), epochs=3, batch_size=32, seed=seed)
        return values(vae), history

    (first, first_history), (again, again_history), (other, other_history) = run(3, 1), run(3, 2), run(4, 1)
    assert equal(first, again)
    assert first_history.elbo == again_history.elbo
    assert first_history.valid_elbo == again_history.valid_elbo
    assert not equal(first, other)
    assert first_history.elbo != other_history.elbo


@pytest.mark.parametrize("end", ["good", "broken", "refused"])
@pytest.mark.parametrize("validate", [True, False])
def test_the_world_is_left_as_it_was(end: str, validate: bool) -> None:
    vae = make_vae(norm=True)
    vae.train()
    vae.likelihood.eval()
    flags = [module.training for module in vae.modules()]
    pyro.param("somebody's", torch.tensor(1.5))
    assert callable(pv.fit)  # imported now: rich, when first imported, draws from Python's generator
    rng, x = pyro.util.get_rng_state(), rows()
    kept = x.clone()
    with pyro.validation_enabled(validate):
        settings = pyro.settings.get()
        if end == "good":
            pv.fit(vae, x, rows(20, 2), objective=RenyiELBO(num_particles=2), epochs=2)
        else:
            with pytest.raises((FloatingPointError, ValueError)):
                pv.fit(vae, x, rows(20, 2), epochs=4, lr=1e30 if end == "broken" else -1.0)
        assert pyro.settings.get() == settings
    after = pyro.util.get_rng_state()
    assert torch.equal(after["torch"], rng["torch"])
    assert after["random"] == rng["random"]
    assert all(np.array_equal(mine, theirs) for mine, theirs in zip(after["numpy"], rng["numpy"], strict=True))
    assert [module.training for module in vae.modules()] == flags
    assert torch.equal(x, kept)
    assert pyro.param("somebody's").item() == 1.5
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()


def test_double_precision_stays_double() -> None:
    vae = make_vae().double()
    history = pv.fit(vae, rows().double(), rows(20, 2).double(), epochs=2, lr=1e-2)
    assert {value.dtype for value in values(vae).values()} == {torch.float64}
    assert history.valid_elbo[-1] > history.valid_elbo[0]
    assert torch.get_default_dtype() == torch.float32


# The ELBO that is reported


@pytest.mark.parametrize("beta", [0.0, 1.0, 3.0])
def test_history_holds_the_true_elbo_whatever_beta(beta: float) -> None:
    x, vae = 3.0 * rows(4000), make_vae()
    valid = rows(3000, 5)
    (log_p, kl), (valid_log_p, valid_kl) = terms(vae, x), terms(vae, valid)
    history = pv.fit(vae, x, valid, objective=pv.objectives.ELBO(beta=beta), epochs=1, batch_size=900, lr=1e-12)
    # The difference of two runs with their own noise: by the spread over the rows, generously, since x is the same.
    error = 5.0 * math.sqrt(2.0 / len(x)) * float((log_p - log_p.mean()).std())
    assert history.elbo[0] == pytest.approx(float((log_p - kl).mean()), abs=error)
    assert history.loss[0] == pytest.approx(-float((log_p - beta * kl).mean()), abs=error)
    assert history.valid_elbo[0] == pytest.approx(float((valid_log_p - valid_kl).mean()), abs=error)


@pytest.mark.parametrize("objective", [None, pv.objectives.ELBO(beta=4.0), TraceMeanField_ELBO()])
def test_an_epoch_is_the_mean_over_rows_not_over_batches(objective: Any) -> None:
    pin = Pin()
    x = torch.tensor([0.5, -1.0, 2.0, 0.1, 7.0, -0.4, 1.0])
    expected = pin.elbo(x).mean().item()
    history = pv.fit(pin.program, x, -2.0 * x, objective=objective, epochs=1, batch_size=3, lr=1e-12)
    assert history.elbo[0] == pytest.approx(expected, abs=0.02)
    assert history.valid_elbo[0] == pytest.approx(pin.elbo(-2.0 * x).mean().item(), abs=0.02)
    wrong = np.mean([pin.elbo(part).mean().item() for part in x.split(3)])
    assert abs(wrong - expected) > 0.1


@pytest.mark.parametrize(("objective", "runs"), [(None, 1), (Trace_ELBO(), 1), (RenyiELBO(num_particles=2), 2)])
def test_only_the_steps_move_the_statistics_of_batch_norm(objective: Any, runs: int) -> None:
    vae = make_vae(norm=True)
    pv.fit(vae, rows(), rows(20, 2), objective=objective, epochs=2, batch_size=32)
    counts = [int(value) for name, value in values(vae).items() if name.endswith("num_batches_tracked")]
    assert counts == [2 * 3 * runs]


def scaled(function: Callable[[Tensor], None], factor: float) -> Callable[[Tensor], None]:
    def inner(x: Tensor) -> None:
        with pyro.poutine.scale(scale=factor):
            function(x)

    return inner


@pytest.mark.parametrize("objective", [None, Trace_ELBO()])
def test_scales_are_of_the_loss_and_not_of_the_reported_elbo(objective: Any) -> None:
    pin, x = Pin(), torch.tensor([0.5, -1.0, 2.0])
    program = pv.Program(scaled(pin.model, 0.1), scaled(pin.guide, 0.1))
    expected = pin.elbo(x).mean().item()
    history = pv.fit(program, x, objective=objective, epochs=1, lr=1e-12)
    assert history.elbo[0] == pytest.approx(expected, abs=0.02)
    assert history.loss[0] == pytest.approx(-0.1 * expected, abs=0.02)


@pytest.mark.parametrize("objective", [None, Trace_ELBO(), TraceMeanField_ELBO()])
@pytest.mark.parametrize("count", [1, 5])
def test_the_gradient_is_that_of_a_mean_row(objective: Any, count: int) -> None:
    pin, hand = Pin(), Pin()
    x = torch.tensor([0.5, -1.0, 2.0, 0.1, -3.0])[:count]
    (-hand.elbo(x).mean()).backward()
    assert hand.a.grad is not None
    pv.fit(pin.program, x, objective=objective, epochs=1, optimiser=lambda p: torch.optim.SGD(p, lr=0.01))
    assert pin.a.item() == pytest.approx(0.8 - 0.01 * float(hand.a.grad), abs=2e-5)


# Programs of every kind


def test_closures_need_no_pyro_module_for_a_traced_elbo() -> None:
    torch.manual_seed(0)
    decoder, heads = nn.Linear(1, D), nn.Linear(D, 2)

    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("code", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("picture", dist.Normal(decoder(z), 0.5).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        mean, raw = heads(x).split(1, -1)
        with pyro.plate("rows", len(x)):
            pyro.sample("code", dist.Normal(mean, raw.exp()).to_event(1))

    program = pv.Program(model, guide)
    before = [p.detach().clone() for net in (decoder, heads) for p in net.parameters()]
    history = pv.fit(program, rows(), objective=Trace_ELBO(), epochs=10, batch_size=32, lr=2e-2)
    after = [p for net in (decoder, heads) for p in net.parameters()]
    assert not [i for i, (old, new) in enumerate(zip(before, after, strict=True)) if torch.equal(old, new)]
    assert history.elbo[-1] > history.elbo[0] + 5.0
    assert list(pyro.get_param_store().keys()) == []
    with pytest.raises(ValueError, match=r"RenyiELBO gave no gradient to any parameter: register.*pyro\.module"):
        pv.fit(program, rows(), objective=RenyiELBO(num_particles=2), epochs=1)


def mean_and_scale_model(x: Tensor) -> None:
    mean = pyro.param("mean", lambda: torch.randn(()))
    scale = pyro.param("scale", torch.tensor(2.0), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(mean, scale), obs=x)


def prior_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))


def test_a_param_store_program_ends_with_its_maximum_in_the_store() -> None:
    x = 3.0 * rows()[:, 0] + 1.0
    pyro.param("somebody's", torch.tensor(1.5))
    pv.fit(pv.Program(mean_and_scale_model, prior_guide), x, epochs=400, batch_size=96, lr=5e-2)
    store = pyro.get_param_store()
    assert set(store.keys()) == {"mean", "scale", "somebody's"}
    assert store["mean"].item() == pytest.approx(x.mean().item(), abs=1e-2)
    assert store["scale"].item() == pytest.approx(x.std(correction=0).item(), abs=1e-2)
    assert store["somebody's"].item() == 1.5


def test_random_initial_values_of_params_belong_to_the_seed() -> None:
    found = []
    for seed in (0, 0, 1):
        pyro.clear_param_store()
        torch.rand(3)
        pv.fit(pv.Program(mean_and_scale_model, prior_guide), rows()[:, 0], epochs=1, lr=1e-9, seed=seed)
        found.append(pyro.param("mean").item())
    assert found[0] == found[1] != found[2]


def conditional(torch_seed: int = 0) -> tuple[pv.Program, nn.Module]:
    torch.manual_seed(torch_seed)
    nets = nn.ModuleDict({"decoder": nn.Linear(1, D), "label": nn.Embedding(3, D), "heads": nn.Linear(2 * D, 2)})

    def model(x: Tensor, label: Tensor) -> None:
        pyro.module("nets", nets)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(nets["decoder"](z) + nets["label"](label), 1.0).to_event(1), obs=x)

    def guide(x: Tensor, label: Tensor) -> None:
        mean, raw = nets["heads"](torch.cat([x, nets["label"](label)], -1)).split(1, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(mean, raw.exp()).to_event(1))

    return pv.Program(model, guide), nets


def test_a_network_that_two_pyro_modules_share_is_left_as_it_was_found() -> None:
    """The store then has two names for one tensor, which it cannot delete one by one."""
    decoder, encoder = nn.Linear(LATENT, D), nn.Linear(D, LATENT)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        pyro.module("the same in a list", nn.ModuleList([decoder]))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), LATENT), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), 1.0).to_event(1))

    before = set(pyro.get_param_store().keys())
    history = pv.fit(pv.Program(model, guide), rows(), epochs=60, lr=1e-2, compile=False)
    assert history.elbo[-1] > history.elbo[0]
    assert set(pyro.get_param_store().keys()) == before


def test_a_conditional_program_takes_tuples_of_rows() -> None:
    label = torch.arange(96) % 3
    x = rows() + 4.0 * nn.functional.one_hot(label, D)
    program, nets = conditional()
    history = pv.fit(program, (x, label), (x[:20], label[:20]), epochs=100, batch_size=32, lr=5e-2)
    assert history.valid_elbo[-1] > history.valid_elbo[0] + 3.0
    table = nets["label"].weight.detach()
    # What one label adds to its column beyond the others is what was put into the data.
    for i in range(3):
        assert float(table[i, i] - (table[:, i].sum() - table[i, i]) / 2) == pytest.approx(4.0, abs=1.0)


# Sources of rows


class Items(Dataset[Any]):
    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Tensor:
        return self.x[index]


@pytest.mark.parametrize("source", ["items", "TensorDataset", "array", "memory map"])
def test_every_source_trains_to_the_same_bits(source: str, tmp_path: Path) -> None:
    def of(x: Tensor, name: str) -> Any:
        np.save(tmp_path / f"{name}.npy", x.numpy())
        return {
            "items": Items(x),
            "TensorDataset": TensorDataset(x),
            "array": x.numpy(),
            "memory map": np.load(tmp_path / f"{name}.npy", mmap_mode="r"),
        }[source]

    plain, given = make_vae(), make_vae()
    first = pv.fit(plain, rows(), rows(20, 2), epochs=3, batch_size=32)
    second = pv.fit(given, of(rows(), "train"), of(rows(20, 2), "valid"), epochs=3, batch_size=32)
    assert equal(values(plain), values(given))
    assert (first.elbo, first.valid_elbo) == (second.elbo, second.valid_elbo)


# Options


class Recorder(torch.optim.SGD):
    """Keeps the gradients that it is given."""

    seen: list[Tensor]

    def step(self, closure: Any = None) -> Any:
        gradients = [p.grad.flatten().clone() for group in self.param_groups for p in group["params"]]
        self.__dict__.setdefault("seen", []).append(torch.cat(gradients))
        return super().step(closure)


def recorded(**options: Any) -> list[Tensor]:
    made: list[Recorder] = []

    def optimiser(parameters: Iterable[Tensor]) -> Recorder:
        made.append(Recorder(parameters, lr=1e-3))
        return made[0]

    pv.fit(make_vae(), rows(), epochs=2, batch_size=32, optimiser=optimiser, **options)
    return made[0].seen


@pytest.mark.parametrize("objective", [None, Trace_ELBO()])
def test_clip_norm_bounds_the_gradient_that_the_optimiser_sees(objective: Any) -> None:
    free = recorded(objective=objective)
    assert len(free) == 6
    assert min(float(gradient.norm()) for gradient in free) > 0.2
    bounded = recorded(objective=objective, clip_norm=0.1)
    assert [float(gradient.norm()) for gradient in bounded] == pytest.approx([0.1] * 6, rel=1e-4)
    assert torch.allclose(bounded[0] * free[0].norm(), 0.1 * free[0], rtol=1e-4, atol=1e-6)
    loose = recorded(objective=objective, clip_norm=1e6)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(loose, free, strict=True))


def test_a_schedule_is_stepped_after_each_epoch() -> None:
    history = pv.fit(make_vae(), rows(), epochs=5, batch_size=32, lr=0.04, schedule=lambda o: StepLR(o, 2, gamma=0.5))
    assert history.learning_rate == pytest.approx([0.04, 0.04, 0.02, 0.02, 0.01])
    stopped = make_vae()
    before = values(stopped)
    pv.fit(stopped, rows(), epochs=2, lr=0.04, schedule=lambda o: LambdaLR(o, lambda epoch: 0.0))
    assert equal(values(stopped), before)


def test_bits_are_drawn_afresh_for_training_and_fixed_for_validation() -> None:
    grey, valid = torch.rand(40, D), torch.rand(10, D)
    drawn: list[Tensor] = []

    def transform(x: Tensor) -> Tensor:
        drawn.append(pv.data.binarise(x))
        return drawn[-1]

    vae = make_vae("bernoulli")
    per_epoch: list[list[Tensor]] = []

    def cut(epoch: int, history: History) -> None:
        per_epoch.append(list(drawn))
        drawn.clear()

    history = pv.fit(vae, grey, valid, transform=transform, epochs=3, batch_size=40, callbacks=[cut])
    trained = [part[-2].sort(0).values for part in per_epoch]
    validated = [part[-1] for part in per_epoch]
    assert all(part.shape == (40, D) for part in trained)
    assert not torch.equal(trained[0], trained[1])
    assert torch.equal(validated[0], validated[1])
    assert torch.equal(validated[1], validated[2])
    assert history.valid_elbo[0] != history.valid_elbo[1]


def test_binarise_lets_a_bernoulli_learn_from_grey_levels() -> None:
    grey = torch.tensor([0.95, 0.05, 0.9, 0.5]).expand(200, D).clone()
    vae = make_vae("bernoulli")
    history = pv.fit(vae, grey, transform=pv.data.binarise, epochs=60, batch_size=50, lr=2e-2)
    entropy = -float((grey[0] * grey[0].log() + (1 - grey[0]) * (1 - grey[0]).log()).sum())
    assert history.elbo[-1] == pytest.approx(-entropy, abs=0.15)  # the best any model can do, in nats
    assert history.elbo[0] < -entropy - 0.5


@pytest.mark.parametrize("norm", [False, True])
def test_patience_goes_back_to_the_best_parameters(norm: bool) -> None:
    vae = make_vae(norm=norm)
    after: list[dict[str, Tensor]] = []

    def keep(epoch: int, history: History) -> None:
        after.append(values(vae))

    history = pv.fit(vae, rows(8), rows(200, 2), epochs=300, lr=5e-2, patience=4, callbacks=[keep])
    best = int(np.argmax(history.valid_elbo))
    assert len(history) == best + 1 + 4 < 300
    assert history.stopped == "no better validation ELBO for 4 epochs"
    assert equal(values(vae), after[best])
    assert not equal(values(vae), after[-1])


def test_patience_that_never_runs_out_goes_back_as_well() -> None:
    vae = make_vae()
    after: list[dict[str, Tensor]] = []
    pv.fit(
        vae,
        rows(8),
        rows(200, 2),
        epochs=40,
        lr=5e-2,
        patience=1000,
        callbacks=[lambda epoch, history: after.append(values(vae))],
    )
    history = pv.fit(make_vae(), rows(8), rows(200, 2), epochs=40, lr=5e-2)
    best = int(np.argmax(history.valid_elbo))
    assert best < 39
    assert equal(values(vae), after[best])


def test_callbacks_see_each_epoch_and_may_stop() -> None:
    seen: list[tuple[str, int, int]] = []

    def first(epoch: int, history: History) -> bool:
        seen.append(("first", epoch, len(history.valid_elbo)))
        return epoch == 3

    def second(epoch: int, history: History) -> None:
        seen.append(("second", epoch, len(history)))

    history = pv.fit(make_vae(), rows(), rows(20, 2), epochs=10, callbacks=[first, second])
    assert seen == [(name, epoch, epoch) for epoch in (1, 2, 3) for name in ("first", "second")]
    assert len(history) == 3
    assert history.stopped == "stopped by a callback"


def test_scalars_for_tensorboard(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of TensorBoard's own imports
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        history = pv.fit(make_vae(), rows(), rows(20, 2), epochs=3, log_dir=tmp_path / "logs")
        events = EventAccumulator(str(tmp_path / "logs"))
        events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "elbo", "valid_elbo", "learning_rate"}
    for name in ("loss", "elbo", "valid_elbo", "learning_rate"):
        points = events.Scalars(name)
        assert [point.step for point in points] == [1, 2, 3]
        assert [point.value for point in points] == pytest.approx(getattr(history, name), rel=1e-6)


def test_without_tensorboard_log_dir_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"log_dir=.*needs TensorBoard: pip install 'pyro-vae\[tensorboard\]'"):
        pv.fit(make_vae(), rows(), epochs=1, log_dir=tmp_path)


@pytest.mark.parametrize("progress", [True, False, None])
def test_progress_shows_the_elbo(progress: bool | None, capfd: pytest.CaptureFixture[str]) -> None:
    history = pv.fit(make_vae(), rows(), rows(20, 2), epochs=2, batch_size=32, progress=progress)
    out, err = capfd.readouterr()
    assert out == ""
    if progress:
        assert f"ELBO {history.elbo[-1]:9.3f}" in err
        assert f"validation {history.valid_elbo[-2]:9.3f}" in err
    else:
        assert err == ""


# Losses that are not finite


def explode(optimiser: torch.optim.Optimizer) -> LambdaLR:
    """Two good epochs, then a step of 1e30."""
    return LambdaLR(optimiser, lambda epoch: 1.0 if epoch < 2 else 1e33)


@pytest.mark.filterwarnings("ignore:Encountered NaN")
@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("objective", [None, Trace_ELBO(), RenyiELBO(num_particles=2)])
def test_a_broken_loss_tells_where_and_leaves_the_good_checkpoint(objective: Any, validate: bool, tmp_path: Path) -> None:
    vae = make_vae()
    after: list[dict[str, Tensor]] = []
    with pyro.validation_enabled(validate), pytest.raises(FloatingPointError) as caught:
        pv.fit(
            vae,
            rows(),
            objective=objective,
            epochs=5,
            batch_size=32,
            schedule=explode,
            checkpoint=tmp_path / "run",
            callbacks=[lambda epoch, history: after.append(values(vae))],
        )
    told = str(caught.value)
    assert "\n" not in told
    assert told.startswith("Epoch 3, batch 2: not finite at site 'z' of the guide (") or told.startswith(
        "Epoch 3, batch 2: not finite at site 'x' of the model ("
    )
    assert "loc " in told
    assert "; x in [" in told
    assert f"{tmp_path / 'run'} keeps the last good state" in told
    found = checkpoint.read(tmp_path / "run")
    assert found is not None
    header, groups = found
    assert header["state"]["position"]["epoch"] == len(after) == 2
    kept = {name.split(".", 1)[1]: value for name, value in groups["parameter"].items()}
    assert equal(kept, after[-1])
    assert all(bool(torch.isfinite(value).all()) for value in kept.values())
    resumed = pv.fit(
        make_vae(), rows(), objective=objective, epochs=2, batch_size=32, schedule=explode, checkpoint=tmp_path / "run"
    )
    assert resumed.epoch == [1, 2]


def test_a_step_that_breaks_the_parameters_at_the_end_of_an_epoch() -> None:
    pin = Pin()
    with pytest.raises(FloatingPointError, match=r"Epoch 1, batch 2: parameter '.*' is not finite after the step\. Try"):
        pv.fit(pin.program, torch.ones(4), batch_size=2, optimiser=lambda p: Late(p, lr=1.0))


class Late(torch.optim.SGD):
    """Breaks its parameters in the second step."""

    def step(self, closure: Any = None) -> None:
        steps = self.__dict__.setdefault("steps", [])
        steps.append(1)
        for parameter in self.param_groups[0]["params"]:
            parameter.data.fill_(float("inf") if len(steps) == 2 else 0.5)


def test_nan_in_a_data_set_is_found_at_its_batch() -> None:
    x = rows(3000)
    x[4, 1] = float("nan")  # not among the 1,024 evenly spread rows that are looked at before
    with pytest.raises(FloatingPointError, match=r"Epoch 1, batch \d+: not finite at site .*x in \[.*1 of 800 not finite"):
        pv.fit(make_vae(), Items(x), epochs=1, batch_size=200)
    with pytest.raises(ValueError, match="NaN or infinite values in 1 of 300 rows, first in row 103"):
        pv.fit(make_vae(), Items(torch.cat([x[1000:1099], x[:201]])), epochs=1)


# Refusals: before any work, in one sentence with the value and the mend

GOOD = rows()


def with_value(value: float) -> Tensor:
    x = rows()
    x[3, 2] = value
    return x


def constant_column() -> Tensor:
    x = rows()
    x[:, 1] = 0.25
    return x


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "NaN": (
        {"train": with_value(float("nan"))},
        r"train has NaN or infinite values in 1 of 96 rows, first in row 3: remove",
    ),
    "infinite": ({"train": with_value(-float("inf"))}, r"train has NaN or infinite values .* row 3: remove"),
    "NaN in valid": ({"valid": with_value(float("nan"))}, r"valid has NaN or infinite values .* row 3: remove"),
    "empty": ({"train": GOOD[:0]}, r"train has shape \(0, 4\), that is no rows: give at least one"),
    "empty valid": ({"valid": GOOD[:0]}, r"valid has shape \(0, 4\), that is no rows"),
    "columns": ({"train": GOOD[:, :3]}, r"x has rows of shape \(3,\), this VAE models rows of shape \(4,\): reshape"),
    "columns of valid": (
        {"valid": GOOD[:, :3]},
        r"Rows of train have shapes \(\(4,\),\), rows of valid \(\(3,\),\): they must",
    ),
    "one number": ({"train": torch.tensor(1.0)}, r"train is a single number, not rows: give"),
    "tuple": ({"train": (GOOD, GOOD)}, r"models one tensor of rows, but was given a tuple of 2: give the first alone"),
    "integers": ({"train": GOOD.long()}, r"train has dtype torch.int64: .* give train.float\(\)"),
    "half": ({"train": GOOD.half()}, r"train has dtype torch.float16, too coarse .* give train.float\(\)"),
    "bfloat": ({"train": GOOD.bfloat16()}, r"train has dtype torch.bfloat16, too coarse .* give train.float\(\)"),
    "double": (
        {"train": GOOD.double()},
        r"x has dtype torch.float64, the parameters torch.float32: give x.to\(torch.float32\)",
    ),
    "batch size 0": ({"batch_size": 0}, r"batch_size=0 must be a whole number of at least 1"),
    "batch size": ({"batch_size": -3}, r"batch_size=-3 must be"),
    "epochs 0": ({"epochs": 0}, r"epochs=0 must be a whole number of at least 1"),
    "epochs": ({"epochs": 2.5}, r"epochs=2.5 must be a whole number"),
    "lr 0": ({"lr": 0.0}, r"lr=0.0 must be positive and finite"),
    "lr": ({"lr": -1e-3}, r"lr=-0.001 must be positive"),
    "lr NaN": ({"lr": float("nan")}, r"lr=nan must be positive"),
    "clip": ({"clip_norm": 0.0}, r"clip_norm=0.0 must be positive, or None"),
    "patience": ({"patience": 0, "valid": GOOD}, r"patience=0 must be a whole number of at least 1"),
    "patience without valid": ({"patience": 3}, r"patience=3 goes by the validation ELBO: give validation rows"),
    "seed": ({"seed": 1.5}, r"seed=1.5 must be a whole number"),
    "device": ({"device": "abacus"}, r"device='abacus' cannot be used here: give 'cpu' or 'auto'"),
    "objective": ({"objective": "elbo"}, r"objective='elbo' is no ELBO object: give pv.objectives.ELBO\(\)"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what: str, tmp_path: Path) -> None:
    changes, told = BAD[what]
    vae = make_vae()
    before = values(vae)
    options = {"epochs": 1, **changes}
    with pytest.raises(ValueError, match=told) as caught:
        pv.fit(vae, options.pop("train", GOOD), checkpoint=tmp_path / "run", **options)
    assert "\n" not in str(caught.value)
    assert equal(values(vae), before)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"device='cuda' cannot be used here: give 'cpu' or 'auto'"):
        pv.fit(make_vae(), rows(), device="cuda")


@pytest.mark.parametrize("what", ["train", "valid"])
def test_grey_levels_for_a_bernoulli(what: str) -> None:
    bits, grey = torch.ones(9, D), torch.ones(9, D)
    grey[4, 2] = 0.3
    parts = (grey, bits) if what == "train" else (bits, grey)
    with pytest.raises(ValueError, match=r"value 0\.3 in row 4, column 2, and Bernoulli takes 0 and 1 alone: .*binarise"):
        pv.fit(make_vae("bernoulli"), *parts, epochs=1)
    with pytest.raises(ValueError, match=r"value 2 in row 4"):
        pv.fit(make_vae("bernoulli"), torch.where(grey == 0.3, 2.0, grey), epochs=1)


@pytest.mark.parametrize("scale", ["per dimension", "network"])
def test_constant_columns_with_a_scale_of_their_own(scale: str) -> None:
    vae = make_vae()
    scales = {
        "per dimension": pv.likelihoods.Learned(D),
        "network": pv.likelihoods.FromNetwork(pv.nets.MLP(LATENT, D, hidden=(4,))),
    }
    vae.likelihood.scale = scales[scale]
    with pytest.raises(
        ValueError, match=r"1 of 4 columns of x are constant \(the first is column 1\).*without bound\. Drop"
    ):
        pv.fit(vae, constant_column(), epochs=1)
    assert len(pv.fit(vae, rows(), epochs=1)) == 1


def test_constant_columns_with_a_shared_scale_only_warn() -> None:
    with pytest.warns(UserWarning, match=r"1 of 4 columns of x are constant \(the first is column 1\)"):
        history = pv.fit(make_vae(), constant_column(), epochs=1)
    assert len(history) == 1
    vae = make_vae()
    vae.likelihood.scale = pv.likelihoods.Fixed(0.5)
    assert len(pv.fit(vae, constant_column(), epochs=1)) == 1  # a fixed scale has nothing to lose


@pytest.mark.parametrize("latent", [0, -1])
def test_latent_size(latent: int) -> None:
    with pytest.raises(ValueError, match=f"latent_dim={latent} must be a whole number of at least 1"):
        pv.guides.DiagonalNormal(pv.nets.MLP(D, hidden=(4,)), latent_dim=latent)
    with pytest.raises(ValueError, match=f"latent_dim={latent} must be"):
        pv.priors.StandardNormal(latent)


def test_modules_in_half_precision() -> None:
    with pytest.raises(ValueError, match=r"x has dtype torch.float32, the parameters torch.float16"):
        pv.fit(make_vae().half(), rows(), epochs=1)


def test_nothing_to_fit() -> None:
    vae = make_vae()
    vae.requires_grad_(requires_grad=False)
    with pytest.raises(ValueError, match="no parameter with a gradient: there is nothing to fit"):
        pv.fit(vae, rows(), epochs=1)


@pytest.mark.filterwarnings("ignore:.* was not registered in the param store")  # Pyro's, of a frozen module
def test_frozen_parameters_stay() -> None:
    vae = make_vae()
    vae.encoder.requires_grad_(requires_grad=False)
    before = values(vae)
    pv.fit(vae, rows(), epochs=1, lr=1e-2)
    moved = {name.split(".")[0] for name, value in values(vae).items() if not torch.equal(value, before[name])}
    assert moved == {"likelihood"}


@pytest.mark.parametrize("where", ["below a file", "no permission"])
def test_a_checkpoint_that_cannot_be_written(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    if where == "below a file":
        folder.write_text("a file")
        folder = folder / "deeper"
    else:

        def refuse(*args: Any, **kwargs: Any) -> None:
            raise PermissionError(13, "Permission denied", str(tmp_path))

        monkeypatch.setattr("pyro_vae.files.tempfile.mkstemp", refuse)
    vae = make_vae()
    before = values(vae)
    with pytest.raises(OSError, match=r"run|denied"):
        pv.fit(vae, rows(), epochs=1, checkpoint=folder)
    assert equal(values(vae), before)  # told before the first step


def test_a_plateau_schedule_goes_by_the_validation_elbo() -> None:
    """With a threshold that no epoch can reach, the rate falls after each epoch without patience."""
    torch.manual_seed(0)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(1),
        likelihood=pv.likelihoods.Normal(pv.nets.MLP(1, 3), scale=1.0),
        guide=pv.guides.DiagonalNormal(pv.nets.MLP(3, hidden=(4,)), latent_dim=1),
    )

    def plateau(optimiser: torch.optim.Optimizer) -> torch.optim.lr_scheduler.ReduceLROnPlateau:
        return torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimiser, mode="max", factor=0.5, patience=0, threshold=1e9, threshold_mode="abs"
        )

    x = torch.randn(20, 3)
    history = pv.fit(vae, x, x, epochs=4, lr=0.1, schedule=plateau, progress=False)
    assert history.learning_rate == pytest.approx([0.1, 0.1, 0.05, 0.025])
