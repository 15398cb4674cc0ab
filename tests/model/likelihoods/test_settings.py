"""Settings and data that are refused, and what stands for a distribution in pictures."""

import pytest
import torch
from model.components import Reshaped
from torch import nn

import pyro_vae as pv
from pyro_vae.model import likelihoods as L
from pyro_vae.model.families.levels import Grid


def net(columns: int = 4) -> nn.Module:
    return pv.nets.MLP(2, columns)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: L.Categorical(net(), num_classes=1), "num_classes=1 must be a whole number of at least 2"),
        (lambda: L.Categorical(net(), num_classes=2.0), r"num_classes=2\.0"),
        (
            lambda: L.Categorical(net(5), num_classes=3),
            "num_classes=3 needs 3 outputs of the decoder for each column of x, and it has 5",
        ),
        (lambda: L.DiscretisedLogistic(net(), scale=0.1, levels=1), "levels=1 must be a whole number of at least 2"),
        (lambda: L.DiscretisedLogistic(net(), scale=0.1, top=0.0), r"top=0\.0 must be positive"),
        (
            lambda: L.DiscretisedLogistic(net(), scale=L.Learned(3)),
            r"scale=Learned\(3\) does not fit a decoder of 4 columns",
        ),
        (lambda: L.DiscretisedLogisticMixture(net(), num_components=0), "num_components=0"),
        (lambda: L.DiscretisedLogisticMixture(net(), num_components=3), "num_components=3 needs 9 outputs .* and it has 4"),
        (lambda: L.Binomial(net(), total_count=0), "total_count=0"),
        (lambda: L.Binomial(net(), total_count=[2, 1.5, 3, 4]), r"total_count=\[2, 1\.5"),
        (lambda: L.StudentT(net(), scale=1.0, df=0.0), r"0\.0 must be positive"),
        (lambda: L.StudentT(net(), scale=1.0, df=L.Optimal()), "df=Optimal.*give a number"),
        (lambda: L.StudentT(net(), scale=1.0, df=L.Learned(3)), r"df=Learned\(3\) does not fit"),
        (lambda: L.Laplace(net(), scale=-1.0), r"-1\.0 must be positive"),
        (lambda: L.LogNormal(net(), scale=L.Learned(2)), r"scale=Learned\(2\) does not fit"),
        (lambda: L.Beta(net(), concentration=L.Learned(2)), r"concentration=Learned\(2\) does not fit"),
        (lambda: L.NegativeBinomial(net(), dispersion=L.Learned(2)), r"dispersion=Learned\(2\) does not fit"),
        (lambda: L.NegativeBinomial(net(), dispersion=L.Optimal()), "dispersion=Optimal"),
        (lambda: L.FullNormal(nn.Flatten()), "no attribute out_features: give features="),
        (lambda: L.FullNormal(net(), initial=1e-4), r"initial=0\.0001 must lie above minimum"),
        (lambda: L.LowRankNormal(net(), rank=0), "rank=0"),
        (lambda: L.FullNormal(net(), features=3), "features=3 does not fit a decoder of 4 columns: leave features out"),
        (lambda: L.LowRankNormal(net(), rank=1, features=3), "features=3 does not fit a decoder of 4 columns"),
        (lambda: L.Poisson(net(), library=1.5), r"library=1\.5"),
    ],
)
def test_bad_settings_are_named(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("likelihood", "message"),
    [
        (
            L.FullNormal(Reshaped(2, (2, 3)), features=6),
            r"decoder returns rows of shape \(2, 3\), and features=6 needs \(6,\)",
        ),
        (
            L.FullNormal(nn.Sequential(net(4)), features=3),
            r"decoder returns rows of shape \(4,\), and features=3 needs \(3,\)",
        ),
        (L.LowRankNormal(nn.Sequential(net(4)), rank=1, features=3), r"decoder returns rows of shape \(4,\)"),
        (
            L.Normal(Reshaped(2, (2, 3)), scale=L.Learned((4, 2, 3))),
            r"returns batch shape \(4,\) and event shape \(2, 3\) .*a scale has no more dimensions than a row",
        ),
    ],
)
def test_a_likelihood_of_other_rows_than_its_decoders_is_named(likelihood: L.Likelihood, message: str) -> None:
    guide = pv.guides.DiagonalNormal(nn.Sequential(nn.Flatten(), nn.LazyLinear(4)), latent_dim=2, features=4)
    with pytest.raises(ValueError, match=rf"(?s)^The likelihood .*{message}"):
        pv.VAE(prior=pv.priors.StandardNormal(2), likelihood=likelihood, guide=guide)


@pytest.mark.parametrize("value", [None, "0.3", nn.Linear(2, 4)])
def test_what_is_no_scale_is_named(value: object) -> None:
    makes = {
        "scale": lambda: L.Normal(net(), scale=value),  # type: ignore[arg-type]
        "df": lambda: L.StudentT(net(), 1.0, df=value),  # type: ignore[arg-type]
        "concentration": lambda: L.Beta(net(), value),  # type: ignore[arg-type]
    }
    for name, make in makes.items():
        with pytest.raises(TypeError, match=rf"^{name}=.* is no scale: give a number, Learned\(\), FromNetwork\(net\) or"):
            make()
    for good in (0.3, [0.3] * 4, torch.full((4,), 0.3), torch.full((4,), 0.3).numpy()):
        assert isinstance(L.Normal(net(), scale=good).scale, L.Fixed)  # type: ignore[arg-type]


@pytest.mark.parametrize("levels", [2, 17, 256, 65_536])
@pytest.mark.parametrize("top", [1.0, 255.0, 0.3])
def test_the_grid_takes_its_own_levels_in_single_precision_and_no_others(levels: int, top: float) -> None:
    grid, k = Grid(levels, top), torch.arange(levels)
    assert grid.check(k.float() / (levels - 1) * top).all()
    assert grid.check((k.double() * top / (levels - 1)).float()).all()
    assert not grid.check((k.float() + 0.5) / (levels - 1) * top).any()
    assert not grid.check(torch.tensor([-top / (levels - 1), top * levels / (levels - 1), torch.inf, torch.nan])).any()


def test_loaded_images_lie_on_their_grid() -> None:
    x = pv.data.load("digits").x
    L.DiscretisedLogistic(net(64), scale=0.1, levels=17).check(x)
    with pytest.raises(ValueError, match=r"takes the 256 levels 0, 1 / 255, \.\.\., 1 alone"):
        L.DiscretisedLogistic(net(64), scale=0.1).check(x)


def test_what_stands_for_a_distribution_in_pictures() -> None:
    z = torch.zeros(1, 2)
    categorical = L.Categorical(net(6), num_classes=3)
    with torch.no_grad():
        categorical.decoder.layers[0].bias.copy_(torch.tensor([0.0, 2.0, 1.0, 5.0, 0.0, 0.0]))
    assert torch.equal(categorical.centre(categorical(z)), torch.tensor([[1.0, 0.0]]))
    student = L.StudentT(net(), scale=1.0, df=0.5)  # a Cauchy's like: no mean
    student.missing = True
    assert torch.equal(student.centre(student(z)), student.decoder(z))
    assert student(z).mean.isnan().all()


def test_binomial_takes_a_number_of_tries_a_column() -> None:
    likelihood = L.Binomial(net(3), total_count=(1, 4, 30))
    likelihood.check(torch.tensor([[1.0, 4.0, 30.0]]))
    with pytest.raises(ValueError, match=r"has the value 2 in row 0, column 0, .*the counts 0, 1, \.\.\., \[1, 4, 30\]"):
        likelihood.check(torch.tensor([[2.0, 4.0, 30.0]]))


def test_a_full_normal_of_a_linear_decoder_has_the_evidence_of_factor_analysis_with_missing_values() -> None:
    """x = W z + b + L e: log p(x_seen) is a Normal's with covariance W W' + L L', by every engine within its error."""
    torch.manual_seed(3)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(2),
        likelihood=L.FullNormal(pv.nets.MLP(2, 4), initial=0.5, missing=True),
        guide=pv.guides.FullNormal(pv.nets.MLP(4, hidden=(8,)), latent_dim=2),
    ).double()
    with torch.no_grad():
        vae.likelihood.raw += torch.randn(4, 4).double().tril(-1)
    layer, tril = vae.likelihood.decoder.layers[0], vae.likelihood.scale_tril().detach()
    covariance = (layer.weight @ layer.weight.T + tril @ tril.T).detach()
    x = vae.generate(8, seed=2)
    x[:6, 1:][torch.rand(6, 3) < 0.5] = torch.nan
    truth = []
    for row in x:
        seen = ~row.isnan()
        assert seen.any()
        normal = torch.distributions.MultivariateNormal(layer.bias.detach()[seen], covariance[seen][:, seen])
        truth.append(normal.log_prob(row[seen]))
    for method in (pv.evidence.exact, pv.posterior.laplace):
        estimate = pv.log_evidence(vae, x, method=method, seed=1)
        assert ((estimate.log_p - torch.stack(truth)).abs() < 5.0 * estimate.standard_error + 1e-8).all()
        assert estimate.reliable.all()


def test_mixture_reads_weights_means_and_scales_from_the_decoder_as_its_docstring_says() -> None:
    likelihood, z = L.DiscretisedLogisticMixture(net(2 * 3 * 2), num_components=2, levels=5, top=8.0), torch.randn(3, 2)
    outputs = likelihood.decoder(z).reshape(3, 2, 3, 2).detach()
    p = likelihood(z).base_dist
    torch.testing.assert_close(p.logits.detach(), outputs[:, :, 0])
    torch.testing.assert_close(p.loc.detach(), 8.0 * (torch.tensor([0.25, 0.75]) + outputs[:, :, 1]))
    torch.testing.assert_close(p.scale.detach(), 8.0 * (1 + outputs[:, :, 2].exp()).log() / 2 + 2.0 / 20)


def test_full_normal_has_the_lower_triangle_of_its_parameter() -> None:
    likelihood = L.FullNormal(net(3), initial=0.8, minimum=0.1)
    torch.testing.assert_close(likelihood.scale_tril(), 0.8 * torch.eye(3))
    with torch.no_grad():
        likelihood.raw.copy_(torch.arange(9.0).reshape(3, 3) - 4.0)
    soft = torch.nn.functional.softplus(torch.tensor([-4.0, 0.0, 4.0])) + 0.1
    expected = torch.tensor([[0.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [2.0, 3.0, 0.0]]) + torch.diag(soft)
    torch.testing.assert_close(likelihood.scale_tril().detach(), expected)
    x, z = torch.randn(4, 3), torch.randn(4, 2)
    normal = torch.distributions.MultivariateNormal(likelihood.decoder(z), scale_tril=expected)
    torch.testing.assert_close(likelihood(z).log_prob(x), normal.log_prob(x))
