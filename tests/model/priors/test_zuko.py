"""zuko is imported in one place, which leaves torch's distributions as they were."""

import subprocess
import sys

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import Planar
from torch import nn

import pyro_vae as pv
from pyro_vae.model.families.flow import Flow, import_zuko

USE = """
import sys
import torch
from torch.distributions import Distribution
import pyro_vae as pv
from torch.distributions.transforms import _InverseTransform
before = Distribution._validate_args, Distribution.__dict__["arg_constraints"], _InverseTransform.__name__
pv.priors.StandardNormal(2)()
assert "zuko" not in sys.modules
p = pv.priors.Flow(2)()
assert "zuko" in sys.modules
q = pv.guides.InverseAutoregressive(pv.nets.MLP(3, hidden=(4,)), 2)(torch.zeros(5, 3))
for each in (p, q):
    each.log_prob(each.sample())
after = Distribution._validate_args, Distribution.__dict__["arg_constraints"], _InverseTransform.__name__
assert before[0] is after[0] is True
assert before[1] is after[1]
assert before[2] == after[2]
try:
    torch.distributions.Normal(0.0, -1.0)
except ValueError:
    print("checked")
"""

MISSING = """
import sys
sys.modules["zuko"] = None
import pyro_vae as pv
try:
    pv.priors.Flow(2)
except ImportError as error:
    print(error)
"""


def run(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore::FutureWarning", "-c", code], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_validation_and_constraints_stay_as_they_were() -> None:
    assert run(USE) == "checked"


def test_a_missing_zuko_is_one_sentence() -> None:
    assert run(MISSING) == "Flows need the package zuko: pip install zuko (the extra flows of pyro-vae)."


def test_a_flow_checks_its_arguments() -> None:
    p = pv.priors.Flow(2, hidden=(4,))()
    with pytest.raises(ValueError, match="support"):
        p.log_prob(torch.tensor([[torch.nan, 0.0]]))
    with pytest.raises(ValueError, match="event_shape"):
        p.log_prob(torch.zeros(4, 3))


def test_the_density_of_the_last_draw_is_remembered_and_never_stale() -> None:
    guide = pv.guides.InverseAutoregressive(pv.nets.MLP(3, hidden=(4,)), 2, hidden=(8,))
    q = guide(torch.randn(5, 3))
    first, second = q(), q()
    fresh = {"first": q.log_prob(first.clone()), "second": q.log_prob(second.clone())}
    assert q.log_prob(second) is q.log_prob(second)
    torch.testing.assert_close(q.log_prob(second), fresh["second"])
    torch.testing.assert_close(q.log_prob(first), fresh["first"])
    with torch.no_grad():  # without gradient: not the value with a graph
        assert not q.log_prob(second).requires_grad
        third = q()
        assert q.log_prob(third) is q.log_prob(third)
    assert q.log_prob(third).requires_grad
    with torch.no_grad():
        fourth = q()
        fourth += 1.0
        torch.testing.assert_close(q.log_prob(fourth), q.log_prob(fourth.clone()))
    # The gradient of the remembered density is that of the draw pushed through: the total derivative.
    torch.manual_seed(1)
    z = q()
    total = torch.autograd.grad(q.log_prob(z).sum(), list(guide.parameters()), allow_unused=True, retain_graph=True)
    again = torch.autograd.grad(q.log_prob(z.clone()).sum(), list(guide.parameters()), allow_unused=True)
    for one, other in zip(total, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_a_flow_of_ones_own_serves_as_a_prior(tmp_path: object) -> None:
    zuko = import_zuko()

    def build() -> pv.VAE:
        return pv.VAE(
            prior=pv.priors.Flow(2, flow=zuko.flows.MAF(2, transforms=1, hidden_features=(8,))),
            likelihood=pv.likelihoods.Normal(pv.nets.MLP(2, 3), scale=0.5),
            guide=pv.guides.DiagonalNormal(pv.nets.MLP(3, hidden=(4,)), latent_dim=2),
        )

    vae, x = build(), torch.randn(4, 3)
    assert repr(vae.prior) == "Flow(latent_dim=2, flow=MAF)"
    z = torch.randn(3, 2)
    torch.testing.assert_close(vae.prior().log_prob(z), vae.prior.flow().log_prob(z))
    vae.save(f"{tmp_path}/vae")
    with pytest.raises(ValueError, match=r"holds a MAF of your own.*into=vae"):
        pv.load(f"{tmp_path}/vae")
    again = pv.load(f"{tmp_path}/vae", into=build())
    assert torch.equal(again.log_weights(x, 3)[0], vae.log_weights(x, 3)[0])


def test_a_distribution_of_zuko_that_cannot_be_pushed_both_ways_at_once_still_draws() -> None:
    zuko = import_zuko()
    normals = zuko.distributions.DiagNormal(torch.randn(3, 2), torch.ones(3, 2))
    mixture = zuko.distributions.Mixture(normals, torch.tensor([0.1, 0.5, -0.3]))
    p = Flow(mixture)
    assert not p.has_rsample
    z = p((4,))
    torch.testing.assert_close(p.log_prob(z), mixture.log_prob(z))
    assert p.expand((7,))().shape == (7, 2)


def test_a_flow_without_a_density_in_the_needed_direction_is_refused() -> None:
    """Pyro's planar flow knows the density of its own draws alone."""

    class OneWay(nn.Module):
        out_features = 2

        def __init__(self) -> None:
            super().__init__()
            self.net, self.planar = nn.Linear(3, 2), Planar(2)

        def forward(self, x: torch.Tensor | None = None) -> object:
            loc = torch.zeros(2) if x is None else self.net(x)
            return dist.TransformedDistribution(dist.Normal(loc, 1.0).to_event(1), [self.planar])

    likelihood = pv.likelihoods.Normal(pv.nets.MLP(2, 3), scale=0.5)
    plain = pv.guides.DiagonalNormal(pv.nets.MLP(3, hidden=(4,)), latent_dim=2)
    with pytest.raises(ValueError, match=r"(?s)Custom\(.*cannot go with the guide DiagonalNormal\(.*both directions"):
        pv.VAE(prior=OneWay(), likelihood=likelihood, guide=plain)
    with pytest.raises(
        ValueError, match=r"(?s)Custom\(.*cannot go with the prior StandardNormal\(.*did not draw.*both directions"
    ):
        pv.VAE(prior=pv.priors.StandardNormal(2), likelihood=likelihood, guide=OneWay())


def test_what_is_no_flow_of_the_latents_is_named() -> None:
    flows = import_zuko().flows
    for flow, found in (
        (nn.Linear(2, 2), "missing 1 required positional argument"),
        (flows.MAF(2, context=3, transforms=1, hidden_features=(4,)), "cannot be multiplied"),
        (flows.MAF(3, transforms=1, hidden_features=(4,)), r"it returns event shape \(3,\)"),
        (3, "not callable"),
    ):
        name = type(flow).__name__
        with pytest.raises(ValueError, match=rf"^flow={name} is no prior of 2 latent dim.*without a context \(.*{found}"):
            pv.priors.Flow(2, flow=flow)
