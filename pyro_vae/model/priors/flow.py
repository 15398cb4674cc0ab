"""A normalising flow as a prior."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pyro_vae.model.families.flow import Flow as FlowFamily
from pyro_vae.model.families.flow import build, calm, import_zuko
from pyro_vae.model.priors.prior import Prior
from pyro_vae.rows import positive
from pyro_vae.seeds import seeded


class Flow(Prior):
    """z = T(eps), eps ~ N(0, I), with T a neural spline flow (Durkan et al. 2019, arXiv:1906.04032) or one of your own.

    The splines are autoregressive and run from z to eps: a density takes one pass, a draw D passes. They act on [-5, 5] and
    leave what lies outside as it is, so that the tails are Normal. T starts near the identity. The package zuko is needed,
    ``pip install zuko``.

    Args:
        latent_dim: D.
        transforms: how many, each in the reversed order of the one before.
        bins: of each spline.
        hidden: widths of the hidden layers of each transform's network.
        flow: a flow of zuko to take instead, a `zuko.lazy.Flow` of D features; the other settings are then not used.

    Raises:
        ValueError: a `flow` that is none, needs a context, or is of another number of features.
    """

    def __init__(
        self,
        latent_dim: int,
        transforms: int = 3,
        bins: int = 8,
        hidden: Sequence[int] = (64, 64),
        flow: nn.Module | None = None,
    ) -> None:
        super().__init__()
        positive(latent_dim=latent_dim, transforms=transforms, bins=bins)
        zuko = import_zuko()
        self.latent_dim, self.transforms, self.bins, self.hidden = latent_dim, transforms, bins, tuple(hidden)
        self.own = flow is not None
        if flow is not None:
            _require_flow(flow, latent_dim)
        self.flow = flow if flow is not None else _splines(zuko, latent_dim, transforms, bins, self.hidden)

    def settings(self) -> dict[str, Any]:
        """See `Component.settings`."""
        if self.own:
            return {"latent_dim": self.latent_dim, "flow": self.flow}
        return {
            "latent_dim": self.latent_dim,
            "transforms": self.transforms,
            "bins": self.bins,
            "hidden": self.hidden,
        }

    def __repr__(self) -> str:
        """The call that makes it; a flow of one's own by its class (zuko's repr would draw random numbers)."""
        return f"Flow(latent_dim={self.latent_dim}, flow={type(self.flow).__name__})" if self.own else super().__repr__()

    def forward(self) -> Any:
        """The flow, event shape (D,)."""
        return FlowFamily(self.flow())


def _require_flow(flow: nn.Module, latent_dim: int) -> None:
    """Refuse what has no density of D numbers when it is called without a context, which it reads in the density alone."""
    parameters = flow.parameters() if isinstance(flow, nn.Module) else iter(())
    like = next(parameters, torch.zeros(()))
    try:
        with torch.no_grad(), seeded(0, like.device):  # some flows estimate their density by draws
            p: Any = flow()
            p.log_prob(like.new_zeros(p.event_shape))
        found = f"it returns event shape {tuple(p.event_shape)}"
        fits = tuple(p.event_shape) == (latent_dim,)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        found, fits = str(error).rstrip("."), False
    if not fits:
        raise ValueError(
            f"flow={type(flow).__name__} is no prior of {latent_dim} latent dimensions: give a flow of zuko of "
            f"{latent_dim} features and without a context ({found})."
        )


def _splines(zuko: Any, latent_dim: int, transforms: int, bins: int, hidden: tuple[int, ...]) -> nn.Module:
    """A neural spline flow, near the identity."""
    settings = {"features": latent_dim, "transforms": transforms, "bins": bins, "hidden_features": hidden}
    flow: Any = build(zuko.flows.NSF, activation=nn.SiLU, **settings)
    for transform in flow.transform.transforms:
        calm(transform)
    made: nn.Module = flow
    return made
