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
from pyro_vae.runs import About, Arguments, Run

ARGUMENTS = Arguments(data="digits", latent=3, hidden=(8, 6), seed=4)
DIGITS = pv.data.load("digits")


def begun(folder: Path, arguments: Arguments = ARGUMENTS) -> Run:
    """A run whose fit has begun, as its checkpoint shows."""
    run = Run.begin(folder, arguments, pv.data.load(arguments.data))
    (folder / checkpoint.NAME).write_bytes(b"")
    return run


def test_the_same_arguments_open_the_same_run(tmp_path: Path) -> None:
    begun(tmp_path / "a")
    assert Run.begin(tmp_path / "a", ARGUMENTS, DIGITS).arguments == ARGUMENTS
    assert Run.open(tmp_path / "a") == Run(tmp_path / "a", ARGUMENTS, About((8, 8), 17, DIGITS.fingerprint()))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"lr": 0.5}, r"--lr was 0\.001 and is 0\.5\. Give another --out"),
        ({"hidden": (8,)}, r"--hidden was \(8, 6\) and is \(8,\)"),
        ({"batch_size": 7, "patience": 2}, "--batch-size was 128 and is 7; --patience was None and is 2"),
        ({"data": "other.csv"}, "DATA was 'digits' and is 'other.csv'"),
    ],
)
def test_other_arguments_are_refused_by_name(changes: dict[str, object], told: str, tmp_path: Path) -> None:
    begun(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path.name} holds another run: {told}"):
        Run.begin(tmp_path, dataclasses.replace(ARGUMENTS, **changes), DIGITS)
    assert Run.open(tmp_path).arguments == ARGUMENTS


def test_a_run_that_never_began_does_not_hold_its_folder(tmp_path: Path) -> None:
    Run.begin(tmp_path, dataclasses.replace(ARGUMENTS, epochs=0), DIGITS)
    Run.begin(tmp_path, ARGUMENTS, DIGITS)
    assert Run.open(tmp_path).arguments == ARGUMENTS


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no run: there is no run\.json in it\. Begin with `pyro-vae fit`"):
        Run.open(tmp_path)
    begun(tmp_path)
    with pytest.raises(FileNotFoundError, match="has no fitted VAE yet: let the same `pyro-vae fit` command end first"):
        Run.open(tmp_path).fitted()


ASKED, KEPT = b'{"data": "digits", "hidden": [1]}', b'{"shape": [2], "levels": null, "fingerprint": ""}'


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00",
        b"{",
        b"[1]",
        b"{}",
        ASKED,
        b'{"arguments": ' + ASKED + b"}",
        b'{"arguments": {"data": "digits", "hidden": 3}, "data": ' + KEPT + b"}",
        b'{"arguments": {"data": 3, "hidden": [1]}, "data": ' + KEPT + b"}",
        b'{"arguments": {"data": "digits", "hidden": [1], "new": 1}, "data": ' + KEPT + b"}",
        b'{"arguments": ' + ASKED + b', "data": {"shape": [2]}}',
        b'{"arguments": ' + ASKED + b', "data": "digits"}',
    ],
)
def test_a_strange_record_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"run\.json is no record of a run"):
        Run.open(tmp_path)


def test_splits_and_views_are_the_same_every_time(tmp_path: Path) -> None:
    for transform in ("none", "binarise", "threshold", "dequantise"):
        run = Run(tmp_path, dataclasses.replace(ARGUMENTS, transform=transform), About.of(DIGITS))
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
    other = dataclasses.replace(ARGUMENTS, seed=5).read()[1]
    assert not torch.equal(other.test.x, first.test.x)


def test_transforms_by_name(tmp_path: Path) -> None:
    data = DIGITS
    made = {
        name: Run(tmp_path, dataclasses.replace(ARGUMENTS, transform=name), About.of(data)).transform()
        for name in ("none", "binarise", "threshold", "dequantise")
    }
    assert made["none"] is None
    assert made["binarise"] is pv.data.binarise
    assert made["threshold"] is pv.data.threshold
    assert made["dequantise"] is not None
    assert torch.equal((made["dequantise"](data.x[:5]) * 17).floor(), (data.x[:5] * 16).round())
    assert checkpoint.name_of(made["dequantise"]) == "Dequantise(levels=17)"


def test_build_follows_the_arguments_and_the_seed() -> None:
    rng = torch.get_rng_state()
    first, again = ARGUMENTS.build(DIGITS), ARGUMENTS.build(DIGITS)
    other = dataclasses.replace(ARGUMENTS, seed=5).build(DIGITS)
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
        (None, pv.likelihoods.Learned),
        ("learned", pv.likelihoods.Learned),
        ("per-dimension", pv.likelihoods.Learned),
        ("network", pv.likelihoods.FromNetwork),
        ("0.5", pv.likelihoods.Fixed),
    ],
)
def test_scales_by_name(scale: str | None, kind: type) -> None:
    vae = dataclasses.replace(ARGUMENTS, scale=scale, guide="full").build(DIGITS)
    assert type(vae.likelihood.scale) is kind
    assert isinstance(vae.encoder, pv.guides.FullNormal)
    value = vae.likelihood.scale(torch.zeros(2, 3))
    assert tuple(value.shape) == {None: (), "learned": (), "per-dimension": (64,), "network": (2, 64), "0.5": ()}[scale]
    if scale == "0.5":
        assert float(value) == 0.5


@pytest.mark.parametrize("scale", ["wide", "-1", "0", "nan", "inf", ""])
def test_a_wrong_scale_is_named(scale: str) -> None:
    with pytest.raises(
        ValueError, match=f"--scale '{scale}' is none of learned, optimal, per-dimension, network, nor a positive number"
    ):
        dataclasses.replace(ARGUMENTS, scale=scale).build(DIGITS)


@pytest.mark.parametrize("latent", [0, -2])
def test_a_wrong_latent_size_is_named(latent: int) -> None:
    with pytest.raises(ValueError, match=f"latent={latent} must be a whole number of at least 1"):
        dataclasses.replace(ARGUMENTS, latent=latent).build(DIGITS)


def test_finish_writes_what_fitted_reads(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(30, 2)).astype(np.float32))
    run = begun(
        tmp_path / "run", dataclasses.replace(ARGUMENTS, data=str(tmp_path / "x.npy"), likelihood="bernoulli", scale=None)
    )
    vae = run.arguments.build(run.data()[0])
    run.finish(vae, History(epoch=[1], elbo=[-3.0]))
    found = Run.open(tmp_path / "run").fitted()
    assert isinstance(found.likelihood, pv.likelihoods.Bernoulli)
    assert all(torch.equal(a, b) for a, b in zip(vae.parameters(), found.parameters(), strict=True))
    assert json.loads((tmp_path / "run" / "history.json").read_text())["elbo"] == [-3.0]


def test_a_scale_is_for_the_normal_alone() -> None:
    assert Arguments(data="digits").scale == "learned"
    assert Arguments(data="digits", likelihood="bernoulli").scale is None
    with pytest.raises(
        ValueError, match=r"^--scale 0\.5 is for --likelihood normal, .* alone: leave it out with --likelihood ber"
    ):
        Arguments(data="digits", likelihood="bernoulli", scale="0.5")


# The data of a run


def write(path: Path, *, count: int = 40, seed: int = 0) -> Path:
    np.save(path, np.random.default_rng(seed).normal(size=(count, 2)).astype(np.float32))
    return path


def test_a_path_means_the_same_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "x.npy")
    (tmp_path / "deeper").mkdir()
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    run = begun(tmp_path / "run", dataclasses.replace(ARGUMENTS, data="x.npy"))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["arguments"]["data"] == str(tmp_path.resolve() / "x.npy")
    monkeypatch.chdir(tmp_path / "deeper")
    opened = Run.open(Path("../run"))
    assert len(opened.data()[0]) == 40
    for spelling in ("../x.npy", "../deeper/../x.npy", str(tmp_path / "x.npy")):
        arguments = dataclasses.replace(ARGUMENTS, data=spelling)
        assert Run.begin(tmp_path / "run", arguments, arguments.read()[0]) == run
    assert Arguments(data="..").data == str(tmp_path.resolve())
    monkeypatch.chdir(tmp_path)
    assert [Arguments(data=name).data for name in ("digits", "nothing.csv")] == ["digits", "nothing.csv"]
    assert Arguments(data="./digits").data == str(tmp_path.resolve() / "digits")


def test_a_link_keeps_its_suffix(tmp_path: Path) -> None:
    (write(tmp_path / "x.npy")).rename(tmp_path / "blob")
    (tmp_path / "x.npy").symlink_to(tmp_path / "blob")
    assert len(Arguments(data=str(tmp_path / "x.npy")).read()[0]) == 40


@pytest.mark.parametrize(("count", "seed"), [(40, 1), (41, 0)])
def test_data_that_have_changed_are_refused(count: int, seed: int, tmp_path: Path) -> None:
    path = write(tmp_path / "x.npy")
    before = path.read_bytes()
    arguments = dataclasses.replace(ARGUMENTS, data=str(path))
    begun(tmp_path / "run", arguments)
    write(path, count=count, seed=seed)
    told = (
        r"x\.npy has changed since the fit in .*run: it was 40 rows of 2, checksum [0-9a-f]{8}, and is "
        rf"{count} rows of 2, checksum [0-9a-f]{{8}}\. Restore it, or fit again to another --out\.$"
    )
    with pytest.raises(ValueError, match=told):
        Run.open(tmp_path / "run").data()
    with pytest.raises(ValueError, match=told):
        Run.begin(tmp_path / "run", arguments, arguments.read()[0])
    path.write_bytes(before)
    assert len(Run.open(tmp_path / "run").data()[0]) == 40


def test_shape_and_levels_come_from_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun(tmp_path, dataclasses.replace(ARGUMENTS, transform="dequantise"))
    monkeypatch.setattr("pyro_vae.runs.arguments.load", lambda source: pytest.fail(f"{source} was loaded"))
    opened = Run.open(tmp_path)
    assert opened.about == About((8, 8), 17, DIGITS.fingerprint())
    assert torch.equal((opened.view(DIGITS.x[:5]) * 17).floor(), (DIGITS.x[:5] * 16).round())
