"""Figures of samples, traversals and the manifold: each picture is the decoder's mean at the latents it stands for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from linear_gaussian import LinearGaussian
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from scipy import stats
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.report import plots

SHAPE = (2, 3)


@pytest.fixture
def ax() -> Iterator[Axes]:
    yield plt.subplots()[1]
    plt.close("all")


class Told(nn.Module):
    """Pixels of two latents that can be read off again: sigmoid of each, and of the label's number."""

    def __init__(self, latent_dim: int, labelled: bool = False) -> None:
        super().__init__()
        self.latent_dim, self.labelled = latent_dim, labelled
        self.reads = (1,) if labelled else ()
        self.slope = nn.Parameter(torch.ones(()))

    def forward(self, z: Tensor, *given: Tensor) -> Tensor:
        pixels = torch.sigmoid(self.slope * z)
        rest = z.new_zeros(*z.shape[:-1], 6 - self.latent_dim)
        if self.labelled:
            rest = rest + 0.1 * given[0][..., None]
        return torch.cat([pixels, rest], -1)


def vae(latent_dim: int = 2, prior: Any = None, labelled: bool = False) -> pv.VAE:
    encoder = pv.nets.MLP(6 + 3 * labelled, hidden=(4,))
    return pv.VAE(
        prior=pv.priors.StandardNormal(latent_dim) if prior is None else prior,
        likelihood=pv.likelihoods.Normal(Told(latent_dim, labelled), scale=0.1),
        guide=pv.guides.DiagonalNormal(
            pv.nets.Conditional(encoder, classes=3) if labelled else encoder, latent_dim=latent_dim
        ),
    )


def pictures(ax: Axes, columns: int, lines: int) -> np.ndarray:
    """(lines, columns, 6) from the grid that was drawn."""
    grid = np.asarray(ax.get_images()[0].get_array())
    assert grid.shape == (lines * 3 + 1, columns * 4 + 1)
    return np.array(
        [[grid[1 + 3 * i : 3 + 3 * i, 1 + 4 * j : 4 + 4 * j].ravel() for j in range(columns)] for i in range(lines)]
    )


def latents(cells: np.ndarray, latent_dim: int = 2) -> np.ndarray:
    """The latents that a picture was decoded from."""
    pixels = cells[..., :latent_dim]
    return np.log(pixels / (1.0 - pixels))


def names(ax: Axes) -> tuple[list[str], list[str]]:
    return [t.get_text() for t in ax.get_xticklabels()], [t.get_text() for t in ax.get_yticklabels()]


@pytest.mark.parametrize("noise", [False, True])
def test_samples_are_those_of_generate(ax: Axes, noise: bool) -> None:
    model = vae()
    assert plots.samples(model, SHAPE, ax, num=9, noise=noise, seed=4) is ax
    assert ax.get_title() == ("Samples: x ~ p(x | z), z ~ p(z)" if noise else "Samples: E[x | z] at z ~ p(z)")
    expected = model.generate(9, seed=4, noise=noise)
    assert np.allclose(pictures(ax, 3, 3).reshape(9, 6), expected.numpy())


def test_samples_of_a_conditional_vae(ax: Axes) -> None:
    plots.samples(vae(labelled=True), SHAPE, ax, num=4, given=torch.tensor([0, 1, 2, 1]))
    assert np.allclose(pictures(ax, 2, 2).reshape(4, 6)[:, 5], [0.0, 0.1, 0.2, 0.1], atol=1e-6)


def test_traversals_move_one_dimension_through_the_prior(ax: Axes) -> None:
    model, x = vae(3), torch.rand(1, 6)
    assert plots.traversals(model, x, SHAPE, ax, dims=[2, 0], num=5) is ax
    cells = latents(pictures(ax, 5, 2), 3)
    centre = model.encode(x).mean[0].numpy()
    moved = stats.norm.ppf(np.linspace(0.02, 0.98, 5))
    for line, dim in enumerate([2, 0]):
        assert np.allclose(cells[line, :, dim], moved, atol=1e-4)
        others = [d for d in range(3) if d != dim]
        assert np.allclose(cells[line][:, others], centre[others], atol=1e-4)
    assert names(ax) == (["0.02", "0.26", "0.5", "0.74", "0.98"], ["z[2]", "z[0]"])
    assert np.allclose(ax.get_xticks(), [2.0, 6.0, 10.0, 14.0, 18.0])  # the middle of pixels 1 to 3, 5 to 7, ...
    assert np.allclose(ax.get_yticks(), [1.5, 4.5])
    assert [ax.get_xlabel(), ax.get_ylabel()] == ["quantile of the prior", "latent dimension"]
    assert ax.axison


@pytest.mark.parametrize("num_lines", [1, 2, 5])
def test_title_and_labels_of_traversals_lie_inside_of_the_figure(num_lines: int) -> None:
    drawn = plots.traversals(vae(5), torch.rand(1, 6), (2, 3), dims=range(num_lines))
    figure = drawn.get_figure(root=True)
    assert figure is not None
    figure.canvas.draw()
    for text in (drawn.title, drawn.xaxis.label, drawn.yaxis.label):
        box = text.get_window_extent()
        assert figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 <= box.y1 <= figure.bbox.y1
    plt.close(figure)


def test_traversals_show_ten_dimensions_unless_told(ax: Axes) -> None:
    class Wide(Told):
        def forward(self, z: Tensor, *given: Tensor) -> Tensor:
            return torch.sigmoid(self.slope * z[..., :6])

    model = pv.VAE(
        prior=pv.priors.StandardNormal(12),
        likelihood=pv.likelihoods.Normal(Wide(12), scale=0.1),
        guide=pv.guides.DiagonalNormal(pv.nets.MLP(6, hidden=(4,)), latent_dim=12),
    )
    plots.traversals(model, torch.rand(1, 6), SHAPE, ax, num=1)
    assert names(ax) == (["0.5"], [f"z[{i}]" for i in range(10)])
    assert pictures(ax, 1, 10).shape == (10, 1, 6)


def test_traversals_keep_the_condition(ax: Axes) -> None:
    plots.traversals(vae(labelled=True), (torch.rand(1, 6), torch.tensor([2])), SHAPE, ax, num=3)
    assert np.allclose(pictures(ax, 3, 2)[..., 5], 0.2, atol=1e-6)


@pytest.mark.parametrize("num", [4, 20])
def test_the_manifold_is_a_grid_of_prior_quantiles(ax: Axes, num: int) -> None:
    assert plots.manifold(vae(), SHAPE, ax, num=num) is ax
    assert ax.get_title() == "Manifold: E[x | z], equal prior probability a picture"
    cells = latents(pictures(ax, num, num))
    quantiles = stats.norm.ppf((np.arange(num) + 0.5) / num)
    for i in range(num):
        assert np.allclose(cells[i, :, 0], quantiles, atol=1e-4)  # to the right
        assert np.allclose(cells[:, i, 1], quantiles[::-1], atol=1e-4)  # upwards
    across, up = names(ax)
    assert len(across) == min(num, 10)
    assert (across[0], across[-1]) == (f"{quantiles[0]:.2f}", f"{quantiles[-1]:.2f}")
    assert (up[0], up[-1]) == (across[-1], across[0])
    assert [ax.get_xlabel(), ax.get_ylabel()] == ["z[0]", "z[1]"]


def test_the_manifold_of_independent_priors_of_other_families(ax: Axes) -> None:
    """Laplace has an inverse distribution function, and its own scale: not that of a Normal."""
    prior = pv.priors.Laplace(2)
    plots.manifold(vae(prior=prior), SHAPE, ax, num=5)
    drawn = prior()
    quantiles = drawn.base_dist.icdf(torch.tensor([[0.1], [0.3], [0.5], [0.7], [0.9]]).expand(-1, 2)).detach().numpy()
    assert np.allclose(latents(pictures(ax, 5, 5))[0, :, 0], quantiles[:, 0], atol=1e-3)


def test_the_manifold_of_a_dependent_prior_has_marginal_quantiles(ax: Axes) -> None:
    """N(m, L L'): the marginals are Normal with the deviations of L L', met by 32,768 draws."""
    prior = pv.priors.Normal(2)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(0.3 * torch.arange(1.0, parameter.numel() + 1).reshape(parameter.shape))
    distribution = prior()
    loc, scale = distribution.mean.detach().numpy(), distribution.stddev.detach().numpy()
    plots.manifold(vae(prior=prior), SHAPE, ax, num=4)
    cells, p = latents(pictures(ax, 4, 4)), np.array([0.125, 0.375, 0.625, 0.875])
    standard = stats.norm.ppf(p)
    error = np.sqrt(p * (1.0 - p) / 32_768) / stats.norm.pdf(standard)
    assert (np.abs(cells[0, :, 0] - loc[0] - scale[0] * standard) < 4.5 * scale[0] * error + 1e-3).all()
    assert (np.abs(cells[::-1, 0, 1] - loc[1] - scale[1] * standard) < 4.5 * scale[1] * error + 1e-3).all()


def test_the_manifold_of_a_conditional_vae_is_told_one_condition(ax: Axes) -> None:
    plots.manifold(vae(labelled=True), SHAPE, ax, num=3, given=torch.tensor([2]))
    assert np.allclose(pictures(ax, 3, 3)[..., 5], 0.2, atol=1e-6)
    with pytest.raises(ValueError, match="reads 1 tensor beside its rows"):
        plots.manifold(vae(labelled=True), SHAPE, ax)
    with pytest.raises(ValueError, match=r"given has shape \(2,\): give the one condition"):
        plots.manifold(vae(labelled=True), SHAPE, ax, given=torch.tensor([2, 1]))


def test_nothing_random_or_of_the_vae_is_left_changed(ax: Axes) -> None:
    model, before = vae(prior=pv.priors.Normal(2)), torch.random.get_rng_state()
    plots.samples(model, SHAPE, ax, num=2)
    plots.manifold(model, SHAPE, ax, num=2)
    plots.traversals(model, torch.rand(1, 6, generator=torch.Generator().manual_seed(1)), SHAPE, ax, num=2)
    assert torch.equal(before, torch.random.get_rng_state())
    assert model.training


def test_plain_programs_are_told_what_to_draw(ax: Axes) -> None:
    known = LinearGaussian()
    for draw in (
        lambda: plots.samples(known.program(), SHAPE, ax),
        lambda: plots.traversals(known.program(), known.draw(1), SHAPE, ax),
        lambda: plots.manifold(known.program(), SHAPE, ax),
    ):
        with pytest.raises(TypeError, match=r"takes a VAE, and was given a Program: .*images\(program.simulate"):
            draw()
    x = known.draw(4)
    rows = known.program().simulate(x)[0][0]
    assert np.allclose(pictures(plots.images(rows, SHAPE, ax), 2, 2).reshape(4, 6), rows.numpy())


@pytest.mark.parametrize(
    ("draw", "told"),
    [
        (lambda: plots.traversals(vae(), torch.rand(2, 6), SHAPE), r"x has 2 rows: give the one to begin at, x\[:1\]"),
        (lambda: plots.traversals(vae(), torch.rand(1, 6), SHAPE, dims=[0, 2]), r"dims=\[0, 2\] must name .* from 0 to 1"),
        (lambda: plots.traversals(vae(), torch.rand(1, 6), SHAPE, dims=[]), r"dims=\[\] must name"),
        (lambda: plots.traversals(vae(), torch.rand(1, 6), (2, 2)), "are no pictures of shape"),
        (lambda: plots.traversals(vae(), torch.rand(1, 6), SHAPE, num=0), "num=0 must be"),
        (lambda: plots.manifold(vae(3), SHAPE), "has 3 latent dimensions, a plane has 2"),
        (lambda: plots.manifold(vae(1), SHAPE), "has 1 latent dimension, a plane has 2"),
        (lambda: plots.samples(vae(), SHAPE, num=0), "num=0 must be"),
    ],
)  # fmt: skip
def test_refusals(draw: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        draw()
    plt.close("all")
