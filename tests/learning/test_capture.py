"""A captured step does what autograd and torch.optim do, for every kind of program and objective."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from learning.twins import Make, columns, same, small, stepping
from model.components import GUIDES, LIKELIHOODS, PRIORS
from model.pairs import PAIRS
from model.pairs import make as make_pair
from model.suited import data_for
from one_dimension import normal_without_rsample
from programs import Networks, Several, every_kind_of_parameter, global_shift
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pyro_vae as pv
from pyro_vae.learning.capture import CapturedStep
from pyro_vae.rows import Rows
from pyro_vae.tracing import CannotCapture

o = pv.objectives


def vae_of(prior: str, likelihood: str, guide: str) -> tuple[pv.VAE, Rows]:
    torch.manual_seed(1)
    p_x = LIKELIHOODS[likelihood](2, (6,))
    vae = pv.VAE(prior=PRIORS[prior](2), likelihood=p_x, guide=GUIDES[guide](6, 2))
    torch.manual_seed(2)
    return vae, (data_for(p_x, 16),)


PLAIN_PRIORS = [name for name in PRIORS if name not in ("Flow", "VampPrior")]
MIXED = list(
    zip(itertools.cycle(PLAIN_PRIORS), LIKELIHOODS, itertools.cycle(["DiagonalNormal", "FullNormal", "LowRankNormal"]))
)
WITH_FLOWS = [
    ("Flow", "Poisson", "Mixture"),
    ("VampPrior", "Bernoulli", "InverseAutoregressive"),
    ("Laplace", "StudentT", "Spline"),
]
SLOW = [*(names for i, names in enumerate(MIXED) if i % 4), *WITH_FLOWS[1:], ("Normal", "Beta", "SemiAmortised")]
"""Each part is in one of these."""


@pytest.mark.filterwarnings("ignore:.*closed form:UserWarning")
@pytest.mark.parametrize("names", [*MIXED[::4], WITH_FLOWS[0]], ids=", ".join)
def test_parts(names: tuple[str, str, str]) -> None:
    same(lambda: vae_of(*names))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*closed form:UserWarning")
@pytest.mark.parametrize("names", SLOW, ids=", ".join)
def test_the_other_parts(names: tuple[str, str, str]) -> None:
    same(lambda: vae_of(*names))


def test_every_part_is_among_them() -> None:
    for kind, known in enumerate((PRIORS, LIKELIHOODS, GUIDES)):
        assert {names[kind] for names in [*MIXED, *WITH_FLOWS, *SLOW]} == set(known)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*closed form:UserWarning")
@pytest.mark.parametrize(
    "pair", [pair for pair in PAIRS if "VampPrior" not in pair or "DiagonalNormal" in pair][::2], ids=", ".join
)
def test_priors_and_guides_compiled(pair: tuple[str, str]) -> None:
    same(lambda: (make_pair(*pair), (columns(),)), compiled=True)


OBJECTIVES: dict[str, Callable[[], Any]] = {
    "ELBO, sampled": lambda: o.ELBO(kl=o.sampled_kl, num_particles=3),
    "warm-up": lambda: o.ELBO(beta=o.warm_up(20)),
    "free bits": lambda: o.ELBO(free_bits=0.3, beta=o.warm_up(3)),
    "IWAE": lambda: o.IWAE(4),
    "Renyi": lambda: o.Renyi(0.5, 3),
    "STL": lambda: o.STL(2),
    "DReG": lambda: o.DReG(4),
    "wake-sleep": lambda: o.ReweightedWakeSleep(4),
    "score": lambda: o.ScoreFunction(3),
    "Trace_ELBO": Trace_ELBO,
    "Trace_ELBO, 3": lambda: Trace_ELBO(num_particles=3),
    "Trace_ELBO, vectorised": lambda: Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1),
    "TraceMeanField_ELBO": TraceMeanField_ELBO,
    "TraceMeanField_ELBO, 3": lambda: TraceMeanField_ELBO(num_particles=3),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective(name: str) -> None:
    """Rows and latents of odd numbers: draws of three particles at once are then not those of three in turn."""

    def make() -> tuple[pv.VAE, Rows]:
        vae, _ = small()
        return vae, (columns(14),)

    same(make, OBJECTIVES[name])


# What is written down is compared for all of them above; the compiler sees every objective, and every second likelihood.
COMPILED = list(zip(OBJECTIVES, itertools.cycle([*LIKELIHOODS][::2]), strict=False))


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "likelihood"), COMPILED)
def test_objectives_and_likelihoods_compiled(objective: str, likelihood: str) -> None:
    same(lambda: vae_of("StandardNormal", likelihood, "DiagonalNormal"), OBJECTIVES[objective], compiled=True)


def test_the_compiler_too() -> None:
    same(small, lambda: o.ELBO(beta=o.warm_up(20)), compiled=True)


def by_labels() -> tuple[pv.Program, Rows]:
    torch.manual_seed(1)
    likelihood = pv.likelihoods.Bernoulli(pv.nets.Conditional(pv.nets.MLP(2 + 3, 6, hidden=(7,)), classes=3))
    guide = pv.guides.DiagonalNormal(pv.nets.Conditional(pv.nets.MLP(6 + 3, hidden=(7,)), classes=3), latent_dim=2)
    vae = pv.VAE(prior=pv.priors.StandardNormal(2), likelihood=likelihood, guide=guide)
    return vae, ((columns() > 0).float(), torch.arange(16) % 3)


def with_gaps() -> tuple[pv.Program, Rows]:
    torch.manual_seed(1)
    likelihood = pv.likelihoods.Normal(pv.nets.MLP(2, 6, hidden=(7,)), pv.likelihoods.Learned(), missing=True)
    guide = pv.guides.DiagonalNormal(pv.nets.MLP(6, hidden=(7,)), latent_dim=2)
    x = columns()
    x[columns(16, 6).roll(1) > 0.8] = torch.nan
    return pv.VAE(prior=pv.priors.StandardNormal(2), likelihood=likelihood, guide=guide), (x,)


def with_noise_and_statistics() -> tuple[pv.Program, Rows]:
    torch.manual_seed(1)
    body = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 7), nn.Tanh(), nn.Dropout(0.3))
    return small(nn.Sequential(nn.Linear(2, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 6)), body, features=7)


def in_double() -> tuple[pv.Program, Rows]:
    vae, (x,) = small()
    return vae.double(), (x.double(),)


def partly_frozen() -> tuple[pv.Program, Rows]:
    vae, rows = small()
    vae.likelihood.decoder.layers[0].requires_grad_(requires_grad=False)
    vae.encoder.idle = nn.Parameter(torch.ones(3))  # no gradient reaches it
    return vae, rows


def handled(scale: float = 1.0, mask: bool = False, around: str = "both") -> Make:
    """A program of functions with handlers around it; its encoder's weights are the decoder's, transposed."""

    def make() -> tuple[pv.Program, Rows]:
        torch.manual_seed(1)
        shared, bias = nn.Linear(2, 6), torch.zeros(6, requires_grad=True)

        def model(x: Tensor) -> None:
            loc = pyro.param("loc", torch.tensor([0.5, -0.5]))
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
                seen = poutine.mask(mask=x[..., 0] > 0.0) if mask else poutine.scale(scale=1.0)
                with seen:
                    pyro.sample("x", dist.Normal(shared(z) + bias, 0.5).to_event(1), obs=x)

        def guide(x: Tensor) -> None:
            spread = pyro.param("spread", torch.tensor([0.5, 0.7]), constraint=dist.constraints.positive)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x @ shared.weight, spread).to_event(1))

        scaled = [poutine.scale(f, scale=scale) if f is model or around == "both" else f for f in (model, guide)]
        return pv.Program(*scaled), (columns(),)

    return make


def several() -> tuple[pv.Program, Rows]:
    """All five latents; the parameter is a shift of what the guide reads."""
    shift, made = torch.zeros(4, requires_grad=True), Several()
    return pv.Program(made.model, lambda x: made.guide(x + shift)), (columns(16, 4),)


def everywhere() -> tuple[pv.Program, Rows]:
    torch.manual_seed(1)
    global_shift.reset_parameters()
    return every_kind_of_parameter()[0], (columns(16, 3),)


def in_order() -> tuple[pv.Program, Rows]:
    torch.manual_seed(1)
    return Networks(nn.Linear(2, 6), nn.Linear(6, 2), 2).program, (columns(),)


PROGRAMS: dict[str, Make] = {
    "conditional": by_labels,
    "missing values": with_gaps,
    "BatchNorm and dropout": with_noise_and_statistics,
    "float64": in_double,
    "frozen and idle parameters": partly_frozen,
    "scaled": handled(scale=0.1),
    "masked": handled(mask=True),
    "closures": in_order,
}


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.filterwarnings("ignore:.*was not registered in the param store:UserWarning")
def test_every_kind_of_program(name: str) -> None:
    same(PROGRAMS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.filterwarnings("ignore:.*was not registered in the param store:UserWarning")
def test_every_kind_of_program_compiled(name: str) -> None:
    same(PROGRAMS[name], compiled=True)


def test_several_constrained_latents() -> None:
    same(several, Trace_ELBO)


@pytest.mark.filterwarnings("ignore:.*was not registered in the param store:UserWarning")
def test_parameters_wherever_pyro_users_keep_them() -> None:
    twin = same(everywhere)
    assert sum(name.startswith("leaf") for name in twin.values) == 16


@pytest.mark.parametrize("name", ["Trace_ELBO", "TraceMeanField_ELBO, 3"])
def test_pyro_s_objectives_with_scales(name: str) -> None:
    same(handled(scale=0.1), OBJECTIVES[name])


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize(
    "optimiser",
    [lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9), lambda p: torch.optim.RMSprop(p, lr=0.01, eps=1e-2)],
    ids=["SGD", "RMSprop"],
)
def test_other_optimisers_take_their_step_outside(optimiser: Any, clip: float | None) -> None:
    same(small, optimiser=optimiser, clip_norm=clip)


# Draws, and what a step costs the host


def step_of(make: Make = small, interval: int = 1, **settings: Any) -> tuple[CapturedStep, Rows, list[Tensor]]:
    program, rows = make()
    stepper, update = stepping(program, rows, **settings)
    step = CapturedStep(stepper, update, rows, 1, compiled=False)
    step.interval = interval
    return step, rows, stepper.leaves


def losses_of(step: CapturedStep, rows: Rows, seed: int, count: int = 4) -> list[float]:
    found = []
    for number in range(count):
        torch.manual_seed(seed + number)
        step.take(rows, number)
        found.append(step.read().loss)
    return found


def test_draws_are_fresh_each_step_and_those_of_the_seed() -> None:
    """With a learning rate of zero nothing but the draws tells one step from another."""
    step, rows, _ = step_of(optimiser=lambda p: torch.optim.Adam(p, lr=0.0))
    first = losses_of(step, rows, seed=10)
    assert len(set(first)) == 4
    assert losses_of(step, rows, seed=10) == first
    assert losses_of(step, rows, seed=11)[:3] == first[1:]
    torch.manual_seed(10)
    step.take(rows, 0)
    step.take(rows, 0)
    both = step.read()
    assert both.steps == 2
    assert both.loss != pytest.approx(2.0 * first[0])


def test_a_schedule_of_the_objective_is_an_input() -> None:
    """-ELBO_beta for beta = 0 and 1, with the same draws: their difference is the KL, which the third loss has by half."""
    settings = {"objective": o.ELBO(beta=o.warm_up(20)), "optimiser": lambda p: torch.optim.Adam(p, lr=0.0)}
    step, rows, _ = step_of(**settings)
    found = []
    for taken in (0, 20, 10):
        torch.manual_seed(1)
        step.take(rows, taken)
        found.append(step.read().loss)
    assert found[1] - found[0] > 0.1
    assert found[2] == pytest.approx((found[0] + found[1]) / 2.0, rel=1e-6)


class Host(TorchDispatchMode):
    """Notes operations for which a host waits for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
            self.waits.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "optimiser",
    [lambda p: torch.optim.Adam(p, lr=0.01, fused=True), lambda p: torch.optim.SGD(p, lr=0.01)],
    ids=["Adam in the graph", "SGD outside"],
)
def test_the_host_never_waits_between_two_readings(optimiser: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it read memory past the dispatcher: `tolist`, `numpy`, `item` and `cpu` are counted by name."""
    step, rows, _ = step_of(with_noise_and_statistics, interval=50, optimiser=optimiser)
    named: list[str] = []
    for name in ("tolist", "numpy", "item", "cpu", "__bool__", "__float__", "__int__"):
        method = getattr(Tensor, name)

        def counting(self: Tensor, *args: Any, name: str = name, method: Any = method, **kwargs: Any) -> Any:
            named.append(name)
            return method(self, *args, **kwargs)

        monkeypatch.setattr(Tensor, name, counting)
    with Host() as host:
        for number in range(50):
            step.take(rows, number)
    assert (host.waits, named) == ([], [])
    assert step.read().steps == 50
    assert named == ["tolist"]


def test_the_host_would_be_seen_to_wait() -> None:
    step, rows, _ = step_of(optimiser=lambda p: torch.optim.SGD(p, lr=0.01))
    with Host() as host:
        step.take(rows, 1)  # on a CPU it looks at each loss
    assert host.waits
    with Host() as host:
        torch.ones(3).nonzero()
        torch.ones(3).sum().item()
    assert len(host.waits) == 2


# What the check sees


def disagreement(make: Make = small, **settings: Any) -> str:
    with pytest.raises(CannotCapture) as caught:
        step_of(make, **settings)
    return str(caught.value)


def test_a_gradient_is_compared_whatever_adam_remembers() -> None:
    """First moments a thousand times the gradient: one tenth of it would be lost in them."""
    step, rows, leaves = step_of(optimiser=lambda p: torch.optim.Adam(p, lr=0.0))
    for leaf, gradient in zip(leaves, step._first(rows, 1), strict=True):
        step._update.optimiser.state[leaf]["exp_avg"].copy_(1e3 * gradient)
    assert step.agrees(rows, 1) is None
    leaves[0].register_hook(lambda gradient: 1.1 * gradient)  # which the graph has never seen
    assert str(step.agrees(rows, 1)).startswith("the captured gradient of a parameter of shape ")


def test_gradients_of_rounding_alone_do_not_count_as_wrong() -> None:
    """A bias before BatchNorm has a gradient of zero; what is left of it differs from run to run."""

    def make() -> tuple[pv.Program, Rows]:
        torch.manual_seed(1)
        decoder = nn.Sequential(nn.Linear(2, 64), nn.BatchNorm1d(64), nn.Tanh(), nn.Linear(64, 6))
        return small(decoder)[0], (100.0 * columns(64),)

    step, rows, leaves = step_of(make)
    biases = [leaf for leaf in leaves if leaf.shape == (64,)]
    biases[0].register_hook(lambda gradient: gradient + 1e-4 * torch.randn_like(gradient))
    assert step.agrees(rows, 1) is None
    biases[0].register_hook(lambda gradient: gradient + 1e3)
    assert step.agrees(rows, 1) is not None


def test_what_python_took_from_the_rows_of_the_capture_shows() -> None:
    def with_mean_of_x() -> tuple[pv.Program, Rows]:
        vae, rows = small()
        inner = vae.model

        def model(x: Tensor) -> None:
            with poutine.scale(scale=1.0 + abs(float(x.numpy().mean()))):
                inner(x)

        return pv.Program(model, vae.guide), rows

    assert disagreement(with_mean_of_x).startswith("the captured step has loss ")


def test_statistics_that_python_moves_now_and_then_show() -> None:
    """In training mode the loss does not depend on them, but `eval()` will."""

    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(6))
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.training and self.calls % 2:
                self.mean.lerp_(x.mean(0), 0.1)
            return x

    def make() -> tuple[pv.Program, Rows]:
        torch.manual_seed(1)
        return small(body=nn.Sequential(Counted(), nn.Linear(6, 7), nn.Tanh()), features=7)

    assert disagreement(make).startswith("the captured step leaves other values in the buffer ")


def test_scales_of_the_model_alone_are_another_loss_than_pyro_s() -> None:
    """`objectives.ELBO` scales a KL as the model is scaled, Pyro's log q as the guide is."""
    make = handled(scale=0.1, around="model")
    assert disagreement(make, objective=Trace_ELBO()).startswith("the captured step has loss ")
    same(make)


def test_latents_in_another_order_than_the_guide_s_are_no_mean_field() -> None:
    """Pyro takes the exact KL and says that it should not be; ours takes the draw. It goes on as the user has it."""

    def make() -> tuple[pv.Program, Rows]:
        torch.manual_seed(1)
        net = nn.Linear(6, 2)

        def model(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                a = pyro.sample("a", dist.Normal(0.0, 1.0))
                b = pyro.sample("b", dist.Normal(a, 1.0))
                pyro.sample("x", dist.Normal((a + b)[..., None], 1.0).expand((*a.shape, 6)).to_event(1), obs=x)

        def guide(x: Tensor) -> None:
            loc = net(x)
            with pyro.plate("data", len(x)):
                pyro.sample("b", dist.Normal(loc[..., 0], 0.5))
                pyro.sample("a", dist.Normal(loc[..., 1], 0.5))

        return pv.Program(model, guide), (columns(),)

    with pytest.warns(UserWarning, match="Failed to verify mean field restriction"):
        assert disagreement(make, objective=TraceMeanField_ELBO()).startswith("the captured step has loss ")


def test_a_latent_without_reparametrisation_under_trace_elbo() -> None:
    def make() -> tuple[pv.Program, Rows]:
        torch.manual_seed(1)
        net = nn.Linear(6, 2)

        def model(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z[..., None], 1.0).expand((*z.shape, 6)).to_event(1), obs=x)

        def guide(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", normal_without_rsample(net(x)[..., 0], 0.5))

        return pv.Program(model, guide), (columns(),)

    assert disagreement(make, objective=Trace_ELBO()) == (
        "Trace_ELBO takes the score-function gradient of some latents, "
        "which only objectives.ScoreFunction() does in a graph"
    )
    same(make, lambda: o.ScoreFunction(3))
