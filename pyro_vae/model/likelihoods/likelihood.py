"""What every likelihood p(x | z) is.

With z of shape (..., D) the decoder returns (..., *event_shape) and the distribution has batch shape (...), so the same
object serves rows (N, D) and particles (K, N, D). `given` are the conditions, tensors (N, ...), see
`pyro_vae.model.conditions`.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn

from pyro_vae.model.component import Component
from pyro_vae.model.conditions import apply
from pyro_vae.model.families.partial import Partial
from pyro_vae.rows import Rows, row_blocks


class Likelihood(Component):
    """p(x | z).

    To add one: subclass `Elementwise` where the dimensions of x are independent given z, else this class. Keep the decoder
    in `self.decoder`; say in `takes`, `mend` and `inside` which data it takes; list the constructor's arguments in
    `settings`. Then add a line to the table in tests/model/components.py.

    Args:
        decoder: (..., D) -> (..., *event_shape) or what the subclass makes of it.
        missing: whether NaN in x is a missing value; otherwise it is an error.

    Attributes:
        discrete: whether p(x | z) is a probability and not a density.
        takes: the support, in words.
        mend: what to do with data outside it.
    """

    discrete: ClassVar[bool] = False
    takes: str = "any finite number"
    mend: str = "remove these rows or fill the values in"

    def __init__(self, decoder: nn.Module, *, missing: bool = False) -> None:
        super().__init__()
        self.decoder, self.missing = decoder, missing

    @abstractmethod
    def forward(self, z: Tensor, *given: Tensor) -> Any:
        """The distribution p(x | z), batch shape z.shape[:-1]."""

    def decode(self, z: Tensor, given: Rows) -> Tensor:
        """The decoder's output at z (..., D), told the conditions that it reads."""
        decoded: Tensor = apply(self.decoder, z, given=given)
        return decoded

    def seeing(self, x: Tensor, z: Tensor, *given: Tensor) -> Any:
        """p(x | z) while it is trained on rows x (N, *event_shape): the same, unless a parameter has its optimum there."""
        return self(z, *given)

    def centre(self, distribution: Any) -> Tensor:
        """What stands for a distribution that `forward` returned, in pictures and reconstructions: its mean."""
        mean: Tensor = distribution.mean
        return mean

    def inside(self, x: Tensor) -> Tensor:
        """Which numbers of x lie in the support, boolean of x's shape. NaN is judged elsewhere."""
        return x.isfinite()

    def check(self, x: Tensor) -> None:
        """Refuse rows (N, *event_shape) outside the support.

        Raises:
            ValueError: names the first value, what is taken, and the mend.
        """
        for part in row_blocks(len(x)):
            flat = x[part].reshape(len(x[part]), -1)
            outside = ~(self.inside(x[part]).reshape(flat.shape) | flat.isnan())
            if bool(outside.any()):
                row, column = outside.nonzero()[0].tolist()
                raise ValueError(
                    f"x has the value {float(flat[row, column]):.4g} in row {part.start + row}, column {column}, and "
                    f"{type(self).__name__} takes {self.takes}: {self.mend}."
                )

    def check_training(self, x: Tensor) -> None:
        """Refuse training data on which the likelihood has no finite maximum."""


class Elementwise(Likelihood):
    """p(x | z) = prod_j p(x_j | z): to add one, implement `elements`."""

    @abstractmethod
    def elements(self, z: Tensor, *given: Tensor) -> Any:
        """The distributions of the numbers of x, batch shape (..., *event_shape), event shape ()."""

    def forward(self, z: Tensor, *given: Tensor) -> Any:
        """The distribution p(x | z), the event being everything but the dimensions that z counts rows with."""
        return self.rows(self.elements(z, *given), z)

    def rows(self, elements: Any, z: Tensor) -> Any:
        """`elements` as one distribution of a row; of the numbers that are not missing, if that is allowed."""
        elements = Partial(elements) if self.missing else elements
        return elements.to_event(len(elements.batch_shape) - z.dim() + 1)
