import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_gaussian import LinearGaussian
from torch import Tensor

import pyro_vae as pv


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
@pytest.mark.parametrize("latent_dim", [1, 3, 20])
def test_exact_equals_the_marginal_density(latent_dim: int, dtype: torch.dtype, tolerance: float) -> None:
    known = LinearGaussian(dim=25, latent_dim=latent_dim, dtype=dtype)
    x = known.draw(50)
    estimate = pv.log_evidence(known.program(inflate=3.0), x, method=pv.evidence.exact)
    truth = known.log_p(x)
    assert ((estimate.log_p - truth).abs() <= tolerance * (1.0 + truth.abs())).all()
    assert ((estimate.log_p - truth).abs() <= 5.0 * estimate.standard_error).all()
    assert estimate.reliable.all()
    assert torch.equal(estimate.lower, estimate.upper)


def test_two_latents_that_depend_on_each_other() -> None:
    """a ~ N(1, 2^2), b | a ~ N(0.5 a, 1), x | b ~ N(3 b, 0.5^2): x ~ N(1.5, 9 (0.25 * 4 + 1) + 0.25)."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(torch.ones((), dtype=x.dtype), 2.0))
            b = pyro.sample("b", dist.Normal(0.5 * a, 1.0))
            pyro.sample("x", dist.Normal(3.0 * b, 0.5), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("b", dist.Normal(x / 3.0, 0.3))
            pyro.sample("a", dist.Normal(torch.ones_like(x), 2.0))

    x = torch.tensor([-4.0, 0.3, 7.5], dtype=torch.float64)
    estimate = pv.log_evidence(pv.Program(model, guide), x, method=pv.evidence.exact)
    torch.testing.assert_close(
        estimate.log_p, -0.5 * (x - 1.5).square() / 18.25 - 0.5 * math.log(2.0 * math.pi * 18.25), rtol=1e-9, atol=0
    )


def one_latent(log_density: object) -> pv.Program:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
            pyro.sample("x", dist.Normal(log_density(z), 0.5), obs=x)  # type: ignore[operator]

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))

    return pv.Program(model, guide)


def three_latents(decoder: object, push: float = 0.0) -> pv.Program:
    """z ~ N(0, I_3), x ~ N(decoder(z), 0.5^2) in three dimensions, times exp(push |z|^2)."""
    prior = dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(decoder(z), 0.5).to_event(1), obs=x)  # type: ignore[operator]
            pyro.factor("push", push * z.square().sum(-1))

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", prior)

    return pv.Program(model, guide)


CURVED = {
    "tanh": torch.tanh,
    "slightly": lambda z: z + 0.01 * z.square(),
    "kink at 0": torch.abs,
    "kink at 1": lambda z: (z - 1.0).abs(),
    "flat below -3": lambda z: torch.relu(z + 3.0),
}


@pytest.mark.parametrize("name", CURVED)
def test_a_curved_decoder_of_three_dimensions_is_refused(name: str) -> None:
    x = torch.tensor([[0.5, 2.0, 1.0]], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"row 0 is not quadratic.*use pv.log_evidence without a method"):
        pv.evidence.exact(three_latents(CURVED[name]), x)


def test_a_ripple_that_only_the_hessian_shows_is_refused() -> None:
    """5e-5 sin(200 z)^3 is within the rounding that float32 is allowed; its second derivative of up to 6 is not."""
    prior = dist.Normal(torch.zeros(3), 1.0).to_event(1)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
            pyro.factor("ripple", 5e-5 * torch.sin(200.0 * z[..., 0]) ** 3)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", prior)

    with pytest.raises(ValueError, match="not quadratic in z: its Hessian changes"):
        pv.evidence.exact(pv.Program(model, guide), torch.zeros(5, 3))


@pytest.mark.parametrize("name", CURVED)
def test_a_curved_decoder_of_one_dimension_is_integrated(name: str) -> None:
    """Against a fine sum. A kink can leave the log joint quadratic all around one of two modes: both must count."""
    x = torch.tensor([0.5, 2.0, 5.0, -4.0], dtype=torch.float64)
    z = torch.linspace(-12.0, 12.0, 2_400_001, dtype=torch.float64)
    normal = dist.Normal(torch.zeros((), dtype=torch.float64), 1.0)
    terms = normal.log_prob(z) + normal.log_prob((x[:, None] - CURVED[name](z)) / 0.5) - math.log(0.5)  # type: ignore[operator]
    truth = torch.logsumexp(terms, -1) + math.log(1e-5)
    estimate = pv.log_evidence(one_latent(CURVED[name]), x, method=pv.evidence.exact)
    assert ((estimate.log_p - truth).abs() <= estimate.standard_error + 1e-9).all()
    assert (estimate.standard_error < 2e-6).all()
    assert estimate.reliable.all()
    assert torch.equal(estimate.lower, estimate.log_p)


def test_rows_of_either_kind_keep_their_places() -> None:
    """Where the second input is positive the decoder is |z|, else it is z: p(x) is known in both cases."""

    def model(x: Tensor, bent: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
            pyro.sample("x", dist.Normal(torch.where(bent > 0, z.abs(), z), 0.5), obs=x)

    def guide(x: Tensor, bent: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))

    x = torch.tensor([0.5, 2.0, -0.3, 1.0], dtype=torch.float64)
    bent = torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    estimate = pv.evidence.exact(pv.Program(model, guide), (x, bent))
    straight = -0.5 * x.square() / 1.25 - 0.5 * math.log(2.0 * math.pi * 1.25)
    truth = straight + torch.where(bent > 0, math.log(2.0) + torch.special.log_ndtr(x / (0.5 * math.sqrt(1.25))), 0.0)
    assert ((estimate.log_p - truth).abs() <= 2.0 * estimate.standard_error).all()
    assert estimate.evaluations[0] < 20 < estimate.evaluations[1]


def test_a_log_joint_without_a_maximum_is_refused() -> None:
    with pytest.raises(ValueError, match="no maximum"):
        pv.evidence.exact(three_latents(lambda z: z, push=4.0), torch.zeros(2, 3, dtype=torch.float64))


def test_an_integral_over_one_dimension_that_diverges_is_marked() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.factor("push", 2.0 * z.square())

    estimate = pv.evidence.exact(pv.Program(model, one_latent(torch.tanh).guide), torch.zeros(2, dtype=torch.float64))
    assert estimate.log_p.isnan().all()
    assert not estimate.reliable.any()
    assert "diverge" in estimate.reasons[0]


def test_the_budget_does_not_change_what_is_exact() -> None:
    known = LinearGaussian(latent_dim=3)
    x = known.draw(20)
    estimate = pv.evidence.exact(known.program(), x, memory=2**16)
    assert ((estimate.log_p - known.log_p(x)).abs() <= 5.0 * estimate.standard_error).all()
    assert (estimate.evaluations == estimate.evaluations[0]).all()


def test_particles_for_exact_are_refused() -> None:
    known = LinearGaussian()
    with pytest.raises(ValueError, match=r"num_particles=10.*exact draws no particles"):
        pv.log_evidence(known.program(), known.draw(3), method=pv.evidence.exact, num_particles=10)
