"""Normalising flows as guides, built of zuko's transforms.

Both begin with a Normal that heads on the encoder set, and transforms that start near the identity and read the encoder's
features. Draws and their densities take one pass through each transform. The package zuko is needed,
``pip install zuko``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import AffineTransform

from pyro_vae.model.component import out_features, positive_from
from pyro_vae.model.families.flow import Flow, build, calm, import_zuko
from pyro_vae.model.guides.gaussian import MINIMUM_SCALE
from pyro_vae.model.guides.guide import Guide
from pyro_vae.rows import positive


class InverseAutoregressive(Guide):
    """The inverse autoregressive flow of Kingma et al. 2016 (arXiv:1606.04934, sec. 4).

        z_0 = mu(x) + sigma(x) eps,   z_t,d = a_t,d z_t-1,d + b_t,d   with a_t, b_t functions of z_t-1,1 .. z_t-1,d-1 and x,

    the order of the dimensions reversed from one t to the next. log a_t is bounded as in zuko. A draw and its density take
    one pass; the density of any other point takes D passes through each transform.

    Args:
        encoder: (N, *event_shape) -> (N, features); the heads are added here.
        latent_dim: D.
        transforms: T.
        hidden: widths of the hidden layers of each transform's network.
        features: outputs of the encoder, needed only where it has no attribute `out_features`.
    """

    def __init__(
        self,
        encoder: nn.Module,
        latent_dim: int,
        transforms: int = 2,
        hidden: Sequence[int] = (64, 64),
        features: int | None = None,
    ) -> None:
        super().__init__()
        positive(latent_dim=latent_dim, transforms=transforms)
        self.encoder, self.latent_dim, self.features = encoder, latent_dim, features
        self.transforms, self.hidden = transforms, tuple(hidden)
        size = out_features(encoder, features)
        self.loc, self.raw_scale = nn.Linear(size, latent_dim), nn.Linear(size, latent_dim)
        self.steps = _transforms(
            import_zuko().flows.MAF,
            transforms,
            features=latent_dim,
            context=size,
            hidden_features=self.hidden,
        )

    def settings(self) -> dict[str, Any]:
        """See `Component.settings`."""
        return {
            "encoder": self.encoder,
            "latent_dim": self.latent_dim,
            "transforms": self.transforms,
            "hidden": self.hidden,
            "features": self.features,
        }

    def forward(self, x: Tensor, *given: Tensor) -> Any:
        """q(z | x), batch shape (N,), event shape (D,)."""
        features = self.encode(x, given)
        scale = positive_from(self.raw_scale(features), MINIMUM_SCALE)
        return _pushed(self.loc(features), scale, [step(features) for step in self.steps])

    def centre(self, q: Any) -> Tensor:
        """The image of mu(x), (N, D): the flow has no mean in closed form."""
        point: Tensor = q.centre
        return point


class Spline(Guide):
    """A neural spline flow (Durkan et al. 2019, arXiv:1906.04032) with coupling layers, fast in both directions.

        z = mu(x) + sigma(x) T(eps; x),   eps ~ N(0, I),

    T a composition of monotonic rational-quadratic splines on [-5, 5], the identity outside, in which half of the
    dimensions set the splines of the others in turn. Draws, and the densities of any points, cost a few passes through each
    transform whatever D is.

    Args:
        encoder: (N, *event_shape) -> (N, features); the heads are added here.
        latent_dim: D.
        transforms: how many.
        bins: of each spline.
        hidden: widths of the hidden layers of each transform's network.
        features: outputs of the encoder, needed only where it has no attribute `out_features`.
    """

    def __init__(
        self,
        encoder: nn.Module,
        latent_dim: int,
        transforms: int = 2,
        bins: int = 8,
        hidden: Sequence[int] = (64, 64),
        features: int | None = None,
    ) -> None:
        super().__init__()
        positive(latent_dim=latent_dim, transforms=transforms, bins=bins)
        self.encoder, self.latent_dim, self.features = encoder, latent_dim, features
        self.transforms, self.bins, self.hidden = transforms, bins, tuple(hidden)
        size = out_features(encoder, features)
        self.loc, self.raw_scale = nn.Linear(size, latent_dim), nn.Linear(size, latent_dim)
        self.steps = _transforms(
            import_zuko().flows.NSF,
            transforms,
            features=latent_dim,
            context=size,
            bins=bins,
            passes=2,
            hidden_features=self.hidden,
        )

    def settings(self) -> dict[str, Any]:
        """See `Component.settings`."""
        return {
            "encoder": self.encoder,
            "latent_dim": self.latent_dim,
            "transforms": self.transforms,
            "bins": self.bins,
            "hidden": self.hidden,
            "features": self.features,
        }

    def forward(self, x: Tensor, *given: Tensor) -> Any:
        """q(z | x), batch shape (N,), event shape (D,)."""
        features = self.encode(x, given)
        scale = positive_from(self.raw_scale(features), MINIMUM_SCALE)
        loc = self.loc(features)
        last = _Stretched(loc, scale, event_dim=1)
        return _pushed(torch.zeros_like(loc), torch.ones_like(scale), [*(step(features) for step in self.steps), last])

    def centre(self, q: Any) -> Tensor:
        """The image of eps = 0, (N, D): the flow has no mean in closed form."""
        point: Tensor = q.centre
        return point


class _Stretched(AffineTransform):
    """loc + scale z of vectors z (..., D), with loc and scale (N, D): torch's takes N for a part of the event shape."""

    def forward_shape(self, shape: Any) -> Any:
        """The shape of an event is kept."""
        return shape

    def inverse_shape(self, shape: Any) -> Any:
        """The shape of an event is kept."""
        return shape


def _transforms(family: Any, count: int, **settings: Any) -> nn.ModuleList:
    """The transforms of a flow of zuko, near the identity."""
    flow: Any = build(family, transforms=count, activation=nn.SiLU, **settings)
    steps: nn.ModuleList = flow.transform.transforms
    for step in steps:
        calm(step)
    return steps


def _pushed(loc: Tensor, scale: Tensor, steps: Sequence[Any]) -> Flow:
    """The distribution of the last of `steps` after ... after the first of a draw of N(loc, diag scale^2), (N, D) each."""
    zuko = import_zuko()
    inverse = zuko.transforms.ComposedTransform(*(step.inv for step in reversed(steps)))
    return Flow(zuko.distributions.NormalizingFlow(inverse, zuko.distributions.DiagNormal(loc, scale)))
