"""The record of a fit."""

from __future__ import annotations

import json

import pytest
import torch
from matplotlib import pyplot as plt

import pyro_vae as pv
from pyro_vae.learning.history import History


def two_epochs(**changes: object) -> History:
    kept = {
        "epoch": [1, 2],
        "loss": [5.0, 3.0],
        "elbo": [-4.0, -2.0],
        "valid_elbo": [-4.5, -2.5],
        "learning_rate": [0.1, 0.1],
        "seconds": [1.0, 2.25],
    }
    return History(**{**kept, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("history", "told"),
    [
        (History(), "History: no epoch yet"),
        (two_epochs(), "epoch 2: ELBO -2.000, validation -2.500 nats a row, 2.2 s"),
        (two_epochs(valid_elbo=[]), "epoch 2: ELBO -2.000 nats a row, 2.2 s"),
        (two_epochs(stopped="enough"), "epoch 2: ELBO -2.000, validation -2.500 nats a row, 2.2 s; enough"),
    ],
)
def test_text(history: History, told: str) -> None:
    assert str(history) == told


def test_length_and_dict() -> None:
    history = two_epochs(stopped="enough")
    assert len(history) == 2
    assert len(History()) == 0
    assert History(**json.loads(json.dumps(history.to_dict()))) == history


def test_two_histories_share_no_list() -> None:
    first, second = History(), History()
    first.elbo.append(1.0)
    assert second.elbo == []


def test_it_plots_itself() -> None:
    _, ax = plt.subplots()
    assert two_epochs().plot(ax) is ax
    assert [list(line.get_ydata()) for line in ax.get_lines()] == [[-4.0, -2.0], [-4.5, -2.5]]
    plt.close("all")


def test_the_kl_at_the_end_is_the_formulas_and_a_collapse_is_told() -> None:
    """sum_j (mu^2 + sigma^2 - 1 - log sigma^2) / 2 over the validation rows; under beta = 100 nothing of it is left."""
    torch.manual_seed(0)
    x = torch.randn(300, 5) * torch.tensor([3.0, 1.0, 1.0, 1.0, 1.0])
    for beta, collapsed in ((1.0, False), (100.0, True)):
        vae = pv.VAE(
            prior=pv.priors.StandardNormal(2),
            likelihood=pv.likelihoods.Normal(pv.nets.MLP(2, 5), scale=1.0),
            guide=pv.guides.DiagonalNormal(pv.nets.MLP(5, hidden=(8,)), latent_dim=2),
        )
        objective = pv.objectives.ELBO(beta=beta)
        history = pv.fit(vae, x[:200], x[200:], objective=objective, epochs=60, batch_size=20, lr=1e-2, progress=False)
        q = vae.encode(x[200:])
        kl = 0.5 * (q.mean.square() + q.variance - 1.0 - q.variance.log()).sum(-1).mean()
        assert history.kl == pytest.approx(float(kl), rel=1e-4)
        assert history.collapsed is collapsed
        assert ("collapsed" in repr(history)) is collapsed
        assert f"KL {history.kl:.3g}" in repr(history)


def test_there_are_no_half_epochs_below_a_short_curve() -> None:
    history = pv.History(epoch=[1, 2, 3], elbo=[-3.0, -2.0, -1.5], loss=[3.0, 2.0, 1.5], seconds=[1.0, 2.0, 3.0])
    ax = history.plot()
    assert all(float(place).is_integer() for place in ax.get_xticks())
    plt.close("all")
