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


@pytest.mark.parametrize("decoder", [torch.tanh, lambda z: z + 0.01 * z.square(), torch.abs])
def test_a_curved_decoder_is_refused(decoder: object) -> None:
    with pytest.raises(ValueError, match="not quadratic"):
        pv.evidence.exact(one_latent(decoder), torch.tensor([0.5, 2.0], dtype=torch.float64))


def test_a_log_joint_without_a_maximum_is_refused() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.factor("push", 2.0 * z.square())

    with pytest.raises(ValueError, match="no maximum"):
        pv.evidence.exact(pv.Program(model, one_latent(torch.tanh).guide), torch.zeros(2, dtype=torch.float64))


def test_particles_for_exact_are_refused() -> None:
    known = LinearGaussian()
    with pytest.raises(ValueError, match=r"num_particles=10.*exact draws no particles"):
        pv.log_evidence(known.program(), known.draw(3), method=pv.evidence.exact, num_particles=10)
