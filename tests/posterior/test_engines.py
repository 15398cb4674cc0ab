"""What every engine promises, against closed forms. A new engine is one more line in the table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_gaussian import LinearGaussian
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pyro_vae as pv
from pyro_vae.evidence import weights
from pyro_vae.posterior import Engine, Sampler

ENGINES: dict[str, Engine] = {
    "prior": pv.posterior.from_prior,
    "guide": pv.posterior.from_guide,
    "laplace": pv.posterior.laplace,
    "laplace, one start": pv.posterior.Laplace(num_starts=1),
    "annealed": pv.posterior.Annealed(most_steps=4, num_leapfrog=2),
    "annealed from the guide": pv.posterior.Annealed(start=pv.posterior.at_guide, most_steps=4, num_leapfrog=2),
    "annealed from the prior": pv.posterior.Annealed(start=pv.posterior.at_prior, most_steps=8, num_leapfrog=2),
}


@dataclass(frozen=True)
class Known:
    """A program with log p(x) and draws of p(z | x) in closed form."""

    program: pv.Program
    x: Tensor
    log_p: Callable[[Tensor], Tensor]
    posterior: Callable[[Tensor], Any]


def linear() -> Known:
    """Linear-Gaussian, all scales different, the guide wide and shifted."""
    known = LinearGaussian(dim=3, latent_dim=2)

    def posterior(x: Tensor) -> Any:
        return dist.MultivariateNormal(known.posterior_mean(x), known.covariance)

    return Known(known.program(inflate=1.3, shift=0.5), known.draw(8), known.log_p, posterior)


def skewed() -> Known:
    """z ~ Gamma(2, 3/2), x ~ Exponential(z): z | x ~ Gamma(3, 3/2 + x) and p(x) = 2 (3/2)^2 / (3/2 + x)^3, Lomax."""
    two, rate = torch.tensor(2.0, dtype=torch.float64), torch.tensor(1.5, dtype=torch.float64)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Exponential(pyro.sample("z", dist.Gamma(two, rate))), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Gamma(two, 1.2 + 0.5 * x))

    def log_p(x: Tensor) -> Tensor:
        return two.log() + 2.0 * rate.log() - 3.0 * (rate + x).log()

    x = torch.tensor([0.05, 0.3, 0.6, 1.0, 1.7, 2.6, 4.0, 7.0], dtype=torch.float64)
    return Known(pv.Program(model, guide), x, log_p, lambda x: dist.Gamma(two + 1.0, rate + x))


MODELS = {"linear": linear, "skewed": skewed}
every_engine = pytest.mark.parametrize("name", ENGINES)
every_model = pytest.mark.parametrize("model", MODELS)


def ready(name: str, known: Known, x: Tensor, seed: int = 1) -> Sampler:
    """A sampler that has learnt from a pilot, as in an engine's own call."""
    engine = ENGINES[name]
    sampler = engine.prepare(known.program, (x,), seed=seed)
    return sampler.adapt(sampler.draw(engine.pilot_particles or 16, seed=2))


@every_engine
@every_model
def test_the_mean_weight_is_unbiased_for_p_of_x(name: str, model: str) -> None:
    """1,200 repetitions of one row with 8 particles each, prepared and tuned anew: the mean of p-hat / p(x) is 1."""
    known = MODELS[model]()
    x = known.x[2:3].repeat(1200, *(1,) * (known.x.dim() - 1))
    particles = ENGINES[name](known.program, x, num_particles=8, seed=4)
    ratio = torch.exp(weights.log_mean_exp(particles.log_weights) - known.log_p(x))
    error = ratio.std() / 1200**0.5
    assert abs(ratio.mean() - 1.0) < 4.5 * error
    assert error < 0.05


@every_engine
@every_model
def test_an_exact_draw_among_the_others_turns_the_bound_around(name: str, model: str) -> None:
    """With it 1 / p-hat is unbiased for 1 / p(x), so that E log p-hat is at least log p(x); without it, at most."""
    known, count = MODELS[model](), 1200
    x = known.x[3:4].repeat(count, *(1,) * (known.x.dim() - 1))
    sampler = ready(name, known, x)
    exact = {"z": known.posterior(x).sample()}
    above = weights.log_mean_exp(sampler.draw(6, 3, exact).log_weights) - known.log_p(x)
    below = weights.log_mean_exp(sampler.draw(6, 4).log_weights) - known.log_p(x)
    inverse = torch.exp(-above)
    error = inverse.std() / count**0.5
    assert abs(inverse.mean() - 1.0) < 4.5 * error
    assert error < 0.15
    assert above.mean() > -4.5 * above.std() / count**0.5
    assert below.mean() < 4.5 * below.std() / count**0.5
    # Both sides move by about half the variance of p-hat: apart where this can be seen at all.
    apart = above.mean() - below.mean()
    error = torch.hypot(above.std(), below.std()) / count**0.5
    assert abs(apart - 0.5 * (above.var() + below.var())) < 4.5 * error + 0.3 * apart.abs()


@every_engine
def test_the_exact_draw_is_among_the_particles(name: str) -> None:
    known = linear()
    exact = {"z": known.posterior(known.x).sample()}
    particles = ready(name, known, known.x).draw(6, 3, exact)
    there = (particles.z["z"] - exact["z"]).abs().amax(-1) < 1e-12
    if not name.startswith("annealed"):  # whose chain from it runs backwards to the start; the particle is its beginning
        with torch.no_grad():
            log_p = known.program.log_joint(known.x).of_sites(dict(particles.z))
        assert torch.isfinite(log_p).all()
    assert (there.sum(0) == 1).all()


@every_engine
@every_model
def test_rows_taken_in_another_order_keep_their_own_answers(name: str, model: str) -> None:
    """Each of them is right for its own x, by its own errors."""
    known, index = MODELS[model](), torch.tensor([6, 0, 1])
    sampler = ready(name, known, known.x)
    some = sampler.take(index)
    assert torch.equal(some.cost, sampler.cost[index])
    assert len(some.doubts) == 3
    particles = some.draw(4000, 5)
    assert particles.log_weights.shape == (4000, 3)
    assert particles.info["evaluations"].shape == (3,)
    gap = (weights.log_mean_exp(particles.log_weights) - known.log_p(known.x[index])).abs()
    error = weights.standard_error(particles.log_weights, particles.strata)
    assert (gap < 4.5 * error + weights.bias(particles.log_weights).abs()).all()
    assert (error < 0.15).all()
    truth = known.log_p(known.x)
    assert (truth[index] - truth[:3]).abs().min() > 0.3  # so that rows in the wrong order would be seen


@every_engine
def test_seeds_repeat_and_differ(name: str) -> None:
    known = linear()
    a, b, c = (ENGINES[name](known.program, known.x, num_particles=7, seed=seed) for seed in (0, 0, 1))
    assert a.log_weights.shape == (7, 8)
    assert a.log_weights.dtype == torch.float64
    assert a.z["z"].shape == (7, 8, 2)
    assert torch.equal(a.log_weights, b.log_weights)
    assert torch.equal(a.z["z"], b.z["z"])
    assert not torch.equal(a.log_weights, c.log_weights)
    sampler = ready(name, known, known.x)
    first, again, other = (sampler.draw(5, seed).log_weights for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@every_engine
@every_model
def test_the_byte_budget_moves_the_answer_by_rounding_alone(name: str, model: str) -> None:
    known = MODELS[model]()
    whole, small = (
        ENGINES[name](known.program, known.x, num_particles=20, seed=1, memory=memory) for memory in (2**30, 2**13)
    )
    torch.testing.assert_close(small.log_weights, whole.log_weights, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(small.z["z"], whole.z["z"], rtol=1e-7, atol=1e-7)


@every_engine
def test_particles_say_who_drew_them_and_what_they_cost(name: str) -> None:
    known = linear()
    particles = ENGINES[name](known.program, known.x, num_particles=9, seed=1)
    assert particles.info["engine"] == ENGINES[name].name
    spent = particles.info["evaluations"]
    assert spent.shape == (8,)
    assert not spent.dtype.is_floating_point
    assert (spent >= 9).all()
    assert len(particles.info.get("doubts", [""] * 8)) == 8
    assert particles.rounding.shape == (8,)
    assert repr(particles) == f"Particles({ENGINES[name].name}: 9 for each of 8 rows; z (2,))"


@every_engine
def test_bad_numbers_are_named_and_settings_can_be_replaced(name: str) -> None:
    known = linear()
    with pytest.raises(ValueError, match="num_particles=0"):
        ENGINES[name](known.program, known.x, num_particles=0)
    with pytest.raises(ValueError, match="memory=0"):
        ENGINES[name](known.program, known.x, num_particles=2, memory=0)
    with pytest.raises(TypeError, match="nonsense"):
        ENGINES[name](known.program, known.x, num_particles=2, nonsense=3)
    default = ENGINES[name](known.program, known.x[:2], num_particles=None)
    assert len(default.log_weights) == ENGINES[name].default_particles


def test_a_setting_in_the_call_is_that_of_the_engine() -> None:
    known = linear()
    call = pv.posterior.laplace(known.program, known.x, num_particles=5, num_starts=9, seed=1)
    made = pv.posterior.Laplace(num_starts=9)(known.program, known.x, num_particles=5, seed=1)
    assert torch.equal(call.log_weights, made.log_weights)
    with pytest.raises(ValueError, match="num_starts=0"):
        pv.posterior.laplace(known.program, known.x, num_starts=0)
    with pytest.raises(ValueError, match="num_leapfrog=0"):
        pv.posterior.annealed(known.program, known.x, num_leapfrog=0)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))])
        return out


def wide(dim: int) -> tuple[LinearGaussian, pv.Program]:
    """Many latents, seen in 20 dimensions, with a diagonal guide, so that the program itself makes no D x D matrix."""
    known = LinearGaussian(dim=20, latent_dim=dim)
    gain = known.gain

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x - known.bias) @ gain.T, 0.5).to_event(1))

    return known, pv.Program(known.model, guide)


def test_laplace_in_300_dimensions_is_right_and_makes_no_hessian() -> None:
    """Right by the closed form; no tensor has N D^2 elements. In 200 dimensions some have: the test can fail."""
    for dim, most in ((300, True), (200, False)):
        known, program = wide(dim)
        x = known.draw(12)
        program.layout((x,))
        with Largest() as largest:
            particles = pv.posterior.laplace(program, x, num_particles=200, seed=1)
        assert (largest.numel < 12 * dim * dim) is most
        error = torch.hypot(weights.standard_error(particles.log_weights, particles.strata), particles.rounding)
        gap = weights.log_mean_exp(particles.log_weights) - known.log_p(x)
        assert (gap.abs() < 4.5 * error).all()
        assert (error < 0.1).all()


def test_the_byte_budget_changes_nothing_in_300_dimensions_either() -> None:
    known, program = wide(300)
    x = known.draw(4)
    whole, small = (
        pv.posterior.laplace(program, x, num_particles=20, seed=1, memory=memory).log_weights for memory in (2**30, 2**17)
    )
    torch.testing.assert_close(small, whole, rtol=1e-6, atol=1e-6)
