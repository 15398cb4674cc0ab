"""What goes wrong in users' programs stays in its row, is told, and leaves the other rows right."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.evidence import Estimate, blocks

METHODS: dict[str, pv.posterior.Engine | None] = {
    "cascade": None,
    "laplace": pv.posterior.laplace,
    "annealed": pv.posterior.Annealed(most_steps=32),
}
every_method = pytest.mark.parametrize("method", METHODS)


def program_of(
    decoder: Callable[[Tensor], Tensor],
    noise: float = 0.5,
    dim: int = 2,
    factor: Callable[[Tensor, Tensor], Tensor] | None = None,
    encoder: Callable[[Tensor], Tensor] = torch.zeros_like,
) -> pv.Program:
    """z ~ N(0, I), x ~ N(decoder(z), noise^2), times exp(factor(x, z)); q(z | x) = N(encoder(x), 1) in as many columns."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(dim, dtype=x.dtype), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), noise).to_event(1), obs=x)
            if factor is not None:
                pyro.factor("factor", factor(x, z))

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc = encoder(x)[:, :1].expand(-1, dim)
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    return pv.Program(model, guide)


def on_a_grid(log_joint: Callable[[Tensor], Tensor], dim: int = 2, half_width: float = 8.0, points: int = 801) -> Tensor:
    """log of the integral over z in R^dim, log_joint: (P, dim) -> (P, N), by the midpoint rule."""
    line = (torch.arange(points, dtype=torch.float64) + 0.5) * (2.0 * half_width / points) - half_width
    z = torch.stack(torch.meshgrid(*[line] * dim, indexing="ij"), -1).reshape(-1, dim)
    return torch.logsumexp(log_joint(z), 0) + dim * math.log(2.0 * half_width / points)


def log_normal(value: Tensor, loc: Tensor, scale: float) -> Tensor:
    return torch.distributions.Normal(loc, scale).log_prob(value).sum(-1)


def right(estimate: Estimate, truth: Tensor) -> Tensor:
    """Which rows are within their errors, boolean (N,)."""
    return (estimate.log_p - truth).abs() < 4.5 * estimate.standard_error + estimate.bias.abs()


def evaluate(method: str, program: pv.Program, x: Tensor, seed: int = 1) -> Estimate:
    engine = METHODS[method]
    if engine is None:
        return pv.log_evidence(program, x, seed=seed)
    return pv.log_evidence(program, x, method=engine, num_particles=400, seed=seed)


@every_method
def test_a_decoder_that_overflows_far_out_does_no_harm(method: str) -> None:
    """exp(exp(1.5 z)) is inf from z = 3 on, in float32: x is improbable there, a weight of zero is the truth."""

    def decoder(z: Tensor) -> Tensor:
        return torch.cat([torch.exp(torch.exp(1.5 * z[..., :1])), z[..., 1:]], -1)

    program = program_of(decoder, encoder=lambda x: 0.2 * x.clamp(-3.0, 3.0))
    x = torch.tensor([[1.2, 0.3], [2.0, -1.0], [3.0, 0.5], [2.5, 2.0]])
    estimate = evaluate(method, program, x)
    wide = x.double()
    truth = on_a_grid(
        lambda z: log_normal(wide, decoder(z[:, None]).clamp_max(1e30), 0.5) + log_normal(z[:, None], torch.zeros(2), 1.0)
    )
    assert torch.isfinite(estimate.log_p).all()
    assert estimate.reliable.any()
    assert right(estimate, truth)[estimate.reliable].all()
    assert (estimate.log_p - truth).abs().max() < 0.5


@every_method
def test_nan_for_some_latents_is_told_and_never_silent(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the decoder is NaN nobody knows the density: no row may pass that has drawn there."""
    monkeypatch.setattr(blocks, "LEVELS", blocks.LEVELS[:2])  # the others take their time over what cannot be mended

    def decoder(z: Tensor) -> Tensor:
        return torch.where(z[..., :1] > 0.0, torch.log(z[..., :1] - 0.5), z[..., :1]).expand(*z.shape[:-1], 2)

    program = program_of(decoder)
    x = torch.tensor([[-1.0, -0.5], [-0.3, 0.2], [0.1, 0.4]], dtype=torch.float64)
    estimate = evaluate(method, program, x)
    assert not estimate.reliable.any()
    assert all("NaN" in reason for reason in estimate.reasons)
    assert torch.isfinite(estimate.log_p).all()
    assert math.isfinite(estimate.mean)


@every_method
def test_a_density_that_is_zero_on_half_of_the_space(method: str) -> None:
    """log p(x, z) = -inf for z_0 < 0: the posterior is cut, which no Gaussian knows; p(x) by quadrature."""

    def cut(_: Tensor, z: Tensor) -> Tensor:
        return torch.where(z[..., 0] < 0.0, -torch.inf, 0.0)

    x = torch.tensor([[1.5, 0.3], [0.2, -1.0], [-0.4, 0.5], [-1.0, 2.0]], dtype=torch.float64)
    estimate = evaluate(method, program_of(lambda z: z, factor=cut), x)

    def log_joint(z: Tensor) -> Tensor:
        z = z[:, None]
        return log_normal(x, z, 0.5) + log_normal(z, torch.zeros(2), 1.0) + cut(x, z)

    assert right(estimate, on_a_grid(log_joint, points=800)).all()  # 0 is between two cells
    assert (estimate.standard_error < 0.2).all()
    assert method != "cascade" or estimate.reliable.all()


@every_method
def test_collapsed_latents_are_no_obstacle(method: str) -> None:
    """The decoder ignores two of three latents: p(x) is that of the one, N(0, 1 + 0.25) in each of two equal columns."""
    x = torch.tensor([[0.3, 0.4], [-1.0, 2.0], [2.5, 2.4]], dtype=torch.float64)
    program = program_of(lambda z: z[..., :1].expand(*z.shape[:-1], 2), dim=3)
    estimate = evaluate(method, program, x)
    covariance = torch.tensor([[1.25, 1.0], [1.0, 1.25]], dtype=torch.float64)
    truth = torch.distributions.MultivariateNormal(torch.zeros(2, dtype=torch.float64), covariance).log_prob(x)
    assert estimate.reliable.all()
    assert right(estimate, truth).all()
    assert (estimate.standard_error < 0.1).all()


@every_method
def test_a_flat_likelihood_leaves_the_prior(method: str) -> None:
    """The decoder ignores z: log p(x) is the log-density of the noise, whatever the guide says."""
    program = program_of(lambda z: torch.zeros_like(z) + 0.7, encoder=lambda x: x.clamp(-1.0, 1.0))
    x = torch.tensor([[0.3, 0.4], [-1.0, 2.0]], dtype=torch.float64)
    estimate = evaluate(method, program, x)
    assert estimate.reliable.all()
    assert right(estimate, log_normal(x, torch.tensor(0.7).double(), 0.5)).all()


@every_method
def test_a_flat_direction_without_a_maximum(method: str) -> None:
    """The posterior is a ridge: only z_0 + z_1 is seen, closely; the Hessian is nearly singular across."""
    program = program_of(lambda z: z.sum(-1, keepdim=True).expand(*z.shape[:-1], 2), noise=0.01)
    x = torch.tensor([[0.3, 0.31], [-1.0, -1.0], [2.5, 2.49]], dtype=torch.float64)
    estimate = evaluate(method, program, x)
    covariance = torch.full((2, 2), 2.0, dtype=torch.float64) + 1e-4 * torch.eye(2, dtype=torch.float64)
    truth = torch.distributions.MultivariateNormal(torch.zeros(2, dtype=torch.float64), covariance).log_prob(x)
    assert estimate.reliable.all()
    assert right(estimate, truth).all()


@every_method
def test_rows_outside_the_support_are_impossible_and_said_so(method: str) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0, dtype=x.dtype), 1.5))
            pyro.sample("x", dist.Exponential(rate), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("rate", dist.Gamma(torch.tensor(2.0, dtype=x.dtype), 1.5).expand([len(x)]))

    x = torch.tensor([0.4, -1.0, 3.0, torch.nan, 1.0], dtype=torch.float64)
    estimate = evaluate(method, pv.Program(model, guide), x)
    good = torch.tensor([0, 2, 4])
    truth = math.log(2.0) + 2.0 * math.log(1.5) - 3.0 * torch.log(1.5 + x)  # Lomax
    assert right(estimate, truth)[good].all()
    assert (estimate.standard_error < 0.1)[good].all()
    assert method != "cascade" or estimate.reliable[good].all()
    assert estimate.log_p[1] == -torch.inf
    assert "outside the support" in estimate.reasons[1]
    assert estimate.log_p[3].isnan()
    assert "NaN" in estimate.reasons[3]
    assert estimate.mean == -torch.inf
    assert "1 of them have no value and are not in the mean" in str(estimate)


def broken_row(where: float) -> dict[str, pv.Program]:
    """Linear programs, z ~ N(0, I_2), x ~ N(z, 1/4), that break for rows with x_0 above `where`, each in its own way."""

    def nan_density(x: Tensor, z: Tensor) -> Tensor:
        return torch.where(x[..., 0] > where, torch.nan, 0.0) + 0.0 * z[..., 0]

    def no_density(x: Tensor, z: Tensor) -> Tensor:
        return torch.where(x[..., 0] > where, -torch.inf, 0.0) + 0.0 * z[..., 0].detach()

    def infinite_guide(x: Tensor) -> Tensor:
        return torch.where(x > where, torch.inf, 0.5 * x)

    def far_guide(x: Tensor) -> Tensor:
        return torch.where(x > where, 1e8, 0.5 * x)

    return {
        "NaN density": program_of(lambda z: z, factor=nan_density),
        "no density": program_of(lambda z: z, factor=no_density),
        "infinite guide": program_of(lambda z: z, encoder=infinite_guide),
        "far guide": program_of(lambda z: z, encoder=far_guide),
    }


@every_method
@pytest.mark.parametrize("fault", broken_row(0.0))
def test_one_bad_row_does_not_change_the_others(method: str, fault: str) -> None:
    """The others are right with and without it, as reliable, and as precise; the bad one is told, or right as well."""
    x = torch.tensor([[0.5, 0.1], [0.0, 0.0], [-1.0, 2.0], [99.0, 0.0], [1.5, -0.4]], dtype=torch.float64)
    good = torch.tensor([0, 1, 2, 4])
    program, truth = broken_row(50.0)[fault], log_normal(x, torch.zeros(2).double(), 1.25**0.5)
    with_it, without = evaluate(method, program, x), evaluate(method, program, x[good])
    assert right(with_it, truth)[good].all()
    assert right(without, truth[good]).all()
    assert with_it.reliable[good].all()
    assert without.reliable.all()
    assert (with_it.standard_error[good] < 0.1).all()
    assert right(with_it, truth)[3] or not with_it.reliable[3]
    assert not with_it.log_p[3].isnan()
    assert with_it.reasons[3] or method != "laplace" or "guide" in fault


@every_method
@pytest.mark.parametrize("far", [1e18, 1e19, 1e30])
def test_a_row_whose_density_is_all_but_nothing_stays_alone(method: str, far: float) -> None:
    """Its log density is -1e37, next to which ten nats are nothing, or no number: the others are right."""
    program = program_of(lambda z: z)
    x = torch.randn(5, 2)
    x[4] *= far
    estimate = pv.log_evidence(program, x, method=METHODS[method], seed=1)
    truth = dist.Normal(0.0, 1.25**0.5).log_prob(x[:4]).sum(-1)
    assert ((estimate.log_p[:4] - truth).abs() < 5.0 * estimate.standard_error[:4] + 1e-3).all()
    assert estimate.log_p[4] < -1e30
    assert estimate.reasons[4] or estimate.standard_error[4] > 1e20


@pytest.mark.parametrize("far", [torch.inf, 1e9])
def test_a_guide_that_overflows_for_one_row_spoils_no_curvature_of_the_others(far: float) -> None:
    """x ~ N((z_0 z_1, z_0^2 - z_1), 1/4): some Hessians are not negative; how they are mended is no matter of that row."""

    def bent(z: Tensor) -> Tensor:
        return torch.stack([z[..., 0] * z[..., 1], z[..., 0].square() - z[..., 1]], -1)

    x = torch.tensor([[0.5, 0.1], [0.0, 0.0], [-1.0, 2.0], [1.5, -0.4], [0.3, -1.5], [99.0, 0.0]], dtype=torch.float64)
    spoilt, usual = (
        pv.log_evidence(program_of(bent, encoder=lambda x, far=far: torch.where(x > 50.0, far, 0.2 * x)), x, seed=1)
        for far in (far, 1.0)
    )
    truth = on_a_grid(lambda z: log_normal(x, bent(z[:, None]), 0.5) + log_normal(z[:, None], torch.zeros(2), 1.0))
    assert spoilt.reliable[:5].all()
    assert ((spoilt.log_p - truth).abs()[:5] < 0.2).all()
    torch.testing.assert_close(spoilt.log_p[:5], usual.log_p[:5], rtol=0.0, atol=0.1)
    assert torch.isfinite(spoilt.log_p[5])


@pytest.mark.parametrize("method", [pv.posterior.from_guide, pv.posterior.from_prior])
def test_a_row_of_nan_leaves_the_numbers_of_plain_sampling_alone(method: pv.posterior.Engine) -> None:
    """Exactly: its place is kept, so that every other row keeps its random numbers."""
    x = torch.randn(12, 2, dtype=torch.float64)
    spoilt = x.clone()
    spoilt[5, 1] = torch.nan
    program, others = program_of(lambda z: z), torch.arange(12) != 5
    a, b = (pv.log_evidence(program, part, method=method, num_particles=100, seed=3) for part in (x, spoilt))
    assert torch.equal(a.log_p[others], b.log_p[others])
    assert torch.equal(a.standard_error[others], b.standard_error[others])
    assert b.log_p[5].isnan()


class Images(nn.Module):
    """A decoder of 4 x 4 images, (N, 3) -> (N, 1, 4, 4), that refuses further batch dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ConvTranspose2d(3, 1, 4)

    def forward(self, z: Tensor) -> Tensor:
        if z.dim() != 2:
            raise ValueError(f"one batch dimension, please, not {tuple(z.shape[:-1])}")
        return self.layer(z[:, :, None, None])


@every_method
def test_a_convolutional_decoder_that_refuses_particles_is_run_on_copies(method: str) -> None:
    """One layer without a bend is linear-Gaussian: x ~ N(b, W W' + I / 4), with W and b read off the layer."""
    decoder = Images().double()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3, dtype=x.dtype), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.5).to_event(3), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.flatten(1)[:, :3], 1.0).to_event(1))

    with torch.no_grad():
        b = decoder(torch.zeros(1, 3, dtype=torch.float64)).flatten()
        w = decoder(torch.eye(3, dtype=torch.float64)).flatten(1) - b
    covariance = w.T @ w + 0.25 * torch.eye(16, dtype=torch.float64)
    marginal = torch.distributions.MultivariateNormal(b, covariance)
    x = marginal.sample((5,))
    estimate = evaluate(method, pv.Program(model, guide), x.reshape(5, 1, 4, 4))
    assert estimate.reliable.all()
    assert right(estimate, marginal.log_prob(x)).all()
