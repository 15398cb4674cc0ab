"""Promises that a critical reader once found broken, each as the shortest program that shows it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyro
import pyro.optim
import pytest
import torch
from pyro.infer import SVI, ReweightedWakeSleep, Trace_ELBO
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import Dataset

import pyro_vae as pv


def make(scale: object = 0.5, columns: int = 5) -> pv.VAE:
    torch.manual_seed(0)
    return pv.VAE(
        prior=pv.priors.StandardNormal(2),
        likelihood=pv.likelihoods.Normal(pv.nets.MLP(2, columns, hidden=8), scale=scale),  # type: ignore[arg-type]
        guide=pv.guides.DiagonalNormal(pv.nets.MLP(columns, hidden=(8,)), latent_dim=2),
    )


class Items(Dataset):  # type: ignore[type-arg]
    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.x[index]


def test_constant_columns_are_seen_in_data_sets_and_through_transforms() -> None:
    x = torch.rand(40, 5)
    x[:, 3] = 0.0
    for source, transform in ((Items(x), None), (x, pv.data.threshold)):
        with pytest.raises(ValueError, match=r"In train: 1 of 5 columns of x are constant \(the first is column 3\)"):
            pv.fit(make(pv.likelihoods.Learned(5)), source, transform=transform, epochs=1, progress=False)


def test_reweighted_wake_sleep_is_an_objective() -> None:
    vae, x = make(), torch.randn(30, 5)
    before = [p.detach().clone() for p in vae.parameters()]
    history = pv.fit(vae, x, objective=ReweightedWakeSleep(num_particles=3), epochs=2, progress=False)
    assert all(math.isfinite(value) for value in (*history.loss, *history.elbo))
    assert all(not torch.equal(p, b) for p, b in zip(vae.parameters(), before, strict=True))


def test_damaged_descriptions_are_told_as_such(tmp_path: Path) -> None:
    make().save(tmp_path / "good")
    with safe_open(tmp_path / "good.safetensors", "pt") as file:
        text = file.metadata()["pyro_vae"]
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    for old, new in (
        ('"prior": {', '"prio": {'),
        ('"priors.StandardNormal"', "5"),
        ('"priors.StandardNormal"', '"priors.Prior"'),
        ('"latent_dim": 2}', '"latent_dim": 4611686018427387904}'),
        ('{"latent_dim": 2}', "[1]"),
    ):
        assert old in text
        save_file(tensors, tmp_path / "bad.safetensors", {"pyro_vae": text.replace(old, new, 1)})
        with pytest.raises(ValueError, match="describes a VAE that this pyro_vae cannot build") as caught:
            pv.load(tmp_path / "bad")
        assert ".." not in str(caught.value)


def test_sizes_from_numpy_are_saved_as_numbers(tmp_path: Path) -> None:
    make(pv.likelihoods.Learned(initial=np.float32(0.5)), columns=np.prod((5,))).save(tmp_path / "vae")
    assert pv.load(tmp_path / "vae").likelihood.scale.initial == 0.5


def test_a_resumed_fit_refuses_another_model(tmp_path: Path) -> None:
    x = torch.randn(20, 5)
    pv.fit(make(0.3), x, epochs=1, checkpoint=tmp_path / "run", progress=False)
    other = make(0.9)
    with pytest.raises(ValueError, match=r"modules was .*value=0\.3\).* and is .*value=0\.9\)"):
        pv.fit(other, x, epochs=2, checkpoint=tmp_path / "run", progress=False)
    assert float(other.likelihood.scale.value) == pytest.approx(0.9)


def test_a_replaced_network_is_trained_by_plain_svi() -> None:
    vae, x = make(), torch.randn(20, 5)
    SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), loss=Trace_ELBO()).step(x)
    vae.likelihood.decoder = pv.nets.MLP(2, 5, hidden=(8,))
    before = [p.detach().clone() for p in vae.likelihood.decoder.parameters()]
    SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), loss=Trace_ELBO()).step(x)
    assert all(not torch.equal(p, b) for p, b in zip(vae.likelihood.decoder.parameters(), before, strict=True))


def test_fit_leaves_only_what_lives_in_the_store() -> None:
    pv.fit(make(), torch.randn(20, 5), epochs=1, progress=False)
    assert not list(pyro.get_param_store().keys())


def test_infinite_errors_stay_infinite_and_no_k_hat_is_no_zero() -> None:
    estimate = pv.log_evidence(make(), torch.randn(4, 5), method=pv.posterior.from_guide, num_particles=1)
    assert estimate.standard_error.isposinf().all()
    assert estimate.bias.isneginf().all()
    assert "no k-hat" in str(estimate)


def test_meta_is_refused_before_anything_moves() -> None:
    vae = make()
    with pytest.raises(ValueError, match="device='meta' holds no numbers"):
        pv.fit(vae, torch.randn(20, 5), device="meta", progress=False)
    assert {p.device.type for p in vae.parameters()} == {"cpu"}


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: make(pv.likelihoods.Learned(3)), r"Learned\(3\) does not fit a decoder of 5 columns: give Learned\(5\)"),
        (lambda: pv.nets.ConvEncoder((4, 4), channels=()), r"channels=\(\) makes no convolution"),
        (
            lambda: pv.VAE(
                prior=pv.priors.StandardNormal(2),
                likelihood=pv.likelihoods.Normal(torch.nn.Sequential(torch.nn.Linear(3, 5)), scale=1.0),
                guide=pv.guides.DiagonalNormal(pv.nets.MLP(5, hidden=(8,)), latent_dim=2),
            ),
            r"cannot take latents of shape \(1, 2\)",
        ),
        (
            lambda: pv.fit(make(), torch.randn(9, 5), optimiser=lambda p: torch.optim.LBFGS(p), progress=False),
            "LBFGS needs a closure",
        ),
        (lambda: pv.fit(make(), torch.randn(9, 5), torch.full((9, 5), torch.nan), progress=False), "valid has NaN"),
    ],
)
def test_ordinary_mistakes_are_told_in_a_sentence(make_it: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_it()  # type: ignore[operator]


def test_a_last_batch_of_one_row_under_batch_norm_names_the_batch_size() -> None:
    vae = make()
    vae.encoder.encoder = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.BatchNorm1d(8))
    with pytest.raises(ValueError, match=r"last batch has one row.*9 rows leave one over with batch_size=4"):
        pv.fit(vae, torch.randn(9, 5), batch_size=4, epochs=1, progress=False)


def test_a_large_initial_scale_does_not_overflow() -> None:
    assert torch.allclose(pv.likelihoods.Learned(initial=1000.0)(torch.zeros(1, 1)), torch.tensor(1000.0))


def test_what_cannot_be_written_is_named_with_its_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied", "/somewhere/.vae.abc.tmp")

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    with pytest.raises(PermissionError, match=r"cannot write .*vae\.safetensors \(Permission denied\): choose a folder"):
        make().save(tmp_path / "vae")
