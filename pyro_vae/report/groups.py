"""Tensors with names, as the groups that ArviZ reads: an xarray Dataset for each.

A variable that belongs to rows has the dimension "row", and before it "chain" and "draw" where it is drawn. The dimensions
of one row's value are called "z_dim_0", "z_dim_1", ... after the variable z, unless the user names them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from pyro_vae.report.versions import before_arviz_one
from pyro_vae.sites import Shape

if TYPE_CHECKING:
    import xarray as xr

CHAIN, DRAW, ROW = "chain", "draw", "row"
RESERVED = (CHAIN, DRAW, ROW)
DRAWN = (CHAIN, DRAW, ROW)

Dims = Mapping[str, Sequence[str]]
Coords = Mapping[str, Sequence[Any] | np.ndarray[Any, Any]]


class Labels:
    """Names of the dimensions of some variables, and the coordinates along them.

    Args:
        shapes: of one row's value, by variable.
        num_rows: N.
        dims: names for the dimensions of one row's value, by variable; None for "z_dim_0", ...
        coords: labels along dimensions, by name of the dimension, "row" among them; None for 0, 1, ...

    Raises:
        ValueError: names or numbers that do not fit.
    """

    def __init__(
        self, shapes: Mapping[str, Shape], num_rows: int, dims: Dims | None = None, coords: Coords | None = None
    ) -> None:
        dims, coords = dims or {}, coords or {}
        self.dims = {name: tuple(f"{name}_dim_{i}" for i in range(len(shape))) for name, shape in shapes.items()}
        for name, given in dims.items():
            _check_dims(name, given, shapes)
            self.dims[name] = tuple(given)
        sizes = {ROW: num_rows}
        for name, shape in shapes.items():
            if name in RESERVED:
                raise ValueError(f"Site {name!r} bears the name of a dimension: call it something else than {RESERVED}.")
            for dim, size in zip(self.dims[name], shape, strict=True):
                if sizes.setdefault(dim, size) != size:
                    raise ValueError(
                        f"Dimension {dim!r} of {name!r} has length {size} there and {sizes[dim]} elsewhere: "
                        "give them different names in dims."
                    )
        self.coords: dict[str, Any] = {dim: np.arange(size) for dim, size in sizes.items()}
        for dim, labels in coords.items():
            if dim not in sizes:
                raise ValueError(f"coords[{dim!r}] belongs to no dimension: there are {', '.join(map(repr, sizes))}.")
            if len(labels) != sizes[dim]:
                raise ValueError(f"coords[{dim!r}] has {len(labels)} labels, the dimension has length {sizes[dim]}.")
            self.coords[dim] = np.asarray(labels)

    def dataset(self, values: Mapping[str, Any], before: Sequence[str] = DRAWN, **attributes: Any) -> xr.Dataset:
        """A Dataset of tensors or arrays whose dimensions are `before` and those of one row's value.

        Args:
            values: by variable; those without a shape of their own, log_p say, have the dimensions `before` alone.
            before: of each variable.
            attributes: of the Dataset.
        """
        import xarray as xr

        variables: dict[str, Any] = {}
        used: dict[str, Any] = {}
        for name, value in values.items():
            array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
            names = (*before, *self.dims.get(name, ()))
            variables[name] = (names, array)
            used |= {dim: self.coords.get(dim, np.arange(size)) for dim, size in zip(names, array.shape, strict=True)}
        told = {"inference_library": "pyro_vae", "inference_library_version": metadata.version("pyro-vae")}
        return xr.Dataset(variables, coords=used, attrs=told | attributes)


def _check_dims(name: str, given: Sequence[str], shapes: Mapping[str, Shape]) -> None:
    if name not in shapes:
        raise ValueError(f"dims[{name!r}] belongs to no variable: there are {', '.join(map(repr, shapes))}.")
    if isinstance(given, str) or len(given) != len(shapes[name]):
        raise ValueError(
            f"dims[{name!r}]={given!r} must be a list of {len(shapes[name])} name(s): "
            f"the value of one row has shape {shapes[name]}."
        )
    if taken := [dim for dim in given if dim in RESERVED]:
        raise ValueError(f"dims[{name!r}] has {taken[0]!r}, which is a dimension already: give another name.")


def gathered(groups: Mapping[str, xr.Dataset]) -> Any:
    """The groups as the installed ArviZ holds them: `InferenceData` before 1.0, an xarray `DataTree` from then on."""
    if before_arviz_one():
        import arviz as az

        container: Any = az.InferenceData
        return container(**groups)
    import xarray as xr

    return xr.DataTree.from_dict(dict(groups))
