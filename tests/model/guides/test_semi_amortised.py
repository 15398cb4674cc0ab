"""SemiAmortised: q(z | x) after a few steps up each row's own bound."""

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

import pyro_vae as pv

D, COLUMNS = 3, 5


def linear_vae(steps: int = 3, num_draws: int = 4, rate: float = 0.5, dim: int = D) -> pv.VAE:
    """z ~ N(0, I), x ~ N(W z + b, s^2 I), in float64, and an encoder that knows nothing of it."""
    torch.manual_seed(0)
    return pv.VAE(
        prior=pv.priors.StandardNormal(dim),
        likelihood=pv.likelihoods.Normal(pv.nets.MLP(dim, COLUMNS), scale=0.5),
        guide=pv.guides.SemiAmortised(
            pv.guides.DiagonalNormal(pv.nets.MLP(COLUMNS, hidden=(7,)), latent_dim=dim),
            steps=steps,
            rate=rate,
            num_draws=num_draws,
        ),
    ).double()


def exact_elbo(vae: pv.VAE, x: Tensor, q: torch.distributions.Distribution) -> Tensor:
    """In closed form: E log p(x | z) of a linear decoder, and KL(q || N(0, I))."""
    layer = vae.likelihood.decoder.layers[0]
    mean, variance = q.mean, q.variance
    squares = (x - mean @ layer.weight.T - layer.bias).square().sum(-1) + variance @ layer.weight.square().sum(0)
    fit = -0.5 * squares / 0.25 - COLUMNS * 0.5 * torch.log(torch.tensor(2 * torch.pi * 0.25, dtype=x.dtype))
    return fit - 0.5 * (variance + mean.square() - 1.0 - variance.log()).sum(-1)


def test_it_raises_the_bound_of_every_row() -> None:
    vae = linear_vae()
    x = 2.0 * torch.randn(50, COLUMNS).double()
    with torch.no_grad():
        before, after = exact_elbo(vae, x, vae.encoder(x)), exact_elbo(vae, x, vae.q_z(x))
    assert (after > before).all()
    assert (after - before).mean() > 1.0


@pytest.mark.parametrize("dim", [1, 3])
def test_it_reaches_the_best_factorised_normal_of_a_linear_gaussian_model(dim: int) -> None:
    """Mean: that of the posterior. Variance: one over the diagonal of its precision (Bishop 2006, eq. 10.13)."""
    vae = linear_vae(steps=150, num_draws=2 * dim, rate=0.3, dim=dim)
    x = 2.0 * torch.randn(20, COLUMNS).double()
    layer = vae.likelihood.decoder.layers[0]
    with torch.no_grad():
        precision = torch.eye(dim).double() + layer.weight.T @ layer.weight / 0.25
        mean = torch.linalg.solve(precision, layer.weight.T @ (x - layer.bias).T / 0.25).T
        q = vae.q_z(x)
    torch.testing.assert_close(q.mean, mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(q.variance, (1.0 / precision.diagonal()).expand_as(mean), rtol=1e-5, atol=0)


def test_no_row_gets_worse_by_its_own_estimate_however_long_the_step() -> None:
    for rate in (0.5, 100.0, 1e8):
        vae = linear_vae(rate=rate)
        x = 3.0 * torch.randn(30, COLUMNS).double()

        def estimate(q: torch.distributions.Distribution, vae: pv.VAE = vae, x: Tensor = x) -> Tensor:
            z = q.mean + q.stddev * vae.encoder.noise[:, None]
            log_joint = torch.stack([vae.p_z().log_prob(one) + vae.p_x(one).log_prob(x) for one in z])
            return log_joint.mean(0) + q.stddev.log().sum(-1)

        with torch.no_grad():
            before, after = estimate(vae.encoder(x)), estimate(vae.q_z(x))
        assert (after >= before - 1e-12).all()
        assert rate > 1.0 or (after > before).all()


def test_q_is_one_function_of_x_row_by_row() -> None:
    vae, x, z = linear_vae(), torch.randn(6, COLUMNS).double(), torch.randn(6, D).double()
    first = vae.q_z(x).log_prob(z)
    torch.manual_seed(9)
    assert torch.equal(vae.q_z(x).log_prob(z), first)
    with torch.no_grad():
        assert torch.equal(vae.q_z(x).log_prob(z), first)
        torch.testing.assert_close(vae.q_z(x[3:4]).log_prob(z[3:4])[0], first[3])
    assert vae.guide_density(x).of_sites({"z": z[None]})[0].sub(first).abs().max() < 1e-12


def test_rows_that_overflow_keep_the_amortised_part_and_disturb_no_other_row() -> None:
    vae = linear_vae()
    guide, x = vae.encoder, torch.randn(4, COLUMNS).double()
    q = guide(x)

    def log_joint(z: Tensor, spoilt: tuple[int, ...] = ()) -> Tensor:
        value = vae.p_z().log_prob(z) + vae.p_x(z).log_prob(x)
        bad = torch.tensor([row in spoilt for row in range(4)])
        return torch.where(bad, value * torch.tensor([torch.nan, 1.0, -torch.inf, 1.0]).double(), value)

    good, bad = guide.refine(q, log_joint), guide.refine(q, lambda z: log_joint(z, (0, 2)))
    assert torch.isfinite(bad.mean).all()
    assert torch.isfinite(bad.stddev).all()
    torch.testing.assert_close(bad.mean[[0, 2]], q.mean[[0, 2]])
    torch.testing.assert_close(bad.mean[[1, 3]], good.mean[[1, 3]])
    torch.testing.assert_close(bad.stddev[[1, 3]], good.stddev[[1, 3]])


def test_a_density_that_jumps_to_infinity_is_no_gain() -> None:
    vae = linear_vae()
    guide, x = vae.encoder, torch.randn(4, COLUMNS).double()
    q = guide(x)

    def log_joint(z: Tensor) -> Tensor:
        moved = (z - q.mean).abs().amax(-1) > q.stddev.amax(-1) * 4.0
        return torch.where(moved, torch.inf, vae.p_z().log_prob(z) + 100.0 * vae.p_x(z).log_prob(x))

    better = guide.refine(q, log_joint)
    assert better.mean.isfinite().all()
    assert log_joint(better.mean).isfinite().all()


def test_the_encoder_gets_the_gradient_at_the_improved_point() -> None:
    """First order: the steps are constants, so the gradient is that of DiagonalNormal with heads moved by them."""
    vae, x = linear_vae(), torch.randn(6, COLUMNS).double()
    weights = list(vae.encoder.parameters())
    loss = -exact_elbo(vae, x, vae.q_z(x)).sum()
    found = torch.autograd.grad(loss, weights)
    assert all((gradient != 0).any() for gradient in found)
    q, better = vae.encoder(x), vae.q_z(x)
    moved = torch.distributions.Normal(
        q.mean + (better.mean - q.mean).detach(), (q.stddev.log() + (better.stddev / q.stddev).log().detach()).exp()
    )
    expected = torch.autograd.grad(-exact_elbo(vae, x, moved).sum(), weights)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_the_decoder_gets_no_gradient_through_the_steps() -> None:
    vae, x = linear_vae(), torch.randn(6, COLUMNS).double()
    leaves = torch.autograd.grad(vae.q_z(x).mean.sum(), list(vae.likelihood.parameters()), allow_unused=True)
    assert all(leaf is None for leaf in leaves)


@pytest.mark.parametrize(("num_draws", "dim"), [(2, 1), (4, 2), (12, 5), (4, 5)])
def test_the_fixed_draws_are_antithetic_and_of_second_moment_one(num_draws: int, dim: int) -> None:
    plain = pv.guides.DiagonalNormal(pv.nets.MLP(3, hidden=(2,)), latent_dim=dim)
    state = torch.get_rng_state()
    noise = pv.guides.SemiAmortised(plain, num_draws=num_draws).noise
    assert torch.equal(torch.get_rng_state(), state)
    assert noise.shape == (num_draws, dim)
    torch.testing.assert_close(noise.mean(0), torch.zeros(dim), rtol=0, atol=1e-6)
    torch.testing.assert_close(noise.square().mean(0), torch.ones(dim))
    if num_draws >= 2 * dim:
        torch.testing.assert_close(noise.T @ noise / num_draws, torch.eye(dim), rtol=0, atol=1e-6)


def test_it_saves_neither_the_draws_nor_the_encoder_twice(tmp_path: object) -> None:
    vae, x = linear_vae(), torch.randn(6, COLUMNS).double()
    names = list(vae.state_dict())
    assert not any("noise" in name for name in names)
    assert sum(name.endswith("layers.0.weight") for name in names) == 2  # the encoder's and the decoder's
    vae.save(f"{tmp_path}/vae")
    again = pv.load(f"{tmp_path}/vae")
    assert torch.equal(again.log_weights(x, 4)[0], vae.log_weights(x, 4)[0])


def test_svi_with_it_ends_above_svi_with_the_amortised_part_alone() -> None:
    x = torch.randn(64, COLUMNS).double()
    ends = []
    for vae in (linear_vae(), linear_vae()):
        if ends:
            vae = pv.VAE(prior=vae.prior, likelihood=vae.likelihood, guide=vae.encoder.guide)
        torch.manual_seed(1)
        svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 5e-3}), loss=Trace_ELBO())
        for _ in range(60):
            svi.step(x)
        with torch.no_grad():
            ends.append(exact_elbo(vae, x, vae.q_z(x)).mean())
    assert ends[0] > ends[1] + 0.5
