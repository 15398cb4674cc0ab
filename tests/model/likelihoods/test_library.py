"""Counts with library sizes, a condition that is read beside the rows (Lopez et al. 2018)."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torch import Tensor

import pyro_vae as pv
from pyro_vae.model.likelihoods import Learned, NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial

MAKE: dict[str, Callable[..., Any]] = {
    "Poisson": lambda **how: Poisson(pv.nets.MLP(2, 5, hidden=(7,)), **how),
    "NegativeBinomial": lambda **how: NegativeBinomial(pv.nets.MLP(2, 5, hidden=(7,)), Learned(5, initial=0.5), **how),
    "ZeroInflatedNegativeBinomial": lambda **how: ZeroInflatedNegativeBinomial(
        pv.nets.MLP(2, 5, hidden=(7,)), Learned(5, initial=0.5), gate=pv.nets.MLP(2, 5), **how
    ),
}


def vae(name: str, *, missing: bool = False) -> pv.VAE:
    torch.manual_seed(1)
    return pv.VAE(
        prior=pv.priors.StandardNormal(2),
        likelihood=MAKE[name](library=1, missing=missing),
        guide=pv.guides.DiagonalNormal(pv.nets.MLP(5, hidden=(8,)), latent_dim=2),
    )


def data(size: int = 16) -> tuple[Tensor, Tensor]:
    library = torch.linspace(5.0, 500.0, size)
    return torch.poisson(library[:, None] * torch.tensor([0.5, 0.3, 0.1, 0.06, 0.04])), library


@pytest.mark.parametrize("form", ["(N,)", "(N, 1)", "integers"])
def test_mean_is_the_library_size_shared_out(form: str) -> None:
    likelihood, (x, library) = MAKE["Poisson"](library=1).double(), data()
    given = {"(N,)": library, "(N, 1)": library[:, None], "integers": library.long()}[form]
    z = torch.randn(3, 16, 2, dtype=torch.float64)
    p = likelihood(z, given)
    sizes = given.reshape(-1).double()
    torch.testing.assert_close(p.mean.sum(-1), sizes.expand(3, -1))
    shares = np.exp(scipy.special.log_softmax(likelihood.decoder(z).detach().numpy(), -1))
    expected = scipy.stats.poisson(sizes.numpy()[:, None] * shares).logpmf(x.numpy()).sum(-1)
    torch.testing.assert_close(p.log_prob(x.double()).detach(), torch.as_tensor(expected))


def test_event_shapes_share_out_the_whole_row() -> None:
    from model.components import Reshaped

    likelihood = Poisson(Reshaped(2, (2, 3)), library=1)
    p = likelihood(torch.randn(4, 2), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    torch.testing.assert_close(p.mean.sum((-1, -2)), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert p.event_shape == (2, 3)


@pytest.mark.parametrize("name", MAKE)
def test_a_vae_with_library_sizes_is_fitted_judged_saved_and_drawn_from(name: str, tmp_path: object) -> None:
    model, (x, library) = vae(name), data()
    history = pv.fit(model, (x, library), epochs=3, batch_size=8, progress=False)
    assert torch.isfinite(torch.tensor(history.elbo)).all()
    estimate = pv.log_evidence(model, (x, library), method=pv.posterior.laplace, num_particles=100)
    assert torch.isfinite(estimate.log_p).all()
    # The evidence does not depend on the proposal: importance sampling from the prior agrees where both are reliable.
    other = pv.log_evidence(model, (x, library), method=pv.posterior.from_prior, num_particles=20_000, seed=1)
    both = estimate.reliable & other.reliable
    error = (
        (estimate.standard_error.square() + other.standard_error.square()).sqrt() + estimate.bias.abs() + other.bias.abs()
    )
    assert both.sum() > 4
    assert ((estimate.log_p - other.log_p).abs() < 5.0 * error + 1e-4)[both].all()
    model.save(f"{tmp_path}/vae")
    again = pv.load(f"{tmp_path}/vae")
    assert repr(again) == repr(model)
    assert "library=1" in repr(again)
    assert torch.equal(again.log_weights((x, library), 5, seed=1)[0], model.log_weights((x, library), 5, seed=1)[0])
    drawn = model.generate(4000, given=torch.full((4000,), 50.0))
    assert drawn.shape == (4000, 5)
    assert torch.equal(drawn, drawn.round())
    if name != "ZeroInflatedNegativeBinomial":
        total = drawn.sum(-1)
        assert abs(float(total.mean()) - 50.0) < 5.0 * float(total.std()) / 4000**0.5


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s.index_fill(0, torch.tensor([3]), 0.0), r"library size of row 3, in x\[1\], is 0 and must be positive"),
        (
            lambda s: s.index_fill(0, torch.tensor([2]), -4.0),
            r"library size of row 2.* is -4 and must be positive and finite",
        ),
        (lambda s: s[:, None].expand(-1, 5), r"have shape \(16, 5\): give one number a row"),
    ],
)
def test_library_sizes_that_cannot_be_are_refused(spoil: Callable[[Tensor], Tensor], message: str) -> None:
    model, (x, library) = vae("NegativeBinomial"), data()
    for use in (model.encode, lambda x: pv.log_evidence(model, x), lambda x: pv.fit(model, x, epochs=1)):
        with pytest.raises(ValueError, match=message):
            use((x, spoil(library)))
    with pytest.raises(ValueError, match=r"reads 1 tensor beside its rows, and was given 0"):
        model.encode(x)
    with pytest.raises(ValueError, match="library=0"):
        Poisson(pv.nets.MLP(2, 5), library=0)
    with pytest.raises(ValueError, match=r"library=2 is not among the 1 condition"):
        Poisson(pv.nets.MLP(2, 5), library=2)(torch.zeros(16, 2), library)


def test_missing_counts_go_with_library_sizes() -> None:
    model, (x, library) = vae("NegativeBinomial", missing=True), data()
    x[::2, 1] = torch.nan
    estimate = pv.log_evidence(model, (x, library), method=pv.posterior.laplace, num_particles=100)
    assert torch.isfinite(estimate.log_p).all()
    assert not model.impute((x, library), 3).isnan().any()
