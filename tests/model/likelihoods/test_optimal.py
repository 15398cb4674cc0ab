"""The scale without a parameter: at its optimum while training, frozen when judging (Rybkin, Daniilidis & Levine 2021)."""

import copy

import pyro
import pytest
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from torch import Tensor

import pyro_vae as pv
from pyro_vae.model.likelihoods import Learned, LogNormal, Normal, Optimal


def linear(scale: Optimal) -> Normal:
    torch.manual_seed(2)
    return Normal(pv.nets.MLP(2, 3), scale=scale).double()


def rows() -> tuple[Tensor, Tensor]:
    torch.manual_seed(4)
    return torch.randn(10, 3, dtype=torch.float64) * torch.tensor([0.5, 1.0, 3.0]), torch.randn(10, 2, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(), (3,)])
def test_while_training_no_other_scale_is_likelier(shape: tuple[int, ...]) -> None:
    likelihood, (x, z) = linear(Optimal(shape)), rows()
    best = likelihood.seeing(x, z).log_prob(x).sum()
    loc = likelihood.decoder(z)
    squares = (x - loc).square()
    s = (squares.mean(0) if shape else squares.mean()).sqrt()
    torch.testing.assert_close(best, torch.distributions.Normal(loc, s).log_prob(x).sum())
    for factor in (0.97, 1.03):
        assert torch.distributions.Normal(loc, factor * s).log_prob(x).sum() < best


@pytest.mark.parametrize("shape", [(), (3,)])
def test_gradient_without_that_of_s_is_the_gradient_of_the_optimum_plugged_in(shape: tuple[int, ...]) -> None:
    """The envelope theorem, against autograd through s itself."""
    likelihood, (x, z) = linear(Optimal(shape)), rows()
    likelihood.seeing(x, z).log_prob(x).sum().backward()
    stopped = [p.grad.clone() for p in likelihood.parameters()]
    loc = likelihood.decoder(z)
    squares = (x - loc).square()
    s = (squares.mean(0) if shape else squares.mean()).sqrt()
    through = torch.autograd.grad(torch.distributions.Normal(loc, s).log_prob(x).sum(), list(likelihood.parameters()))
    torch.testing.assert_close(stopped, list(through))


def test_particles_and_missing_values_are_counted_once_each() -> None:
    likelihood, (x, _) = linear(Optimal(3)), rows()
    z = torch.randn(4, 10, 2, dtype=torch.float64)
    x[:4, 0], x[:, 2] = torch.nan, torch.nan
    likelihood.missing = True
    p = likelihood.seeing(x, z)
    residual = x - likelihood.decoder(z)
    expected = torch.stack([residual[:, 4:, 0].square().mean().sqrt(), residual[..., 1].square().mean().sqrt()])
    found = p.base_dist.base_dist.scale[0, 0]
    torch.testing.assert_close(found[:2], expected)
    assert float(found[2]) == 1.0  # nothing was seen of it: as it was
    assert torch.isfinite(p.log_prob(x)).all()


def test_frozen_value_is_the_running_mean_and_nothing_else_moves_it() -> None:
    likelihood, (x, z) = linear(Optimal(window=3, initial=0.7)), rows()
    assert float(likelihood.scale(z)) == pytest.approx(0.7)
    expected, batches = 0.0, [x * k for k in (1.0, 2.0, 0.5, 3.0, 1.0)]
    for i, batch in enumerate(batches):
        likelihood.seeing(batch, z)
        rate = 1.0 / min(i + 1, 3)
        expected += rate * (float((batch - likelihood.decoder(z)).detach().square().mean()) - expected)
    assert float(likelihood.scale(z)) == pytest.approx(expected**0.5)
    before = copy.deepcopy(likelihood.state_dict())
    likelihood(z).log_prob(x)
    assert all(torch.equal(value, before[name]) for name, value in likelihood.state_dict().items())


def build(scale: Optimal | Learned, **others: bool) -> pv.VAE:
    torch.manual_seed(0)
    return pv.VAE(
        prior=pv.priors.StandardNormal(2),
        likelihood=Normal(pv.nets.MLP(2, 3), scale=scale, **others),
        guide=pv.guides.FullNormal(pv.nets.MLP(3, hidden=(16,)), latent_dim=2),
    )


def test_judged_rows_do_not_know_each_other(tmp_path: object) -> None:
    vae, (x, _) = build(Optimal()), rows()
    x = x.float()
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), loss=TraceMeanField_ELBO())
    for _ in range(5):
        svi.step(x)
    assert vae.training
    alone = torch.cat([pv.log_evidence(vae, x[i : i + 1], method=pv.evidence.exact).log_p for i in range(4)])
    together = pv.log_evidence(vae, x, method=pv.evidence.exact).log_p[:4]
    torch.testing.assert_close(alone, together, rtol=1e-6, atol=1e-6)
    assert int(vae.likelihood.scale.batches) == 5  # judging moved nothing
    vae.save(f"{tmp_path}/vae")
    again = pv.load(f"{tmp_path}/vae")
    assert torch.equal(again.likelihood.scale(x), vae.likelihood.scale(x))
    assert int(again.likelihood.scale.batches) == 5
    vae.double()
    assert vae.likelihood.scale(x).dtype == torch.float64


def test_fit_reaches_the_noise_that_made_the_data() -> None:
    """x = W z + 0.3 noise: the frozen s is near 0.3 after a fit."""
    torch.manual_seed(7)
    x = torch.randn(2000, 2) @ torch.tensor([[1.0, 0.5, -1.0], [0.0, 1.0, 0.7]]) + 0.3 * torch.randn(2000, 3)
    vae = build(Optimal())
    pv.fit(vae, x, epochs=30, batch_size=200, lr=1e-2, progress=False)
    # The standard deviation of one free direction, 2000 rows: 0.3 / sqrt(2 * 2000) = 0.005.
    assert float(vae.likelihood.scale(x)) == pytest.approx(0.3, abs=0.03)


def test_log_normal_has_its_optimum_in_log_x() -> None:
    torch.manual_seed(3)
    likelihood, z = LogNormal(pv.nets.MLP(2, 3), scale=Optimal()), torch.randn(20, 2)
    x = torch.randn(20, 3).exp()
    expected = (x.log() - likelihood.decoder(z)).square().mean().sqrt()
    p = likelihood.seeing(x, z)
    torch.testing.assert_close(p.base_dist.scale[0, 0], expected)
    torch.testing.assert_close(likelihood.scale(z), expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Optimal(minimum=0.0), "minimum=0.0"),
        (lambda: Optimal(window=0), "window=0"),
        (
            lambda: pv.likelihoods.Laplace(pv.nets.MLP(1, 2), scale=Optimal()),
            "optimum of a Normal.*this is a Laplace: give Learned",
        ),
        (lambda: pv.likelihoods.Beta(pv.nets.MLP(1, 2), concentration=Optimal()), "concentration=Optimal"),
        (lambda: Normal(pv.nets.MLP(1, 2), scale=Optimal(3)), r"scale=Optimal\(3\) does not fit a decoder of 2 columns"),
        (lambda: Normal(pv.nets.MLP(1, 2), scale=Learned(3)), r"scale=Learned\(3\) does not fit a decoder of 2 columns"),
    ],
)
def test_what_does_not_go_together_is_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_constant_columns_are_told_as_with_a_learned_scale() -> None:
    x = torch.randn(10, 3)
    x[:, 1] = 0.5
    x[2, 1] = torch.nan  # what is missing does not make it vary
    with pytest.raises(ValueError, match=r"1 of 3 columns of x are constant \(the first is column 1\)"):
        Optimal(3).check_training(x)
    with pytest.warns(UserWarning, match="the first is column 1"):
        Optimal().check_training(x)
    for refused in (
        pv.likelihoods.FullNormal(pv.nets.MLP(2, 3)),
        pv.likelihoods.LowRankNormal(pv.nets.MLP(2, 3), rank=1),
        pv.likelihoods.StudentT(pv.nets.MLP(2, 3), scale=Learned(3)),
        pv.likelihoods.Beta(pv.nets.MLP(2, 3), concentration=Learned(3)),
    ):
        with pytest.raises(ValueError, match="first is column 1"):
            refused.check_training(x)
    pv.likelihoods.DiscretisedLogistic(pv.nets.MLP(2, 3), scale=Learned(3)).check_training(x)  # a probability has a bound
