import math

import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from linear_gaussian import LinearGaussian, kl_normal
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor

import pyro_vae as pv
from pyro_vae.program import record


def gradients(loss: Tensor, parameters: list[Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


def gaussian_vae(scale: float = 0.7, guide: str = "DiagonalNormal") -> pv.VAE:
    torch.manual_seed(0)
    return pv.VAE(
        prior=pv.priors.StandardNormal(2),
        likelihood=pv.likelihoods.Normal(pv.nets.MLP(2, 5, hidden=(6,)), scale=scale),
        guide=getattr(pv.guides, guide)(pv.nets.MLP(5, hidden=(6,)), latent_dim=2),
    ).double()


@pytest.mark.parametrize("inflate", [1.0, 1.6])
def test_log_p_less_the_elbo_is_the_kl_to_the_posterior_row_by_row(inflate: float) -> None:
    """Mean of 4,000 draws of each row's ELBO, within 5 standard errors; rows have different gaps through the shift."""
    known = LinearGaussian()
    x = known.draw(12)
    program = known.program(inflate=inflate, shift=0.4)
    elbo = pv.objectives.ELBO().rows(program.model, program.guide, x.repeat(4000, 1)).reshape(4000, 12)
    gap = known.log_p(x) - elbo
    factor = torch.linalg.cholesky(known.covariance)
    mean = known.posterior_mean(x)
    kl = kl_normal(mean + 0.4 * factor.sum(-1), inflate * factor, mean, factor)
    assert ((gap.mean(0) - kl).abs() < 5.0 * gap.std(0) / 4000**0.5).all()
    assert (kl > 0.1).all()


def test_analytic_and_sampled_kl_agree_within_the_sampling_error() -> None:
    for guide in ("DiagonalNormal", "FullNormal"):
        vae, x = gaussian_vae(guide=guide), torch.randn(4, 5, dtype=torch.float64)
        exact = pv.objectives.analytic_kl(*sites(vae, x)).detach()
        draws = pv.objectives.sampled_kl(*sites(vae, x.repeat(4000, 1))).detach().reshape(4000, 4)
        assert ((draws.mean(0) - exact).abs() < 5.0 * draws.std(0) / 4000**0.5).all()
        again = pv.objectives.analytic_kl(*sites(vae, x)).detach()
        assert torch.equal(exact, again)


def sites(vae: pv.VAE, x: Tensor) -> tuple[object, object]:
    q = record(vae.guide, (x,))
    return q["z"], record(vae.model, (x,), {"z": q["z"].value})["z"]


@pytest.mark.parametrize(("kl", "theirs"), [("analytic_kl", TraceMeanField_ELBO), ("sampled_kl", Trace_ELBO)])
def test_loss_and_gradients_equal_pyros_for_the_same_noise(kl: str, theirs: type) -> None:
    for scale in (None, 0.25):
        vae, x = gaussian_vae(), torch.randn(7, 5, dtype=torch.float64)
        model, guide = vae.model, vae.guide
        if scale is not None:
            model, guide = pyro.poutine.scale(model, scale), pyro.poutine.scale(guide, scale)
        parameters = list(vae.parameters())
        found = []
        for objective in (pv.objectives.ELBO(kl=getattr(pv.objectives, kl)), theirs()):
            torch.manual_seed(4)
            loss = objective.differentiable_loss(model, guide, x)
            found.append((loss.detach(), gradients(loss, parameters)))
        torch.testing.assert_close(found[0][0], found[1][0])
        # Pyro's Trace_ELBO holds the guide's parameters fixed in log q nowhere either: the gradients are the same.
        torch.testing.assert_close(found[0][1], found[1][1])


def test_beta_two_s_squared_is_the_squared_error_loss() -> None:
    """Gradient of |x - x'|^2 + beta KL equals that of -2 s^2 ELBO_beta' with beta = 2 s^2, for the same draw of z."""
    s = 0.7
    vae, x = gaussian_vae(scale=s), torch.randn(6, 5, dtype=torch.float64)
    vae.likelihood.scale.value.fill_(s)
    parameters = list(vae.parameters())
    torch.manual_seed(9)
    loss, elbo = pv.objectives.ELBO().loss_and_elbo(vae.model, vae.guide, x)
    torch.manual_seed(9)
    q = vae.encoder(x)
    reconstruction = vae.likelihood.decoder(q.rsample())
    kl = 0.5 * (q.variance + q.mean.square() - 1.0 - q.variance.log()).sum()
    by_hand = (x - reconstruction).square().sum() + 2.0 * s**2 * kl
    torch.testing.assert_close(gradients(by_hand, parameters), gradients(2.0 * s**2 * loss, parameters))
    # And the values differ by the constant that the "MSE" loss drops: d s^2 log(2 pi s^2) a row.
    constant = 5 * s**2 * math.log(2.0 * math.pi * s**2)
    torch.testing.assert_close(-2.0 * s**2 * elbo, by_hand.detach() / 6 + constant)


def test_without_kl_and_covariance_it_is_the_plain_autoencoder() -> None:
    """As beta -> 0 and Sigma -> 0 the gradient tends to that of |x - f(mu(x))|^2, linearly in sigma."""
    s = 0.5
    vae, x = gaussian_vae(scale=s), torch.randn(6, 5, dtype=torch.float64)
    parameters = [*vae.likelihood.parameters(), *vae.encoder.encoder.parameters(), *vae.encoder.loc.parameters()]
    plain = (x - vae.likelihood.decoder(vae.encoder(x).mean)).square().sum()
    expected = gradients(plain, parameters)
    distances = []
    for raw in (-4.0, -8.0, -12.0):  # sigma = softplus(raw) + 1e-6: 1.8e-2, 3.4e-4, 7.1e-6
        with torch.no_grad():
            vae.encoder.raw_scale.weight.zero_()
            vae.encoder.raw_scale.bias.fill_(raw)
        torch.manual_seed(2)
        sigma = math.log1p(math.exp(raw))
        loss, _ = pv.objectives.ELBO(beta=sigma).loss_and_elbo(vae.model, vae.guide, x)
        distances.append(float((gradients(2.0 * s**2 * loss, parameters) - expected).norm() / expected.norm()))
    assert distances[0] > 30.0 * distances[1] > 900.0 * distances[2]
    assert distances[2] < 1e-4


def test_beta_weights_the_loss_and_never_the_reported_elbo() -> None:
    vae, x = gaussian_vae(), torch.randn(6, 5, dtype=torch.float64)
    found = {}
    for beta in (0.0, 1.0, 3.0):
        torch.manual_seed(1)
        found[beta] = pv.objectives.ELBO(beta=beta).loss_and_elbo(vae.model, vae.guide, x)
    kl = float((found[1.0][0] - found[0.0][0]).detach())
    by_hand = vae.encoder(x)
    assert kl == pytest.approx(
        float(0.5 * (by_hand.variance + by_hand.mean.square() - 1.0 - by_hand.variance.log()).sum().detach())
    )
    assert float((found[3.0][0] - found[0.0][0]).detach()) == pytest.approx(3.0 * kl)
    assert found[0.0][1] == found[1.0][1] == found[3.0][1]
    assert float(found[1.0][1]) == pytest.approx(-float(found[1.0][0].detach()) / 6)


def test_schedules_do_what_their_formula_says_and_count_svi_steps() -> None:
    warm = pv.objectives.warm_up(10, start=0.2, end=1.2)
    assert [warm(step) for step in (0, 5, 10, 99)] == pytest.approx([0.2, 0.7, 1.2, 1.2])
    cycle = pv.objectives.cyclic(8, rise=0.5)
    assert [cycle(step) for step in (0, 2, 4, 7, 8, 10)] == pytest.approx([0.0, 0.5, 1.0, 1.0, 0.0, 0.5])
    seen: list[int] = []
    vae, x = gaussian_vae(), torch.randn(3, 5, dtype=torch.float64)

    def spy(step: int) -> float:
        seen.append(step)
        return 1.0

    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), loss=pv.objectives.ELBO(beta=spy))
    for _ in range(3):
        svi.step(x)
    svi.evaluate_loss(x)
    assert seen == [0, 1, 2, 3]


def test_more_particles_average_and_keep_the_expectation() -> None:
    vae, x = gaussian_vae(), torch.randn(3, 5, dtype=torch.float64)
    with torch.no_grad():
        one = torch.tensor([pv.objectives.ELBO().loss(vae.model, vae.guide, x) for _ in range(1000)])
        ten = torch.tensor([pv.objectives.ELBO(num_particles=10).loss(vae.model, vae.guide, x) for _ in range(200)])
    error = (one.var() / 1000 + ten.var() / 200).sqrt()
    assert abs(one.mean() - ten.mean()) < 5.0 * error
    # Variances fall tenfold; a variance from m draws has a relative error of sqrt(2 / m) (more for heavy tails).
    assert 5.0 < one.var() / ten.var() < 20.0


def test_a_latent_order_that_is_not_mean_field_uses_the_draw() -> None:
    """q(a | x) q(b | a) against p(b) p(a | b): the exact KL of `a` at a sampled b would be wrong. Linear-Gaussian truth."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            b = pyro.sample("b", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
            a = pyro.sample("a", dist.Normal(0.8 * b, 0.6))
            pyro.sample("x", dist.Normal(a, 0.5), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.8 * x, 0.4472135954999579))
            pyro.sample("b", dist.Normal(0.8 * a, 0.6))

    # p(a) = N(0, 1), so q(a | x) = N(0.8 x, 0.2) and q(b | a) = N(0.8 a, 0.36) are the exact posterior: the ELBO has no gap
    # and no noise at all.
    x = torch.tensor([0.3, -2.0], dtype=torch.float64)
    truth = -0.5 * x.square() / 1.25 - 0.5 * math.log(2.0 * math.pi * 1.25)
    torch.testing.assert_close(pv.objectives.ELBO().rows(model, guide, x), truth)


def test_pairs_without_a_closed_form_fall_back_and_say_so() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.StudentT(3.0, torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    with pytest.warns(UserWarning, match=r"KL\(Normal \|\| StudentT\) of latent 'z': it is sampled"):
        pv.objectives.ELBO().loss(model, guide, torch.zeros(3))


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match=r"beta=-1.0"):
        pv.objectives.ELBO(beta=-1.0)
    with pytest.raises(ValueError, match="num_particles=0"):
        pv.objectives.ELBO(num_particles=0)
    with pytest.raises(ValueError, match="steps=0"):
        pv.objectives.warm_up(0)
    with pytest.raises(ValueError, match=r"rise=2.0"):
        pv.objectives.cyclic(5, rise=2.0)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Poisson(torch.ones(len(x))))

    with pytest.raises(ValueError, match=r"'z' of the guide \(Poisson\) cannot be reparametrised.*Trace_ELBO"):
        pv.objectives.ELBO().loss(guide, guide, torch.zeros(3))
