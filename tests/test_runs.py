"""A run on the disk: its arguments, its refusals, its held-out rows and its VAE."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import pyro_vae as pv
from pyro_vae.learning import checkpoint
from pyro_vae.learning.history import History
from pyro_vae.runs import Arguments, Run

ARGUMENTS = Arguments(data="digits", latent=3, hidden=(8, 6), seed=4)


def begun(folder: Path, arguments: Arguments = ARGUMENTS) -> Run:
    """A run whose fit has begun, as its checkpoint shows."""
    run = Run.begin(folder, arguments)
    (folder / checkpoint.NAME).write_bytes(b"")
    return run


def test_the_same_arguments_open_the_same_run(tmp_path: Path) -> None:
    begun(tmp_path / "a")
    assert Run.begin(tmp_path / "a", ARGUMENTS).arguments == ARGUMENTS
    assert Run.open(tmp_path / "a") == Run(tmp_path / "a", ARGUMENTS)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"lr": 0.5}, r"--lr was 0\.001 and is 0\.5\. Give another --out"),
        ({"hidden": (8,)}, r"--hidden was \(8, 6\) and is \(8,\)"),
        ({"batch_size": 7, "patience": 2}, "--batch-size was 128 and is 7; --patience was None and is 2"),
        ({"data": "other.csv"}, "--data was 'digits' and is 'other.csv'"),
    ],
)
def test_other_arguments_are_refused_by_name(changes: dict[str, object], told: str, tmp_path: Path) -> None:
    begun(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path.name} holds another run: {told}"):
        Run.begin(tmp_path, dataclasses.replace(ARGUMENTS, **changes))
    assert Run.open(tmp_path).arguments == ARGUMENTS


def test_a_run_that_never_began_does_not_hold_its_folder(tmp_path: Path) -> None:
    Run.begin(tmp_path, dataclasses.replace(ARGUMENTS, epochs=0))
    Run.begin(tmp_path, ARGUMENTS)
    assert Run.open(tmp_path).arguments == ARGUMENTS


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no run: there is no run\.json in it\. Begin with `pyro-vae fit`"):
        Run.open(tmp_path)
    begun(tmp_path)
    with pytest.raises(FileNotFoundError, match="has no fitted VAE yet: let the same `pyro-vae fit` command end first"):
        Run.open(tmp_path).fitted()


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe\x00", b"{", b"[1]", b"{}", b'{"hidden": 3}', b'{"hidden": [1], "new": 1}']
)
def test_a_strange_record_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"run\.json is no record of a run"):
        Run.open(tmp_path)


def test_splits_and_views_are_the_same_every_time(tmp_path: Path) -> None:
    for transform in ("none", "binarise", "threshold", "dequantise"):
        run = Run(tmp_path, dataclasses.replace(ARGUMENTS, transform=transform))
        first, again = run.data()[1], run.data()[1]
        assert torch.equal(first.test.x, again.test.x)
        rows = first.test.x
        torch.rand(3)
        view = run.view(rows)
        assert torch.equal(run.view(rows), view)
        if transform in ("binarise", "threshold"):
            assert set(view.unique().tolist()) == {0.0, 1.0}
        elif transform == "dequantise":
            assert torch.equal((view * 17).floor(), (rows * 16).round())
        else:
            assert torch.equal(view, rows)
    other = Run(tmp_path, dataclasses.replace(ARGUMENTS, seed=5)).data()[1]
    assert not torch.equal(other.test.x, first.test.x)


def test_transforms_by_name(tmp_path: Path) -> None:
    data = Run(tmp_path, ARGUMENTS).data()[0]
    made = {
        name: Run(tmp_path, dataclasses.replace(ARGUMENTS, transform=name)).transform(data)
        for name in ("none", "binarise", "threshold", "dequantise")
    }
    assert made["none"] is None
    assert made["binarise"] is pv.data.binarise
    assert made["threshold"] is pv.data.threshold
    assert made["dequantise"] is not None
    assert torch.equal((made["dequantise"](data.x[:5]) * 17).floor(), (data.x[:5] * 16).round())
    assert checkpoint.name_of(made["dequantise"]) == "Dequantise(levels=17)"


def test_build_follows_the_arguments_and_the_seed(tmp_path: Path) -> None:
    data = Run(tmp_path, ARGUMENTS).data()[0]
    rng = torch.get_rng_state()
    first, again = Run(tmp_path, ARGUMENTS).build(data), Run(tmp_path, ARGUMENTS).build(data)
    other = Run(tmp_path, dataclasses.replace(ARGUMENTS, seed=5)).build(data)
    assert torch.equal(torch.get_rng_state(), rng)
    weights = [torch.cat([p.flatten() for p in vae.parameters()]) for vae in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert first.encoder.encoder.hidden == (8, 6)
    assert first.likelihood.decoder.hidden == (6, 8)
    assert first.prior.latent_dim == 3
    assert first.generate(2).shape == (2, 64)


@pytest.mark.parametrize(
    ("scale", "kind"),
    [
        ("learned", pv.likelihoods.Learned),
        ("per-dimension", pv.likelihoods.Learned),
        ("network", pv.likelihoods.FromNetwork),
        ("0.5", pv.likelihoods.Fixed),
    ],
)
def test_scales_by_name(scale: str, kind: type, tmp_path: Path) -> None:
    run = Run(tmp_path, dataclasses.replace(ARGUMENTS, scale=scale, guide="full"))
    vae = run.build(run.data()[0])
    assert type(vae.likelihood.scale) is kind
    assert isinstance(vae.encoder, pv.guides.FullNormal)
    value = vae.likelihood.scale(torch.zeros(2, 3))
    assert tuple(value.shape) == {"learned": (), "per-dimension": (64,), "network": (2, 64), "0.5": ()}[scale]
    if scale == "0.5":
        assert float(value) == 0.5


@pytest.mark.parametrize("scale", ["wide", "-1", "0", "nan", "inf", ""])
def test_a_wrong_scale_is_named(scale: str, tmp_path: Path) -> None:
    run = Run(tmp_path, dataclasses.replace(ARGUMENTS, scale=scale))
    with pytest.raises(
        ValueError, match=f"--scale '{scale}' is none of learned, per-dimension, network, nor a positive number"
    ):
        run.build(run.data()[0])


@pytest.mark.parametrize("latent", [0, -2])
def test_a_wrong_latent_size_is_named(latent: int, tmp_path: Path) -> None:
    run = Run(tmp_path, dataclasses.replace(ARGUMENTS, latent=latent))
    with pytest.raises(ValueError, match=f"latent={latent} must be a whole number of at least 1"):
        run.build(run.data()[0])


def test_finish_writes_what_fitted_reads(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(30, 2)).astype(np.float32))
    run = begun(tmp_path / "run", dataclasses.replace(ARGUMENTS, data=str(tmp_path / "x.npy"), likelihood="bernoulli"))
    vae = run.build(run.data()[0])
    run.finish(vae, History(epoch=[1], elbo=[-3.0]))
    found = Run.open(tmp_path / "run").fitted()
    assert isinstance(found.likelihood, pv.likelihoods.Bernoulli)
    assert all(torch.equal(a, b) for a, b in zip(vae.parameters(), found.parameters(), strict=True))
    assert json.loads((tmp_path / "run" / "history.json").read_text())["elbo"] == [-3.0]
