"""Dimensions by name: checks that name what is missing, and names that one array alone has."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import xarray as xr

from subquad.core.spelling import nearest

Arrays = dict[str, xr.DataArray]


def pair(name: str, value: Any, of: str) -> tuple[Hashable, Hashable]:
    """(the first name, the second), which are one name unless a pair is given."""
    if isinstance(value, tuple):
        if len(value) != 2:
            msg = f"{name} is {value!r}, expected the name of a dimension, or a pair of names, {of}"
            raise ValueError(msg)
        return value
    return value, value


def check(arrays: Mapping[str, Any], dims: Mapping[str, Sequence[Hashable]]) -> Arrays:
    """The arrays that are not None, which must be DataArrays that have these dimensions."""
    given = {name: x for name, x in arrays.items() if x is not None}
    for name, x in given.items():
        if not isinstance(x, xr.DataArray):
            kind = type(x).__name__
            advice = "pass one of its variables" if isinstance(x, xr.Dataset) else "xarray.DataArray(x, dims=…) is one"
            msg = f"{name} is a {kind}, expected a DataArray with the dimensions {_listed(dims[name])}; {advice}"
            raise TypeError(msg)
        for dim in dims[name]:
            if dim not in x.dims:
                have = [str(one) for one in x.dims]
                hint = nearest(str(dim), have) if have else "it has no dimension"
                msg = f"{name} has no dimension {dim!r}; {hint}"
                raise ValueError(msg)
    return given


def check_apart(arrays: Arrays, dim: Hashable, why: str) -> None:
    """ValueError if one of the arrays has a dimension that only others may have."""
    for name, x in arrays.items():
        if dim in x.dims:
            msg = f"{name} has the dimension {dim!r}, {why}; rename it, {name}.rename({{{dim!r}: …}})"
            raise ValueError(msg)


def aligned(arrays: Arrays) -> Arrays:
    """The arrays, after the check that dimensions of one name have equal labels and lengths in all of them."""
    return dict(zip(arrays, xr.align(*arrays.values(), join="exact", copy=False), strict=True))


def without(arrays: Arrays, *dims: Hashable) -> Arrays:
    """The arrays without coordinates along dimensions that the output has not."""
    return {
        name: x.drop_vars([key for key, along in x.coords.items() if not set(dims).isdisjoint(along.dims)])
        for name, x in arrays.items()
    }


def ranked(x: Any, rank: int) -> Any:
    """An array with so many axes, new ones of length 1 in front."""
    return x if x is None else x[(None,) * (rank - x.ndim)]


def _listed(dims: Sequence[Hashable]) -> str:
    return " and ".join(map(repr, dims))
