"""Missing numbers as one site, and what Pyro's own way, `obs_mask`, would have made of them."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

from pyro_vae.model.families.partial import OrMissing, Partial, complete

X = torch.tensor([[0.3, torch.nan, -1.0], [torch.nan, torch.nan, torch.nan]])


def test_log_prob_of_what_was_seen_and_zero_for_the_rest() -> None:
    p = Partial(dist.Normal(torch.zeros(2, 3), 2.0))
    expected = torch.where(X.isnan(), 0.0, dist.Normal(0.0, 2.0).log_prob(X.nan_to_num()))
    assert torch.equal(p.log_prob(X), expected)
    assert torch.equal(p.to_event(1).log_prob(X), expected.sum(-1))


@pytest.mark.parametrize(
    "base", [dist.Poisson(torch.ones(3)), dist.Beta(torch.ones(3), 2.0), dist.LogNormal(torch.zeros(3), 1.0)]
)
def test_support_is_the_bases_and_nan(base: dist.TorchDistribution) -> None:
    p = Partial(base)
    x = base.sample()
    assert p.support.check(torch.where(torch.arange(3) == 1, torch.nan, x)).all()
    assert not p.support.check(torch.full((3,), -1.0)).any()
    with pytest.raises(ValueError, match="within the support"):
        p.log_prob(torch.tensor([-1.0, torch.nan, -1.0]))
    assert isinstance(p.support, OrMissing)
    assert str(p.support).endswith("or NaN")
    assert p.support.is_discrete == base.support.is_discrete
    assert base.support.check(p.support.inside(x)).all()


def test_expanded_and_completed() -> None:
    p = Partial(dist.Normal(torch.arange(3.0), 0.5)).expand((2, 3))
    torch.testing.assert_close(p.mean, torch.arange(3.0).expand(2, 3))
    torch.testing.assert_close(p.variance, torch.full((2, 3), 0.25))
    assert p.has_rsample
    assert p.rsample().shape == (2, 3)
    full = complete(p.to_event(1), X)
    assert torch.equal(full[~X.isnan()], X[~X.isnan()])
    assert not full.isnan().any()
    assert not Partial(dist.Poisson(torch.ones(2))).has_rsample


def test_pyros_obs_mask_counts_what_was_not_seen() -> None:
    """z ~ N(0, 1), x ~ N(z, 1), q a point: with `obs_mask` the unseen are latents, and the loss has their noise."""
    seen = ~X.isnan()

    def ours() -> None:
        with pyro.plate("rows", 2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", Partial(dist.Normal(z[:, None].expand(2, 3), 1.0)).to_event(1), obs=X)

    def pyros() -> None:
        with pyro.plate("rows", 2, dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, 1), 1.0))
            with pyro.plate("columns", 3, dim=-1):
                pyro.sample("x", dist.Normal(z, 1.0), obs=X.nan_to_num(), obs_mask=seen)

    def guide(dim: int) -> None:
        shape = (2,) if dim == -1 else (2, 1)
        with pyro.plate("rows", 2, dim=dim):
            pyro.sample("z", dist.Delta(torch.full(shape, 0.4)))

    log_x = torch.where(seen, dist.Normal(0.4, 1.0).log_prob(X.nan_to_num()), 0.0).sum()
    by_hand = -float(log_x + 2 * dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.4)))
    for loss in (Trace_ELBO, TraceMeanField_ELBO):
        assert loss().loss(ours, lambda: guide(-1)) == pytest.approx(by_hand, rel=1e-6)
    with pytest.warns(UserWarning, match="x_unobserved"):
        theirs = [Trace_ELBO().loss(pyros, lambda: guide(-2)) for _ in range(2)]
    assert min(theirs) > by_hand + 1.0
    assert theirs[0] != theirs[1]
    with pytest.warns(UserWarning, match="x_unobserved"), pytest.raises(KeyError, match="x_unobserved"):
        TraceMeanField_ELBO().loss(pyros, lambda: guide(-2))
