"""VampPrior: made of the guide that the VAE hands over, none of whose parameters it owns."""

import copy

import pyro
import pytest
import torch
from model.components import GUIDES
from pyro.infer import SVI, Trace_ELBO

import pyro_vae as pv

COLUMNS = 6


def vae_with(guide: str = "DiagonalNormal", shape: int = COLUMNS, dim: int = 2) -> pv.VAE:
    return pv.VAE(
        prior=pv.priors.VampPrior(dim, shape, num_inputs=4),
        likelihood=pv.likelihoods.Normal(pv.nets.MLP(dim, COLUMNS, hidden=(7,)), scale=pv.likelihoods.Learned()),
        guide=GUIDES[guide](COLUMNS, dim),
    )


@pytest.mark.parametrize("guide", GUIDES)
def test_it_is_the_mean_of_the_guide_at_the_pseudo_inputs(guide: str) -> None:
    vae = vae_with(guide)
    z = torch.randn(5, 2)
    with torch.no_grad():
        each = torch.stack([vae.encoder(u[None]).log_prob(z) for u in vae.prior.inputs])
        torch.testing.assert_close(vae.p_z().log_prob(z), each.exp().mean(0).log(), rtol=1e-4, atol=1e-5)
        assert vae.p_z().sample((9,)).shape == (9, 2)


def test_no_parameter_is_registered_twice() -> None:
    vae, x = vae_with(), torch.randn(8, COLUMNS)
    assert [name for name, _ in vae.named_parameters() if name.startswith("prior.")] == ["prior.inputs"]
    named = [name for name, _ in vae.named_parameters(remove_duplicate=False)]
    assert len(named) == len({id(p) for p in vae.parameters()}) == len(vae.state_dict())
    vae.model(x), vae.guide(x)
    store = pyro.get_param_store()
    names = [name for name in store if ".prior$$$" in name]
    assert [name.split("$$$")[1] for name in names] == ["inputs"]
    assert {id(store._params[name]) for name in store} == {id(p) for p in vae.parameters()}
    leaves = vae.trainable(x)
    assert {id(p) for p in leaves.values()} == {id(p) for p in vae.parameters()}


def test_a_deep_copy_is_made_of_its_own_guide() -> None:
    vae, x = vae_with(), torch.randn(8, COLUMNS)
    other = copy.deepcopy(vae)
    before = copy.deepcopy(vae.state_dict())
    svi = SVI(other.model, other.guide, pyro.optim.Adam({"lr": 0.1}), loss=Trace_ELBO())
    svi.step(x)
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    z = torch.randn(3, 2)
    assert not torch.allclose(other.p_z().log_prob(z), vae.p_z().log_prob(z))
    torch.testing.assert_close(other.p_z().log_prob(z), other.prior(other.encoder).log_prob(z))


def test_saving_keeps_one_copy_of_the_guide(tmp_path: object) -> None:
    vae = vae_with()
    vae.save(f"{tmp_path}/vae")
    again = pv.load(f"{tmp_path}/vae")
    assert repr(again) == repr(vae)
    z = torch.randn(3, 2)
    assert torch.equal(again.p_z().log_prob(z), vae.p_z().log_prob(z))


def test_the_guide_gets_the_gradient_of_log_p_z_as_well() -> None:
    """d/dphi log p(z) by autograd, against a difference quotient in one weight of the guide."""
    vae = vae_with().double()
    z, weight = torch.randn(5, 2).double(), vae.encoder.loc.weight
    vae.p_z().log_prob(z).sum().backward()
    gradient, step = weight.grad[1, 3].clone(), 1e-6
    with torch.no_grad():
        weight[1, 3] += step
        above = vae.p_z().log_prob(z).sum()
        weight[1, 3] -= 2 * step
        below = vae.p_z().log_prob(z).sum()
    assert gradient.abs() > 1e-3
    torch.testing.assert_close(gradient, (above - below) / (2 * step), rtol=1e-6, atol=1e-8)


def test_it_starts_at_rows_of_the_data_if_asked() -> None:
    x, state = torch.randn(30, 2, 3), torch.get_rng_state()
    prior = pv.priors.VampPrior.from_rows(x, 2, num_inputs=7, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    same = (prior.inputs[:, None] == x[None]).flatten(2).all(-1)
    assert same.any(1).all()
    assert same.any(0).sum() == 7
    assert torch.equal(prior.inputs, pv.priors.VampPrior.from_rows(x, 2, num_inputs=7, seed=3).inputs)
    assert not torch.equal(prior.inputs, pv.priors.VampPrior.from_rows(x, 2, num_inputs=7, seed=4).inputs)
    assert pv.priors.VampPrior.from_rows(x.double(), 2, num_inputs=7).inputs.dtype is torch.float64
    with pytest.raises(ValueError, match="30 rows, fewer than num_inputs=50"):
        pv.priors.VampPrior.from_rows(x, 2)
    with pytest.raises(ValueError, match="NaN or infinite"):
        pv.priors.VampPrior.from_rows(x * torch.nan, 2, num_inputs=3)
    with pytest.raises(ValueError, match=r"dtype torch.int64.*floating"):
        pv.priors.VampPrior.from_rows(torch.zeros(30, 2, dtype=torch.long), 2, num_inputs=3)


def test_what_it_cannot_be_made_of_is_named() -> None:
    with pytest.raises(ValueError, match=r"VampPrior\(latent_dim=2, shape=\(6,\), num_inputs=50\) is made of the guide"):
        pv.priors.VampPrior(2, 6)()
    with pytest.raises(ValueError, match=r"VampPrior\(.*shape=\(5,\).*DiagonalNormal\("):
        vae_with(shape=5)
    net = pv.nets.Conditional(pv.nets.MLP(COLUMNS + 3, hidden=(4,)), classes=3)
    conditional = pv.guides.DiagonalNormal(net, latent_dim=2)
    with pytest.raises(ValueError, match=r"VampPrior\(.*no conditions for its pseudo-inputs.*DiagonalNormal\("):
        pv.VAE(
            prior=pv.priors.VampPrior(2, COLUMNS),
            likelihood=pv.likelihoods.Normal(pv.nets.MLP(2, COLUMNS), scale=0.5),
            guide=conditional,
        )


def test_pseudo_inputs_of_another_shape_than_the_rows_are_refused_though_the_encoder_could_read_them() -> None:
    class Sums(torch.nn.Module):
        out_features = 1

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sum(-1, keepdim=True)

    with pytest.raises(ValueError, match=r"VampPrior\(.*shape=\(5,\).*rows of shape \(6,\).*Normal\("):
        pv.VAE(
            prior=pv.priors.VampPrior(2, 5),
            likelihood=pv.likelihoods.Normal(pv.nets.MLP(2, COLUMNS), scale=0.5),
            guide=pv.guides.DiagonalNormal(Sums(), latent_dim=2),
        )
