"""Captured densities: those of the formulas whatever the numbers of rows and particles, the same draws, or eager ones."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_gaussian import LinearGaussian
from programs import Calls, Curved, Networks, Several, weights
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae import captured
from pyro_vae.captured import CapturedProgram
from pyro_vae.graph import Graph
from pyro_vae.layouts import Values
from pyro_vae.log_joint import LogJoint
from pyro_vae.memory import BUDGET, Density, at_u


def joint(log_joint: LogJoint, z: Values) -> Tensor:
    return log_joint.of_sites(z)


def likelihood(log_joint: LogJoint, z: Values) -> Tensor:
    return log_joint.likelihood_of_sites(z)


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The functions that were captured; graphs are run operation by operation, for the sake of time."""
    functions: list[Any] = []

    def graph(function: Any, examples: Any) -> Graph:
        functions.append(function)
        return Graph(function, examples, compiled=False)

    monkeypatch.setattr(captured, "Graph", graph)
    return functions


def evaluated(program: pv.Program, x: Tensor, z: Values, density: Density) -> Tensor:
    """By a graph: anything else fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        found = CapturedProgram(program, True, BUDGET).evaluated((x,), z, density)
    assert found is not None
    return found


@pytest.mark.parametrize(("num_particles", "num_rows"), [(23, 37), (1, 40), (60, 2), (64, 16)])
def test_densities_are_those_of_the_formulas(num_particles: int, num_rows: int) -> None:
    curved = Curved()
    x, z = weights(num_rows, 3), weights(num_particles, num_rows, 2, seed=1)
    for density, name, expected in (
        (joint, "z", curved.log_joint(x, z)),
        (likelihood, "z", curved.log_likelihood(x, z)),
        (at_u, "u", curved.log_joint(x, z)),
    ):
        found = evaluated(curved.program, x, {name: z}, density)
        assert found.dtype == torch.float64
        assert not found.requires_grad
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_several_constrained_latents() -> None:
    several = Several()
    x = weights(9, 4)
    z, _ = several.program.sample(x, 70)
    expected = several.log_joint(x, z)
    torch.testing.assert_close(evaluated(several.program, x, z, joint), expected, rtol=1e-5, atol=1e-5)
    log_joint = several.program.log_joint(x)
    # dz/du: of exp for the rate, of the logistic function for the share, of stick breaking for the simplex (Stan's manual).
    rate, share, (a, b, c) = (z["rate"].double(), z["share"].double(), z["simplex"].double().unbind(-1))
    jacobian = rate.log() + (share * (1.0 - share)).log() + (a * b * c).log()
    found = evaluated(several.program, x, {"u": log_joint.flatten(z)}, at_u)
    torch.testing.assert_close(found, expected + jacobian, rtol=1e-4, atol=1e-4)


def test_batch_norm_in_eval_and_no_python_after_the_capture() -> None:
    decoder = nn.Sequential(nn.Linear(2, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    decoder(5.0 + 3.0 * weights(40, 2))  # statistics far from 0 and 1
    networks = Networks(decoder, nn.Linear(3, 2), 2)
    program = CapturedProgram(networks.program, True, BUDGET)
    x, z = weights(20, 3), weights(30, 20, 2, seed=1)
    program.evaluated((x,), {"z": z}, joint)
    calls = Calls(decoder)
    found = program.evaluated((x[:7],), {"z": z[:, :7]}, joint)
    assert calls.count == 0
    assert found is not None
    torch.testing.assert_close(found, networks.log_joint(x[:7], z[:, :7]), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        decoder[0].weight.mul_(2.0)
    found = program.evaluated((x,), {"z": z}, joint)  # a change in place is seen
    assert found is not None
    torch.testing.assert_close(found, networks.log_joint(x, z), rtol=1e-5, atol=1e-5)


def test_points_without_density_stay_so() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Exponential(pyro.sample("z", dist.Gamma(2.0, 1.5))), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Gamma(2.0, 1.2 + 0.5 * x))

    x, z = weights(8).exp(), weights(9, 8, seed=1)  # about half of the latents lie outside their support
    found = evaluated(pv.Program(model, guide), x, {"z": z}, joint)
    right, wide = z > 0.0, z.clamp_min(1e-3).double()
    expected = 2.0 * torch.tensor(1.5).log() + 2.0 * wide.log() - (1.5 + x) * wide
    assert not bool(torch.isfinite(found[~right]).any())
    torch.testing.assert_close(found[right], expected[right], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("engine", [pv.posterior.from_guide, pv.posterior.from_prior, pv.posterior.laplace])
def test_draws_are_the_same_and_the_generator_is_left_alone(engine: pv.posterior.Engine, made: list[Any]) -> None:
    known = LinearGaussian()
    program, x = known.program(1.3, 0.3), known.marginal().sample((9,))
    state = torch.get_rng_state()
    plain = engine(program, x, num_particles=100, seed=2)
    with_graph = engine(CapturedProgram(program, True, BUDGET), x, num_particles=100, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(made) == 1
    if engine is not pv.posterior.laplace:  # which learns from its pilot's weights
        assert torch.equal(plain.z["z"], with_graph.z["z"])
    torch.testing.assert_close(plain.z, with_graph.z, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(plain.log_weights, with_graph.log_weights, rtol=1e-9, atol=1e-9)


DIFFERS = "the captured density differs from the eager one"

Decode = Callable[[Tensor, Tensor], Tensor]


def refused(decode: Decode) -> pv.Program:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decode(z, x), 0.5).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.4 * x, 0.8).to_event(1))

    return pv.Program(model, guide)


REFUSED: dict[str, tuple[str, Decode]] = {
    "number": ("asks for the value", lambda z, x: z * (1.0 if float(z.sum()) > -1e9 else 2.0)),
    "draws": ("draws random numbers", lambda z, x: z + 0.0 * torch.rand(())),
    "rows": ("copies of the rows", lambda z, x: z + 0.1 * len(z)),
    "z in NumPy": (DIFFERS, lambda z, x: torch.as_tensor(np.tanh(z.detach().numpy()))),
    "x in NumPy": (DIFFERS, lambda z, x: z + 0.1 * torch.as_tensor(np.cos(x.numpy()))),
    "a view of x": (DIFFERS, lambda z, x: z + 0.1 * torch.from_numpy(x.numpy())),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_captured_is_evaluated_eagerly(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reason, decode = REFUSED[case]
    program, x = refused(decode), weights(40, 2)
    judge = functools.partial(pv.log_evidence, program, x, method=pv.posterior.from_guide, num_particles=300, seed=3)
    plain, state = judge(compile=False), torch.get_rng_state()
    with pytest.warns(RuntimeWarning, match=f"goes on without compilation: .*{reason}") as met:
        told = judge(compile=True)
    assert {each.filename for each in met} == {__file__}
    assert torch.equal(told.log_p, plain.log_p)
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.setattr(captured, "WORTH", 0)
    monkeypatch.setattr("pyro_vae.memory.BLOCK_ROWS", 16)
    assert torch.equal(judge(compile="auto").log_p, judge(compile=False).log_p)  # and no warning


@pytest.mark.parametrize("number", [np.max, lambda z: z[0, 0], np.mean], ids=["maximum", "first", "mean"])
def test_a_number_that_numpy_took_from_all_points_is_refused(number: Callable[[Any], Any]) -> None:
    # Unseen where layouts are compared: there latents are small.
    program = refused(lambda z, x: z * (2.0 if number(z.detach().numpy().reshape(-1, 2)) > 9.0 else 1.0))
    x, z = weights(40, 2), weights(30, 40, 2, seed=1)
    z[0, 0] = 1e5
    with pytest.warns(RuntimeWarning, match=DIFFERS):
        assert CapturedProgram(program, True, BUDGET).evaluated((x,), {"z": z}, joint) is None


@pytest.mark.parametrize("far", [False, True])
def test_a_graph_that_is_not_the_density_is_refused(far: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(function: Any, examples: Any) -> Graph:
        return Graph(lambda *points: (function(*points)[0] + 0.01,), examples, compiled=False)

    monkeypatch.setattr(captured, "Graph", wrong)
    program, x, z = refused(lambda z, x: z), weights(30, 2), weights(9, 30, 2, seed=1)
    if far:
        z[0, 7] = 1e3  # one point with a density of about -2e6 does not hide the others'
    with pytest.warns(RuntimeWarning, match=DIFFERS):
        assert CapturedProgram(program, True, BUDGET).evaluated((x,), {"z": z}, joint) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_is_told_from_differences_point_by_point(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    should = torch.tensor([-1e6, -900.0, 0.1, -1000.0, 1100.0, -torch.inf, torch.nan], dtype=torch.float64)
    assert captured._close(should, should, dtype)
    for point, size in enumerate([1e6, 1e3, 1e3, 1e3, 1.1e3]):
        for sign in (-1.0, 1.0):
            off = torch.zeros_like(should)
            off[point] = sign * size * eps
            assert captured._close(should + 10.0 * off, should, dtype)
            assert not captured._close(should + 50.0 * off, should, dtype)
    assert not captured._close(should.nan_to_num(nan=0.0, neginf=-torch.inf), should, dtype)
    assert not captured._close(should.nan_to_num(nan=torch.nan, neginf=-1e9), should, dtype)


def test_a_density_without_a_graph_leaves_the_others_theirs(made: list[Any]) -> None:
    def asks(log_joint: LogJoint, z: Values) -> Tensor:
        return log_joint.of_sites(z) * (1.0 if float(z["z"].sum()) > -1e9 else 2.0)

    curved = Curved()
    program, x, z = CapturedProgram(curved.program, True, BUDGET), weights(30, 3), weights(9, 30, 2, seed=1)
    assert program.evaluated((x,), {"z": z}, joint) is not None
    with pytest.warns(RuntimeWarning, match="asks for the value"):
        assert program.evaluated((x,), {"z": z}, asks) is None
    assert program.evaluated((x,), {"z": z}, asks) is None  # neither tried nor told again
    assert program.evaluated((x,), {"z": z}, joint) is not None
    assert program.evaluated((x,), {"z": z}, likelihood) is not None
    assert len(made) == 3


def test_points_without_any_density_wait_for_others(made: list[Any]) -> None:
    program = CapturedProgram(refused(lambda z, x: z), True, BUDGET)
    x, z = weights(30, 2), weights(9, 30, 2, seed=1)
    with pytest.warns(RuntimeWarning, match="none of the points at hand has a density"):
        assert program.evaluated((x,), {"z": torch.where(z > 0.0, torch.inf, -torch.inf)}, joint) is None
    assert program.evaluated((x,), {"z": z}, joint) is not None


def test_points_all_alike_wait_for_others(made: list[Any]) -> None:
    curved = Curved()
    program, x, z = CapturedProgram(curved.program, True, BUDGET), weights(30, 3), weights(9, 30, 2, seed=1)
    same_x, same_z = x[:1].expand(30, 3), z[:1, :1].expand(9, 30, 2)
    with pytest.warns(RuntimeWarning, match="all alike in x or in a latent"):
        assert program.evaluated((same_x,), {"z": z}, joint) is None
    assert program.evaluated((x,), {"z": same_z}, joint) is None  # and told once
    assert program.evaluated((x[:1],), {"z": z[:, :1].repeat(9, 1, 1)}, joint) is None
    assert len(made) == 0
    found = program.evaluated((x,), {"z": z}, joint)
    assert found is not None
    torch.testing.assert_close(found, curved.log_joint(x, z), rtol=1e-5, atol=1e-5)


def test_auto_counts_what_is_left(monkeypatch: pytest.MonkeyPatch, made: list[Any]) -> None:
    monkeypatch.setattr("pyro_vae.memory.BLOCK_ROWS", 16)
    known = LinearGaussian(dtype=torch.float32)
    program, x = known.program(1.3), known.marginal().sample((80,)).float()
    judge = functools.partial(pv.log_evidence, program, x, method=pv.posterior.from_guide, num_particles=200, seed=3)
    plain = judge(compile="auto")
    assert len(made) == 0
    monkeypatch.setattr(captured, "WORTH", 2**20)  # 16,000 points take a few MiB
    counted = judge(compile="auto")
    assert len(made) == 1
    torch.testing.assert_close(counted.log_p, plain.log_p, rtol=1e-5, atol=1e-5)
    assert bool(((counted.log_p - known.log_p(x)).abs() < 5.0 * counted.standard_error + 1e-3).all())
    again = judge(compile="auto")
    assert torch.equal(counted.log_p, again.log_p)
    judge(compile=False)
    assert len(made) == 2
    pv.log_evidence(program, x, compile="auto")  # the cascade: only if it is told to
    assert len(made) == 2
    cascade = pv.log_evidence(program, x, compile=True)
    assert len(made) > 2
    assert bool(((cascade.log_p - known.log_p(x)).abs() < 5.0 * cascade.standard_error + 1e-3).all())


def test_the_budget_changes_rounding_at_most(made: list[Any]) -> None:
    curved = Curved()
    x = weights(30, 3)
    judge = functools.partial(pv.log_evidence, curved.program, x, method=pv.posterior.from_guide, num_particles=100)
    large, small = judge(compile=True), judge(compile=True, memory=60_000)
    assert len(made) == 2
    torch.testing.assert_close(large.log_p, small.log_p, rtol=1e-5, atol=1e-5)
    with pytest.warns(RuntimeWarning, match="more memory than a tile may"):
        judge(compile=True, memory=3_000)


@pytest.mark.parametrize("mode", ["yes", 0, 1, None])
def test_mode_is_one_of_three(mode: Any) -> None:
    known = LinearGaussian()
    with pytest.raises(ValueError, match=f"compile={mode!r} is none of 'auto', True and False"):
        pv.log_evidence(known.program(), known.marginal().sample((2,)), compile=mode)


@pytest.mark.slow
def test_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "Graph", Graph)
    curved = Curved()
    x, z = weights(37, 3), weights(23, 37, 2, seed=1)
    found = evaluated(curved.program, x, {"z": z}, joint)
    torch.testing.assert_close(found, curved.log_joint(x, z), rtol=1e-5, atol=1e-5)
