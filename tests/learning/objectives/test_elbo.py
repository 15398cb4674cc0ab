import functools
import math
import warnings
from collections.abc import Callable

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

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")  # each object says it once, whatever Python's registry of warnings has seen
        for objective in (pv.objectives.ELBO(num_particles=2), pv.objectives.ELBO()):
            losses = [objective.loss(model, guide, torch.zeros(3)) for _ in range(3)]
            assert all(map(math.isfinite, losses))
    told = "torch has no closed form for KL(Normal || StudentT) of latent 'z': it is sampled."
    assert [str(warning.message) for warning in caught] == [told, told]
    pv.objectives.ELBO().rows(model, guide, torch.zeros(3))  # a value, not a gradient: the noise matters to nobody


class Wide:
    """Two latents, one of three independent dimensions, one of two that hang together; every KL is known by hand."""

    def __init__(self) -> None:
        self.loc = torch.tensor([[0.1, -1.5, 0.6], [0.3, 2.0, -0.2], [-0.1, 0.5, 0.05]], dtype=torch.float64)
        self.scale = torch.tensor([0.9, 0.4, 0.7], dtype=torch.float64)
        self.factor = torch.tensor([[0.8, 0.0], [0.3, 1.1]], dtype=torch.float64)

    def model(self, x: Tensor) -> None:
        zero, one = torch.zeros(3, dtype=x.dtype), torch.ones(3, dtype=x.dtype)
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(zero, one).to_event(1))
            b = pyro.sample("b", dist.MultivariateNormal(zero[:2], scale_tril=torch.eye(2, dtype=x.dtype)))
            pyro.sample("x", dist.Normal(a.sum(-1) + b.sum(-1), 0.8), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(self.loc[: len(x)], self.scale).to_event(1))
            pyro.sample("b", dist.MultivariateNormal(0.4 * x[:, None].expand(-1, 2), scale_tril=self.factor))

    def kl(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3) of "a" by dimension, (N,) of "b"."""
        by_dimension = 0.5 * (self.scale**2 + self.loc**2 - 1.0) - self.scale.log()
        mean, covariance = 0.4 * x[:, None].expand(-1, 2), self.factor @ self.factor.T
        return by_dimension, 0.5 * (covariance.trace() + mean.square().sum(-1) - 2.0) - self.factor.diagonal().log().sum()


@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize("free", [0.05, 0.4, 5.0])
def test_free_bits_do_what_the_formula_says(free: float, num_particles: int) -> None:
    wide, x = Wide(), torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    a, b = wide.kl(x)
    costs, elbos = [], []
    for objective in (
        pv.objectives.ELBO(num_particles=num_particles, free_bits=free, beta=0.7),
        pv.objectives.ELBO(num_particles=num_particles, beta=0.0),
    ):
        torch.manual_seed(0)
        loss, elbo = objective.loss_and_elbo(wide.model, wide.guide, x)
        costs.append(loss)
        elbos.append(elbo)
    by_hand = 3 * (sum(max(free, float(part)) for part in a.mean(0)) + max(2 * free, float(b.mean())))
    assert float(costs[0] - costs[1]) == pytest.approx(0.7 * by_hand)
    assert float(elbos[0]) == pytest.approx(float(elbos[1])) == pytest.approx(-float(costs[1] + a.sum() + b.sum()) / 3)


@pytest.mark.parametrize("shape", [(), (3,)])
def test_a_kl_of_ones_own_may_be_of_the_rows_alone(shape: tuple[int, ...]) -> None:
    wide, x = Wide(), torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    costs = []
    for beta in (1.0, 0.0):
        torch.manual_seed(0)
        objective = pv.objectives.ELBO(kl=lambda q, p: torch.full(shape, 0.25).double(), beta=beta, num_particles=4)
        costs.append(objective.loss(wide.model, wide.guide, x))
    assert costs[0] - costs[1] == pytest.approx(2 * 3 * 0.25)


def test_free_bits_weigh_rows_by_scale_and_mask_and_stop_the_gradient_below() -> None:
    wide, x = Wide(), torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    weights, keep = torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64), torch.tensor([True, True, False])

    def handled(function: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
        return pyro.poutine.scale(pyro.poutine.mask(function, keep), weights)

    wide.loc.requires_grad_()
    costs = []
    for objective in (pv.objectives.ELBO(free_bits=0.4), pv.objectives.ELBO(beta=0.0)):
        torch.manual_seed(0)
        costs.append(objective.differentiable_loss(handled(wide.model), handled(wide.guide), x))
    a, b = wide.kl(x)
    w = weights * keep
    sums, whole = (w[:, None] * a).sum(0), (w * b).sum()
    terms = [*(torch.maximum(part, 0.4 * w.sum()) for part in sums), torch.maximum(whole, 0.8 * w.sum())]
    torch.testing.assert_close(costs[0] - costs[1], sum(terms))
    (slope,) = torch.autograd.grad(costs[0] - costs[1], wide.loc)
    assert (sums > 0.4 * w.sum()).tolist() == [False, True, False]
    expected = torch.zeros_like(slope)
    expected[:, 1] = (w * wide.loc[:, 1]).detach()
    torch.testing.assert_close(slope, expected)


def test_free_bits_of_a_sampled_kl_split_by_dimension_too() -> None:
    wide, x = Wide(), torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    torch.manual_seed(0)
    freed = pv.objectives.ELBO(kl=pv.objectives.sampled_kl, free_bits=0.5).differentiable_loss(wide.model, wide.guide, x)
    torch.manual_seed(0)
    plain = pv.objectives.ELBO(kl=pv.objectives.sampled_kl, beta=0.0).differentiable_loss(wide.model, wide.guide, x)
    torch.manual_seed(0)
    q, p = pv.objectives.sites_of(wide.model, wide.guide, (x,), {})
    z = q["a"].value
    ratio = -0.5 * ((z - wide.loc) / wide.scale) ** 2 - wide.scale.log() + 0.5 * z**2
    whole = q["b"].distribution.log_prob(q["b"].value) - p["b"].distribution.log_prob(q["b"].value)
    by_hand = 3 * (ratio.mean(0).clamp(min=0.5).sum() + whole.mean().clamp(min=1.0))
    torch.testing.assert_close(freed - plain, by_hand)


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match=r"beta=-1.0"):
        pv.objectives.ELBO(beta=-1.0)
    with pytest.raises(ValueError, match=r"free_bits=-0\.5"):
        pv.objectives.ELBO(free_bits=-0.5)
    with pytest.raises(ValueError, match=r"beta='a' must be a finite number of at least 0, or a schedule"):
        pv.objectives.ELBO(beta="a")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"free_bits=None must be a finite number"):
        pv.objectives.ELBO(free_bits=None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"kl='sampled' is no function: give .*analytic_kl or .*sampled_kl"):
        pv.objectives.ELBO(kl="sampled")  # type: ignore[arg-type]
    makers = ("ELBO", "IWAE", "STL", "DReG", "ReweightedWakeSleep", "ScoreFunction")
    for maker in (*(getattr(pv.objectives, name) for name in makers), functools.partial(pv.objectives.Renyi, 0.5)):
        with pytest.raises(ValueError, match="num_particles=0"):
            maker(num_particles=0)
    for alpha in (1, 1.0, math.inf, math.nan):
        with pytest.raises(
            ValueError, match=rf"alpha={alpha} must be a finite number other than 1: .* objectives\.ELBO\(\)"
        ):
            pv.objectives.Renyi(alpha)
    with pytest.raises(ValueError, match=r"wake_phi=1\.5 is a share"):
        pv.objectives.ReweightedWakeSleep(wake_phi=1.5)
    with pytest.raises(ValueError, match="steps=0"):
        pv.objectives.warm_up(0)
    with pytest.raises(ValueError, match=r"rise=2.0"):
        pv.objectives.cyclic(5, rise=2.0)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Poisson(torch.ones(len(x))))

    with pytest.raises(ValueError, match=r"'z' of the guide \(Poisson\) cannot be reparametrised.*Trace_ELBO"):
        pv.objectives.ELBO().loss(guide, guide, torch.zeros(3))
