"""The gradient of E_q[h(z)] through the draws, against quadrature and against the score function."""

import pytest
import torch
from model.components import GUIDES
from model.quadratures import grid
from torch import Tensor

from pyro_vae.model.families.normal_mixture import NormalMixture


def h(z: Tensor) -> Tensor:
    """Asymmetric, and not a sum over dimensions."""
    return torch.sin(1.3 * z[..., 0] + 0.4) + 0.3 * z.square().sum(-1) + 0.7 * (z[..., 0] * z[..., -1]).tanh()


def parts(dim: int, count: int = 3) -> list[Tensor]:
    """logits, loc and scale of a mixture whose components overlap in some dimensions and not in others."""
    generator = torch.Generator().manual_seed(dim)
    logits = torch.tensor([0.3, -0.4, 0.8, -1.0], dtype=torch.float64)[:count]
    loc = 1.5 * torch.randn(count, dim, generator=generator, dtype=torch.float64)
    scale = 0.3 + torch.rand(count, dim, generator=generator, dtype=torch.float64)
    return [part.requires_grad_() for part in (logits, loc, scale)]


def flat(gradients: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients])


def by_draws(leaves: list[Tensor], dim: int, batches: int, size: int) -> tuple[Tensor, Tensor]:
    """Mean and standard error of the pathwise gradient, from means over `size` draws."""
    found = []
    for _ in range(batches):
        z = NormalMixture(*leaves).rsample((size,))
        found.append(flat(torch.autograd.grad(h(z).mean(), leaves)))
    gradients = torch.stack(found)
    return gradients.mean(0), gradients.std(0) / batches**0.5


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("dim", [1, 2])
def test_the_gradient_of_a_mixture_is_that_of_quadrature(dim: int, count: int) -> None:
    leaves = parts(dim, count)
    nodes, log_weight = grid(dim, 4001 if dim == 1 else 701, reach=5.0)
    exact = ((NormalMixture(*leaves).log_prob(nodes) + log_weight).exp() * h(nodes)).sum()
    expected = flat(torch.autograd.grad(exact, leaves))
    torch.manual_seed(1)
    mean, error = by_draws(leaves, dim, batches=60, size=1000)
    assert expected.abs().max() > 0.1
    assert ((mean - expected).abs() < 4.5 * error + 1e-6).all(), (mean, expected, error)
    assert (error < 0.1).all()


def test_the_gradient_in_five_dimensions_is_that_of_the_score_function() -> None:
    leaves = parts(5)
    torch.manual_seed(2)
    mean, error = by_draws(leaves, 5, batches=60, size=2000)
    scores = []
    for _ in range(60):
        q = NormalMixture(*leaves)
        z = q.sample((10_000,))
        value = h(z)
        scores.append(flat(torch.autograd.grad(((value - value.mean()) * q.log_prob(z)).mean(), leaves)))
    score = torch.stack(scores)
    both = torch.hypot(error, score.std(0) / 60**0.5)
    assert ((mean - score.mean(0)).abs() < 4.7 * both).all()
    assert (both < 0.15).all()


def test_the_draws_of_one_component_are_those_of_the_normal() -> None:
    """z = mu + sigma eps: dz/dmu = 1 and dz/dsigma = (z - mu) / sigma, exactly."""
    _, loc, scale = (part.detach() for part in parts(3, 1))
    loc.requires_grad_(), scale.requires_grad_()
    z = NormalMixture(torch.zeros(1, dtype=torch.float64), loc, scale).rsample((5,))
    weight = torch.linspace(0.5, 2.0, 15, dtype=torch.float64).reshape(5, 3)
    first, second = torch.autograd.grad((weight * z).sum(), (loc, scale))
    torch.testing.assert_close(first[0], weight.sum(0))
    torch.testing.assert_close(second[0], (weight * ((z - loc) / scale)).sum(0).detach())


def test_each_draw_solves_the_implicit_equation() -> None:
    """J dz/dphi + dS/dphi = 0 with S written down plainly and differentiated by autograd, draw by draw, D = 3."""
    leaves = parts(3)

    def transform(z: Tensor, logits: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        normal, weight, columns = torch.distributions.Normal(loc, scale), logits.softmax(-1), []
        for d in range(3):
            columns.append((weight * torch.distributions.Normal(loc[:, d], scale[:, d]).cdf(z[d])).sum())
            weight = weight * normal.log_prob(z)[:, d].exp()
            weight = weight / weight.sum()
        return torch.stack(columns)

    torch.manual_seed(5)
    for _ in range(5):
        z = NormalMixture(*leaves).rsample()
        fixed = z.detach()
        jacobian = torch.autograd.functional.jacobian(lambda point: transform(point, *leaves), fixed).detach()
        for d in range(3):
            found = torch.stack([flat(torch.autograd.grad(z[e], leaves, retain_graph=True)) for e in range(3)])
            own = flat(torch.autograd.grad(transform(fixed, *leaves)[d], leaves))
            torch.testing.assert_close(jacobian[d] @ found, -own, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("apart", [1.0, 30.0, 1e4])
def test_float32_gradients_are_those_of_float64_far_apart_and_in_the_tails(apart: float) -> None:
    logits, loc, scale = (part.detach() for part in parts(4))
    loc, logits = loc * apart, logits * 8.0
    found = {}
    torch.manual_seed(6)
    q = NormalMixture(logits.float(), loc.float(), scale.float())
    z = q.sample((4000,))
    for dtype in (torch.float32, torch.float64):
        leaves = [part.to(dtype).requires_grad_() for part in (logits.float(), loc.float(), scale.float())]
        q = NormalMixture(*leaves)
        q.sample = lambda shape, dtype=dtype: z.to(dtype)  # type: ignore[method-assign]
        found[dtype] = flat(torch.autograd.grad(q.rsample((4000,)).mean(0).sum(), leaves)).double()
    assert torch.isfinite(found[torch.float32]).all()
    scale_of = found[torch.float64].abs().max()
    torch.testing.assert_close(found[torch.float32], found[torch.float64], rtol=2e-3, atol=2e-3 * float(scale_of))


@pytest.mark.parametrize("name", [name for name in GUIDES if name != "Mixture"])
def test_the_gradient_through_the_draws_of_a_guide_is_the_exact_one(name: str) -> None:
    """dE_q[h]/d(parameters) on a grid for D = 2 against the mean over draws, one row."""
    guide, x = GUIDES[name](6, 2).double(), torch.randn(1, 6, dtype=torch.float64)
    leaves = list(guide.parameters())
    nodes, log_weight = grid(2, 251, reach=3.0)
    exact = ((guide(x).log_prob(nodes.unsqueeze(-2))[:, 0] + log_weight).exp() * h(nodes)).sum()
    expected = flat(torch.autograd.grad(exact, leaves))
    torch.manual_seed(7)
    gradients = torch.stack([flat(torch.autograd.grad(h(guide(x).rsample((500,))).mean(), leaves)) for _ in range(60)])
    error = gradients.std(0) / 60**0.5
    assert expected.abs().max() > 0.05
    # Several hundred parameters: 5 errors.
    assert ((gradients.mean(0) - expected).abs() < 5.0 * error + 1e-4).all()
