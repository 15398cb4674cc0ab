"""Program: densities against formulas written by hand, scales and masks, draws, and nothing left changed."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import Curved, Networks, Several, log_normal, weights, with_plate
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import biject_to, constraints

import pyro_vae as pv
from pyro_vae import Program

X3, X4 = weights(6, 3, seed=7), weights(6, 4, seed=8)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def drawn(program: Program, x: Tensor, num_particles: int = 5) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return program.sample(x, num_particles)[0]


# Densities


def test_log_joint_of_one_latent() -> None:
    curved = Curved()
    z = 2.0 * weights(5, 6, 2, seed=3)
    log_joint = curved.program.log_joint(X3)
    expected = curved.log_joint(X3, z)
    assert log_joint.dim == 2
    assert log_joint.num_rows == 6
    assert log_joint(z).dtype == torch.float64
    assert expected.std() > 10  # the rows and particles are told apart
    torch.testing.assert_close(log_joint(z), expected, **CLOSE)
    torch.testing.assert_close(log_joint.of_sites({"z": z}), expected, **CLOSE)
    torch.testing.assert_close(log_joint.likelihood_of_sites({"z": z}), curved.log_likelihood(X3, z), **CLOSE)


def test_log_weights_of_one_latent() -> None:
    curved = Curved()
    log_weights, z = curved.program.log_weights(X3, 50, seed=4)
    assert z["z"].shape == (50, 6, 2)
    torch.testing.assert_close(log_weights, curved.log_joint(X3, z["z"]) - curved.log_q(X3, z["z"]), **CLOSE)


def test_log_q_and_draws_of_the_guide() -> None:
    curved = Curved()
    z, log_q = curved.program.sample(X3, 4000)
    torch.testing.assert_close(log_q, curved.log_q(X3, z["z"]), **CLOSE)
    loc, scale = curved.q(X3)
    assert ((z["z"].mean(0) - loc).abs() < 5 * scale / math.sqrt(4000)).all()
    assert (z["z"].std(0) / scale - 1).abs().max() < 5 / math.sqrt(2 * 4000)


def test_draws_of_the_prior() -> None:
    curved = Curved()
    z, log_p = curved.program.sample_prior(X3, 700)
    assert z["z"].shape == (700, 6, 2)
    torch.testing.assert_close(log_p, curved.log_prior(z["z"]), **CLOSE)
    every = z["z"].flatten(0, 1)
    assert ((every.mean(0) - curved.prior_loc).abs() < 5 * curved.prior_scale / math.sqrt(len(every))).all()
    assert (every.std(0) / curved.prior_scale - 1).abs().max() < 5 / math.sqrt(2 * len(every))


def test_several_latents() -> None:
    several = Several()
    log_weights, z = several.program.log_weights(X4, 40, seed=2)
    assert {name: tuple(value.shape[2:]) for name, value in z.items()} == {
        "simplex": (3,), "z1": (), "z2": (2,), "rate": (), "share": (),
    }  # fmt: skip
    torch.testing.assert_close(log_weights, several.log_joint(X4, z) - several.log_q(X4, z), **CLOSE)


def test_the_prior_of_several_latents() -> None:
    several = Several()
    z, log_p = several.program.sample_prior(X4, 30)
    likelihood = log_normal(X4, several.mean(z), several.noise).sum(-1)
    torch.testing.assert_close(log_p, several.log_joint(X4, z) - likelihood, **CLOSE)


def log_jacobian(several: Several, u: Tensor) -> Tensor:
    """log |dz/du| for the constrained latents: exp, the logistic function, and autograd through the simplex."""
    rate, share, simplex = u[..., 3], u[..., 4], u[..., 5:]

    def free_coordinates(v: Tensor) -> Tensor:
        return biject_to(constraints.simplex)(v)[:-1]

    flat = simplex.reshape(-1, 2)
    determinants = torch.stack([torch.autograd.functional.jacobian(free_coordinates, v).det() for v in flat])
    logistic = nn.functional.logsigmoid(share) + nn.functional.logsigmoid(-share)
    return rate + logistic + determinants.log().reshape(simplex.shape[:-1])


def test_log_joint_of_the_unconstrained_vector_has_the_jacobian() -> None:
    several = Several()
    log_joint = several.program.log_joint(X4)
    assert log_joint.dim == 1 + 2 + 1 + 1 + 2  # a simplex of three has two free numbers
    u = weights(5, 6, 7, seed=5)
    z = {
        "z1": u[..., 0],
        "z2": u[..., 1:3],
        "rate": u[..., 3].exp(),
        "share": u[..., 4].sigmoid(),
        "simplex": biject_to(constraints.simplex)(u[..., 5:]),
    }
    for name, value in log_joint.unflatten(u).items():
        torch.testing.assert_close(value, z[name])
    expected = several.log_joint(X4, z)
    jacobian = log_jacobian(several, u)
    assert jacobian.abs().max() > 1
    torch.testing.assert_close(log_joint(u), expected + jacobian, **CLOSE)
    torch.testing.assert_close(log_joint.of_sites(z), expected, **CLOSE)


def test_flatten_and_unflatten_are_inverse() -> None:
    several = Several()
    log_joint = several.program.log_joint(X4)
    u = weights(3, 6, 7, seed=6)
    torch.testing.assert_close(log_joint.flatten(log_joint.unflatten(u)), u, rtol=1e-4, atol=1e-4)


def test_gradients_of_log_joint_are_those_of_the_formula() -> None:
    several = Several()
    u = weights(5, 6, 7, seed=5).requires_grad_()
    (gradient,) = torch.autograd.grad(several.program.log_joint(X4)(u).sum(), u)
    z = {
        "z1": u[..., 0],
        "z2": u[..., 1:3],
        "rate": u[..., 3].exp(),
        "share": u[..., 4].sigmoid(),
        "simplex": biject_to(constraints.simplex)(u[..., 5:]),
    }
    # The simplex's Jacobian is the product of what is left of the stick and the logistic slopes.
    slopes = u[..., 5:] - torch.tensor([2.0, 1.0]).log()
    stick = nn.functional.logsigmoid(slopes) + nn.functional.logsigmoid(-slopes)
    left = nn.functional.logsigmoid(-slopes[..., 0])
    logistic = nn.functional.logsigmoid(u[..., 4]) + nn.functional.logsigmoid(-u[..., 4])
    formula = several.log_joint(X4, z) + u[..., 3] + logistic + stick.sum(-1) + left
    (expected,) = torch.autograd.grad(formula.sum(), u)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("prior", "low", "high"),
    [(dist.LogNormal(0.3, 0.8), 1e-6, 80.0), (dist.Gamma(3.0, 1.5), 1e-6, 25.0), (dist.Beta(2.0, 4.0), 1e-7, 1 - 1e-7)],
    ids=lambda value: type(value).__name__,
)
def test_integrals_over_u_are_integrals_over_z(prior: Any, low: float, high: float) -> None:
    x = torch.tensor([[0.4], [1.7]], dtype=torch.float64)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z.sqrt()[..., None], 0.6).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            half = dist.LogNormal(x[:, 0], 1.0) if high > 1 else dist.Uniform(x.new_zeros(len(x)), 1.0)
            pyro.sample("z", half)

    log_joint = Program(model, guide).log_joint(x)
    u = torch.linspace(-18.0, 18.0, 20001, dtype=torch.float64)
    over_u = torch.trapezoid(log_joint(u[:, None, None].expand(-1, 2, 1)).exp(), u, dim=0)
    z = torch.linspace(low, high, 200001, dtype=torch.float64)[:, None]
    density = torch.exp(prior.log_prob(z).double() + log_normal(x[:, 0], z.sqrt(), 0.6))
    torch.testing.assert_close(over_u, torch.trapezoid(density, z, dim=0), rtol=1e-5, atol=0)


def test_log_joint_refuses_a_vector_of_another_shape() -> None:
    log_joint = Curved().program.log_joint(X3)
    with pytest.raises(ValueError, match=r"u has shape \(4, 6, 3\), this log joint takes \(K, 6, 2\)"):
        log_joint(torch.zeros(4, 6, 3))
    with pytest.raises(ValueError, match=r"u has shape \(6, 2\)"):
        log_joint.unflatten(torch.zeros(6, 2))


def test_double_precision_stays() -> None:
    curved, x = Curved(torch.float64), X3.double()
    z, log_q = curved.program.sample(x, 3)
    assert z["z"].dtype == torch.float64
    torch.testing.assert_close(log_q, curved.log_q(x, z["z"]), rtol=1e-13, atol=1e-13)
    expected = curved.log_joint(x, z["z"])
    torch.testing.assert_close(curved.program.log_joint(x)(z["z"]), expected, rtol=1e-13, atol=1e-12)


def test_no_row_depends_on_another() -> None:
    curved = Curved()
    z = {"z": weights(4, 6, 2)}
    for index in ([5], [3, 1], [0, 0, 4, 2, 1]):
        part = curved.program.log_joint(X3[index]).of_sites({"z": z["z"][:, index]})
        torch.testing.assert_close(part, curved.log_joint(X3, z["z"])[:, index], **CLOSE)


def test_log_weights_follow_the_seed() -> None:
    program = Curved().program
    first, same, other = (program.log_weights(X3, 4, seed=seed)[0] for seed in (3, 3, (3, 1)))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_log_weights_keep_no_graph() -> None:
    networks = Networks(nn.Linear(2, 3), nn.Linear(3, 2), 2)
    log_weights, z = networks.program.log_weights(X3, 4)
    assert not log_weights.requires_grad
    assert not z["z"].requires_grad


def test_a_draw_outside_the_prior_costs_its_own_row() -> None:
    """torch's Exponential goes on below zero where arguments are not validated: its support has the last word."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Exponential(2.0))
            pyro.sample("x", dist.Normal(z[..., None], 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(x[:, 0], 1.0))

    x = weights(4, 1)
    z = torch.tensor([[0.5, 1.5, -0.3, 0.9], [-2.0, 0.1, 0.2, -1.1]])
    expected = log_normal(x[:, 0], z, 1.0) + math.log(2.0) - 2.0 * z
    expected[z < 0] = -math.inf
    torch.testing.assert_close(Program(model, guide).log_joint(x).of_sites({"z": z}), expected, **CLOSE)


def test_a_factor_counts() -> None:
    curved = Curved()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(curved.prior_loc, curved.prior_scale).to_event(1))
            pyro.factor("penalty", -(z[..., 0] ** 2))
            pyro.deterministic("squares", z**2)
            pyro.sample("x", dist.Normal(curved.mean(z), curved.noise).to_event(1), obs=x)

    program = Program(model, curved.guide)
    z = weights(5, 6, 2)
    expected = curved.log_joint(X3, z) - z[..., 0].double() ** 2
    torch.testing.assert_close(program.log_joint(X3)(z), expected, **CLOSE)
    assert program.usable_rows((X3,))[0].all()


def test_an_improper_prior() -> None:
    curved = Curved()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), (2,)))
            pyro.sample("x", dist.Normal(curved.mean(z), curved.noise).to_event(1), obs=x)

    z = weights(5, 6, 2)
    log_joint = Program(model, curved.guide).log_joint(X3)
    torch.testing.assert_close(log_joint(z), curved.log_likelihood(X3, z), **CLOSE)


# Scales and masks

SCALED: dict[str, Callable[[Curved], Program]] = {
    "scale": lambda c: Program(poutine.scale(c.model, 0.1), poutine.scale(c.guide, 0.1)),
    "large plate": lambda _: with_plate(lambda x: pyro.plate("data", 60000, subsample_size=len(x))),
    "large plate with rows": lambda _: with_plate(lambda x: pyro.plate("data", 60000, subsample=x)),
}


@pytest.mark.parametrize("kind", SCALED)
def test_scales_do_not_touch_densities(kind: str) -> None:
    curved = Curved()
    program = SCALED[kind](curved)
    site = program.check(X3).model["x"]
    assert site.scale == pytest.approx(0.1 if kind == "scale" else 60000 / 2)  # the handlers are there
    log_weights, z = program.log_weights(X3, 7, seed=3)
    torch.testing.assert_close(log_weights, curved.log_joint(X3, z["z"]) - curved.log_q(X3, z["z"]), **CLOSE)
    torch.testing.assert_close(program.log_joint(X3)(z["z"]), curved.log_joint(X3, z["z"]), **CLOSE)


def masked(curved: Curved) -> Program:
    """Rows whose first column is positive are observed."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(curved.prior_loc, curved.prior_scale).to_event(1))
            with poutine.mask(mask=x[:, 0] > 0):
                pyro.sample("x", dist.Normal(curved.mean(z), curved.noise).to_event(1), obs=x)

    return Program(model, curved.guide)


def test_masks_are_honoured() -> None:
    curved = Curved()
    z = weights(5, 6, 2)
    seen = X3[:, 0] > 0
    assert 0 < seen.sum() < 6
    expected = curved.log_prior(z) + torch.where(seen, curved.log_likelihood(X3, z), 0.0)
    torch.testing.assert_close(masked(curved).log_joint(X3)(z), expected, **CLOSE)


def test_a_mask_over_everything() -> None:
    curved = Curved()
    program = Program(poutine.mask(curved.model, mask=False), curved.guide)
    assert torch.equal(program.log_joint(X3)(weights(5, 6, 2)), torch.zeros(5, 6, dtype=torch.float64))


def test_a_masked_row_may_lie_outside_the_support() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=x[:, 1] > 0):
                pyro.sample("x", dist.LogNormal(z, 1.0), obs=x[:, 0])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.1 * x[:, 0], 1.0))

    x = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [2.0, 1.0], [-1.0, 1.0]])
    good, _ = Program(model, guide).usable_rows((x,))
    assert good.tolist() == [True, True, True, False]


# Rows that cannot be judged


def exponential() -> Program:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Exponential(z.exp()[..., None].expand(*z.shape, 2)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.sum(-1), 1.0))

    return Program(model, guide)


def test_usable_rows_marks_the_bad_ones_and_only_them() -> None:
    x = weights(2500, 2).abs()
    bad = {0: "NaN", 3: "outside", 1023: "outside", 1024: "NaN", 1700: "outside", 2499: "NaN"}
    for row, kind in bad.items():
        x[row, row % 2] = math.nan if kind == "NaN" else -1.0
    x[2000, 1], bad[2000] = math.inf, "NaN"
    good, reasons = exponential().usable_rows((x,))
    assert set((~good).nonzero().flatten().tolist()) == set(bad)
    texts = {"NaN": "NaN or infinite values", "outside": "outside the support of the likelihood"}
    assert reasons == [texts[bad[row]] if row in bad else "" for row in range(2500)]


@pytest.mark.parametrize("value", [math.nan, -1.0])
def test_usable_rows_where_there_are_none(value: float) -> None:
    good, reasons = exponential().usable_rows((torch.full((3, 2), value),))
    assert not good.any()
    assert all(reasons)


def test_a_row_outside_the_support_touches_no_other() -> None:
    x = weights(5, 2).abs()
    x[1] = -1.0
    z = weights(4, 5)
    log_joint = exponential().log_joint(x).of_sites({"z": z})
    expected = log_normal(z, 0.0, 1.0) + 2 * z - z.exp() * x.sum(-1)
    good = [0, 2, 3, 4]
    torch.testing.assert_close(log_joint[:, good], expected[:, good], **CLOSE)


# Draws from the model


def test_simulate_draws_from_the_model() -> None:
    curved = Curved()
    (x,), z = curved.program.simulate(torch.zeros(20000, 3), seed=2)
    assert x.shape == (20000, 3)
    spread = curved.prior_scale / math.sqrt(20000)
    assert ((z["z"].mean(0) - curved.prior_loc).abs() < 5 * spread).all()
    noise = x - curved.mean(z["z"])  # the draws of x belong to the draws of z
    assert (noise.mean(0).abs() < 5 * curved.noise / math.sqrt(20000)).all()
    assert (noise.std(0) / curved.noise - 1).abs().max() < 5 / math.sqrt(2 * 20000)
    assert torch.corrcoef(noise.T).triu(1).abs().max() < 5 / math.sqrt(20000)
    again, other = (curved.program.simulate(torch.zeros(20000, 3), seed=seed)[0][0] for seed in (2, 3))
    assert torch.equal(x, again)
    assert not torch.equal(x, other)


class Conditional:
    """p(x | z, y) and q(z | x, y); y is one of three labels."""

    offsets = torch.tensor([[0.0, 3.0], [-2.0, 1.0], [5.0, -4.0]])

    def __init__(self) -> None:
        self.program = Program(self.model, self.guide)

    def model(self, x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[..., None] + self.offsets[y], 0.5).to_event(1), obs=x)

    def guide(self, x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x - self.offsets[y]).mean(-1), 0.4))


def test_conditional_models() -> None:
    program = Conditional().program
    x, y = weights(6, 2), torch.tensor([0, 2, 1, 1, 0, 2])
    log_weights, z = program.log_weights((x, y), 9, seed=1)
    z, loc = z["z"], Conditional.offsets[y]
    expected = log_normal(z, 0.0, 1.0) + log_normal(x, z[..., None] + loc, 0.5).sum(-1)
    torch.testing.assert_close(log_weights, expected - log_normal(z, (x - loc).mean(-1), 0.4), **CLOSE)


def test_simulate_keeps_what_the_model_is_conditioned_on() -> None:
    y = torch.tensor([0, 1, 2]).repeat(2000)
    (x, kept), z = Conditional().program.simulate((torch.zeros(6000, 2), y))
    assert torch.equal(kept, y)
    noise = x - z["z"][:, None] - Conditional.offsets[y]
    assert noise.mean().abs() < 5 * 0.5 / math.sqrt(12000)
    assert abs(noise.std() / 0.5 - 1) < 5 / math.sqrt(2 * 12000)


def test_simulate_tells_equal_tensors_apart() -> None:
    """x and y hold the same numbers; y, which is observed, is the one to be replaced."""

    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal((x + z[..., None]), 1.0).to_event(1), obs=y)

    def guide(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((y - x).mean(-1), 1.0))

    x = torch.zeros(5, 2)
    (kept, fresh), _ = Program(model, guide).simulate((x, torch.zeros(5, 2)))
    assert kept is x
    assert (fresh != 0).all()


@pytest.mark.parametrize("kind", ["another shape", "twice"])
def test_simulate_refuses_what_the_guide_could_not_read(kind: str) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if kind == "twice":
                pyro.sample("first", dist.Normal(z[..., None], 1.0).expand([*z.shape, 3]).to_event(1), obs=x)
            observed = x if kind == "twice" else x[:, :2]
            pyro.sample(
                "pixels", dist.Normal(z[..., None], 1.0).expand([*z.shape, len(observed[0])]).to_event(1), obs=observed
            )

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.mean(-1), 1.0))

    program = Program(model, guide)
    assert program.log_weights(X3, 2)[0].isfinite().all()  # judging is no problem
    size = 3 if kind == "twice" else 2
    message = rf"model observes 'pixels' with shape \(6, {size}\), which is not x of shape \(6, 3\).*: observe x itself"
    with pytest.raises(ValueError, match=message):
        program.simulate(X3)


# Nothing is left changed


class Trip(Exception):
    """What a model raises when it is told to."""


class Stateful:
    """Parameters in the store and in networks, a network with BatchNorm and Dropout, and a wire to trip over."""

    def __init__(self) -> None:
        self.decoder = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
        self.encoder = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5))
        self.encoder[1].eval()
        self.calls, self.trip_at = 0, -1
        self.program = Program(self.model, self.guide)

    def _step(self) -> None:
        self.calls += 1
        if self.calls == self.trip_at:
            raise Trip

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        scale = pyro.param("scale", lambda: torch.rand(3) + 0.1, constraint=constraints.positive)
        with pyro.plate("data", 60000, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            self._step()
            pyro.sample("x", dist.Normal(self.decoder(z), scale).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        pyro.module("also the decoder", self.decoder)
        with pyro.plate("data", 60000, subsample_size=len(x)):
            self._step()
            pyro.sample("z", dist.Normal(self.encoder(x), pyro.param("known")).to_event(1))


USES: dict[str, Callable[[Program], object]] = {
    "check": lambda program: program.check(X3),
    "log_weights": lambda program: program.log_weights(X3, 3),
    "log_joint": lambda program: program.log_joint(X3)(torch.zeros(2, 6, 2)),
    "flatten": lambda program: program.log_joint(X3).flatten({"z": torch.zeros(2, 6, 2)}),
    "simulate": lambda program: program.simulate(X3),
    "usable_rows": lambda program: program.usable_rows((X3,)),
    "sample": lambda program: program.sample(X3, 3),
    "sample_prior": lambda program: program.sample_prior(X3, 3),
}
AMBIENT = ("sample", "sample_prior")  # they draw from torch's generator, which therefore moves on


def state(networks: Stateful, *, with_randomness: bool) -> dict[str, Any]:
    store = pyro.get_param_store()
    modules = [m for network in (networks.decoder, networks.encoder) for m in network.modules()]
    buffers = [part.clone() for network in (networks.decoder, networks.encoder) for part in network.buffers()]
    return {
        "store": {name: value.detach().tolist() for name, value in store.items()},
        "objects": {name: id(value) for name, value in store.named_parameters()},
        "names": {name: store.param_name(value) for name, value in store.named_parameters()},
        "constraints": {name: type(c).__name__ for name, c in store.get_state()["constraints"].items()},
        "training": [m.training for m in modules],
        "buffers": [part.tolist() for part in buffers],
        "settings": pyro.settings.get(),
        "validation": torch.distributions.Distribution._validate_args,
        "handlers": len(pyro.poutine.runtime._PYRO_STACK),
        "plates": len(pyro.poutine.runtime._DIM_ALLOCATOR._stack),
        "random": torch.get_rng_state().tolist() if with_randomness else None,
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
        "gradients": torch.is_grad_enabled(),
    }


@contextmanager
def unchanged(networks: Stateful, *, with_randomness: bool = True) -> Iterator[None]:
    pyro.param("known", torch.tensor([0.5, 0.7]), constraint=constraints.positive)
    pyro.module("decoder", networks.decoder)  # known already, unlike "encoder", "scale" and the decoder's second name
    before = state(networks, with_randomness=with_randomness)
    yield
    after = state(networks, with_randomness=with_randomness)
    assert {key: value for key, value in after.items() if value != before[key]} == {}


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("use", USES)
def test_nothing_is_left_changed(use: str, validate: bool) -> None:
    networks = Stateful()
    with pyro.validation_enabled(validate), unchanged(networks, with_randomness=use not in AMBIENT):
        USES[use](networks.program)
    assert networks.calls > 0


@pytest.mark.parametrize("use", USES)
def test_nothing_is_left_changed_by_a_failure(use: str) -> None:
    USES[use]((rehearsal := _known()).program)
    raised = 0
    calls = rehearsal.calls
    for trip_at in sorted({1, 2, 3, calls // 2, calls - 1, calls} & set(range(1, calls + 1))):
        networks = _known()
        networks.trip_at = trip_at
        with unchanged(networks, with_randomness=use not in AMBIENT):
            try:
                USES[use](networks.program)
            except Trip:
                raised += 1
    assert raised > 0


def _known() -> Stateful:
    pyro.clear_param_store()
    pyro.param("known", torch.tensor([0.5, 0.7]), constraint=constraints.positive)
    return Stateful()


def test_no_answer_depends_on_what_was_asked_before() -> None:
    """The layout is found under a seed of its own: a program that knows it draws the same as one that does not."""
    fresh, warm = Curved().program, Curved().program
    warm.layout((X3,))
    results = []
    for program in (fresh, warm):
        torch.manual_seed(5)
        results.append((program.sample(X3, 3)[1], program.sample_prior(X3, 3)[1]))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_parameters_not_yet_in_the_store_are_the_same_in_each_call() -> None:
    """Where the store lacks a random initial value, each call makes it anew: it must be the same one."""
    log_joint = Stateful().program.log_joint
    pyro.param("known", torch.tensor([0.5, 0.7]), constraint=constraints.positive)
    u = torch.ones(1, 6, 2)
    first = log_joint(X3)(u)
    torch.rand(10)
    assert torch.equal(log_joint(X3)(u), first)


# Programs themselves


def test_programs_print_themselves() -> None:
    assert repr(Curved().program) == "Program(model, guide)"
    assert repr(Program(nn.Linear(2, 2), functools.partial(print))) == "Program(Linear, partial)"


def test_programs_take_numpy() -> None:
    curved = Curved()
    z, log_q = curved.program.sample(X3.numpy(), 2)
    torch.testing.assert_close(log_q, curved.log_q(X3, z["z"]), **CLOSE)


def test_modules_serve_as_model_and_guide() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(2, 3)

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.net(z), 0.5).to_event(1), obs=x)

    model = Model()
    z = weights(4, 6, 2)
    mean = torch.einsum("knd,xd->knx", z, model.net.weight.detach()) + model.net.bias.detach()
    expected = log_normal(z, 0.0, 1.0).sum(-1) + log_normal(X3, mean, 0.5).sum(-1)
    torch.testing.assert_close(Program(model, Curved().guide).log_joint(X3)(z).detach(), expected, **CLOSE)


def test_check_is_public() -> None:
    program = Curved().program
    assert str(pv.check(program, X3)) == str(program.check(X3))


def test_networks_of_another_precision_are_refused() -> None:
    program = Networks(nn.Linear(2, 3), nn.Linear(3, 2), 2).program
    with pytest.raises(ValueError, match=r"x has dtype torch.float64, the parameters torch.float32: give x.to\(torch.fl"):
        program.log_weights(X3.double(), 2)


def test_networks_on_another_device_are_refused() -> None:
    networks = Networks(nn.Linear(2, 3, device="meta"), nn.Linear(3, 2, device="meta"), 2)
    with pytest.raises(ValueError, match=r"x is on cpu, the parameters on meta: give x.to\('meta'\), or move the modules"):
        networks.program.check(X3)
