"""A notebook's own code, unchanged: Pyro's tutorial VAE on images, and modules of the user's own as parts of a VAE."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

import pyro_vae as pv


class Encoder(nn.Module):
    """As in Pyro's tutorial on VAEs: images to a pair of tensors."""

    def __init__(self, z_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(16, hidden_dim)
        self.fc21 = nn.Linear(hidden_dim, z_dim)
        self.fc22 = nn.Linear(hidden_dim, z_dim)
        self.softplus = nn.Softplus()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.softplus(self.fc1(x.reshape(-1, 16)))
        return self.fc21(hidden), torch.exp(self.fc22(hidden))


class Decoder(nn.Module):
    def __init__(self, z_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(z_dim, hidden_dim)
        self.fc21 = nn.Linear(hidden_dim, 16)

    def forward(self, z: Tensor) -> Tensor:
        return torch.sigmoid(self.fc21(nn.functional.softplus(self.fc1(z))))


class TutorialVAE(nn.Module):
    """The tutorial's model and guide: probabilities, `x.reshape`, scales made in the model."""

    def __init__(self, z_dim: int = 2, hidden_dim: int = 12) -> None:
        super().__init__()
        self.encoder, self.decoder, self.z_dim = Encoder(z_dim, hidden_dim), Decoder(z_dim, hidden_dim), z_dim

    def model(self, x: Tensor) -> Tensor:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z_loc = torch.zeros(x.shape[0], self.z_dim, dtype=x.dtype, device=x.device)
            z_scale = torch.ones(x.shape[0], self.z_dim, dtype=x.dtype, device=x.device)
            z = pyro.sample("latent", dist.Normal(z_loc, z_scale).to_event(1))
            loc_img = self.decoder.forward(z)
            pyro.sample("obs", dist.Bernoulli(loc_img).to_event(1), obs=x.reshape(-1, 16))
            return loc_img

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            z_loc, z_scale = self.encoder.forward(x)
            pyro.sample("latent", dist.Normal(z_loc, z_scale).to_event(1))


def test_the_tutorials_vae_runs_unchanged_on_images() -> None:
    """log p(x) by every engine against the sum over a fine grid of z, p(z) = N(0, I) in two dimensions."""
    torch.manual_seed(0)
    vae = TutorialVAE()
    x = (torch.rand(40, 1, 4, 4) < 0.4).float()
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), loss=Trace_ELBO())
    for _ in range(5):
        assert math.isfinite(svi.step(x))
    program = pv.Program(vae.model, vae.guide)
    assert "latent" in str(pv.check(program, x))
    pv.fit(program, x, x, epochs=30, batch_size=10, lr=1e-2, progress=False)
    grid = torch.linspace(-7.0, 7.0, 281)
    z = torch.cartesian_prod(grid, grid)
    with torch.no_grad():
        log_likelihood = dist.Bernoulli(vae.decoder(z)).log_prob(x.reshape(-1, 1, 16)).sum(-1).double()
    log_prior = -0.5 * z.square().sum(-1).double() - math.log(2.0 * math.pi)
    truth = torch.logsumexp(log_likelihood + log_prior, dim=-1) + 2.0 * math.log(14.0 / 280)
    for method in (None, pv.evidence.exact, pv.posterior.laplace, pv.posterior.from_prior):
        estimate = pv.log_evidence(program, x, method=method, seed=1)
        error = 5.0 * estimate.standard_error + 2.0 * estimate.bias.abs() + 1e-4
        assert ((estimate.log_p - truth).abs() < error).all(), method
    with pytest.raises(ValueError, match="observe x itself"):
        pv.evidence.sandwich(program, num_simulated=4, like=x)


class MyPrior(nn.Module):
    """Two Normals of its own scale."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor([0.3, -0.2]))

    def forward(self) -> dist.Distribution:
        return dist.Normal(torch.zeros_like(self.log_scale), self.log_scale.exp()).to_event(1)


class MyLikelihood(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 3)

    def forward(self, z: Tensor) -> dist.Distribution:
        return dist.Normal(self.net(z), 0.5).to_event(1)


class MyGuide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> dist.Distribution:
        loc, raw = self.net(x).chunk(2, -1)
        return dist.Normal(loc, raw.exp()).to_event(1)


def test_modules_of_ones_own_stand_for_any_part(tmp_path: object) -> None:
    def build() -> pv.VAE:
        return pv.VAE(prior=MyPrior(), likelihood=MyLikelihood(), guide=MyGuide())

    vae, x = build(), torch.randn(20, 3)
    pv.fit(vae, x, epochs=2, progress=False)
    net, scale = vae.likelihood.decoder.net, vae.prior.module.log_scale.exp()
    weight = net.weight * scale
    covariance = weight @ weight.T + 0.25 * torch.eye(3)
    truth = torch.distributions.MultivariateNormal(net.bias, covariance).log_prob(x).detach()
    torch.testing.assert_close(pv.evidence.exact(vae, x).log_p.float(), truth, rtol=1e-4, atol=1e-4)
    vae.save(f"{tmp_path}/mine")
    with pytest.raises(ValueError, match=r"holds a MyPrior of your own.*into=vae"):
        pv.load(f"{tmp_path}/mine")
    again = pv.load(f"{tmp_path}/mine", into=build())
    assert torch.equal(again.log_weights(x, 3)[0], vae.log_weights(x, 3)[0])
    assert vae.generate(4).shape == (4, 3)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"prior": nn.Linear(2, 2)}, r"prior is a Linear: give a pv.priors.Prior, or a module whose forward\(\) returns"),
        ({"prior": 3}, "prior is a int: give a pv.priors.Prior"),
        ({"prior": pv.guides.DiagonalNormal(nn.Linear(3, 4), 2)}, "prior is a DiagonalNormal: give a pv.priors.Prior"),
        (
            {"likelihood": nn.Linear(2, 3)},
            r"likelihood is a Linear, which returns a Tensor: give a pv.likelihoods.Likelihood",
        ),
        ({"guide": nn.Linear(3, 4)}, r"guide is a Linear, which returns a Tensor: give a pv.guides.Guide, or a module"),
        ({"likelihood": pv.priors.StandardNormal(2)}, "likelihood is a StandardNormal: give a pv.likelihoods.Likelihood"),
    ],
)
def test_parts_of_another_kind_are_refused(parts: dict[str, object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        pv.VAE(**{"prior": MyPrior(), "likelihood": MyLikelihood(), "guide": MyGuide(), **parts})  # type: ignore[arg-type]


class OfTorch(nn.Module):
    """Another part's distribution, of torch.distributions."""

    latent_dim = 2

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, *told: Tensor) -> torch.distributions.Distribution:
        base = self.part(*told).base_dist
        return torch.distributions.Independent(torch.distributions.Normal(base.loc, base.scale), 1)


@pytest.mark.parametrize(("name", "make"), [("prior", MyPrior), ("likelihood", MyLikelihood), ("guide", MyGuide)])
def test_distributions_that_pyro_cannot_draw_from_are_refused(name: str, make: type[nn.Module]) -> None:
    parts = {"prior": MyPrior(), "likelihood": MyLikelihood(), "guide": MyGuide(), name: OfTorch(make())}
    with pytest.raises(TypeError, match=rf"{name} is a OfTorch, which returns a Independent of torch.distributions"):
        pv.VAE(**parts)


class PriorOfLabels(nn.Module):
    """N(y m, s^2), told the first tensor after the rows."""

    reads = (1,)

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor([0.7, -0.4]))

    def forward(self, y: Tensor) -> dist.Distribution:
        return dist.Normal(y[:, None] * self.shift, 1.5).to_event(1)


def test_a_prior_of_ones_own_may_read_conditions(tmp_path: object) -> None:
    """log p(x | y) of a linear decoder, W (y m) + b in the mean, by every engine."""
    torch.manual_seed(2)
    vae = pv.VAE(prior=PriorOfLabels(), likelihood=MyLikelihood(), guide=MyGuide())
    x, y = torch.randn(8, 3), torch.arange(8) % 3
    net = vae.likelihood.decoder.net
    covariance = 1.5**2 * net.weight @ net.weight.T + 0.25 * torch.eye(3)
    mean = net(y[:, None] * vae.prior.module.shift)
    truth = torch.distributions.MultivariateNormal(mean, covariance).log_prob(x).detach().double()
    for method in (None, pv.evidence.exact, pv.posterior.laplace):
        found = pv.log_evidence(vae, (x, y), method=method, seed=1)
        assert ((found.log_p - truth).abs() < 5.0 * found.standard_error + 2.0 * found.bias.abs() + 1e-4).all()
    assert vae.generate(3, given=torch.arange(3)).shape == (3, 3)
    pv.fit(vae, (x, y), epochs=1, progress=False)
    vae.save(f"{tmp_path}/vae")
    pv.load(f"{tmp_path}/vae", into=vae)


def test_a_likelihood_of_ones_own_without_to_event_is_named_and_not_the_guide() -> None:
    class Forgetful(MyLikelihood):
        def forward(self, z: Tensor) -> dist.Distribution:
            return dist.Normal(self.net(z), 0.5)

    with pytest.raises(
        ValueError, match=r"(?s)^The likelihood .*batch shape \(1, 3\) and event shape \(\).*\.to_event\(1\)"
    ):
        pv.VAE(prior=MyPrior(), likelihood=Forgetful(), guide=MyGuide())
