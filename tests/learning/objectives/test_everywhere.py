"""Every objective in plain SVI and in `pv.fit`, with checkpoints, several latents, networks that take no particles."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from one_dimension import normal_without_rsample
from programs import Several
from pyro.infer import SVI, TraceMeanField_ELBO
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.learning.objectives import Objective

o = pv.objectives
D = 6

OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "ELBO": lambda: o.ELBO(num_particles=3),
    "free bits": lambda: o.ELBO(free_bits=0.1, beta=o.warm_up(20)),
    "IWAE": lambda: o.IWAE(4),
    "Renyi": lambda: o.Renyi(0.5, 3),
    "STL": lambda: o.STL(),
    "DReG": lambda: o.DReG(4),
    "RWS": lambda: o.ReweightedWakeSleep(4),
    "RWS, sleep": lambda: o.ReweightedWakeSleep(4, wake_phi=0.5),
    "score": lambda: o.ScoreFunction(8),
}


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, 2, generator=generator) @ torch.randn(2, D, generator=generator)
    x = x + 0.3 * torch.randn(200, D, generator=generator)
    return x[:160], x[160:]


def make_vae(norm: bool = False, inner: type[nn.Module] = nn.BatchNorm1d) -> pv.VAE:
    """With `norm`, BatchNorm in both networks and dropout in the encoder: state, draws and a network without particles."""
    torch.manual_seed(0)
    decoder: nn.Module = pv.nets.MLP(2, D, hidden=(8,))
    body: nn.Module = pv.nets.MLP(D, hidden=(8,))
    if norm:
        body = nn.Sequential(inner(D), nn.Linear(D, 8), nn.Tanh(), nn.Dropout(0.2))
        decoder = nn.Sequential(nn.Linear(2, 8), inner(8), nn.Tanh(), nn.Linear(8, D))
    return pv.VAE(
        prior=pv.priors.StandardNormal(2),
        likelihood=pv.likelihoods.Normal(decoder, pv.likelihoods.Learned()),
        guide=pv.guides.DiagonalNormal(body, latent_dim=2, features=8),
    )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_in_plain_svi_every_parameter_moves_and_the_elbo_rises(name: str) -> None:
    vae, (x, _) = make_vae(), data()
    before = copy.deepcopy(vae.state_dict())
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), loss=OBJECTIVES[name]())
    elbo = o.ELBO().rows(vae.model, vae.guide, x).mean()
    losses = [svi.step(x) for _ in range(60)]
    assert not [key for key, value in vae.named_parameters() if torch.equal(value, before[key])]
    assert o.ELBO().rows(vae.model, vae.guide, x).mean() > elbo + 1.0
    assert all(isinstance(loss, float) and math.isfinite(loss) for loss in losses)
    assert math.isfinite(svi.evaluate_loss(x))


@pytest.mark.parametrize("norm", [False, True], ids=["batched", "looped"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_in_fit_the_elbo_rises_and_a_run_goes_on_to_the_bit(name: str, norm: bool, tmp_path: Path) -> None:
    train, valid = data()

    def run(epochs: int, folder: Path | None) -> tuple[pv.History, dict[str, Tensor]]:
        vae = make_vae(norm)
        history = pv.fit(
            vae, train, valid, objective=OBJECTIVES[name](), epochs=epochs, batch_size=32, lr=1e-2, checkpoint=folder
        )
        return history, vae.state_dict()

    whole, values = run(6, None)
    run(3, tmp_path)
    resumed, again = run(6, tmp_path)
    assert whole.elbo == resumed.elbo
    assert whole.loss == resumed.loss
    assert whole.valid_elbo == resumed.valid_elbo
    assert not [key for key, value in values.items() if not torch.equal(value, again[key])]
    assert whole.valid_elbo[-1] > whole.valid_elbo[0] + 0.3
    assert not any(name.startswith("vae") for name in pyro.get_param_store())


def test_checkpoints_of_other_settings_are_told_apart(tmp_path: Path) -> None:
    train, _ = data()
    for objective in (o.DReG(2), o.Renyi(0.5), o.ReweightedWakeSleep(2), o.ScoreFunction(2)):
        folder = tmp_path / type(objective).__name__
        pv.fit(make_vae(), train, objective=objective, epochs=1, checkpoint=folder)
        with pytest.raises(
            ValueError, match=rf"objective was '{type(objective).__name__}\(.* and is 'IWAE\(num_particles=2\)'"
        ):
            pv.fit(make_vae(), train, objective=o.IWAE(2), epochs=1, checkpoint=folder)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_batch_norm_is_run_once_a_particle_and_other_networks_once(name: str) -> None:
    x, runs = data()[0], {}
    for inner in (nn.BatchNorm1d, nn.LayerNorm):
        vae, objective, calls = make_vae(norm=True, inner=inner), OBJECTIVES[name](), []
        objective.differentiable_loss(vae.model, vae.guide, x)  # finds out which it is
        hook = vae.likelihood.register_forward_hook(lambda _, given, out, calls=calls: calls.append(given[0].shape))
        loss = objective.differentiable_loss(vae.model, vae.guide, x)
        hook.remove()
        loss.backward()
        dreams = 1 if name == "RWS, sleep" else 0
        runs[inner] = len(calls) - dreams
        assert math.prod(calls[0]) * runs[inner] == objective.num_particles * len(x) * 2
    assert runs == {nn.BatchNorm1d: objective.num_particles, nn.LayerNorm: 1}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_several_latents_of_every_support(name: str) -> None:
    """Latents drawn in another order than the model's, some given earlier ones, some on the simplex; all of it learned."""
    several, encoder = Several(), nn.Linear(4, 4)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 4, generator=generator)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        several.program.guide(0.5 * encoder(x))

    svi = SVI(several.model, guide, pyro.optim.Adam({"lr": 2e-2}), loss=OBJECTIVES[name]())
    before = torch.stack([o.ELBO().rows(several.model, guide, x) for _ in range(30)]).mean()
    for _ in range(60):
        svi.step(x)
    assert torch.stack([o.ELBO().rows(several.model, guide, x) for _ in range(30)]).mean() > before + 0.5


@pytest.mark.parametrize("objective", [o.ReweightedWakeSleep(8), o.ScoreFunction(8)], ids=["RWS", "score"])
def test_a_guide_without_reparametrised_draws_is_fitted(objective: Objective) -> None:
    torch.manual_seed(0)
    heads, decoder = nn.Linear(D, 2), nn.Linear(1, D)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(decoder(z[..., None]), 0.8).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        mean, raw = heads(x).unbind(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", normal_without_rsample(mean, raw.exp()))

    history = pv.fit(pv.Program(model, guide), *data(), objective=objective, epochs=10, batch_size=32, lr=2e-2)
    assert history.elbo[-1] > history.elbo[0] + 1.0
    assert history.valid_elbo[-1] > history.valid_elbo[0] + 1.0


def test_a_discrete_latent_is_fitted_in_plain_svi() -> None:
    """z ~ Bernoulli(p), x ~ N(2 z - 1, 0.7^2): p and the posterior's log-odds, linear in x, have closed forms."""
    generator = torch.Generator().manual_seed(0)
    truth = (torch.rand(1000, generator=generator) < 0.3).double()
    x = 2.0 * truth - 1.0 + 0.7 * torch.randn(1000, generator=generator).double()

    def model(x: Tensor) -> None:
        logit = pyro.param("logit", torch.zeros((), dtype=x.dtype))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(logits=logit))
            pyro.sample("x", dist.Normal(2.0 * z - 1.0, 0.7), obs=x)

    def guide(x: Tensor) -> None:
        slope, shift = (
            pyro.param("slope", torch.zeros((), dtype=x.dtype)),
            pyro.param("shift", torch.zeros((), dtype=x.dtype)),
        )
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=slope * x + shift))

    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.98}), loss=o.ReweightedWakeSleep(10))
    for _ in range(250):
        svi.step(x)
    store = pyro.get_param_store()
    assert store["slope"].item() == pytest.approx(2.0 / 0.49, rel=0.1)  # log N(x; 1, s) - log N(x; -1, s) = 2 x / s^2
    assert store["shift"].item() == pytest.approx(store["logit"].item(), abs=0.15)
    assert store["logit"].sigmoid().item() == pytest.approx(truth.mean().item(), abs=0.05)


def test_parameters_that_svi_makes_at_its_first_step_are_trained() -> None:
    """Finding out whether particles can be batched runs the program before; what it makes in the store is gone by then."""
    x = data()[0]

    def model(x: Tensor) -> None:
        shift = pyro.param("shift", lambda: torch.randn(D))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z[..., None] + shift, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.param("shift", lambda: torch.randn(D))
        scale = pyro.param("scale", torch.tensor(0.7), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.mean(-1), scale))

    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), loss=o.IWAE(4))
    torch.manual_seed(3)
    svi.step(x)
    store = pyro.get_param_store()
    first = {name: store[name].detach().clone() for name in store}
    svi.step(x)
    assert set(first) == {"shift", "scale"}
    assert not [name for name in first if torch.equal(store[name], first[name])]
    torch.manual_seed(3)
    # One step of Adam from the value that the ambient generator gives, whatever was tried before.
    assert ((first["shift"] - torch.randn(D)).abs() - 0.1).abs().max() < 1e-4


def test_keyword_arguments_reach_model_and_guide() -> None:
    x = data()[0][:, 0]

    def model(x: Tensor, *, scale: float) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, scale), obs=x)

    def guide(x: Tensor, *, scale: float) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / (1.0 + scale**2), scale / math.sqrt(1.0 + scale**2)))

    expected = dist.Normal(0.0, math.sqrt(1.0 + 0.25)).log_prob(x).sum()
    for objective in (o.IWAE(3), o.ReweightedWakeSleep(2, wake_phi=0.5)):
        assert objective.loss(model, guide, x, scale=0.5) == pytest.approx(-float(expected), rel=1e-5)
        assert math.isfinite(float(objective.differentiable_loss(model, guide, x, scale=0.5)))


def student_pair(x: Tensor) -> tuple[Callable[..., None], Callable[..., None]]:
    def model(x: Tensor) -> None:
        shift = pyro.param("shift", torch.zeros(()))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.StudentT(3.0, torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z + shift, 0.5), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 0.5))

    return model, guide


@pytest.mark.parametrize("objective", [o.ELBO, TraceMeanField_ELBO])
def test_fit_says_once_that_a_kl_is_sampled(objective: Callable[[], Any]) -> None:
    x = data()[0][:, 0]
    for _ in range(2):  # a new object says it anew, whatever Python's registry of warnings has seen
        pyro.clear_param_store()
        with pytest.warns(UserWarning, match=r"KL\(Normal \|\| StudentT\) of latent 'z': it is sampled") as caught:
            pv.fit(pv.Program(*student_pair(x)), x, data()[1][:, 0], objective=objective(), epochs=3, batch_size=32)
        assert len(caught) == 1
    pv.fit(pv.Program(*student_pair(x)), x, objective=o.IWAE(2), epochs=1)  # nothing is sampled instead of anything
