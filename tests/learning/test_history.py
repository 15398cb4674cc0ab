"""The record of a fit."""

from __future__ import annotations

import json

import pytest
from matplotlib import pyplot as plt

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
