"""TypeError and ValueError for what may not come in: array libraries, devices, dtypes, numbers."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device

from subquad.backend import Array
from subquad.core.dtypes import is_dtype
from subquad.core.loading import library_of


def check_arrays(**arrays: Array | None) -> ModuleType:
    """The namespace common to the arrays that are not None; TypeError or ValueError where there is none."""
    given = {name: x for name, x in arrays.items() if x is not None}
    spaces = {name: _namespace(name, x) for name, x in given.items()}
    first, xp = next(iter(spaces.items()))
    for name, other in spaces.items():
        if other is not xp:
            msg = (
                f"{first} is an array of {library_of(xp)} but {name} is an array of {library_of(other)}; "
                f"convert one of them, nothing is moved between libraries silently"
            )
            raise TypeError(msg)
    where = device(given[first])
    for name, x in given.items():
        there = device(x)
        if where is None or there is None:  # traced arrays have no device
            continue
        if there != where and _devices(there) != _devices(where):
            msg = f"{first} is on device {where} but {name} is on {there}; move them to one device"
            raise ValueError(msg)
    return xp


def _devices(where: Any) -> Any:
    """A device, or the set of those that an array is divided among, in whatever way."""
    devices = getattr(where, "device_set", ())
    return devices if len(devices) > 1 else next(iter(devices), where)


def _namespace(name: str, x: Array) -> ModuleType:
    if isinstance(x, np.ma.MaskedArray | np.matrix):
        msg = (
            f"{name} is a numpy {type(x).__name__}, which is not supported; "
            f"pass a plain array (numpy.asarray) and hidden keys as key_mask"
        )
        raise TypeError(msg)
    if isinstance(x, bool | int | float | complex | str | list | tuple):
        xp = None  # asked before array_namespace, which skips Python scalars
    else:
        try:
            xp = array_namespace(x)
        except TypeError:
            xp = None
    if xp is None:
        kind = "bool" if name.endswith("mask") else "float"
        msg = (
            f"{name} is a {type(x).__name__}, not an array; "
            f"convert it first, for example with numpy.asarray({name}, dtype={kind})"
        )
        raise TypeError(msg)
    return xp


def check_given(**arrays: Array | None) -> None:
    """TypeError for an argument that must be an array and is None."""
    for name, x in arrays.items():
        if x is None:
            msg = f"{name} is a NoneType, not an array"
            raise TypeError(msg)


def check_floating(xp: ModuleType, *, complex_too: bool = False, **arrays: Array | None) -> None:
    """TypeError unless every array that is not None has a real floating dtype (or complex, where allowed)."""
    kinds = ("real floating", "complex floating") if complex_too else ("real floating",)
    for name, x in arrays.items():
        if x is not None and not is_dtype(xp, x.dtype, kinds):
            expected = "a real or complex floating dtype" if complex_too else "a real floating dtype"
            msg = f"{name} has dtype {x.dtype}, expected {expected}; convert it, for example to float32"
            raise TypeError(msg)


def check_flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        msg = f"{name} must be True or False, got {value!r} of type {type(value).__name__}"
        raise TypeError(msg)
    return bool(value)


def check_count(name: str, value: Any, *, least: int = 1, why: str = "") -> int:
    """A Python integer ≥ `least`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        msg = f"{name} must be an integer, got {value!r} of type {type(value).__name__}{why}"
        raise TypeError(msg)
    if value < least:
        msg = f"{name} must be at least {least}, got {value}"
        raise ValueError(msg)
    return int(value)


def check_seed(value: Any) -> int:
    why = (
        "; draws are made on the host, so that they are the same for every library: "
        "pass an integer, or the random array itself"
    )
    return check_count("seed", value, least=0, why=why)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in choices:  # an array would be compared element by element
        msg = f"{name} is {value!r}, expected one of {', '.join(map(repr, choices))}"
        raise ValueError(msg)
    return str(value)


def check_number(name: str, value: Any, *, why: str = "") -> float:
    """A finite Python number."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating | np.integer):
        msg = f"{name} must be a number, got {value!r} of type {type(value).__name__}{why}"
        raise TypeError(msg)
    if not math.isfinite(value):
        msg = f"{name} must be finite, got {value}"
        raise ValueError(msg)
    return float(value)


def check_positive(name: str, value: Any) -> float:
    if check_number(name, value) <= 0:
        msg = f"{name} must be positive, got {value}"
        raise ValueError(msg)
    return float(value)
