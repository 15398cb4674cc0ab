"""The demo: everything it promises is in its folder."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch
from matplotlib import image

import pyro_vae as pv
from pyro_vae.report import demo


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads only get into each other's way in networks this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


FIGURES = ["learning_curve.png", "reconstructions.png", "samples.png", "latent_space.png"]


def test_demo_writes_model_history_evidence_and_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = {name: (method, count and 50) for name, (method, count) in demo.METHODS.items()}
    monkeypatch.setattr(demo, "METHODS", few)
    out = tmp_path / "new" / "demo"
    rng = torch.get_rng_state()
    result = demo.run(out, seed=1, epochs=3, progress=False)
    assert torch.equal(torch.get_rng_state(), rng)
    told = " ".join(capsys.readouterr().out.split())
    assert "1797 rows of 8 x 8" in told
    assert "log p(x) of" in told
    assert "ELBO" in told

    assert json.loads(json.dumps(result)) == result
    methods = {entry["method"]: entry for entry in result["methods"]}
    assert {"ELBO", "prior", "guide", "laplace", "cascade"} == methods.keys()
    for name, entry in methods.items():
        assert math.isfinite(entry["log_p"]), name
        assert entry["data_error"] > 0.0
    # log p(x) is above its bound: the guide's importance weights tighten the ELBO that they come from.
    assert methods["guide"]["log_p"] > methods["ELBO"]["log_p"]
    # The cascade says by what, and how far its rows may be relied upon.
    assert sum(methods["cascade"]["engines"].values()) == result["held_out_rows"]
    assert methods["cascade"]["reliable"] > 0.9 * result["held_out_rows"] > methods["prior"]["reliable"]
    assert f"{methods['cascade']['reliable']} of {result['held_out_rows']} rows can be relied upon" in told
    for name in methods.keys() - {"ELBO"}:
        rows = pd.read_csv(out / f"evidence_{name}.csv")
        assert len(rows) == result["held_out_rows"]
        assert rows["log_p"].mean() == pytest.approx(methods[name]["log_p"], rel=1e-6)

    assert json.loads((out / "history.json").read_text())["epoch"] == [1, 2, 3]
    assert pv.load(out / "vae").generate(2).shape == (2, 64)
    for name in FIGURES:
        picture = image.imread(out / name)
        assert min(picture.shape[:2]) > 200
        assert picture[..., :3].std() > 0.01, f"{name} is one colour"
    assert not list(out.glob(".*"))
