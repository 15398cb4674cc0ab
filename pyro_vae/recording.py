"""What one run of a model or guide shows, kept so that another run can be made at the same place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from pyro_vae.sites import Site

HandOn = Callable[[Tensor], Tensor]
"""A drawn latent -> what its program goes on with."""


class Recording(dict[str, Site]):
    """The sample sites of one run by name; filled by an effect handler of `pyro_vae.program`.

    Args:
        values: what the run takes instead of draws, as in `given`.
        lenient: draw a latent afresh where its value has another shape, so that `require_fit` can say so.
        hand_on: what the run goes on with instead of a latent's draw; None leaves the draw.

    Attributes:
        given: what fixes another run to the same draws: latents by name, and the row indices of plates.
    """

    def __init__(
        self, values: Mapping[str, Tensor] | None = None, *, lenient: bool = False, hand_on: HandOn | None = None
    ) -> None:
        super().__init__()
        self._values, self._lenient, self._hand_on = values or {}, lenient, hand_on
        self.given: dict[str, Tensor] = {}

    @property
    def plates(self) -> dict[str, Tensor]:
        """The part of `given` that says which rows a subsampled plate took."""
        return {key: value for key, value in self.given.items() if key not in self}

    def replay(self, message: Any, *, is_plate: bool) -> None:
        """Before a site is drawn: the value it is to have, if there is one."""
        value = None if message["is_observed"] else self._values.get(_key(message, is_plate=is_plate))
        if value is not None and not (self._lenient and value.shape != message["fn"].shape()):
            message["value"] = value

    def keep(self, message: Any, *, is_plate: bool) -> None:
        """After a site is drawn."""
        drawn = not (is_plate or message["is_observed"])
        if drawn and self._hand_on is not None:
            message["value"] = self._hand_on(message["value"])
        if drawn or is_plate:
            self.given[_key(message, is_plate=is_plate)] = message["value"]
        if not is_plate:
            self[message["name"]] = Site.of(message)


def _key(message: Any, *, is_plate: bool) -> str:
    return f"rows of plate {message['name']}" if is_plate else str(message["name"])
