"""When a run goes over to a graph, what it does when it cannot, and that nobody can tell from the result."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from learning.twins import columns, small, stepping
from pyro.infer import RenyiELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR

import pyro_vae as pv
from pyro_vae.graph import Graph
from pyro_vae.learning import capture, engine

UNTIL = "Training goes on without compilation: "


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the rows for which a step was captured; graphs are run operation by operation."""
    made: list[tuple[int, ...]] = []

    def uncompiled(function: Any, examples: Any, *, compiled: bool = True) -> Graph:
        made.append(tuple(examples[1].shape))
        return Graph(function, examples, compiled=False)

    monkeypatch.setattr(capture, "Graph", uncompiled)
    return made


def fitted(
    compile: Any = True, make: Callable[[], Any] = lambda: small()[0], **settings: Any
) -> tuple[pv.History, dict[str, Tensor]]:
    """A fit of a fresh program, its history and its values."""
    pyro.clear_param_store()
    torch.manual_seed(5)
    program = make()
    given = {"epochs": 3, "batch_size": 8, "lr": 0.01, **settings}
    x = given.pop("x", columns(20))
    history = pv.fit(program, x, compile=compile, **given)
    values = dict(program.trainable(x))
    for at, module in program.modules_found().items():
        values |= {f"{at}.{name}": buffer for name, buffer in module.named_buffers()}
    return history, {name: value.detach().clone() for name, value in values.items()}


def bare(inner: Callable[[Tensor], Tensor] = lambda loc: loc, likelihood: Any = None) -> pv.Program:
    """A program of functions; `inner` is applied to what the decoder says."""
    torch.manual_seed(1)
    encoder, decoder = nn.Linear(6, 4), nn.Linear(2, 6)
    likelihood = likelihood or (lambda loc: dist.Normal(loc, 0.5))

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", likelihood(inner(decoder(z))).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        a, b = encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(a, b.exp()).to_event(1))

    return pv.Program(model, guide)


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# The same fit


def with_everything() -> pv.VAE:
    torch.manual_seed(1)
    body = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 7), nn.Tanh(), nn.Dropout(0.2))
    return small(body=body, features=7)[0]


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "warm-up, clipped, schedule": {
        "objective": pv.objectives.ELBO(beta=pv.objectives.warm_up(10)),
        "clip_norm": 1.0,
        "schedule": lambda optimiser: StepLR(optimiser, 1, gamma=0.5),
    },
    "SGD, binarised": {
        "optimiser": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
        "transform": lambda x: (x + torch.randn_like(x) > 0).float(),
        "valid": columns(8).roll(1),
    },
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_compiled_fit_has_the_losses_of_an_eager_one(graphs: list[Any], name: str) -> None:
    histories, values = zip(*(fitted(mode, with_everything, **SETTINGS[name]) for mode in (False, True)), strict=True)
    assert graphs == [(8, 6)]  # not again for the short last batch, of 4 rows
    for figure in ("loss", "elbo", "valid_elbo"):
        assert getattr(histories[1], figure) == pytest.approx(getattr(histories[0], figure), rel=1e-5)
    assert histories[0].compiled_from is None
    assert histories[1].compiled_from == 1
    for at, value in values[0].items():
        torch.testing.assert_close(values[1][at], value, rtol=1e-3, atol=1e-3, msg=lambda m, n=at: f"{n}: {m}")


def test_a_run_of_two_batches_an_epoch_never_captures_the_short_one(graphs: list[Any]) -> None:
    """The second step, from which compile=True may capture, is the short one."""
    eager, compiled = (fitted(mode, x=columns(12)) for mode in (False, True))
    assert graphs == [(8, 6)]
    assert compiled[0].loss == pytest.approx(eager[0].loss, rel=1e-6)
    assert compiled[0].compiled_from == 2


def test_an_engine_waits_for_a_whole_batch(graphs: list[Any]) -> None:
    vae, rows = small()
    made = engine.Engine(*stepping(vae, rows), True, 8)
    made.capture((columns(4),), 1)
    assert not made.compiled
    made.capture((columns(8),), 2)
    assert made.compiled
    assert graphs == [(8, 6)]


def test_a_run_of_one_short_batch_captures_it(graphs: list[Any]) -> None:
    fitted(x=columns(7))
    assert graphs == [(7, 6)]


# When


def test_auto_counts(graphs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert (engine.FIRST, engine.WORTH) == (100, 8_000)
    monkeypatch.setattr(engine, "FIRST", 4)
    monkeypatch.setattr(engine, "WORTH", 10)
    assert fitted("auto", epochs=5)[0].compiled_from == 4  # 15 steps: 11 are left at the fifth
    assert fitted("auto", epochs=4)[0].compiled_from is None
    assert fitted(True, epochs=1)[0].compiled_from == 1
    assert len(graphs) == 2
    fitted(False, epochs=5)
    assert len(graphs) == 2


@pytest.mark.parametrize("mode", ["yes", None, 3])
def test_another_mode_is_refused(mode: Any) -> None:
    with pytest.raises(ValueError, match=rf"^compile={mode!r} is none of 'auto', True and False\.$"):
        fitted(mode)


class Cut:
    """A transform that ends the run at one batch, as Ctrl-C does."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __repr__(self) -> str:
        return "Cut()"

    def __call__(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return x


def cut_and_resumed(folder: Path, modes: list[Any], at: int = 6, **settings: Any) -> tuple[pv.History, dict[str, Tensor]]:
    """A run that is cut before its end as often as there are modes but one."""
    *firsts, last = modes
    for number, mode in enumerate(firsts):
        with pytest.raises(SystemExit):
            fitted(mode, checkpoint=folder, transform=Cut(at + 2 * number), **settings)
    return fitted(last, checkpoint=folder, transform=Cut(0), **settings)


def test_cut_and_resumed_is_the_same_to_the_bit(graphs: list[Any], tmp_path: Path) -> None:
    settings = {"epochs": 4, "schedule": lambda optimiser: StepLR(optimiser, 1, gamma=0.9)}
    whole = fitted(True, transform=Cut(0), **settings)
    resumed = cut_and_resumed(tmp_path, [True, True], **settings)
    assert equal(whole[1], resumed[1])
    assert (whole[0].loss, whole[0].elbo) == (resumed[0].loss, resumed[0].elbo)
    assert resumed[0].compiled_from == whole[0].compiled_from == 1
    assert len(graphs) == 3


def test_compiled_from_is_in_the_checkpoint_and_auto_keeps_to_it(
    graphs: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "FIRST", 3)
    monkeypatch.setattr(engine, "WORTH", 9)
    whole = fitted("auto", epochs=4, transform=Cut(0))
    assert whole[0].compiled_from == 3
    resumed = cut_and_resumed(tmp_path, ["auto", "auto"], epochs=4, at=9)  # with too few steps left to begin with it now
    assert equal(whole[1], resumed[1])
    assert resumed[0].compiled_from == 3
    assert resumed[0].loss == whole[0].loss


def test_across_modes(graphs: list[Any], tmp_path: Path) -> None:
    eager = fitted(False, epochs=4, transform=Cut(0))
    mixed = cut_and_resumed(tmp_path, [False, True, "auto"], epochs=4)
    assert mixed[0].loss == pytest.approx(eager[0].loss, rel=1e-5)
    assert mixed[0].compiled_from is not None
    assert len(graphs) == 2


@pytest.mark.slow
def test_cut_and_resumed_is_the_same_to_the_bit_with_the_compiler(tmp_path: Path) -> None:
    whole, eager = fitted(True, with_everything, transform=Cut(0)), fitted(False, with_everything, transform=Cut(0))
    resumed = cut_and_resumed(tmp_path, [True, True], make=with_everything)
    assert equal(whole[1], resumed[1])
    assert whole[0].loss == resumed[0].loss == pytest.approx(eager[0].loss, rel=1e-4)


# What it leaves alone


def test_a_capture_leaves_no_trace(graphs: list[Any]) -> None:
    """A model with a state that is no buffer."""
    state = torch.zeros(6)

    def inner(loc: Tensor) -> Tensor:
        state.mul_(0.9).add_(loc.detach().mean(tuple(range(loc.dim() - 1))))
        return loc - state

    def moved() -> Any:
        state.zero_()
        return bare(inner)

    found = []
    for mode in (False, True):
        torch.manual_seed(3)
        history, values = fitted(mode, moved)
        store = {name: value.shape for name, value in pyro.get_param_store().items()}
        found.append((values, state.clone(), torch.rand(()), store, history.loss))
    for name, value in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], value)
    torch.testing.assert_close(found[1][1], found[0][1])
    assert found[0][2:4] == found[1][2:4]
    assert found[1][4] == pytest.approx(found[0][4], rel=1e-5)
    assert graphs == [(8, 6)]


def test_a_capture_in_itself_changes_nothing(graphs: list[Any]) -> None:
    class Draws(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            np.random.rand(), random.random()  # noqa: NPY002
            return z

    torch.manual_seed(1)
    body = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 7), Draws(), nn.Dropout(0.2))
    vae = small(body=body, features=7)[0]
    stepper, update = stepping(vae, (columns(),), pv.objectives.ELBO(beta=pv.objectives.warm_up(5)))
    tensors = [*stepper.leaves, *vae.buffers(), *(t for s in update.optimiser.state.values() for t in s.values())]
    before, drawn = [tensor.clone() for tensor in tensors], pyro.util.get_rng_state()
    gradients = [leaf.grad for leaf in stepper.leaves]
    step = capture.CapturedStep(stepper, update, (columns(8),), 1)
    assert step.agrees((columns(8),), 1) is None
    assert all(map(torch.equal, tensors, before))
    assert all(leaf.grad is gradient for leaf, gradient in zip(stepper.leaves, gradients, strict=True))
    after = pyro.util.get_rng_state()
    assert torch.equal(drawn["torch"], after["torch"])
    assert drawn["random"] == after["random"]
    assert str(drawn["numpy"]) == str(after["numpy"])
    assert vae.training
    assert step.read() == capture.Spent()
    with pytest.raises(ValueError, match="Expected parameter loc"):  # validation is on again
        dist.Normal(torch.tensor(torch.nan), 1.0)


# What cannot be captured


def frozen_noise() -> pv.Program:
    return bare(lambda loc: loc + np.random.rand())  # noqa: NPY002


def looks_at_numbers() -> pv.Program:
    return bare(lambda loc: loc + float(loc.detach().numpy().mean()))


class Moving(nn.Module):
    """Puts another buffer in the place of the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 6)
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, z: Tensor) -> Tensor:
        y = self.layer(z)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(tuple(range(y.dim() - 1)))
        return y


class Reads(pv.objectives.Objective):
    """A user's own, which reads the number of steps without a schedule."""

    def loss_and_elbo(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        loss, elbo = pv.objectives.ELBO().loss_and_elbo(model, guide, *args, **kwargs)
        return loss * (1.0 + self.steps_taken), elbo


def with_hook() -> pv.VAE:
    vae = small()[0]
    vae.encoder.loc.bias.register_post_accumulate_grad_hook(lambda _: None)
    return vae


VALUE = "it asks for the value of a tensor, as .item(), float() or `if` do (at test_engine.py:"
REASONS: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "if": (lambda: bare(lambda loc: loc if loc.mean() > 0 else 2.0 * loc), {}, VALUE),
    "item": (lambda: bare(lambda loc: loc / (1.0 + loc.detach().abs().max().item())), {}, VALUE),
    "NumPy draws": (frozen_noise, {}, "the captured step has loss "),
    "NumPy numbers": (looks_at_numbers, {}, "the captured step has loss "),
    "mask": (lambda: bare(lambda loc: loc + loc[loc > 0].sum()), {}, "the shape of a result depends on values"),
    "buffer": (lambda: small(Moving())[0], {}, "a step puts another tensor in the place of the buffer "),
    "Pyro's Renyi": (
        lambda: small()[0],
        {"objective": RenyiELBO(num_particles=2)},
        "RenyiELBO asks for numbers as it goes; objectives ",
    ),
    "steps": (bare, {"objective": Reads()}, "Reads reads steps_taken, which only `schedules` may"),
    "hook": (with_hook, {}, "a parameter has a hook for when its gradient is accumulated"),
    "sleep": (
        lambda: small()[0],
        {"objective": pv.objectives.ReweightedWakeSleep(2, wake_phi=0.5)},
        "it asks for the value",
    ),
}


@pytest.mark.parametrize("name", REASONS)
def test_what_cannot_be_captured_goes_on_eagerly_and_says_why_once(graphs: list[Any], name: str) -> None:
    make, settings, reason = REASONS[name]
    np.random.seed(0)  # noqa: NPY002
    eager = fitted(False, make, **settings)
    np.random.seed(0)  # noqa: NPY002
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = fitted(True, make, **settings)
    told = [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]
    assert len(told) == 1
    assert told[0].startswith(UNTIL + reason)
    assert told[0].endswith(".")
    assert not told[0].endswith("..")
    assert told[0] == f"{UNTIL}{found[0].why_eager.rstrip('.')}."
    assert found[0].compiled_from is None
    assert found[0].loss == eager[0].loss
    assert equal(found[1], eager[1])


def test_a_program_that_changes_is_captured_again_and_then_given_up(graphs: list[Any]) -> None:
    factor = [1.0]

    def changing() -> Any:
        factor[0] = 1.0
        return bare(lambda loc: loc * factor[0])

    def callback(epoch: int, history: pv.History) -> None:
        factor[0] += 0.5

    eager = fitted(False, changing, epochs=5, callbacks=[callback])
    with pytest.warns(RuntimeWarning, match="reads something that changes while it trains and is no tensor") as caught:
        found = fitted(True, changing, epochs=5, callbacks=[callback])
    assert len(caught) == 1
    assert len(graphs) == 2
    assert found[0].loss == pytest.approx(eager[0].loss, rel=1e-5)


@pytest.mark.parametrize("what", ["freeze", "eval"])
@pytest.mark.filterwarnings("ignore:.*was not registered in the param store:UserWarning")
def test_a_callback_may_freeze_parameters_or_switch_dropout_off_once(graphs: list[Any], what: str) -> None:
    made: list[pv.VAE] = []

    def make() -> pv.VAE:
        made.append(with_everything())
        return made[-1]

    def callback(epoch: int, history: pv.History) -> None:
        if what == "freeze":
            made[-1].encoder.requires_grad_(requires_grad=False)
        else:
            made[-1].eval()

    eager, found = (fitted(mode, make, callbacks=[callback]) for mode in (False, True))
    assert len(graphs) == 2
    assert found[0].loss == pytest.approx(eager[0].loss, rel=1e-5)
    assert found[0].why_eager == ""


def test_rows_outside_of_the_support_are_told_by_pyro(graphs: list[Any]) -> None:
    """A bare program's rows are looked at before a capture, and its own error comes from the eager step."""
    x = columns(20).sigmoid()
    x[17, 2] = 7.0
    program = lambda: bare(torch.sigmoid, lambda loc: dist.ContinuousBernoulli(loc))  # noqa: E731
    for mode in (False, True):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with pytest.raises(ValueError, match="support"):
                fitted(mode, program, x=x, batch_size=4)
        told = [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]
        assert len(told) <= 1
        assert all("outside the support, which only an eager step tells" in text for text in told)
    assert graphs == []


def test_a_sparse_gradient_is_that_of_the_eager_step_too(graphs: list[Any]) -> None:
    def make() -> pv.Program:
        torch.manual_seed(2)
        table = nn.Embedding(3, 6, sparse=True)
        return bare(lambda loc: loc + table(torch.arange(3)).sum(0))

    optimiser = lambda p: torch.optim.SGD(p, lr=0.01)  # noqa: E731
    eager, found = (fitted(mode, make, optimiser=optimiser) for mode in (False, True))
    assert found[0].loss == pytest.approx(eager[0].loss, rel=1e-6)


SCRIPT = """
import json, sys, warnings, torch
import pyro_vae as pv
torch.manual_seed(0)
vae = pv.VAE(
    prior=pv.priors.StandardNormal(2),
    likelihood=pv.likelihoods.Bernoulli(pv.nets.MLP(2, 6, hidden=(4,))),
    guide=pv.guides.DiagonalNormal(pv.nets.MLP(6, hidden=(4,)), latent_dim=2),
)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    history = pv.fit(vae, torch.rand(64, 6).bernoulli(), epochs=3, batch_size=16, compile=True, progress=False)
told = [str(each.message) for each in caught if issubclass(each.category, RuntimeWarning)]
print(json.dumps([len(history), told, history.why_eager]))
"""


def test_without_a_compiler_the_fit_finishes(tmp_path: Path) -> None:
    env = {**os.environ, "CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    epochs, told, why = json.loads(done.stdout)
    assert epochs == 3
    assert why == "no working C++ compiler was found (install g++ or clang, or name one in the variable CXX)"
    assert told == [f"{UNTIL}{why}."]


# Losses that are not finite


@pytest.fixture
def poisoned() -> Tensor:
    """Rows of which one makes the loss infinite, though it is finite itself."""
    x = columns(22)
    x[13] = 1e25
    return x


@pytest.mark.parametrize("interval", [1, 2, 50])
def test_a_loss_that_is_not_finite_is_told_as_by_eager_steps(
    graphs: list[Any], poisoned: Tensor, interval: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the host looks late: steps after the failing one, the short last one too, must not move anything."""
    original = capture.CapturedStep.__init__

    def patient(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.interval = interval

    monkeypatch.setattr(capture.CapturedStep, "__init__", patient)
    told, ends = [], []
    for mode in (False, True):
        made: list[Any] = []

        def make(made: list[Any] = made) -> Any:
            made.append(small()[0])
            return made[-1]

        with pytest.raises(FloatingPointError) as caught:
            fitted(mode, make, x=poisoned, batch_size=4, seed=2)
        told.append(str(caught.value))
        ends.append({name: value.detach().clone() for name, value in made[-1].state_dict().items()})
    assert told[0] == told[1]
    assert told[1].startswith("Epoch 1, batch 4: ")
    assert graphs == [(4, 6)]
    assert "not finite at site 'z' of the guide" in told[1]
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-4, atol=1e-5)


def test_the_checkpoint_keeps_the_last_good_state(graphs: list[Any], tmp_path: Path) -> None:
    x = columns(20)
    poison = {"left": 8}

    class Turns:
        def __repr__(self) -> str:
            return "Turns()"

        def __call__(self, batch: Tensor) -> Tensor:
            poison["left"] -= 1
            return batch * 1e25 if poison["left"] == 0 else batch

    with pytest.raises(FloatingPointError, match=rf"Epoch \d, batch \d: .*not finite.*{tmp_path.name} keeps the last good"):
        fitted(x=x, transform=Turns(), checkpoint=tmp_path)
    poison["left"] = -1
    resumed = fitted(x=x, transform=Turns(), checkpoint=tmp_path)
    assert equal(resumed[1], fitted(x=x, transform=Turns())[1])


def test_a_kl_without_a_closed_form_is_told_once(graphs: list[Any]) -> None:
    """The objective that stands in for Pyro's says nothing again."""

    def make() -> pv.VAE:
        torch.manual_seed(1)
        vae = small()[0]
        return pv.VAE(prior=pv.priors.Mixture(2, num_components=3), likelihood=vae.likelihood, guide=vae.encoder)

    with pytest.warns(UserWarning, match="closed form") as caught:
        fitted(True, make, objective=TraceMeanField_ELBO())
    assert len(caught) == 1
    assert graphs == [(8, 6)]
