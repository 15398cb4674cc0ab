"""Priors of different families, one beside the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from pyro_vae.model.families.product import Product as ProductFamily
from pyro_vae.model.priors.prior import Prior


class Product(Prior):
    """p(z) = prod_i p_i(z_i): the first part has the first dimensions of z, and so on.

    Args:
        priors: the parts, any `Prior`s but those that read the guide.
        parts: the same as one sequence, instead.

    Raises:
        ValueError: no part, or one that reads the guide (it is a prior of all dimensions).
        TypeError: a part that is no `Prior`.

    Examples:
        >>> from pyro_vae.model.priors import Laplace, StandardNormal
        >>> Product(StandardNormal(2), Laplace(1))().event_shape
        torch.Size([3])
    """

    def __init__(self, *priors: Prior, parts: Sequence[Prior] = ()) -> None:
        super().__init__()
        made = (*priors, *parts)
        if not made:
            raise ValueError("A Product needs at least one prior: Product(StandardNormal(2), Laplace(3)), say.")
        for part in made:
            if not isinstance(part, Prior):
                raise TypeError(f"A part of a Product is a {type(part).__name__}: give a subclass of pv.priors.Prior.")
            if part.reads_guide:
                raise ValueError(f"{part!r} is made of the guide, which has all dimensions: it is no part of a Product.")
        self.parts = nn.ModuleList(made)
        self.latent_dim = sum(part.latent_dim for part in made)
        self.reads = tuple(sorted({position for part in made for position in getattr(part, "reads", ())}))

    def settings(self) -> dict[str, Any]:
        """See `Component.settings`."""
        return {"parts": tuple(self.parts)}

    def __repr__(self) -> str:
        """The call that makes it."""
        return f"Product({', '.join(map(repr, self.parts))})"

    def forward(self, *given: Tensor) -> Any:
        """The product, event shape (D,), told the conditions that the parts read."""
        told = dict(zip(self.reads, given, strict=True))
        return ProductFamily(*(part(*(told[at] for at in getattr(part, "reads", ()))) for part in self.parts))
