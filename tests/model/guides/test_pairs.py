"""Every prior and every guide of the tables in a VAE: fitted by Pyro, saved, on any device, in any dtype."""

import copy
import math
import warnings

import pyro
import pytest
import torch
from model.components import COLUMNS
from model.pairs import PAIRS, make, rows
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch.fx.experimental.proxy_tensor import make_fx

import pyro_vae as pv


@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO, pv.objectives.ELBO])
@pytest.mark.parametrize(("prior", "guide"), PAIRS)
def test_plain_pyro_svi_moves_every_parameter(prior: str, guide: str, loss: type) -> None:
    vae, x = make(prior, guide), rows()
    before = copy.deepcopy(vae.state_dict())
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), loss=loss())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*KL")  # that a pair has no formula is said, once
        losses = [svi.step(x) for _ in range(2)]
    assert all(math.isfinite(value) for value in losses)
    still = [name for name, value in vae.named_parameters() if torch.equal(value, before[name])]
    assert not still


@pytest.mark.parametrize(("prior", "guide"), PAIRS)
def test_both_elbos_of_pyro_and_ours_estimate_the_same_number(prior: str, guide: str) -> None:
    """Whether the KL is exact or sampled: means over 20 losses of 30 rows, within 4.5 standard errors of each other."""
    vae, x = make(prior, guide), rows(30)
    torch.manual_seed(4)
    found = []
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*KL")
        for loss in (Trace_ELBO(), TraceMeanField_ELBO(), pv.objectives.ELBO()):
            values = torch.tensor([float(loss.loss(vae.model, vae.guide, x)) for _ in range(20)])
            found.append((values.mean(), values.std() / 20**0.5))
    for mean, error in found[1:]:
        assert abs(mean - found[0][0]) < 4.5 * math.hypot(error, found[0][1])


@pytest.mark.parametrize(("prior", "guide"), PAIRS)
def test_saving_and_loading_keeps_every_density(prior: str, guide: str, tmp_path: object) -> None:
    vae, x = make(prior, guide), rows()
    vae.save(f"{tmp_path}/vae")
    again = pv.load(f"{tmp_path}/vae")
    assert repr(again) == repr(vae)
    assert torch.equal(again.log_weights(x, 5, seed=1)[0], vae.log_weights(x, 5, seed=1)[0])
    assert torch.equal(again.generate(5), vae.generate(5))
    twin = copy.deepcopy(vae)
    assert torch.equal(twin.log_weights(x, 5, seed=1)[0], vae.log_weights(x, 5, seed=1)[0])


@pytest.mark.parametrize(("prior", "guide"), [pair for pair in PAIRS if pair != ("VampPrior", "Spline")])  # as slow as sure
def test_a_step_can_be_captured(prior: str, guide: str) -> None:
    """By make_fx, with the gradients of autograd: nothing asks for a value or leaves the graph on the way."""
    vae, x = make(prior, guide), rows()
    values = {name: parameter.detach() for name, parameter in vae.named_parameters()}

    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vae = vae

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q = self.vae.q_z(x)
            z = q.rsample()
            return (q.log_prob(z) - self.vae.p_z().log_prob(z) - self.vae.p_x(z).log_prob(x)).sum()

    def loss(values: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(Loss(), {f"vae.{name}": value for name, value in values.items()}, (x,))

    with pyro.validation_enabled(is_validate=False):
        step = make_fx(torch.func.grad_and_value(loss))(values)
        torch.manual_seed(0)
        gradients, value = step(values)
        torch.manual_seed(0)
        expected = Loss()(x)
    torch.testing.assert_close(value, expected.detach())
    expected.backward()
    for name, parameter in vae.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("prior", "guide"), PAIRS)
def test_float64_throughout(prior: str, guide: str) -> None:
    vae, x = make(prior, guide).double(), rows().double()
    assert vae.guide(x).dtype is torch.float64
    assert vae.generate(3).dtype is torch.float64
    assert vae.reconstruct(x).dtype is torch.float64
    z = torch.randn(8, 2, dtype=torch.float64)
    assert vae.p_z().log_prob(z).dtype is torch.float64
    assert vae.q_z(x).log_prob(z).dtype is torch.float64
    single = make(prior, guide)
    torch.testing.assert_close(
        single.q_z(x.float()).log_prob(z.float()).double(), vae.q_z(x).log_prob(z), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize(("prior", "guide"), PAIRS)
def test_what_is_built_on_the_meta_device_stays_there(prior: str, guide: str) -> None:
    with torch.device("meta"):
        vae = make(prior, guide)
    x = torch.zeros(4, COLUMNS, device="meta")
    with pyro.validation_enabled(is_validate=False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*KL")
        q, p = vae.q_z(x), vae.p_z()
        z = q.rsample()
        found = [z, q.log_prob(z), vae.encoder.centre(q), p.sample((3,)), p.log_prob(z), p.expand((4,)).sample()]
        found += pv.objectives.ELBO().loss_and_elbo(vae.model, vae.guide, x)
    assert {t.device.type for t in [*found, *vae.parameters(), *vae.buffers()]} == {"meta"}
