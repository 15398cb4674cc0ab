"""Normalising flows of zuko as Pyro distributions, and the one place where zuko is imported.

zuko switches off torch's checks of arguments, for all distributions of the process, when it is imported, and replaces
`Distribution.arg_constraints`. Here both are put back, and what zuko's own classes need is set on those alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.contrib.zuko import ZukoToPyro
from torch import Tensor, nn
from torch.distributions import Distribution, constraints
from torch.distributions.transforms import _InverseTransform


def import_zuko() -> Any:
    """The package zuko, imported without a change to torch's distributions.

    Raises:
        ImportError: it is not installed.
    """
    before = {name: Distribution.__dict__[name] for name in ("_validate_args", "arg_constraints")}
    name = _InverseTransform.__name__
    try:
        import zuko
    except ModuleNotFoundError as error:
        raise ImportError("Flows need the package zuko: pip install zuko (the extra flows of pyro-vae).") from error
    finally:
        for attribute, value in before.items():
            setattr(Distribution, attribute, value)
        _InverseTransform.__name__ = name
    for kind in vars(zuko.distributions).values():
        own = inspect.isclass(kind) and issubclass(kind, Distribution) and kind.__module__.startswith("zuko.")
        # A class that declares no constraints inherits torch's property, with which no argument check can be made.
        if own and isinstance(inspect.getattr_static(kind, "arg_constraints"), property):
            kind.arg_constraints = {}
    return zuko


def build(make: Callable[..., nn.Module], **settings: Any) -> nn.Module:
    """`make(**settings)`, a network of zuko on the ambient device; zuko computes masks, which need values, on the way."""
    device = torch.get_default_device()
    with torch.device("cpu"):
        module = make(**settings)
    return module.to(device)


def calm(transform: Any, factor: float = 0.1) -> None:
    """Shrink what a lazy transform of zuko starts with, the last layer of its network if it has one: near the identity."""
    network = getattr(transform, "hyper", None)
    with torch.no_grad():
        for parameter in (transform if network is None else network[-1]).parameters():
            parameter.mul_(factor)


class Flow(ZukoToPyro):
    """A flow of zuko on R^D: a `zuko.distributions.NormalizingFlow`, or any distribution of zuko.

    To what Pyro's adapter has it adds a support, checks of arguments, and a memory of the last draw alone: `log_prob` of
    the very tensor that `pyro.sample` drew is known from the draw. Any other value, a changed one, or one that is asked
    for with gradients and was drawn without (or the other way round), is computed anew.

    Args:
        flow: batch shape (...), event shape (D,).
        validate_args: see `torch.distributions.Distribution`.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 - torch's own spelling
    support = constraints.real_vector

    def __init__(self, flow: Any, *, validate_args: bool | None = None) -> None:
        super().__init__(flow)
        dist.TorchDistribution.__init__(self, flow.batch_shape, flow.event_shape, validate_args=validate_args)
        self._last: tuple[Tensor, int, bool, Tensor] | None = None

    @property
    def centre(self) -> Tensor:
        """The image of the base's mean, (..., D): one point in the midst of the flow, not its mean."""
        flow: Any = self.dist
        point: Tensor = flow.transform.inv(flow.base.mean)
        return point.expand(self._extended_shape())

    def expand(self, batch_shape: Any, _instance: Any = None) -> Flow:
        """The same distribution with the batch shape `batch_shape`."""
        return Flow(self.dist.expand(torch.Size(batch_shape)), validate_args=self._validate_args)

    def __call__(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 - torch's own signature
        """A draw that `pyro.sample` asks for, (*sample_shape, ..., D), and its density in the same pass."""
        if not hasattr(self.dist, "rsample_and_log_prob"):
            drawn: Tensor = self.rsample(sample_shape) if self.has_rsample else self.sample(sample_shape)
            return drawn
        value, log_prob = self.dist.rsample_and_log_prob(torch.Size(sample_shape))
        self._last = value, value._version, torch.is_grad_enabled(), log_prob
        return value

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 - torch's own signature
        """Draws without gradient, (*sample_shape, ..., D)."""
        with torch.no_grad():
            drawn: Tensor = self.dist.sample(torch.Size(sample_shape))
        return drawn

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 - torch's own signature
        """Reparametrised draws, (*sample_shape, ..., D)."""
        drawn: Tensor = self.dist.rsample(torch.Size(sample_shape))
        return drawn

    def log_prob(self, value: Tensor) -> Tensor:
        """log q(value), (..., D) -> (...), in nats."""
        if self._validate_args:
            self._validate_sample(value)
        if self._last is not None:
            drawn, version, graded, log_prob = self._last
            if value is drawn and version == value._version and graded == torch.is_grad_enabled():
                return log_prob
        log_prob = self.dist.log_prob(value)
        return log_prob
