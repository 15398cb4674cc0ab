"""A warning names the line of the user, through whatever frames of Pyro and torch it arises."""

from __future__ import annotations

import warnings
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_vae as pv
from pyro_vae.warn import warn


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.StudentT(3.0, torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def guide(x: Tensor) -> None:
    loc = pyro.param("loc", torch.tensor(0.0))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc + x, 1.0))


def through_the_program(x: Tensor) -> None:
    pv.fit(pv.Program(model, guide), x, epochs=1, batch_size=3, compile=False, progress=False)


def through_pyro(x: Tensor) -> None:
    with pyro.get_param_store().scope():
        pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), pv.objectives.ELBO()).step(x)


def in_the_model_room(x: Tensor) -> None:
    pv.em.ppca(torch.cat([torch.randn(20, 3), torch.ones(20, 1)], 1), 1)


@pytest.mark.parametrize("call", [through_the_program, through_pyro, in_the_model_room])
def test_the_line_is_the_users(call: Any) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(torch.tensor([0.3, -1.0, 0.8]))
    lines = range(call.__code__.co_firstlineno, call.__code__.co_firstlineno + 6)
    assert caught
    for warning in caught:
        assert warning.filename == __file__
        assert warning.lineno in lines


def test_what_was_said_of_a_line_is_not_said_again_unless_asked() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for again in (False, False, True, True):
            warn("x has a constant column", again=again)
    assert len(caught) == 3
