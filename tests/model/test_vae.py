import copy

import pyro
import pyro.optim
import pytest
import torch
from model.components import GUIDES, LIKELIHOODS, PLAIN_GUIDES, Reshaped
from model.suited import data_for
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch import nn

import pyro_vae as pv
from pyro_vae import files


def make(guide: str = "DiagonalNormal", likelihood: str = "Normal, learned", columns: int = 6) -> pv.VAE:
    return pv.VAE(
        prior=pv.priors.StandardNormal(2),
        likelihood=LIKELIHOODS[likelihood](2, (columns,)),
        guide=GUIDES[guide](columns, 2),
    )


def rows(likelihood: str, size: int = 8) -> torch.Tensor:
    return data_for(LIKELIHOODS[likelihood](2, (6,)), size)


@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO, pv.objectives.ELBO])
@pytest.mark.parametrize("guide", PLAIN_GUIDES)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_plain_pyro_svi_moves_every_parameter(loss: type, guide: str, likelihood: str) -> None:
    vae, x = make(guide, likelihood), rows(likelihood)
    before = copy.deepcopy(vae.state_dict())
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), loss=loss())
    first = svi.step(x)
    svi.step(x)
    assert torch.isfinite(torch.tensor(first))
    moved = {name: not torch.equal(value, before[name]) for name, value in vae.named_parameters()}
    assert all(moved.values()), moved


@pytest.mark.parametrize("guide", PLAIN_GUIDES)
def test_svi_loss_with_the_exact_kl_has_no_noise_given_z(guide: str) -> None:
    """TraceMeanField_ELBO samples a KL it has no formula for without a word: the loss must be -log p(x|z) + KL by hand."""
    vae, x = make(guide), rows("Normal, learned")
    torch.manual_seed(5)
    loss = TraceMeanField_ELBO().loss(vae.model, vae.guide, x)
    torch.manual_seed(5)
    q = vae.encoder(x)
    z = q.rsample()
    sigma = q.covariance_matrix if guide == "FullNormal" else torch.diag_embed(q.variance)
    kl = 0.5 * (sigma.diagonal(dim1=-2, dim2=-1).sum(-1) + q.mean.square().sum(-1) - 2 - torch.logdet(sigma))
    by_hand = (kl - vae.likelihood(z).log_prob(x)).sum().detach()
    assert loss == pytest.approx(float(by_hand), rel=1e-5)


def test_two_vaes_never_share_parameters() -> None:
    torch.manual_seed(1)
    first = make()
    second = make()
    third = copy.deepcopy(first)
    x = rows("Normal, learned")
    kept = copy.deepcopy(first.state_dict()), copy.deepcopy(second.state_dict())
    for vae in (first, second, third):
        vae.model(x), vae.guide(x)
    svi = SVI(third.model, third.guide, pyro.optim.Adam({"lr": 0.1}), loss=Trace_ELBO())
    svi.step(x)
    for vae, before in zip((first, second), kept, strict=True):
        assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    assert not torch.equal(third.likelihood.scale.raw, first.likelihood.scale.raw)
    owners = {id(p) for vae in (first, second, third) for p in vae.parameters()}
    assert len(owners) == 3 * len(list(first.parameters()))
    assert {id(p) for p in pyro.get_param_store()._params.values()} == owners


def test_model_draws_rows_of_the_generative_process() -> None:
    """z ~ N(0, I), x = W z + b + s noise: mean and covariance of 40,000 draws, within 5 standard errors."""
    vae = make(columns=6)
    vae.likelihood = pv.likelihoods.Normal(pv.nets.MLP(2, 6), scale=0.5)
    weight, bias = vae.likelihood.decoder.layers[0].weight.detach(), vae.likelihood.decoder.layers[0].bias.detach()
    x = vae.generate(40_000, seed=3)
    assert torch.equal(x, vae.generate(40_000, seed=3))
    covariance = weight @ weight.T + 0.25 * torch.eye(6)
    sd = covariance.diagonal().sqrt()
    assert ((x.mean(0) - bias).abs() < 5.0 * sd / 200).all()
    error = (covariance.square() + torch.outer(sd, sd).square()).sqrt() / 200
    assert ((torch.cov(x.T) - covariance).abs() < 5.0 * error).all()
    means = vae.generate(10, seed=3, noise=False)
    again = vae.generate(10, seed=3, noise=False)
    assert torch.equal(means, again)
    assert vae.model(size=3).shape == (3, 6)


def test_encode_and_reconstruct_are_means_and_leave_no_trace() -> None:
    vae, x = make(), rows("Normal, learned")
    vae.train()
    q = vae.encode(x)
    assert not q.mean.requires_grad
    torch.testing.assert_close(vae.reconstruct(x), vae.likelihood.decoder(vae.encoder(x).mean).detach())
    assert vae.training
    assert all(module.training for module in vae.modules())
    assert not list(pyro.get_param_store().keys())


def test_model_without_rows_or_size_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match=r"model\(size=64\)"):
        make().model()
    with pytest.raises(ValueError, match="size=0"):
        make().generate(0)


@pytest.mark.parametrize("guide", PLAIN_GUIDES)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_save_and_load_give_the_same_log_densities(tmp_path: object, guide: str, likelihood: str) -> None:
    vae, x = make(guide, likelihood), rows(likelihood)
    vae.save(f"{tmp_path}/deep/folder/vae")
    again = pv.load(f"{tmp_path}/deep/folder/vae")
    assert repr(again) == repr(vae)
    assert torch.equal(again.log_weights(x, 5, seed=1)[0], vae.log_weights(x, 5, seed=1)[0])


def test_precision_and_buffers_survive_saving(tmp_path: object) -> None:
    vae = make(likelihood="Normal, fixed").double()
    vae.save(f"{tmp_path}/vae.safetensors")
    again = pv.load(f"{tmp_path}/vae")
    assert {p.dtype for p in again.parameters()} == {torch.float64}
    assert torch.equal(again.likelihood.scale.value, vae.likelihood.scale.value)


def test_a_module_of_ones_own_needs_into(tmp_path: object) -> None:
    def build() -> pv.VAE:
        return pv.VAE(
            prior=pv.priors.StandardNormal(2),
            likelihood=pv.likelihoods.Normal(Reshaped(2, (6,)), scale=1.0),
            guide=pv.guides.DiagonalNormal(nn.Linear(6, 4), latent_dim=2),
        )

    def plain() -> pv.VAE:
        return pv.VAE(
            prior=pv.priors.StandardNormal(2),
            likelihood=pv.likelihoods.Normal(pv.nets.MLP(2, 6), scale=1.0),
            guide=pv.guides.DiagonalNormal(pv.nets.MLP(6, 4), latent_dim=2),
        )

    vae, x = build(), rows("Normal, learned")
    vae.save(f"{tmp_path}/mine")
    with pytest.raises(ValueError, match=r"holds a Reshaped of your own.*pv.load\(path, into=vae\)"):
        pv.load(f"{tmp_path}/mine")
    other = build()
    assert pv.load(f"{tmp_path}/mine", into=other) is other
    assert torch.equal(other.log_weights(x, 3)[0], vae.log_weights(x, 3)[0])
    with pytest.raises(ValueError, match=r"does not fit: 'encoder.encoder.bias' is only in the file"):
        pv.load(f"{tmp_path}/mine", into=plain())


def test_parts_that_disagree_are_both_named() -> None:
    with pytest.raises(ValueError, match=r"StandardNormal\(latent_dim=3\) has 3.*MLP.*has 2"):
        pv.VAE(
            prior=pv.priors.StandardNormal(3),
            likelihood=LIKELIHOODS["Bernoulli"](2, (6,)),
            guide=GUIDES["FullNormal"](6, 3),
        )
    with pytest.raises(TypeError, match=r"prior is a MLP: give a pv.priors.Prior, or a module whose"):
        pv.VAE(prior=pv.nets.MLP(2, 2), likelihood=LIKELIHOODS["Bernoulli"](2, (6,)), guide=GUIDES["FullNormal"](6, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x[:, :5], r"rows of shape \(5,\), this VAE models rows of shape \(6,\)"),
        (lambda x: x.index_fill(0, torch.tensor([2]), torch.nan), "NaN or infinite values in 1 of 8 rows, first in row 2"),
        (lambda x: x.index_fill(0, torch.tensor([4]), torch.inf), "first in row 4"),
        (lambda x: x[:0], "no rows"),
        (lambda x: x.long(), "dtype torch.int64"),
        (lambda x: x.half(), "dtype torch.float16, too coarse"),
        (lambda x: x.double(), "dtype torch.float64, the parameters torch.float32"),
        (lambda x: x.to("meta"), "x is on meta, the parameters on cpu"),
        (lambda x: (x, x), "models one tensor of rows, but was given a tuple of 2"),
        (lambda x: x + 0.25, "Bernoulli takes 0 and 1 alone"),
    ],
)
@pytest.mark.parametrize("use", ["encode", "reconstruct", "log_evidence"])
def test_unusable_rows_are_refused_before_any_work(spoil: object, message: str, use: str) -> None:
    vae = make(likelihood="Bernoulli")
    x = spoil(rows("Bernoulli"))  # type: ignore[operator]
    call = {"encode": vae.encode, "reconstruct": vae.reconstruct, "log_evidence": lambda x: pv.log_evidence(vae, x)}[use]
    with pytest.raises(ValueError, match=message):
        call(x)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"prior": pv.priors.Laplace(2)}, r"differ in prior: StandardNormal and Laplace: build"),
        ({"scale": 3.0}, r"differ in likelihood\.scale\.value: 1\.0 and 3\.0: build"),
        ({"scale": pv.likelihoods.Learned()}, r"differ in likelihood\.scale: Fixed and Learned: build"),
        ({"activation": nn.Tanh}, r"differ in likelihood\.decoder\.activation: SiLU and Tanh: build"),
        ({"hidden": (5, 4)}, r"differ in likelihood\.decoder\.hidden: \(5,\) and \(5, 4\): build"),
    ],
)
def test_a_file_of_another_model_is_not_loaded_into_a_vae(tmp_path: object, other: dict[str, object], message: str) -> None:
    def build(prior: object = None, scale: object = 1.0, **net: object) -> pv.VAE:
        return pv.VAE(
            prior=prior or pv.priors.StandardNormal(2),  # type: ignore[arg-type]
            likelihood=pv.likelihoods.Normal(pv.nets.MLP(2, 6, **{"hidden": (5,), **net}), scale=scale),  # type: ignore[arg-type]
            guide=pv.guides.DiagonalNormal(nn.Linear(6, 4), latent_dim=2),
        )

    build().save(f"{tmp_path}/vae")
    target = build(**other)
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(ValueError, match=message):
        pv.load(f"{tmp_path}/vae", into=target)
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


def test_a_file_without_newer_settings_is_still_loaded_into_a_vae(tmp_path: object) -> None:
    vae = make()
    vae.save(f"{tmp_path}/vae")
    path = files.with_suffix(f"{tmp_path}/vae")
    tensors, header = files.read(path, "vae")
    del header["likelihood"]["settings"]["missing"]
    files.write(path, "vae", tensors, header)
    again = pv.load(path, into=make())
    assert all(torch.equal(value, tensors[name]) for name, value in again.state_dict().items())


def test_imputation_by_what_is_no_engine_is_refused() -> None:
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(2),
        likelihood=pv.likelihoods.Normal(pv.nets.MLP(2, 3), scale=0.5, missing=True),
        guide=pv.guides.DiagonalNormal(pv.nets.MLP(3, hidden=(4,)), latent_dim=2),
    )
    for method in (pv.evidence.exact, "laplace"):
        with pytest.raises(
            TypeError, match=r"method='?(exact|laplace)'? draws no latents: give an engine of pv\.posterior"
        ):
            vae.impute(torch.zeros(2, 3), method=method)  # type: ignore[arg-type]
