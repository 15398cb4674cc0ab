"""log p(x) without a method: right, or marked."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_gaussian import LinearGaussian
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.evidence import Estimate
from pyro_vae.evidence.cascade import LEVELS, Block


def within(estimate: Estimate, truth: Tensor) -> Tensor:
    """Which rows are within their errors of the truth, boolean (N,)."""
    return (estimate.log_p - truth).abs() < 4.5 * estimate.standard_error + estimate.bias.abs()


class Folded:
    """z ~ N(0, 1), x ~ N(|z|, 0.2^2): two equal modes; the guide sees that at +x alone. p(x) is a skew normal density."""

    noise = 0.2

    def __init__(self) -> None:
        self.program = pv.Program(self.model, self.guide)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
            pyro.sample("x", dist.Normal(z.abs(), self.noise), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.1 * self.noise))

    def log_p(self, x: Tensor) -> Tensor:
        scale = (1.0 + self.noise**2) ** 0.5
        normal = torch.distributions.Normal(torch.zeros((), dtype=x.dtype), scale).log_prob(x)
        return normal + torch.tensor(2.0).double().log() + torch.special.log_ndtr(x / (self.noise * scale))


class Rugged:
    """z ~ N(0, I_2), x ~ N(bent(z), 0.4^2) through a network with hooks that count the points it is asked for."""

    noise = 0.4

    def __init__(self, shift: float = 0.0) -> None:
        self.decoder = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        with torch.no_grad():
            for parameter in self.decoder.parameters():
                parameter.mul_(2.0)
        self.shift, self.points = shift, 0
        self.decoder.register_forward_hook(self._called)
        self.program = pv.Program(self.model, self.guide)

    def _called(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.points += inputs[0].shape[:-1].numel()
        if output.requires_grad:
            output.register_hook(self._returned)

    def _returned(self, gradient: Tensor) -> None:
        self.points += gradient.shape[:-1].numel()

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), self.noise).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.shift + 0.2 * x[:, :2], 0.7).to_event(1))

    def draw(self, count: int) -> Tensor:
        with torch.no_grad():
            loc = self.decoder(torch.randn(count, 2, dtype=torch.float64))
        return loc + self.noise * torch.randn(count, 3, dtype=torch.float64)

    def log_p(self, x: Tensor) -> Tensor:
        """By the trapezoid rule, spectrally accurate as the integrand and all its derivatives vanish at the ends."""
        line = torch.linspace(-7.0, 7.0, 351, dtype=torch.float64)
        z = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 1, 2)
        with torch.no_grad():
            likelihood = dist.Normal(self.decoder(z), self.noise).log_prob(x).sum(-1)
        return torch.logsumexp(likelihood + dist.Normal(0.0, 1.0).log_prob(z).sum(-1), 0) + 2.0 * (line[1] - line[0]).log()


GUIDES = {"exact": (1.0, 0.0), "wide": (1.5, 0.3), "narrow": (0.5, 0.0), "hopeless": (0.3, 10.0)}


@pytest.mark.parametrize("name", GUIDES)
def test_linear_gaussian_rows_are_reliable_and_right_whatever_the_guide(name: str) -> None:
    inflate, shift = GUIDES[name]
    known = LinearGaussian()
    x = known.draw(100)
    estimate = pv.log_evidence(known.program(inflate, shift), x, seed=1)
    assert estimate.reliable.all()
    assert within(estimate, known.log_p(x)).all()
    assert (estimate.standard_error <= 0.05).all()


def test_nearly_all_rows_of_a_bent_model_are_reliable_and_these_are_right() -> None:
    rugged = Rugged(shift=0.5)
    x = rugged.draw(100)
    estimate = pv.log_evidence(rugged.program, x, seed=1)
    assert estimate.reliable.double().mean() > 0.9
    assert within(estimate, rugged.log_p(x))[estimate.reliable].all()
    assert (estimate.standard_error <= 0.05)[estimate.reliable].all()


def test_a_guide_that_covers_one_of_two_equal_modes_is_not_believed() -> None:
    """By its own weights that guide is perfect, and log 2 low."""
    folded = Folded()
    x = torch.tensor([0.8, 1.0, 1.7, 2.5], dtype=torch.float64).repeat(8)
    truth = folded.log_p(x)
    fooled = pv.log_evidence(folded.program, x, method=pv.posterior.from_guide, seed=1)
    assert fooled.reliable.all()
    assert (truth - fooled.log_p > 0.6).all()
    estimate = pv.log_evidence(folded.program, x, seed=1)
    assert estimate.reliable.all()
    # Of a wide component's one or two draws nobody can tell the scatter: half the target is let pass.
    assert ((estimate.log_p - truth).abs() < torch.clamp(4.5 * estimate.standard_error, min=0.025)).all()
    assert abs((estimate.log_p - truth).mean()) < 0.01
    assert (estimate.standard_error <= 0.05).all()


def test_rows_whose_starts_agree_by_luck_are_searched_where_others_have_two_modes() -> None:
    """z ~ N(0, 1), x ~ N(z^2, 0.3^2): three draws of the prior lie on the guide's side of zero in one row of eight."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
            pyro.sample("x", dist.Normal(z.square(), 0.3), obs=x)

    def guide(x: Tensor) -> None:
        mode = x.clamp_min(0.05).sqrt()
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(mode, 0.15 / mode + 0.05))

    x = torch.randn(1000, dtype=torch.float64).square() + 0.3 * torch.randn(1000, dtype=torch.float64)
    grid = torch.linspace(-7.0, 7.0, 14_001, dtype=torch.float64)
    log_prior = dist.Normal(torch.zeros_like(grid), 1.0).log_prob(grid)
    truth = torch.logsumexp(log_prior + dist.Normal(grid.square(), 0.3).log_prob(x[:, None]), 1) + math.log(0.001)
    estimate = pv.log_evidence(pv.Program(model, guide), x, seed=1)
    assert estimate.reliable.double().mean() > 0.99
    assert (estimate.log_p - truth).abs()[estimate.reliable].max() < 0.3  # a mode that is missed costs log 2


@pytest.mark.parametrize("x", [-2.0, 0.1, 1.0, 6.0, 30.0])
def test_a_long_shoulder_of_a_narrow_peak_is_not_missed(x: float) -> None:
    """z ~ Exponential(0.7), x ~ StudentT(3, z, 0.5), the guide narrow at x: at x = 6 a tenth of the mass is near zero.

    100 repetitions; of the rows that are called reliable not one in fifty may be beyond 4.5 errors.
    """
    rate = torch.tensor(0.7, dtype=torch.float64)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.StudentT(3.0, pyro.sample("z", dist.Exponential(rate)), 0.5), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(x.abs().log(), 0.1))

    rows = torch.full((100,), x, dtype=torch.float64)
    z = torch.linspace(0.0, 80.0, 800_001, dtype=torch.float64)
    density = torch.exp(dist.Exponential(rate).log_prob(z) + dist.StudentT(3.0, z, 0.5).log_prob(rows[0]))
    truth = torch.log(torch.trapezoid(density, z))
    estimate = pv.log_evidence(pv.Program(model, guide), rows, seed=1)
    assert estimate.reliable.double().mean() > 0.5
    assert (~within(estimate, truth))[estimate.reliable].double().mean() <= 0.02


@pytest.mark.parametrize("target", [0.2, 0.01])
def test_the_target_is_reached_on_reliable_rows(target: float) -> None:
    rugged = Rugged(shift=0.5)
    x = rugged.draw(30)
    estimate = pv.log_evidence(rugged.program, x, target=target, seed=3)
    assert estimate.reliable.double().mean() > 0.7
    assert (estimate.standard_error <= target)[estimate.reliable].all()
    assert within(estimate, rugged.log_p(x))[estimate.reliable].all()


def test_a_closer_target_costs_more() -> None:
    rugged = Rugged()
    x = rugged.draw(20)
    spent = [int(pv.log_evidence(rugged.program, x, target=target).evaluations.sum()) for target in (0.1, 0.01)]
    assert spent[1] > 2 * spent[0]


def test_rows_that_never_pass_say_why_and_keep_their_number() -> None:
    """A millionth of a nat is beyond any number of particles; the numbers are right by their own errors all the same."""
    rugged = Rugged()
    x = rugged.draw(6)
    estimate = pv.log_evidence(rugged.program, x, target=1e-6)
    assert not estimate.reliable.any()
    assert all("standard error above 1e-06" in reason or "k-hat" in reason for reason in estimate.reasons)
    assert torch.isfinite(estimate.log_p).all()
    assert within(estimate, rugged.log_p(x)).all()
    assert "6 of 6 rows are not reliable" in str(estimate)


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_evaluations_are_the_passes_through_the_decoder(shift: float) -> None:
    """Both ways, counted by hooks; the few passes that measure memory are not charged to any row."""
    rugged = Rugged(shift)
    x = rugged.draw(100)
    rugged.program.layout((x,))
    rugged.points = 0
    estimate = pv.log_evidence(rugged.program, x, seed=2)
    assert int(estimate.evaluations.sum()) == pytest.approx(rugged.points, rel=0.01)
    assert (estimate.evaluations > 100).all()
    assert len(estimate.evaluations.unique()) > 1


@pytest.mark.parametrize("method", [pv.posterior.from_guide, pv.posterior.from_prior])
def test_evaluations_of_plain_sampling_are_its_particles(method: pv.posterior.Engine) -> None:
    rugged = Rugged()
    x = rugged.draw(50)
    rugged.program.layout((x,))
    rugged.points = 0
    estimate = pv.log_evidence(rugged.program, x, method=method, num_particles=300)
    assert estimate.evaluations.tolist() == [300] * 50
    assert rugged.points == pytest.approx(300 * 50, rel=0.02)  # and the few that measure the memory


def test_seeds_repeat_and_the_budget_changes_rounding_alone() -> None:
    rugged = Rugged(shift=1.0)
    x = rugged.draw(20)
    a, b, small, other = (
        pv.log_evidence(rugged.program, x, seed=seed, memory=memory)
        for seed, memory in ((1, 2**30), (1, 2**30), (1, 2**19), (2, 2**30))
    )
    assert torch.equal(a.log_p, b.log_p)
    assert a.engine == b.engine == small.engine
    torch.testing.assert_close(small.log_p, a.log_p, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(small.standard_error, a.standard_error, rtol=1e-5, atol=1e-7)
    assert torch.equal(small.evaluations, a.evaluations)
    assert not torch.equal(other.log_p, a.log_p)


def test_equal_rows_get_independent_errors() -> None:
    """300 times one x: the errors scatter as they say, none is a copy of another."""
    known = LinearGaussian(dim=4, latent_dim=2)
    x = known.draw(1).repeat(300, 1)
    estimate = pv.log_evidence(known.program(1.6, 0.5), x, seed=5)
    assert len(estimate.log_p.unique()) == 300
    score = (estimate.log_p - known.log_p(x)) / estimate.standard_error
    assert abs(score.mean()) < 4.5 / 300**0.5 + 0.1  # the bias of a logarithm is a fraction of its error
    assert abs(score.var() - 1.0) < 4.5 * (2.0 / 300) ** 0.5 + 0.15


def test_progress_is_told_level_by_level() -> None:
    rugged, told = Rugged(shift=3.0), []
    x = rugged.draw(30)
    pv.log_evidence(rugged.program, x, on_block=lambda *block: told.append(block))
    assert told[0] == ("guide", 30, 30)
    assert told[1][0] == "laplace"
    assert all(done <= given <= 30 for _, done, given in told)
    assert [given for _, _, given in told] == sorted((given for _, _, given in told), reverse=True)


def test_ctrl_c_after_a_block_returns_the_finished_rows() -> None:
    known = LinearGaussian(dim=4, latent_dim=1)
    x = known.draw(1100)
    blocks: list[int] = []

    def on_block(name: str, done: int, given: int) -> None:
        blocks.append(done)
        raise KeyboardInterrupt

    for method in (None, pv.posterior.from_guide):
        blocks.clear()
        estimate = pv.log_evidence(known.program(1.1), x, method=method, on_block=on_block)
        done = blocks[0]
        assert 0 < done < 1100
        assert len(estimate) == 1100
        gap = (estimate.log_p - known.log_p(x)).abs()[:done]
        assert (gap < 8.0 * estimate.standard_error[:done]).all()  # few, bounded weights: their error is uncertain
        assert estimate.log_p[done:].isnan().all()
        assert not estimate.reliable[done:].any()
        assert all("interrupted" in reason for reason in estimate.reasons[done:])
        assert torch.isfinite(torch.tensor(estimate.mean))
        assert f"{1100 - done} of them have no value" in str(estimate)


class Interrupted(Rugged):
    """Its decoder raises KeyboardInterrupt when told to."""

    now = False

    def _called(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if self.now:
            raise KeyboardInterrupt
        super()._called(module, inputs, output)


@pytest.mark.parametrize("level", ["guide", "laplace"])
def test_ctrl_c_inside_the_decoder_keeps_what_is_known(level: str) -> None:
    """During the first level rows not reached have no number; later ones have that of the level before, and its doubts."""
    rugged = Interrupted(shift=2.0)
    x = rugged.draw(1100 if level == "guide" else 60)

    def on_block(name: str, done: int, given: int) -> None:
        rugged.now = level == "guide" or name == level

    estimate = pv.log_evidence(rugged.program, x, target=0.2, on_block=on_block)
    assert rugged.now
    rugged.now = False
    reached = torch.tensor(["interrupted" not in reason for reason in estimate.reasons])
    assert torch.equal(torch.isfinite(estimate.log_p), reached)
    assert reached.any()
    assert reached.all() == (level == "laplace")
    truth = rugged.log_p(x[:60])
    assert within(estimate.rows(60), truth)[estimate.reliable[:60]].all()


@pytest.mark.parametrize("method", [None, pv.posterior.from_guide])
def test_ctrl_c_before_anything_is_known_stops_all(method: pv.posterior.Engine | None) -> None:
    rugged = Interrupted()
    x = rugged.draw(5)
    rugged.program.layout((x,))
    rugged.now = True
    with pytest.raises(KeyboardInterrupt):
        pv.log_evidence(rugged.program, x, method=method)


def test_more_rows_than_a_pilot_may_hold_are_judged_in_pieces() -> None:
    """A level whose first pilot takes 1,024 draws works on some forty rows at a time; all of 100 are answered."""
    folded = Folded()
    x = torch.linspace(0.3, 3.0, 100, dtype=torch.float64)
    block = Block(LEVELS[3], folded.program, (x,), 0.05, seed=1, memory=2**30)
    estimate = block.answer(last=False)
    assert len(estimate) == 100
    assert estimate.reliable.all()
    assert ((estimate.log_p - folded.log_p(x)).abs() < 0.05).all()
    assert (estimate.evaluations > 1024).all()
