"""Conditional models p(x | y): a mixture of Normals whose every density is known."""

import math

import pyro
import pytest
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from torch import Tensor, nn

import pyro_vae as pv

CLASSES = 3


def conditional(columns: int = 4) -> pv.VAE:
    torch.manual_seed(1)
    return pv.VAE(
        prior=pv.priors.StandardNormal(2),
        likelihood=pv.likelihoods.Normal(
            pv.nets.Conditional(pv.nets.MLP(2 + CLASSES, columns), classes=CLASSES),
            scale=pv.likelihoods.Learned(initial=0.5),
        ),
        guide=pv.guides.FullNormal(
            pv.nets.Conditional(pv.nets.MLP(columns + CLASSES, hidden=(8,)), classes=CLASSES), latent_dim=2
        ),
    ).double()


def data(count: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, 4, generator=generator).double(), torch.arange(count) % CLASSES


def truth(vae: pv.VAE, x: Tensor, y: Tensor) -> Tensor:
    """N(x; W_z z-part: b + W_y e_y, W W' + s^2 I)."""
    layer = vae.likelihood.decoder.net.layers[0]
    weight, shift = layer.weight.detach()[:, :2], layer.weight.detach()[:, 2:]
    covariance = weight @ weight.T + 0.25 * torch.eye(4, dtype=torch.float64)
    return torch.distributions.MultivariateNormal(layer.bias.detach() + shift.T[y], covariance).log_prob(x)


@pytest.mark.parametrize(
    "method", [None, pv.evidence.exact, pv.posterior.laplace, pv.posterior.annealed, pv.posterior.from_prior]
)
def test_the_evidence_is_conditional(method: object) -> None:
    vae, (x, y) = conditional(), data()
    estimate = pv.log_evidence(vae, (x, y), method=method, seed=1)  # type: ignore[arg-type]
    error = 5.0 * estimate.standard_error + 2.0 * estimate.bias.abs() + 1e-6
    assert ((estimate.log_p - truth(vae, x, y)).abs() < error)[estimate.reliable].all()
    assert estimate.reliable.sum() > 6
    other = pv.evidence.exact(vae, (x, y.roll(1)))
    assert (other.log_p - truth(vae, x, y)).abs().min() > 1e-3  # y matters


def test_it_goes_through_fit_svi_saving_and_generation(tmp_path: object) -> None:
    vae, (x, y) = conditional(), data(64)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), loss=TraceMeanField_ELBO())
    assert math.isfinite(svi.step(x, y))
    before = pv.evidence.exact(vae, (x, y)).mean
    pv.fit(vae, (x, y), (x, y), epochs=20, batch_size=16, lr=1e-2, progress=False)
    assert pv.evidence.exact(vae, (x, y)).mean > before + 0.5
    vae.save(f"{tmp_path}/vae")
    again = pv.load(f"{tmp_path}/vae")
    assert repr(again) == repr(vae)
    assert torch.equal(again.log_weights((x, y), 4)[0], vae.log_weights((x, y), 4)[0])
    assert vae.encode((x, y)).mean.shape == (64, 2)
    assert vae.reconstruct((x, y)).shape == (64, 4)
    box = pv.evidence.sandwich(vae, num_simulated=9, like=data(), seed=1)
    assert (box.upper - box.lower > -0.1).all()


def test_generated_rows_have_the_moments_of_their_class() -> None:
    vae = conditional()
    y = torch.full((20_000,), 2)
    x = vae.generate(20_000, given=y, seed=3)
    layer = vae.likelihood.decoder.net.layers[0]
    weight = layer.weight.detach()[:, :2]
    sd = (weight.square().sum(-1) + 0.25).sqrt()
    assert ((x.mean(0) - layer.bias.detach() - layer.weight.detach()[:, 4]).abs() < 5.0 * sd / 20_000**0.5).all()
    means = vae.generate(3, given=torch.arange(3), noise=False)
    assert means.shape == (3, 4)


def test_a_condition_of_numbers_and_a_module_of_ones_own() -> None:
    class Shift(nn.Module):
        """Reads the second tensor after the rows."""

        reads = (2,)
        in_features = 2

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([[1.0, 0.5, -1.0]]))

        def forward(self, z: Tensor, y: Tensor) -> Tensor:
            return z[..., :1] @ self.weight + y.to(z)[:, None]

    vae = pv.VAE(
        prior=pv.priors.StandardNormal(2),
        likelihood=pv.likelihoods.Normal(Shift(), scale=1.0),
        guide=pv.guides.DiagonalNormal(pv.nets.Conditional(pv.nets.MLP(3 + 2, hidden=(4,)), columns=2), latent_dim=2),
    )
    x, first, second = torch.randn(5, 3), torch.randn(5, 2), torch.arange(5)
    found = pv.evidence.exact(vae, (x, first, second)).log_p
    weight = vae.likelihood.decoder.weight[0].detach()
    covariance = torch.outer(weight, weight) + torch.eye(3)
    expected = torch.distributions.MultivariateNormal(second[:, None].expand(5, 3).float(), covariance).log_prob(x)
    torch.testing.assert_close(found.float(), expected)
    with pytest.raises(ValueError, match=r"x\[1\] has shape \(5, 3\): the network reads 2 columns"):
        vae.encode((x, torch.randn(5, 3), second))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x, y: x, r"reads 1 tensor beside its rows, and was given 0: give x as a tuple of 2, \(rows, y1\)"),
        (lambda x, y: (x, y, y), "reads 1 tensor beside its rows, and was given 2"),
        (lambda x, y: (x, y + 1), r"x\[1\] has the value 3, and the network reads one of 3 classes.*from 0 to 2"),
        (lambda x, y: (x, y - 1), r"x\[1\] has the value -1"),
        (lambda x, y: (x, y + 0.5), r"x\[1\] has the value 0\.5"),
        (lambda x, y: (x, y[:, None].expand(9, 2)), r"x\[1\] has shape \(9, 2\)"),
        (lambda x, y: (x, y[:5]), r"\[0\] has 9 rows and .*\[1\] has 5"),
    ],
)
def test_unusable_conditions_are_named(spoil: object, message: str) -> None:
    vae = conditional()
    for use in (vae.encode, lambda x: pv.log_evidence(vae, x), lambda x: pv.fit(vae, x, epochs=1)):
        with pytest.raises(ValueError, match=message):
            use(spoil(*data()))  # type: ignore[operator]


def test_what_generate_needs_is_named() -> None:
    with pytest.raises(ValueError, match=r"reads 1 tensor\(s\) beside its rows, and generate was given 0"):
        conditional().generate(4)
    with pytest.raises(ValueError, match="given has 2 rows and size=4"):
        conditional().generate(4, given=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"x\[1\] has the value 7"):
        conditional().generate(1, given=torch.tensor([7]))
    with pytest.raises(ValueError, match=r"give like=\(x, y\)"):
        pv.evidence.sandwich(conditional(), num_simulated=3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pv.nets.Conditional(pv.nets.MLP(3, 2), classes=3), "takes 3 columns: none is left beside the 3"),
        (lambda: pv.nets.Conditional(pv.nets.MLP(3, 2)), "classes=None and columns=None: give one of them"),
        (lambda: pv.nets.Conditional(pv.nets.MLP(3, 2), classes=2, columns=1), "classes=2 and columns=1: give one"),
        (lambda: pv.nets.Conditional(pv.nets.MLP(3, 2), classes=0), "classes=0"),
        (lambda: pv.nets.Conditional(pv.nets.MLP(3, 2), classes=1, position=0), "position=0"),
    ],
)
def test_bad_settings_are_named(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_log1p_passes_the_condition_on() -> None:
    """As an encoder and, of positive z, as a decoder: Log1p(net)(x, y) is net(log(1 + x), y)."""
    net = pv.nets.Conditional(pv.nets.MLP(4 + CLASSES, hidden=(8,)), classes=CLASSES)
    around, (x, y) = pv.nets.Log1p(net), data()
    assert (around.reads, around.in_features, around.out_features) == ((1,), 4, 8)
    torch.testing.assert_close(around(x.abs().float(), y), net(x.abs().float().log1p(), y))
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(2),
        likelihood=pv.likelihoods.Poisson(pv.nets.MLP(2, 4)),
        guide=pv.guides.DiagonalNormal(around, latent_dim=2),
    )
    counts = x.abs().round().float()
    assert not torch.allclose(vae.encode((counts, y)).mean, vae.encode((counts, y.roll(1))).mean)


@pytest.mark.parametrize("part", ["likelihood", "guide"])
def test_a_condition_inside_of_a_module_that_does_not_pass_it_on_is_explained(part: str) -> None:
    sizes = {"likelihood": 2, "guide": 4}
    net = {name: pv.nets.MLP(size, 4) for name, size in sizes.items()}
    inside = pv.nets.Conditional(pv.nets.MLP(sizes[part] + CLASSES, 4), classes=CLASSES)
    net[part] = nn.Sequential(inside, nn.Tanh())  # type: ignore[assignment]
    with pytest.raises(ValueError, match=rf"(?s)The {part} .* conditions, .* must be the outermost one, or .*`reads`"):
        pv.VAE(
            prior=pv.priors.StandardNormal(2),
            likelihood=pv.likelihoods.Normal(net["likelihood"], scale=1.0),
            guide=pv.guides.DiagonalNormal(net["guide"], latent_dim=2, features=4),
        )


def test_a_single_number_as_given_is_explained() -> None:
    for given in (1, torch.tensor(1)):
        with pytest.raises(ValueError, match=r"given=1 is a single number: .* torch\.full\(\(3,\), 1\)"):
            conditional().generate(3, given=given)  # type: ignore[arg-type]
    assert conditional().generate(3, given=torch.full((3,), 1)).shape == (3, 4)  # the mend mends
    with pytest.raises(ValueError, match=r"x\[1\] has the value 7.* In `given`, x\[1\] is the first tensor"):
        conditional().generate(1, given=torch.tensor([7]))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_conditions_that_are_not_finite_are_refused(value: float) -> None:
    net = pv.nets.Conditional(pv.nets.MLP(2 + 2, 4), columns=2)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(2),
        likelihood=pv.likelihoods.Normal(net, scale=1.0),
        guide=pv.guides.DiagonalNormal(pv.nets.MLP(4, hidden=(4,)), latent_dim=2),
    )
    y = torch.zeros(3, 2)
    assert vae.generate(3, given=y).isfinite().all()
    y[1, 1] = value
    for use in (lambda: vae.generate(3, given=y), lambda: vae.encode((torch.zeros(3, 4), y))):
        with pytest.raises(ValueError, match=r"x\[1\] has NaN or infinite values, first in row 1: the network") as refusal:
            use()
        assert "missing" not in str(refusal.value)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32, torch.float64])
def test_labels_may_have_any_type(dtype: torch.dtype) -> None:
    vae, (x, y) = conditional(), data()
    torch.testing.assert_close(pv.evidence.exact(vae, (x, y.to(dtype))).log_p, truth(vae, x, y))
    with pytest.raises(ValueError, match=r"x\[1\] has the value 3"):
        vae.encode((x, (y + 1).to(dtype)))
