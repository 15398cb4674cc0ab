"""Monte Carlo EM against closed forms and quadrature: what it reports, where it ends."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from em.curve import Curve, line_data
from linear_gaussian import LinearGaussian, kl_normal
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR

import pyro_vae as pv
from pyro_vae.em.maximising import MStep
from pyro_vae.em.weighing import EStep, Weighed
from pyro_vae.learning.updates import Update
from pyro_vae.posterior import Annealed, at_points

HMC = Annealed(start=at_points, num_leapfrog=5, first_steps=4, most_steps=4)
ENGINES = {"modes": pv.em.monte_carlo.WARM, "chains": HMC, "guide": pv.posterior.from_guide}


# What is reported


@pytest.mark.parametrize("name", ENGINES)
def test_the_reported_log_p_is_that_of_quadrature(name: str) -> None:
    """In training with parameters that stay, in validation with those of each epoch's end, within the stated errors."""
    curve, x, valid = Curve(), line_data(80), line_data(40, seed=1)
    still = pv.em.fit(curve.program, x, engine=ENGINES[name], epochs=2, batch_size=40, lr=1e-300, progress=False)
    exact = curve.log_p(x).mean().item()
    for log_p, error, bias in zip(still.log_p, still.standard_error, still.bias, strict=True):
        assert abs(log_p - bias - exact) < 4.5 * error
        assert error < 0.05
    before = curve.log_p(valid).mean().item()
    seen: list[float] = []

    def look(epoch: int, history: pv.em.EMHistory) -> None:
        seen.append(curve.log_p(valid).mean().item())

    history = pv.em.fit(
        curve.program, x, valid, engine=ENGINES[name], epochs=4, batch_size=40, lr=3e-2, callbacks=[look], progress=False
    )
    told = zip(history.valid_log_p, history.valid_standard_error, history.valid_bias, seen, strict=True)
    assert all(abs(log_p - bias - exact) < 4.5 * error for log_p, error, bias, exact in told)
    assert seen[-1] > before + 0.2
    assert history.log_p[-1] > exact + 0.1
    assert min(map(len, (history.evaluations, history.learning_rate, history.seconds, history.reliable))) == 4
    assert all(0.0 <= share <= 1.0 for share in (*history.reliable, *history.valid_reliable))


def test_validation_rows_change_nothing_else() -> None:
    ends = []
    for valid in (None, line_data(30, seed=1)):
        curve = Curve()
        history = pv.em.fit(curve.program, line_data(60), valid, epochs=2, batch_size=32, lr=1e-2, progress=False)
        ends.append((history.log_p, curve.state()))
    assert ends[0][0] == ends[1][0]
    assert all(torch.equal(value, ends[1][1][name]) for name, value in ends[0][1].items())


def test_evaluations_count_both_steps() -> None:
    """Guide draws cost a pass each, and a gradient two for each particle."""
    curve = Curve()
    engine = pv.posterior.from_guide
    history = pv.em.fit(curve.program, line_data(30), engine=engine, num_particles=40, m_steps=3, epochs=1, progress=False)
    assert history.evaluations == [40 + 2 * 40 * 3]


# The M-step


def weighted_regression(part: Weighed) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Slope, offset, residual variances that maximise sum_ik s_ik log N(x_i; W z_ik + b, diag v), by normal equations."""
    x, z, s = part.rows[0].numpy(), part.z["z"].numpy(), part.shares.numpy()
    design = np.concatenate([z, np.ones((*z.shape[:2], 1))], -1)
    gram = np.einsum("kn,kni,knj->ij", s, design, design)
    fitted = np.linalg.solve(gram, np.einsum("kn,kni,nd->id", s, design, x)).T
    residual = x[None] - np.einsum("kni,di->knd", design, fitted)
    return fitted[:, :-1], fitted[:, -1], np.einsum("kn,knd->d", s, residual**2) / len(x)


def test_the_m_step_ends_at_the_weighted_regression_and_only_climbs() -> None:
    decoder, log_scale = nn.Linear(2, 4).double(), nn.Parameter(torch.zeros(4, dtype=torch.float64))
    spare = nn.Linear(4, 2).double()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), log_scale.exp()).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(spare(x), 1.0).to_event(1))

    program = pv.Program(model, guide)
    x = LinearGaussian(dim=4, latent_dim=2).draw(50)
    parts, _ = EStep(program, pv.posterior.from_guide, 30, 2**30, x.new_full((50, 2), math.nan))((x,), torch.arange(50), 0)
    assert len(parts) == 1
    leaves = [*decoder.parameters(), log_scale]
    update = Update(leaves, torch.optim.Adam(leaves, lr=5e-2))
    values = MStep(program, update, 500, 2**30, fit_guide=False)(parts)
    assert values[-1] > values[0] + 0.5
    assert min(np.diff(values[:40])) > 0.0  # Adam's first small steps go up, each of them
    weight, bias, variance = weighted_regression(parts[0])
    assert np.allclose(decoder.weight.detach().numpy(), weight, atol=1e-4)
    assert np.allclose(decoder.bias.detach().numpy(), bias, atol=1e-4)
    assert np.allclose((2.0 * log_scale).exp().detach().numpy(), variance, rtol=1e-3)


def test_the_objective_is_the_weighted_mean_over_rows_in_any_pieces() -> None:
    curve, x = Curve(), line_data(37)
    estep = EStep(curve.program, pv.posterior.from_guide, 25, 2**30, x.new_full((37, 1), math.nan))
    parts, _ = estep((x,), torch.arange(37), 5)
    part = parts[0]
    assert torch.allclose(part.shares.sum(0), torch.ones(37, dtype=torch.float64))
    z = part.z["z"]
    with torch.no_grad():
        log_joint = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
        log_joint += dist.Normal(curve.decoder(z), curve.log_scale.exp()).log_prob(x).sum(-1)
        loc, log_scale = curve.encoder(x).unsqueeze(-1).unbind(-2)
        log_q = dist.Normal(loc, log_scale.exp()).log_prob(z).sum(-1)
        shares = torch.softmax(log_joint - log_q, 0)
        expected = (shares * log_joint).sum(0).mean(), (shares * (log_joint + log_q)).sum(0).mean()
    leaves = [curve.log_scale]
    for memory in (2**30, 2**18):
        for fit_guide, value in zip((False, True), expected, strict=True):
            update = Update(leaves, torch.optim.SGD(leaves, lr=0.0))
            found = MStep(curve.program, update, 1, memory, fit_guide=fit_guide)(parts)
            assert found[0] == pytest.approx(value.item(), abs=1e-10)
            gradient = curve.log_scale.grad
            assert gradient is not None
            residual = (x - curve.decoder(z)) / curve.log_scale.exp()
            # d log N / d log s = r^2 - 1 for each number
            by_hand = -(shares * (residual.square() - 1.0).sum(-1)).sum(0).mean()
            assert gradient.item() == pytest.approx(by_hand.item(), abs=1e-10)


# Where it ends


def largest_log_p(x: Tensor, latent_dim: int) -> float:
    """Mean log-likelihood of probabilistic PCA at its maximum (Tipping & Bishop 1999, eq. 3.8), from eigenvalues."""
    values = np.sort(np.linalg.eigvalsh(np.cov(x.double().numpy().T, bias=True)))[::-1]
    dim, noise = len(values), values[latent_dim:].mean()
    log_det = np.log(values[:latent_dim]).sum() + (dim - latent_dim) * math.log(noise)
    return float(-0.5 * (dim * math.log(2.0 * math.pi) + log_det + dim))


def linear_vae(dim: int, latent_dim: int) -> pv.VAE:
    torch.manual_seed(0)
    return pv.VAE(
        prior=pv.priors.StandardNormal(latent_dim),
        likelihood=pv.likelihoods.Normal(pv.nets.MLP(latent_dim, dim, hidden=()), scale=pv.likelihoods.Learned()),
        guide=pv.guides.DiagonalNormal(pv.nets.MLP(dim, hidden=(8,)), latent_dim=latent_dim),
    )


@pytest.mark.parametrize("engine", [pv.em.monte_carlo.WARM, HMC], ids=["modes", "chains"])
def test_a_linear_decoder_approaches_the_maximum_of_ppca(engine: pv.posterior.Engine) -> None:
    x = LinearGaussian(dim=6, latent_dim=2, dtype=torch.float32).draw(300)
    vae, best = linear_vae(6, 2), largest_log_p(x, 2)
    before = {name: value.clone() for name, value in vae.encoder.state_dict().items()}
    history = pv.em.fit(
        vae, x, engine=engine, num_particles=16, epochs=12, batch_size=150, lr=0.1, m_steps=8, progress=False,
        schedule=lambda optimiser: StepLR(optimiser, 4, gamma=0.3),
    )  # fmt: skip
    reached = pv.log_evidence(vae, x, method=pv.evidence.exact).mean
    assert best - 0.05 < reached < best + 1e-4
    assert history.log_p[0] < best - 0.5
    assert abs(history.log_p[-1] - history.bias[-1] - reached) < 4.5 * history.standard_error[-1] + 0.02
    assert all(torch.equal(value, before[name]) for name, value in vae.encoder.state_dict().items())


def test_a_plain_program_with_a_constrained_latent() -> None:
    """Counts whose rate is Gamma(3, 3 / m): their mean fits m, and log p(x) is negative binomial."""
    x = torch.distributions.NegativeBinomial(3.0, torch.tensor(4.0 / 7.0, dtype=torch.float64)).sample((200,))

    def model(x: Tensor) -> None:
        m = pyro.param("m", torch.tensor(1.0, dtype=torch.float64), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(x.new_tensor(3.0), x.new_tensor(3.0)))
            pyro.sample("x", dist.Poisson(m * rate), obs=x)

    def guide(x: Tensor) -> None:
        a = pyro.param("a", torch.tensor(0.1, dtype=torch.float64))
        with pyro.plate("data", len(x)):
            pyro.sample("rate", dist.LogNormal(a * (x - 3.0), 0.7))

    def log_p(m: float) -> float:
        p = torch.tensor(m / (3.0 + m), dtype=torch.float64)
        return torch.distributions.NegativeBinomial(3.0, p).log_prob(x).mean().item()

    history = pv.em.fit(
        pv.Program(model, guide), x, epochs=14, batch_size=200, lr=0.15, progress=False,
        schedule=lambda optimiser: StepLR(optimiser, 5, gamma=0.3),
    )  # fmt: skip
    m = pyro.param("m").item()
    assert m == pytest.approx(x.mean().item(), rel=0.02)
    assert abs(history.log_p[-1] - history.bias[-1] - log_p(m)) < 4.5 * history.standard_error[-1] + 1e-3
    assert history.reliable[-1] > 0.6  # k-hat of 64 weights is a strict judge
    assert pyro.param("a").item() == 0.1


def test_the_guide_learns_the_posterior_from_the_particles() -> None:
    """Wake-phi with the model held fixed: KL(p(z | x) || q(z | x)) in closed form goes to nothing."""
    known = LinearGaussian(dim=4, latent_dim=2)
    encoder, factor = nn.Linear(4, 2).double(), nn.Parameter(torch.eye(2, dtype=torch.float64))

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(encoder(x), scale_tril=factor.tril()))

    def gap(x: Tensor) -> float:
        with torch.no_grad():
            exact = torch.linalg.cholesky(known.covariance)
            return kl_normal(known.posterior_mean(x), exact, encoder(x), factor.tril()).mean().item()

    x = known.draw(200)
    before = gap(x)
    history = pv.em.fit(
        pv.Program(known.model, guide), x, epochs=10, batch_size=100, lr=0.1, fit_guide=True, progress=False,
        schedule=lambda optimiser: StepLR(optimiser, 4, gamma=0.3),
    )  # fmt: skip
    assert before > 0.5
    assert gap(x) < 0.01
    assert history.log_p[0] == pytest.approx(known.log_p(x).mean().item(), abs=0.01)


def test_missing_values() -> None:
    x = LinearGaussian(dim=4, latent_dim=1, dtype=torch.float32).draw(120)
    x[torch.rand(120, 4, generator=torch.Generator().manual_seed(2)) < 0.2] = torch.nan
    torch.manual_seed(0)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(1),
        likelihood=pv.likelihoods.Normal(pv.nets.MLP(1, 4, hidden=()), scale=pv.likelihoods.Learned(), missing=True),
        guide=pv.guides.DiagonalNormal(pv.nets.MLP(4, hidden=(8,)), latent_dim=1),
    )
    before = pv.log_evidence(vae, x, method=pv.evidence.exact).mean
    history = pv.em.fit(vae, x, epochs=6, batch_size=60, lr=0.05, progress=False)
    after = pv.log_evidence(vae, x, method=pv.evidence.exact).mean
    assert after > before + 0.5
    assert abs(history.log_p[-1] - after) < 0.2


def test_a_row_without_density_costs_only_itself() -> None:
    """A row outside the support has no particles: it is not reliable, and the others are fitted as without it."""
    scale = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Exponential((z + scale).exp()), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))

    x = torch.linspace(0.1, 3.0, 40, dtype=torch.float64)
    x[7] = -1.0
    history = pv.em.fit(pv.Program(model, guide), x, epochs=2, batch_size=40, lr=0.05, progress=False)
    assert history.reliable[-1] <= 39 / 40
    assert all(map(math.isfinite, history.log_p + history.standard_error))
    assert math.isfinite(scale.item())
    assert scale.item() != 0.0


# Bad input


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"engine": 3}, TypeError, "engine=3 is no engine: give pv.posterior.laplace"),
        ({"engine": pv.evidence.exact}, TypeError, "is no engine"),
        ({"m_steps": 0}, ValueError, "m_steps=0 must be a whole number of at least 1"),
        ({"num_particles": 1.5}, ValueError, "num_particles=1.5 must be a whole number"),
        ({"epochs": 0}, ValueError, "epochs=0"),
        ({"lr": -1.0}, ValueError, "lr=-1.0 must be positive"),
        ({"clip_norm": 0.0}, ValueError, "clip_norm=0.0 must be positive"),
        (
            {"x": torch.full((4, 3), math.nan, dtype=torch.float64)},
            ValueError,
            "x has NaN or infinite values in 4 of 4",
        ),
        ({"valid": torch.zeros(4, 2, dtype=torch.float64)}, ValueError, "Rows of x have shapes"),
        ({"optimiser": torch.optim.LBFGS}, ValueError, "LBFGS needs a closure"),
    ],
)
def test_bad_input_is_told(changes: dict[str, Any], error: type[Exception], told: str) -> None:
    given = {"x": line_data(8), "progress": False, **changes}
    with pytest.raises(error, match=told):
        pv.em.fit(Curve().program, given.pop("x"), **given)


def test_a_model_without_parameters_and_a_scale_that_no_m_step_sets() -> None:
    known = LinearGaussian()
    with pytest.raises(ValueError, match="The model has no parameter with a gradient"):
        pv.em.fit(known.program(), known.draw(8), progress=False)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(1),
        likelihood=pv.likelihoods.Normal(pv.nets.MLP(1, 3, hidden=()), scale=pv.likelihoods.Optimal()),
        guide=pv.guides.DiagonalNormal(pv.nets.MLP(3, hidden=(4,)), latent_dim=1),
    )
    with pytest.raises(ValueError, match=r"has the scale Optimal\(\).*give pv\.likelihoods\.Learned"):
        pv.em.fit(vae, torch.randn(8, 3), progress=False)


def test_a_step_too_far_is_told_with_its_batch(tmp_path: Path) -> None:
    curve = Curve()
    with pytest.raises(FloatingPointError, match=r"Epoch 1, batch \d: .*Try a smaller lr.*keeps the last good state"):
        pv.em.fit(curve.program, line_data(20), batch_size=10, lr=1e4, checkpoint=tmp_path, progress=False)
