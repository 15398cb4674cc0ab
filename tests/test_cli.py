"""The command line: the job end to end, and a user's mistakes in one line with exit code 2."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import image

import pyro_vae as pv
from pyro_vae import cli
from pyro_vae.learning import checkpoint
from pyro_vae.report import bars, demo

TINY = ["--latent", "2", "--hidden", "8", "--epochs", "2", "--batch-size", "256"]


def run(*words: Any) -> int:
    """The exit code of a command."""
    try:
        cli.main([str(word) for word in words])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def python(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, check=False, **options)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads only get into each other's way in networks this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the digits."""
    out = tmp_path_factory.mktemp("runs") / "a"
    assert run("fit", "digits", *TINY, "--transform", "dequantise", "--out", out) == 0
    return out


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with three latent dimensions, too many for quadrature."""
    out = tmp_path_factory.mktemp("runs") / "deep"
    assert run("fit", "digits", *TINY, "--latent", "3", "--transform", "dequantise", "--out", out) == 0
    return out


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain numbers with names and labels."""
    path = tmp_path_factory.mktemp("data") / "table.csv"
    x = np.random.default_rng(0).normal(size=(60, 3)) @ np.array([[1.0, 0.5, 0.0], [0.0, 1.0, 2.0], [0.3, 0.0, 1.0]])
    pd.DataFrame(x, columns=["a", "b", "c"]).assign(label=np.arange(60) % 2).to_csv(path, index=False)
    return path


# The job


def test_fit_leaves_a_whole_run(fitted: Path) -> None:
    names = {"run.json", "checkpoint.safetensors", "vae.safetensors", "history.json", "learning_curve.png"}
    assert {path.name for path in fitted.iterdir()} >= names
    assert image.imread(fitted / "learning_curve.png").std() > 0.01
    assert json.loads((fitted / "history.json").read_text())["epoch"] == [1, 2]
    assert pv.load(fitted / "vae").prior.latent_dim == 2


def test_the_same_command_returns_the_same_run(fitted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = json.loads((fitted / "history.json").read_text())
    vae = (fitted / "vae.safetensors").read_bytes()
    assert run("fit", "digits", *TINY, "--transform", "dequantise", "--out", fitted, "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"out": str(fitted), **before}
    assert err == ""
    assert (fitted / "vae.safetensors").read_bytes() == vae


def test_other_arguments_with_the_same_folder(fitted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vae = (fitted / "vae.safetensors").read_bytes()
    assert run("fit", "digits", *TINY, "--lr", "0.5", "--out", fitted) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "--transform was 'dequantise' and is 'none'; --lr was 0.001 and is 0.5. Give another --out" in err
    assert err.count("\n") == 1
    assert (fitted / "vae.safetensors").read_bytes() == vae


def test_fit_says_how_it_went(tmp_path: Path, table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run("fit", table, *TINY, "--guide", "full", "--scale", "per-dimension", "--valid", "0.2", "--out", tmp_path / "b")
        == 0
    )
    out = capsys.readouterr().out
    assert re.fullmatch(r"epoch 2: ELBO -?[\d.]+, validation -?[\d.]+ nats a row, [\d.]+ s, KL [\d.]+\nsaved in .*b\n", out)
    assert pv.load(tmp_path / "b" / "vae").generate(2).shape == (2, 3)  # the labels are no column of x


def test_the_names_of_parts_are_those_that_runs_know() -> None:
    """The command line writes them out, so that --help need not import torch."""
    from pyro_vae.runs import parts

    assert list(parts.PRIORS) == cli.PRIORS
    assert list(parts.LIKELIHOODS) == cli.LIKELIHOODS
    assert list(parts.GUIDES) == cli.GUIDES
    assert ["elbo", *parts.OBJECTIVES] == cli.OBJECTIVES


@pytest.mark.parametrize("number", range(13))
def test_every_name_fits_and_is_judged(number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The names of each kind in turn, so that every one is used; data that suit the likelihood, some of them missing."""

    def name(kind: list[str]) -> str:
        return kind[number % len(kind)]

    likelihood, x = name(cli.LIKELIHOODS), torch.randn(60, 4)
    levels = torch.randint(4, (60, 4)).float()
    suited = {
        "log-normal": x.exp(), "beta": x.sigmoid(), "bernoulli": (x > 0).float(), "continuous-bernoulli": x.sigmoid(),
        "logistic": (x.sigmoid() * 255).round() / 255, "logistic-mixture": (x.sigmoid() * 255).round() / 255,
        "poisson": levels, "negative-binomial": levels, "zero-inflated": levels,
    }.get(likelihood, x)  # fmt: skip
    suited[::7, 1] = torch.nan
    np.save(tmp_path / "x.npy", suited.numpy())
    words = ["--prior", name(cli.PRIORS), "--likelihood", likelihood, "--guide", name(cli.GUIDES)]
    words += ["--objective", name(cli.OBJECTIVES), "--missing", "--valid", "0.2", "--test", "0.1"]
    assert run("fit", tmp_path / "x.npy", *TINY, *words, "--out", tmp_path / "run") == 0
    assert run("evaluate", tmp_path / "run", "--method", "laplace", "--particles", "100", "--no-figures") == 0
    out = capsys.readouterr().out
    assert "log p(x) = " in out
    assert ("bits per dimension" in out) is (
        likelihood in ("bernoulli", "logistic", "logistic-mixture", *cli.LIKELIHOODS[-3:])
    )


def test_evaluate_writes_rows_and_json(fitted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("evaluate", fitted, "--method", "guide", "--particles", "50", "--json") == 0
    about = json.loads(capsys.readouterr().out)
    rows = pd.read_csv(fitted / "evidence.csv")
    columns = [
        "row",
        "log_p",
        "standard_error",
        "bias",
        "lower",
        "upper",
        "ess",
        "pareto_k",
        "evaluations",
        "engine",
        "reliable",
    ]
    assert list(rows.columns)[: len(columns)] == columns
    assert about["rows"] == len(rows) == 180
    assert rows["row"].tolist() == list(range(180))
    assert rows["log_p"].mean() == pytest.approx(about["mean"], rel=1e-9)
    assert rows["reliable"].sum() == about["reliable"]
    assert about["data_standard_error"] == pytest.approx(rows["log_p"].std() / 180**0.5, rel=1e-6)
    assert (rows["evaluations"] >= 50).all()


def test_evaluate_is_the_librarys_answer_on_the_held_out_rows(fitted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--method", "guide", "--particles", "20", "--seed", "3", "--rows", "15"]
    assert run("evaluate", fitted, *words) == 0
    assert re.search(r"^log p\(x\) = -?[\d.]+ nats a row", capsys.readouterr().out, re.MULTILINE)
    from pyro_vae.runs import Run

    opened = Run.open(fitted)
    x = opened.view(opened.data()[1].test.x)[:15]
    estimate = pv.log_evidence(pv.load(fitted / "vae"), x, method=pv.posterior.from_guide, num_particles=20, seed=3)
    rows = pd.read_csv(fitted / "evidence.csv")
    assert rows["log_p"].tolist() == pytest.approx(estimate.log_p.tolist(), rel=1e-6)


def test_evaluate_by_the_cascade(fitted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--rows", "25", "--bounds", "10", "--target", "0.1", "--seed", "4"]
    assert run("evaluate", fitted, *words, "--json") == 0
    out, err = capsys.readouterr()
    assert err == ""  # no bars where there is no terminal
    about = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    rows = pd.read_csv(fitted / "evidence.csv")
    assert about["method"] == "cascade"
    assert about["rows"] == len(rows) == 25
    assert about["reliable"] == rows["reliable"].sum()
    assert {name: told["rows"] for name, told in about["engines"].items()} == rows["engine"].value_counts().to_dict()
    assert (rows["standard_error"][rows["reliable"]] <= 0.1).all()
    assert rows["upper"].notna().tolist() == [True] * 10 + [False] * 15
    box = about["sandwich"]
    assert box["rows"] == 10
    assert box["lower"] == pytest.approx(rows["lower"][:10].mean())
    assert box["upper"] - box["lower"] == pytest.approx(box["mean_width"])
    # Independent estimates of the same rows, one of them between bounds.
    error = np.hypot(rows["standard_error"], rows[["lower_standard_error", "upper_standard_error"]].max(axis=1))[:10]
    assert (rows["log_p"][:10] > rows["lower"][:10] - 5.0 * error).all()
    assert (rows["log_p"][:10] < rows["upper"][:10] + 5.0 * error).all()
    figures = {"evidence_convergence.png", "evidence_pareto_k.png", "evidence_sandwich.png"}
    assert set(about["figures"]) == figures
    assert all(image.imread(fitted / name).std() > 0.01 for name in figures)


def test_evaluate_says_what_it_did(fitted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("evaluate", fitted, "--rows", "10", "--bounds", "3", "--no-figures") == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0].split() == "engine rows evaluations a row standard error, nats reliable".split()
    told = [line.split()[0] for line in lines[2 : lines.index("")]]
    assert set(told) == set(pd.read_csv(fitted / "evidence.csv")["engine"])
    assert lines[-1] == f"rows are in {fitted / 'evidence.csv'}"
    assert not list(fitted.glob("evidence*.png"))  # those of an earlier evaluation are of other rows


def test_ctrl_c_keeps_what_is_finished(
    fitted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bars.Bars, "on_block", lambda *_: signal.raise_signal(signal.SIGINT))
    assert run("evaluate", fitted, "--rows", "10", "--json") == 130
    out, err = capsys.readouterr()
    assert json.loads(out)["interrupted"]
    assert len(pd.read_csv(fitted / "evidence.csv")) == 10
    assert err == f"pyro-vae: stopped; the rows that were finished are in {fitted / 'evidence.csv'}.\n"


def test_ctrl_c_before_anything_is_finished(
    fitted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pv.evidence, "log_evidence", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    assert run("evaluate", fitted) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"pyro-vae: stopped before any rows were finished; .*evidence\.csv was not written\.\n", err)


@pytest.mark.parametrize("method", ["prior", "laplace", "annealed"])
def test_the_other_methods(method: str, fitted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("evaluate", fitted, "--method", method, "--particles", "30", "--rows", "4", "--json") == 0
    assert json.loads(capsys.readouterr().out)["method"] == method
    assert set(pd.read_csv(fitted / "evidence.csv")["engine"]) == {method}


def test_quadrature_of_two_latent_dimensions(fitted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("evaluate", fitted, "--rows", "4", "--bounds", "0", "--no-figures") == 0
    by_particles = pd.read_csv(fitted / "evidence.csv")
    assert run("evaluate", fitted, "--method", "exact", "--rows", "4") == 0
    rows = pd.read_csv(fitted / "evidence.csv")
    assert set(rows["engine"]) == {"quadrature"}
    assert rows["lower"].tolist() == rows["upper"].tolist() == rows["log_p"].tolist()
    assert ((by_particles["log_p"] - rows["log_p"]).abs() < 5.0 * by_particles["standard_error"]).all()


@pytest.mark.parametrize("suffix", [".png", ".npy", ".csv"])
@pytest.mark.parametrize("mean", [True, False])
def test_generate(suffix: str, mean: bool, fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / f"samples{suffix}"
    assert run("generate", fitted, "-n", "9", "--seed", "5", "--out", out, *(["--mean"] if mean else [])) == 0
    assert capsys.readouterr().out == f"9 rows are in {out}\n"
    expected = pv.load(fitted / "vae").generate(9, seed=5, noise=not mean)
    if suffix == ".png":
        assert image.imread(out).std() > 0.01
    else:
        found = np.load(out) if suffix == ".npy" else np.loadtxt(out, delimiter=",", dtype=np.float32)
        assert torch.allclose(torch.from_numpy(found), expected)


def test_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(demo, "METHODS", {"guide": (pv.posterior.from_guide, 20)})
    assert run("demo", "--epochs", "1", "--out", tmp_path / "demo", "--json") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["out"] == str(tmp_path / "demo")
    assert (tmp_path / "demo" / "vae.safetensors").exists()


# Mistakes

MISTAKES: dict[str, tuple[list[str], str]] = {
    "no such command": (["fti"], r"No such command 'fti'"),
    "no such option": (["fit", "digits", "--out", "OUT", "--latents", "3"], r"No such option.*--latents"),
    "no out": (["fit", "digits"], r"Missing option '--out'"),
    "no data": (["fit", "--out", "OUT"], r"Missing argument 'DATA'"),
    "data": (["fit", "nothing", "--out", "OUT"], r"there is no data set, file or folder 'nothing': a file ends in"),
    "words in a table": (["fit", "WORDS", "--out", "OUT"], r"words\.csv, line 2: column 'a' has 'two', no number"),
    "NaN in a table": (
        ["fit", "GAPS", "--out", "OUT", "--valid", "0.2"],
        r"has NaN or infinite values .* missing=True\. On the command line: --missing\.$",
    ),
    "missing values of bits": (
        ["fit", "GAPS", "--out", "OUT", "--missing", "--transform", "threshold", "--likelihood", "bernoulli"],
        r": --transform threshold takes no missing values: leave it out, or leave out --missing\.$",
    ),
    "levels": (
        ["fit", "LEVELS", "--out", "OUT", "--likelihood", "logistic"],
        r"levels= and top= that it has, or take a density such as Normal\. On the command line: --likelihood normal\.$",
    ),
    "hidden": (
        ["fit", "digits", "--out", "OUT", "--hidden", "8,x"],
        r"--hidden.*'8,x' must be whole numbers .* such as 200,200",
    ),
    "hidden 0": (["fit", "digits", "--out", "OUT", "--hidden", "0"], r"--hidden.*'0' must be whole numbers of at least 1"),
    "latent 0": (["fit", "digits", "--out", "OUT", "--latent", "0"], r"'--latent': 0 is not in the range x>=1"),
    "latent": (["fit", "digits", "--out", "OUT", "--latent", "two"], r"--latent.*'two' is not a valid integer"),
    "epochs": (["fit", "digits", "--out", "OUT", "--epochs", "-1"], r"'--epochs': -1 is not in the range x>=1"),
    "batch size": (["fit", "digits", "--out", "OUT", "--batch-size", "0"], r"'--batch-size': 0 is not in the range"),
    "lr": (["fit", "digits", "--out", "OUT", "--lr", "0"], r"'--lr': 0.0 is not in the range x>0"),
    "lr inf": (["fit", "digits", "--out", "OUT", "--lr", "inf"], r"'--lr': inf is not finite"),
    "lr nan": (["fit", "digits", "--out", "OUT", "--lr", "nan"], r"'--lr': nan is not finite"),
    "beta": (["fit", "digits", "--out", "OUT", "--beta", "-1"], r"'--beta': -1.0 is not in the range x>=0"),
    "clip": (["fit", "digits", "--out", "OUT", "--clip-norm", "-2"], r"'--clip-norm': -2.0 is not in the range x>0"),
    "patience": (["fit", "digits", "--out", "OUT", "--patience", "0"], r"'--patience': 0 is not in the range"),
    "scale of bits": (
        ["fit", "digits", "--out", "OUT", "--likelihood", "bernoulli", "--scale", "learned"],
        r": --scale learned is for --likelihood normal, student, .* alone: leave it out with --likelihood bernoulli\.$",
    ),
    "scale": (
        ["fit", "digits", "--out", "OUT", "--scale", "big"],
        r"--scale 'big' is none of learned, optimal, per-dimension",
    ),
    "likelihood": (
        ["fit", "digits", "--out", "OUT", "--likelihood", "cauchy"],
        r"'cauchy' is not one of 'normal', 'low-rank'",
    ),
    "prior": (["fit", "digits", "--out", "OUT", "--prior", "cauchy"], r"'cauchy' is not one of 'standard', 'normal'"),
    "free bits": (
        ["fit", "digits", "--out", "OUT", "--objective", "iwae", "--free-bits", "0.1"],
        r": --beta and --free-bits are for --objective elbo alone: leave them out with iwae\.$",
    ),
    "optimal scale": (
        ["fit", "digits", "--out", "OUT", "--likelihood", "student", "--scale", "optimal"],
        r"StudentT",
    ),
    "grey": (
        ["fit", "digits", "--out", "OUT", "--likelihood", "bernoulli"],
        r"Bernoulli takes 0 and 1 alone.* On the command line: --transform binarise or --transform threshold\.$",
    ),
    "constant": (
        ["fit", "digits", "--out", "OUT", "--scale", "per-dimension"],
        r"columns of x are constant .*dequantise.* On the command line: --transform dequantise or --scale learned\.$",
    ),
    "valid nan": (["fit", "digits", "--out", "OUT", "--valid", "nan"], r"valid=nan is no fraction of the rows"),
    "test inf": (["fit", "digits", "--out", "OUT", "--test", "inf"], r"test=inf is no fraction of the rows"),
    "valid": (["fit", "digits", "--out", "OUT", "--valid", "0"], r"valid=0.0, test=0.1 leave a part .* empty: choose"),
    "device": (["fit", "digits", "--out", "OUT", "--device", "abacus"], r"device='abacus' cannot be used here"),
    "unwritable": (["fit", "digits", "--out", "FILE/deeper"], r"a-file"),
    "out is a file": (["fit", "digits", "--out", "FILE"], r"Directory '.*a-file' is a file"),
    "no run": (["evaluate", "OUT"], r"holds no run: there is no run\.json in it\. Begin with `pyro-vae fit`"),
    "method": (
        ["evaluate", "RUN", "--method", "magic"],
        r"'magic' is not one of 'cascade', 'guide', 'laplace', 'annealed', 'prior', 'exact'",
    ),
    "particles 0": (["evaluate", "RUN", "--particles", "0"], r"'--particles': 0 is not in the range x>=1"),
    "particles": (["evaluate", "RUN", "--particles", "-5"], r"'--particles': -5 is not"),
    "rows": (["evaluate", "RUN", "--rows", "0"], r"'--rows': 0 is not in the range x>=1"),
    "particles of the cascade": (
        ["evaluate", "RUN", "--particles", "500"],
        r": --particles 500 needs --method guide, .*: the cascade .*; give --target for its accuracy\.$",
    ),
    "target of a method": (
        ["evaluate", "RUN", "--method", "guide", "--target", "0.1"],
        r": --target 0\.1 is for the cascade: leave it out, or --method guide\.$",
    ),
    "target": (["evaluate", "RUN", "--target", "0"], r"'--target': 0.0 is not in the range x>0"),
    "bounds": (["evaluate", "RUN", "--bounds", "-1"], r"'--bounds': -1 is not in the range x>=0"),
    "particles of exact": (
        ["evaluate", "RUN", "--method", "exact", "--particles", "9"],
        r": --particles 9: --method exact draws none, leave it out\.$",
    ),
    "not exact": (["evaluate", "DEEP", "--method", "exact"], r"quadratic|linear"),
    "no run to draw from": (["generate", "OUT", "--out", "a.png"], r"holds no run"),
    "suffix": (["generate", "RUN", "--out", "a.gif"], r"--out a\.gif must end in \.png, \.npy or \.csv"),
    "count": (["generate", "RUN", "-n", "0", "--out", "a.npy"], r"'-n': 0 is not in the range x>=1"),
    "nowhere to draw to": (["generate", "RUN", "--out", "FILE/a.npy"], r"a-file"),
}

TOLD_BY_THE_FIT = {"NaN in a table", "levels", "grey", "constant", "device"}  # when the folder is there already


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(
    what: str, fitted: Path, deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, told = MISTAKES[what]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-file").write_text("not a folder")
    (tmp_path / "words.csv").write_text("a,b\ntwo,3\n")
    (tmp_path / "gaps.csv").write_text("a,b\n" + "1,\n2,3\n5,8\n" * 10)
    places = {"OUT": "out", "RUN": str(fitted), "DEEP": str(deep), "FILE": "a-file", "WORDS": "words.csv"}
    (tmp_path / "levels.csv").write_text("a,b\n" + "0,0.0625\n0.5,1\n" * 20)
    places |= {"GAPS": "gaps.csv", "LEVELS": "levels.csv"}
    given = [re.sub(r"^(OUT|RUN|DEEP|FILE|WORDS|GAPS|LEVELS)\b", lambda found: places[found[1]], word) for word in words]
    assert run(*given) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"pyro-vae: .*\n", err), err
    assert re.search(told, err), err
    assert not (tmp_path / "out" / checkpoint.NAME).exists()
    assert what in TOLD_BY_THE_FIT or not (tmp_path / "out").exists()


def test_a_mistake_does_not_spoil_the_folder(tmp_path: Path, table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fit", table, *TINY, "--device", "abacus", "--out", tmp_path / "run") == 2
    assert (tmp_path / "run" / "run.json").exists()
    capsys.readouterr()
    assert run("fit", table, *TINY, "--out", tmp_path / "run") == 0


def test_a_run_does_not_depend_on_the_working_directory(
    tmp_path: Path, table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(table.parent)
    assert run("fit", table.name, *TINY, "--out", tmp_path / "run") == 0
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    assert run("evaluate", "../run", "--method", "guide", "--particles", "20") == 0
    assert run("fit", table, *TINY, "--scale", "learned", "--out", "../run") == 0
    assert capsys.readouterr().err == ""


def test_evaluate_refuses_data_that_have_changed(tmp_path: Path, table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy.csv"
    copy.write_bytes(table.read_bytes())
    assert run("fit", copy, *TINY, "--out", tmp_path / "run") == 0
    copy.write_text("".join(copy.read_text().splitlines(keepends=True)[:-1]))
    capsys.readouterr()
    assert run("evaluate", tmp_path / "run") == 2
    assert run("fit", copy, *TINY, "--out", tmp_path / "run") == 2
    out, err = capsys.readouterr()
    assert out == ""
    told = (
        r"pyro-vae: .*copy\.csv has changed since the fit in .*: it was 60 rows of 3, .* is 59 rows of 3, .*Restore it.*\n"
    )
    assert re.fullmatch(told * 2, err), err
    assert not (tmp_path / "run" / "evidence.csv").exists()


def test_pictures_need_no_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 4, 3), dtype=np.uint8)
    np.save(tmp_path / "x.npy", pixels)
    assert run("fit", tmp_path / "x.npy", *TINY, "--out", tmp_path / "run") == 0
    (tmp_path / "x.npy").unlink()
    assert run("generate", tmp_path / "run", "-n", "4", "--out", tmp_path / "a.png") == 0
    assert image.imread(tmp_path / "a.png").std() > 0.01


def test_pictures_of_plain_numbers_are_refused(tmp_path: Path, table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fit", table, *TINY, "--out", tmp_path / "run") == 0
    capsys.readouterr()
    assert run("generate", tmp_path / "run", "--out", tmp_path / "a.png") == 2
    err = capsys.readouterr().err
    assert re.fullmatch(r"pyro-vae: Rows of shape \(3,\) are no pictures: give --out a \.npy or \.csv file\.\n", err)
    assert run("generate", tmp_path / "run", "-n", "5", "--out", tmp_path / "a.csv") == 0
    assert np.loadtxt(tmp_path / "a.csv", delimiter=",").shape == (5, 3)


def test_a_fit_that_fails_ends_with_1(tmp_path: Path, table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fit", table, *TINY, "--batch-size", "16", "--lr", "1e30", "--out", tmp_path / "run") == 1
    assert re.fullmatch(r"pyro-vae: Epoch 1, batch \d: .* keeps the last good state\.\n", capsys.readouterr().err)


def test_a_spoiled_vae_is_refused(tmp_path: Path, table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fit", table, *TINY, "--out", tmp_path / "run") == 0
    (tmp_path / "run" / "vae.safetensors").write_bytes(b"spoiled")
    capsys.readouterr()
    assert run("evaluate", tmp_path / "run") == 2
    assert re.fullmatch(r"pyro-vae: .*vae\.safetensors is no pyro_vae file.*\n", capsys.readouterr().err)


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(FileNotFoundError, match="no data set, file or folder"):
        cli.main(["--debug", "fit", "nothing", "--out", "a"])


# Help


@pytest.mark.parametrize("command", [[], ["fit"], ["evaluate"], ["generate"], ["demo"]])
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help(command: list[str], option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*command, option) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith(" ".join(["Usage: pyro-vae", *command]))
    assert f"pyro-vae {command[0] if command else 'demo'}" in out.split("Examples:")[1]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"pyro-vae, version {pv.__version__}\n"


def test_help_comes_without_torch() -> None:
    code = "import sys, pyro_vae.cli as c; c.main(['--help']); print([m for m in ('torch', 'pyro') if m in sys.modules])"
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_as_a_module(tmp_path: Path) -> None:
    done = python("-m", "pyro_vae", "evaluate", str(tmp_path / "nothing"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"pyro-vae: .*nothing holds no run: .*\n", done.stderr)
    assert python("-m", "pyro_vae", "--help").stdout.startswith("Usage: pyro-vae")
