"""Scales of plates and handlers, masks, and sites that belong to no row: the weights are taken row by row, then scaled."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from one_dimension import normal_without_rsample
from programs import log_normal
from pyro.infer import RenyiELBO
from torch import Tensor

import pyro_vae as pv
from pyro_vae.learning.objectives import Objective

o = pv.objectives

N, B, K = 9, 4, 5
X = torch.linspace(-2.0, 3.0, N, dtype=torch.float64)


class Noted:
    """z ~ N(0.4, 1.3^2), x ~ N(0.9 z, 0.7^2), q = N(0.3 x + 0.2, 0.9^2); notes rows and draws of each run of the guide."""

    def __init__(self, plate: Callable[[Tensor], Any], family: Callable[..., object] = dist.Normal) -> None:
        self.plate, self.family, self.draws, self.taken = plate, family, [], []

    def model(self, x: Tensor) -> None:
        with self.plate(x) as i:
            z = pyro.sample("z", dist.Normal(torch.full((), 0.4, dtype=x.dtype), 1.3))
            pyro.sample("x", dist.Normal(0.9 * z, 0.7), obs=self.at(x, i))

    def guide(self, x: Tensor) -> None:
        with self.plate(x) as i:
            part = self.at(x, i)
            self.draws.append(pyro.sample("z", self.family(0.3 * part + 0.2, torch.full((), 0.9, dtype=x.dtype))))
            self.taken.append(part)

    @staticmethod
    def at(x: Tensor, i: Tensor) -> Tensor:
        return x if len(i) == len(x) else x[i]

    def log_w(self) -> Tensor:
        """(K, B) by hand, from what the last K draws were."""
        batched = self.draws[-1].dim() == 2
        z = self.draws[-1] if batched else torch.stack(self.draws[-K:])
        x = self.taken[-1] if batched else torch.stack(self.taken[-K:])
        return log_normal(z, 0.4, 1.3) + log_normal(x, 0.9 * z, 0.7) - log_normal(z, 0.3 * x + 0.2, 0.9)


@contextmanager
def scaled_plate(x: Tensor) -> Iterator[Tensor]:
    with pyro.poutine.scale(scale=0.01), pyro.plate("data", len(x)) as i:
        yield i


@contextmanager
def weighted_rows(x: Tensor) -> Iterator[Tensor]:
    with pyro.poutine.scale(scale=torch.linspace(0.5, 2.0, len(x), dtype=x.dtype)), pyro.plate("data", len(x)) as i:
        yield i


# name: plate, scale of the rows that are taken
SCALED: dict[str, tuple[Callable[[Tensor], Any], Any]] = {
    "whole": (lambda x: pyro.plate("data", len(x)), 1.0),
    "subsample_size": (lambda x: pyro.plate("data", N, subsample_size=B), N / B),  # fits no other number of rows: looped
    "subsample_size, batched": (lambda x: pyro.plate("data", len(x), subsample_size=min(B, len(x))), N / B),
    "subsample": (lambda x: pyro.plate("data", 1000, subsample=torch.arange(len(x))), 1000 / N),
    "handler": (scaled_plate, 0.01),
    "weights": (weighted_rows, torch.linspace(0.5, 2.0, N, dtype=torch.float64)),
}

BOUNDS: dict[str, tuple[Callable[[], Objective], Callable[[Tensor], Tensor]]] = {
    "ELBO": (lambda: o.ELBO(kl=o.sampled_kl, num_particles=K), lambda w: w.mean(0)),
    "IWAE": (lambda: o.IWAE(K), lambda w: w.exp().mean(0).log()),
    "Renyi": (lambda: o.Renyi(0.3, K), lambda w: (0.7 * w).exp().mean(0).log() / 0.7),
    "STL": (lambda: o.STL(K), lambda w: w.exp().mean(0).log()),
    "DReG": (lambda: o.DReG(K), lambda w: w.exp().mean(0).log()),
    "RWS": (lambda: o.ReweightedWakeSleep(K), lambda w: w.exp().mean(0).log()),
    "score": (lambda: o.ScoreFunction(K), lambda w: w.mean(0)),
}


@pytest.mark.parametrize("where", SCALED)
@pytest.mark.parametrize("name", BOUNDS)
def test_each_row_counts_by_its_scale_after_its_bound_is_taken(name: str, where: str) -> None:
    plate, scale = SCALED[where]
    noted, (make, bound) = Noted(plate), BOUNDS[name]
    with torch.no_grad():
        loss, elbo = make().loss_and_elbo(noted.model, noted.guide, X)
    log_w = noted.log_w()
    assert log_w.shape == (K, B if "subsample_size" in where else N)
    assert (noted.draws[-1].dim() == 2) == (where != "subsample_size")
    torch.testing.assert_close(loss, -(scale * bound(log_w)).sum())
    torch.testing.assert_close(elbo, log_w.mean())


@pytest.mark.parametrize("where", ["subsample_size", "subsample", "handler"])
def test_pyros_renyi_elbo_is_another_number(where: str) -> None:
    """It multiplies by the scale inside the exponent; the same draws, by hand both ways."""
    plate, scale = SCALED[where]
    noted = Noted(plate)
    theirs = RenyiELBO(alpha=0.0, num_particles=K).loss(noted.model, noted.guide, X)
    log_w = noted.log_w()
    right = -float((scale * log_w.exp().mean(0).log()).sum())
    assert theirs == pytest.approx(-float((scale * log_w).exp().mean(0).log().sum()))
    assert abs(theirs - right) > 0.02 * abs(right)
    # And under subsample_size it takes the mean over weights of different rows, since each particle draws rows anew.
    assert torch.equal(noted.taken[-1], noted.taken[-2]) == (where != "subsample_size")


def test_pyros_renyi_elbo_sums_the_batch_where_a_site_lies_outside() -> None:
    noted = Noted(SCALED["whole"][0])

    def model(x: Tensor) -> None:
        pyro.factor("constant", torch.zeros((), dtype=x.dtype))
        noted.model(x)

    theirs = RenyiELBO(alpha=0.0, num_particles=K).loss(model, noted.guide, X)
    log_w = noted.log_w()
    assert theirs == pytest.approx(-float(log_w.sum(-1).exp().mean(0).log()))
    assert abs(theirs + float(log_w.exp().mean(0).log().sum())) > 1.0
    with pytest.raises(ValueError, match="Site 'constant'"):
        o.IWAE(K).loss(model, noted.guide, X)


@pytest.mark.parametrize("where", ["subsample_size", "subsample_size, batched", "whole"])
def test_all_particles_of_a_row_meet_the_same_rows(where: str) -> None:
    noted, runs = Noted(SCALED[where][0]), K if where == "subsample_size" else 1
    o.IWAE(K).loss(noted.model, noted.guide, X)
    first = noted.taken[-1]
    assert all(torch.equal(taken, first) for taken in noted.taken[-runs:])
    o.IWAE(K).loss(noted.model, noted.guide, X)
    assert torch.equal(first, noted.taken[-1]) == (where == "whole")  # other rows in the next step


@pytest.mark.parametrize("name", BOUNDS)
def test_masked_rows_count_nothing(name: str) -> None:
    keep = torch.arange(N) % 3 != 1
    noted, (make, bound) = Noted(SCALED["whole"][0]), BOUNDS[name]
    mask = pyro.poutine.mask

    def masked(function: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
        def inner(x: Tensor) -> None:
            with mask(mask=keep if len(x) == N else keep[: len(x)]):
                function(x)

        return inner

    with torch.no_grad():
        loss, _ = make().loss_and_elbo(masked(noted.model), masked(noted.guide), X)
    torch.testing.assert_close(loss, -bound(noted.log_w())[keep].sum())


@pytest.mark.parametrize("name", BOUNDS)
def test_a_batch_that_is_masked_altogether_costs_nothing(name: str) -> None:
    noted, slope = Noted(SCALED["whole"][0]), torch.ones((), dtype=torch.float64, requires_grad=True)
    noted.family = lambda loc, scale: dist.Normal(slope * loc, scale)
    masked = [pyro.poutine.mask(function, mask=torch.tensor(False)) for function in (noted.model, noted.guide)]
    loss = BOUNDS[name][0]().differentiable_loss(*masked, X)
    assert float(loss.detach()) == 0.0
    if loss.requires_grad:
        assert torch.autograd.grad(loss, slope, materialize_grads=True)[0] == 0.0


def test_a_masked_observation_leaves_the_prior_and_the_guide() -> None:
    noted, keep = Noted(SCALED["whole"][0]), torch.arange(N) % 2 == 0

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.full((), 0.4, dtype=x.dtype), 1.3))
            with pyro.poutine.mask(mask=keep[: len(x)]):
                pyro.sample("x", dist.Normal(0.9 * z, 0.7), obs=x)

    loss = o.IWAE(K).loss(model, noted.guide, X)
    z = noted.draws[-1]
    log_w = log_normal(z, 0.4, 1.3) + keep * log_normal(X, 0.9 * z, 0.7) - log_normal(z, 0.3 * X + 0.2, 0.9)
    assert loss == pytest.approx(-float(log_w.exp().mean(0).log().sum()))


WEIGHTED = [name for name in BOUNDS if name != "ELBO"]


@pytest.mark.parametrize("name", WEIGHTED)
def test_sites_of_one_row_with_different_scales_are_refused(name: str) -> None:
    noted = Noted(SCALED["whole"][0])

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            with pyro.poutine.scale(scale=0.5):
                z = pyro.sample("z", dist.Normal(torch.full((), 0.4, dtype=x.dtype), 1.3))
            pyro.sample("x", dist.Normal(0.9 * z, 0.7), obs=x)

    with pytest.raises(
        ValueError, match=r"Sites 'z' and 'z' of one row have the scales 1.0 and 0.5.*poutine\.scale around the"
    ):
        BOUNDS[name][0]().loss(model, noted.guide, X)


@pytest.mark.parametrize("name", WEIGHTED)
def test_a_latent_outside_the_plate_is_refused(name: str) -> None:
    def model(x: Tensor) -> None:
        shared = pyro.sample("shared", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(shared, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("shared", dist.Normal(x.mean(), 1.0))

    with pytest.raises(ValueError, match=r"Site 'shared' .*plates: none.*pyro\.plate\('data', len\(x\)\)"):
        BOUNDS[name][0]().loss(model, guide, X.float())
    assert math.isfinite(o.ELBO(num_particles=2).loss(model, guide, X.float()))


def test_a_dimension_without_a_plate_is_not_taken_for_particles() -> None:
    def sites(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(3, len(x)), 1.0))

    def model(x: Tensor) -> None:
        sites(x)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(torch.zeros(()), 1.0), obs=x)

    with pytest.raises(ValueError, match="Site 'z'"):
        o.IWAE(1).loss(model, sites, X.float())


@pytest.mark.parametrize("name", BOUNDS)
def test_who_needs_reparametrised_draws_refuses_others_by_name(name: str) -> None:
    noted = Noted(SCALED["whole"][0], family=normal_without_rsample)
    objective = BOUNDS[name][0]()
    if name in ("RWS", "score"):
        assert math.isfinite(objective.loss(noted.model, noted.guide, X))
        return
    with pytest.raises(
        ValueError, match=r"Latent 'z' of the guide \(_Plain\) cannot be reparam.*ScoreFunction\(\), .*WakeSleep\(\)"
    ):
        objective.loss(noted.model, noted.guide, X)


def test_latents_that_differ_are_named() -> None:
    noted, whole = Noted(SCALED["whole"][0]), SCALED["whole"][0]

    def more(x: Tensor) -> None:
        noted.guide(x)
        with whole(x):
            pyro.sample("u", dist.Normal(x, 1.0))

    with pytest.raises(ValueError, match="'u' is a latent of the guide but no latent of the model"):
        o.ELBO().loss(noted.model, more, X)

    def less(x: Tensor) -> None:
        with whole(x):
            pass

    with pytest.raises(ValueError, match="'z' is a latent of the model but not of the guide"):
        o.IWAE().loss(noted.model, less, X)
