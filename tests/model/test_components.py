import copy
from collections.abc import Callable

import pytest
import torch
from model.components import (
    GUIDES,
    LATENT_DIMS,
    LIKELIHOOD_SHAPES,
    LIKELIHOODS,
    NO_DRAWS_ON_META,
    PLAIN_GUIDES,
    PRIORS,
    every_parameter_has_a_gradient,
    p_z,
)
from torch import nn

import pyro_vae as pv
from pyro_vae.model.component import Component, ForeignError, describe, rebuild


@pytest.mark.parametrize("dim", LATENT_DIMS)
@pytest.mark.parametrize("name", PRIORS)
def test_a_prior_is_a_distribution_of_one_latent_vector(name: str, dim: int) -> None:
    prior = PRIORS[name](dim)
    p = p_z(prior)
    assert p.batch_shape == ()
    assert p.event_shape == (dim,)
    z = p.sample((100,))
    assert torch.isfinite(p.log_prob(z)).all()
    assert p.support.check(z).all()
    assert prior.latent_dim == dim
    assert repr(prior).startswith(f"{name}(")


@pytest.mark.parametrize("batch", [(4,), (3, 4)])
@pytest.mark.parametrize(("name", "shape"), LIKELIHOOD_SHAPES)
def test_a_likelihood_is_a_distribution_of_rows(name: str, shape: tuple[int, ...], batch: tuple[int, ...]) -> None:
    likelihood = LIKELIHOODS[name](2, shape)
    z = torch.randn(*batch, 2)
    p = likelihood(z)
    assert p.batch_shape == batch
    assert p.event_shape == shape
    x = p.sample()
    assert p.support.check(x).all()
    likelihood.check(x.reshape(-1, *shape))
    log_prob = p.log_prob(x)
    assert log_prob.shape == batch
    one = (0,) * len(batch)
    torch.testing.assert_close(log_prob[one], likelihood(z[one][None]).log_prob(x[one][None])[0])
    # Of a weighted sum: the gradients of a Laplace are signs, and may cancel.
    every_parameter_has_a_gradient(likelihood, log_prob * torch.linspace(1.0, 2.0, log_prob.numel()).reshape(batch))


@pytest.mark.parametrize("dim", LATENT_DIMS)
@pytest.mark.parametrize("name", GUIDES)
def test_a_guide_is_a_reparametrised_distribution_of_latents(name: str, dim: int) -> None:
    guide = GUIDES[name](6, dim)
    q = guide(torch.randn(5, 6))
    assert q.batch_shape == (5,)
    assert q.event_shape == (dim,)
    assert q.has_rsample
    z = q.rsample()
    # The cubes make the gradient of every part of the covariance visible.
    every_parameter_has_a_gradient(guide, (z**3).sum(-1) + q.log_prob(z.detach() + 0.1) + z.prod(-1))


@pytest.mark.parametrize(
    "make",
    [
        *(pytest.param(lambda made=made: made(3), id=f"prior {name}") for name, made in PRIORS.items()),
        *(pytest.param(lambda made=made: made(3, (4,)), id=f"likelihood {name}") for name, made in LIKELIHOODS.items()),
        *(pytest.param(lambda made=made: made(4, 3), id=f"guide {name}") for name, made in GUIDES.items()),
    ],
)
def test_a_component_is_rebuilt_from_its_description(make: Callable[[], Component]) -> None:
    made = make()
    again = rebuild(describe(made))
    assert repr(again) == repr(made)
    again.load_state_dict(made.state_dict())
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in made.named_parameters()}


def test_normal_log_prob_is_the_formula_with_each_kind_of_scale() -> None:
    z, x = torch.randn(5, 2), torch.randn(5, 3)
    for name in ("Normal, fixed", "Normal, learned", "Normal, per dimension", "Normal, network"):
        likelihood = LIKELIHOODS[name](2, (3,))
        loc, s = likelihood.decoder(z), likelihood.scale(z).expand(5, 3)
        by_hand = (-0.5 * ((x - loc) / s) ** 2 - s.log() - 0.5 * torch.log(torch.tensor(2 * torch.pi))).sum(-1)
        torch.testing.assert_close(likelihood(z).log_prob(x), by_hand)


def test_bernoulli_log_prob_is_the_formula() -> None:
    likelihood = LIKELIHOODS["Bernoulli"](2, (3,))
    z, x = torch.randn(5, 2), (torch.rand(5, 3) < 0.5).float()
    p = torch.sigmoid(likelihood.decoder(z).double())
    by_hand = (x * p.log() + (1 - x) * (1 - p).log()).sum(-1)
    torch.testing.assert_close(likelihood(z).log_prob(x).double(), by_hand, rtol=1e-5, atol=1e-6)


def test_scales_never_fall_below_their_minimum() -> None:
    learned = pv.likelihoods.Learned(3, minimum=0.05)
    nn.init.constant_(learned.raw, -1e4)
    assert torch.equal(learned(torch.zeros(1, 1)), torch.full((3,), 0.05))
    assert torch.allclose(pv.likelihoods.Learned(initial=0.7)(torch.zeros(1, 1)), torch.tensor(0.7))
    net = nn.Linear(2, 3)
    nn.init.constant_(net.bias, -1e4)
    assert torch.allclose(pv.likelihoods.FromNetwork(net, minimum=0.02)(torch.zeros(4, 2)), torch.full((4, 3), 0.02))


def test_gradient_through_the_full_covariance_is_that_of_the_formula_z_equals_mu_plus_l_eps() -> None:
    guide = pv.guides.FullNormal(pv.nets.MLP(4, hidden=(5,)), latent_dim=3)
    x = torch.randn(2, 4)
    torch.manual_seed(3)
    z = guide(x).rsample()
    torch.manual_seed(3)
    eps = torch.randn(2, 3)
    q = guide(x)
    torch.testing.assert_close(z, q.loc + (q.scale_tril @ eps[..., None])[..., 0])
    assert (q.scale_tril.triu(1) == 0).all()
    assert (q.scale_tril.diagonal(dim1=-2, dim2=-1) > 0).all()
    assert (q.scale_tril.tril(-1) != 0).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pv.priors.StandardNormal(0), "latent_dim=0"),
        (lambda: pv.priors.StandardNormal(-2), "latent_dim=-2"),
        (lambda: pv.guides.DiagonalNormal(pv.nets.MLP(3, hidden=(2,)), latent_dim=0), "latent_dim=0"),
        (lambda: pv.guides.DiagonalNormal(nn.Flatten(), latent_dim=2), "no attribute out_features.*features="),
        (lambda: pv.nets.MLP(3), "at least one hidden layer"),
        (lambda: pv.nets.MLP(3, 0), "width=0"),
        (lambda: pv.nets.ConvEncoder((1, 2, 3, 4)), "must be .channels, height, width."),
        (lambda: pv.likelihoods.Normal(pv.nets.MLP(1, 1), scale=0.0), "scale=0.0 must be positive"),
        (lambda: pv.likelihoods.Normal(pv.nets.MLP(1, 1), scale=-1.0), "scale=-1.0 must be positive"),
        (lambda: pv.likelihoods.Learned(minimum=0.0), "minimum=0.0"),
        (lambda: pv.likelihoods.Learned(initial=1e-4), "initial=0.0001 must lie above minimum=0.001"),
        (lambda: pv.likelihoods.FromNetwork(nn.Linear(1, 1), minimum=-1.0), "minimum=-1.0"),
        (lambda: pv.nets.MLP(3, 2)(torch.zeros(4, 5)), r"takes 3 columns, but was given shape \(4, 5\)"),
        (lambda: pv.nets.ConvEncoder((4, 4))(torch.zeros(4, 5)), "16 columns"),
    ],
)
def test_bad_settings_are_named(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_bernoulli_refuses_grey_levels_and_names_the_mend() -> None:
    x = torch.zeros(3, 4)
    x[1, 2] = 0.43
    with pytest.raises(ValueError, match=r"0\.43 in row 1, column 2.*pv\.data\.binarise"):
        LIKELIHOODS["Bernoulli"](2, (4,)).check(x)


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (3, 9, 7)])
def test_convolutional_pair_takes_rows_and_particles(size: tuple[int, ...]) -> None:
    shape = size if len(size) == 3 else (1, *size)
    columns = shape[0] * shape[1] * shape[2]
    encoder, decoder = pv.nets.ConvEncoder(size, (4, 6), 10), pv.nets.ConvDecoder(3, size, (6, 4))
    x, z = torch.rand(2, columns), torch.randn(5, 2, 3)
    assert encoder(x).shape == (2, 10)
    assert decoder(z).shape == (5, 2, columns)
    torch.testing.assert_close(decoder(z)[3, 1], decoder(z[3, 1][None])[0])
    every_parameter_has_a_gradient(encoder, encoder(x))
    every_parameter_has_a_gradient(decoder, decoder(z).square())
    assert encoder.out_features == 10
    assert (decoder.in_features, decoder.out_features) == (3, columns)


def test_components_are_independent_after_a_deep_copy_and_know_what_is_foreign() -> None:
    first = pv.nets.MLP(2, 3)
    second = copy.deepcopy(first)
    with torch.no_grad():
        second.layers[0].weight.zero_()
    assert (first.layers[0].weight != 0).any()

    class Mine(Component):
        def settings(self) -> dict[str, object]:
            return {}

    assert describe(Mine()) == {"foreign": "Mine"}
    with pytest.raises(ForeignError, match="Mine"):
        rebuild(describe(Mine()))
    with pytest.raises(ValueError, match="no component"):
        rebuild({"component": "nets.Nothing", "settings": {}})
    with pytest.raises(ValueError, match="no component"):
        rebuild({"component": "os.system", "settings": {}})
    with pytest.raises(ValueError, match="no component"):
        rebuild({"activation": "functional"})


@pytest.mark.parametrize("guide", PLAIN_GUIDES)
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_what_is_built_on_the_meta_device_stays_there(name: str, guide: str) -> None:
    """No tensor is made on a device of its own choice: on "meta" that would raise, or come back elsewhere."""
    # Validation reads values, and tensors on "meta" have none.
    with torch.device("meta"):
        vae = pv.VAE(prior=pv.priors.StandardNormal(2), likelihood=LIKELIHOODS[name](2, (6,)), guide=GUIDES[guide](6, 2))
    import pyro

    with pyro.validation_enabled(is_validate=False):
        q = vae.encoder(torch.zeros(4, 6, device="meta"))
        z = q.rsample()
        p = vae.likelihood(z)
        x = p.mean if name in NO_DRAWS_ON_META else p.sample()
        found = [z, vae.prior().sample(), vae.prior().log_prob(z), q.log_prob(z), x, p.log_prob(x)]
        objective = pv.objectives.ELBO()
        loss, elbo = objective.loss_and_elbo(vae.model, vae.guide, torch.zeros(4, 6, device="meta"))
    assert {t.device.type for t in [*found, loss, elbo]} == {"meta"}
