"""Parts of a VAE that can say what they are made of.

A `Component` is an `nn.Module` whose constructor arguments are its `settings()`. They make its `repr`, and a description
in plain JSON from which `pv.load` builds it again: names of classes of this package, numbers, lists. A module of the user's
own has no description; a file that holds one is loaded into a VAE that the user builds.
"""

from __future__ import annotations

import importlib
from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

HOMES = ("nets", "priors", "scales", "likelihoods", "guides")


class Component(nn.Module):
    """A module that knows its constructor arguments. Subclasses implement `settings`."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, by name: numbers, tuples, components, modules, classes of `torch.nn`."""

    def __repr__(self) -> str:
        """The call that makes it."""
        inside = ", ".join(f"{name}={_show(value)}" for name, value in self.settings().items())
        return f"{type(self).__name__}({inside})"


def _show(value: Any) -> str:
    return value.__name__ if isinstance(value, type) else repr(value)


def describe(value: Any) -> Any:
    """`value` as JSON: components by class and settings, other modules as {"foreign": repr}."""
    if isinstance(value, Component):
        home = type(value).__module__.removeprefix("pyro_vae.model.").partition(".")[0]
        if type(value).__module__.startswith("pyro_vae.model.") and home in HOMES:
            settings = {name: describe(setting) for name, setting in value.settings().items()}
            return {"component": f"{home}.{type(value).__name__}", "settings": settings}
    if isinstance(value, nn.Module):
        return {"foreign": type(value).__name__}
    if isinstance(value, type):
        known = issubclass(value, nn.Module) and getattr(nn, value.__name__, None) is value
        return {"activation": value.__name__} if known else {"foreign": value.__name__}
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [describe(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return {"foreign": type(value).__name__}


def difference(first: Any, second: Any, place: str) -> str | None:
    """Where two descriptions differ first, as "place: this and that"; None if they do not.

    Not compared are modules of the user's own, and settings that one of the two lacks, as a file of an older version may.
    """
    if isinstance(first, dict) and isinstance(second, dict) and not ("foreign" in first or "foreign" in second):
        if {"component", "settings"} <= first.keys() & second.keys() and first["component"] == second["component"]:
            mine, other = first["settings"], second["settings"]
            inside = (difference(mine[name], other[name], f"{place}.{name}") for name in mine if name in other)
            return next((found for found in inside if found), None)
    if isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        items = enumerate(zip(first, second, strict=True))
        return next((found for i, pair in items if (found := difference(*pair, f"{place}[{i}]"))), None)
    foreign = any(isinstance(each, dict) and "foreign" in each for each in (first, second))
    return None if foreign or first == second else f"{place}: {_brief(first)} and {_brief(second)}"


def _brief(description: Any) -> str:
    """A component by its class, anything else as it is."""
    if isinstance(description, dict):
        return str(description.get("component", description.get("activation", description))).rpartition(".")[2]
    return repr(tuple(description) if isinstance(description, list) else description)


class ForeignError(Exception):
    """A description holds a class that only the user can make; its name is the argument."""


def rebuild(description: Any) -> Any:
    """What `describe` described.

    Raises:
        ForeignError: names the class that only the user can make.
        ValueError: a name that is no component of this package; other errors where the description is damaged.
    """
    if isinstance(description, list):
        return tuple(rebuild(item) for item in description)
    if not isinstance(description, dict):
        return description
    if "foreign" in description:
        raise ForeignError(description["foreign"])
    if "activation" in description:
        return _named(nn, description["activation"], nn.Module)
    home, _, name = description["component"].partition(".")
    if home not in HOMES:
        raise ValueError(f"no component {description['component']!r} in this pyro_vae")
    component = _named(importlib.import_module(f"pyro_vae.model.{home}"), name, Component)
    return component(**{key: rebuild(value) for key, value in description["settings"].items()})


def _named(module: Any, name: str, kind: type) -> Any:
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise ValueError(f"no component {name!r} in this pyro_vae")
    return found


def out_features(net: nn.Module, given: int | None = None) -> int:
    """How many features `net` returns a row: as given, or as the net itself says.

    Raises:
        ValueError: neither says.
    """
    size = given if given is not None else getattr(net, "out_features", None)
    if size is None:
        raise ValueError(f"{type(net).__name__} has no attribute out_features: give features=, its number of outputs.")
    return int(size)


def positive_from(raw: Tensor, minimum: float) -> Tensor:
    """softplus(raw) + minimum: a scale that optimisers can move freely and that stays away from zero."""
    return torch.nn.functional.softplus(raw) + minimum
