"""Checks of arguments, which raise TypeError or ValueError: array libraries, devices, dtypes, numbers."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np

from subquad.backend import Array, Backend
from subquad.core.beside import namespace_of
from subquad.core.dtypes import is_dtype
from subquad.core.loading import backend_of, library_of

WITH_UNITS = "logits q·k have no unit, and the output has that of v; pass numbers in units that you choose"
LARGEST = 2**63 - 1  # of a size, which libraries hold in 64 bits


def whole_call(
    error: TypeError, name: str, function: Callable[..., Any], arrays: Mapping[str, Any], options: Mapping[str, Any]
) -> Any:
    """The result of a call by the backend that refused one of its arrays; the error is raised if it has no form."""
    backend: Backend | None = getattr(error, "refused_by", None)
    found = NotImplemented if backend is None else backend.whole_call(name, function, arrays, options)
    if found is NotImplemented:
        raise error
    return found


def check_arrays(**arrays: Array | None) -> ModuleType:
    """The array namespace of the arrays that are not None.

    Raises TypeError for a value that is no array or for arrays of two libraries, ValueError for arrays on two devices.
    """
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
    backend = backend_of(xp)
    where = backend.device_of(given[first])
    for name, x in given.items():
        there = backend.device_of(x)
        if where is not None and there is not None and there != where:
            msg = f"{first} is on device {where} but {name} is on {there}; move them to one device"
            raise ValueError(msg)
    return xp


def _namespace(name: str, x: Array) -> ModuleType:
    # The array namespace of `x`; TypeError if it is no array, or a NumPy array that breaks the rules of arrays
    masked = sys.modules.get("numpy.ma")  # loaded by whoever has such an array
    if isinstance(x, np.matrix) or (masked is not None and isinstance(x, masked.MaskedArray)):
        msg = (
            f"{name} is a numpy {type(x).__name__}, which is not supported; "
            f"pass a plain array (numpy.asarray) and hidden keys as key_mask"
        )
        raise TypeError(msg)
    if hasattr(x, "todense"):
        msg = f"{name} is a {type(x).__name__}, a sparse array; make it dense: {name}.todense()"
        raise TypeError(msg)
    if isinstance(x, bool | int | float | complex | str | list | tuple):
        xp = None  # asked before array_namespace, which skips Python scalars
    else:
        try:
            xp = namespace_of(x)
        except TypeError:
            xp = None
    if xp is None:
        kind = "bool" if name.endswith("mask") else "int" if name in ("segments", "tokens") else "float"
        advice = f"convert it first, for example with numpy.asarray({name}, dtype={kind})"
        if hasattr(x, "units"):  # which numpy.asarray would drop
            advice = f"{WITH_UNITS}: {name}.magnitude"
        msg = f"{name} is a {type(x).__name__}, not an array; {advice}"
        raise TypeError(msg)
    reason = backend_of(xp).refuses(x)
    if reason is not None:
        msg = f"{name} is {reason}"
        error = TypeError(msg)
        error.refused_by = backend_of(xp)  # type: ignore[attr-defined]  # a class of its own would be lost in tracers
        raise error
    return xp


def check_given(**arrays: Array | None) -> None:
    """Raise TypeError if one of the arguments is None."""
    for name, x in arrays.items():
        if x is None:
            msg = f"{name} is a NoneType, not an array"
            raise TypeError(msg)


def check_floating(xp: ModuleType, *, complex_too: bool = False, **arrays: Array | None) -> None:
    """Raise TypeError unless every array that is not None is real and floating, or complex with `complex_too`."""
    kinds = ("real floating", "complex floating") if complex_too else ("real floating",)
    for name, x in arrays.items():
        if x is not None and not is_dtype(xp, x.dtype, kinds):
            expected = "a real or complex floating dtype" if complex_too else "a real floating dtype"
            msg = f"{name} has dtype {x.dtype}, expected {expected}; convert it, for example to float32"
            raise TypeError(msg)


def check_flag(name: str, value: Any) -> bool:
    # The value as a Python bool; TypeError unless it is a bool of Python or NumPy
    if not isinstance(value, bool | np.bool_):
        msg = f"{name} must be True or False, got {value!r} of type {type(value).__name__}"
        raise TypeError(msg)
    return bool(value)


def check_count(name: str, value: Any, *, least: int = 1, most: float = LARGEST, why: str = "") -> int:
    """The value as a Python int; TypeError unless it is an integer, ValueError unless it is in least … most."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        msg = f"{name} must be an integer, got {value!r} of type {type(value).__name__}{why}"
        raise TypeError(msg)
    if value < least:
        msg = f"{name} must be at least {least}, got {_short(value)}"
        raise ValueError(msg)
    if value > most:
        msg = f"{name} must be at most {most}, got {_short(value)}"
        raise ValueError(msg)
    return int(value)


def check_seed(value: Any) -> int:
    # The seed as a Python int ≥ 0; TypeError for other types, such as a generator or a key of JAX
    why = (
        "; draws are made on the host, so that they are the same for every library: "
        "pass an integer, or the random array itself"
    )
    return check_count("seed", value, least=0, most=math.inf, why=why)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    # The value as a string; ValueError unless it is one of `choices`
    if not isinstance(value, str) or value not in choices:  # an array would be compared element by element
        msg = f"{name} is {value!r}, expected one of {', '.join(map(repr, choices))}"
        raise ValueError(msg)
    return str(value)


def check_number(name: str, value: Any, *, why: str = "") -> float:
    """The value as a Python float; TypeError unless it is a real number, ValueError unless it is finite."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating | np.integer):
        msg = f"{name} must be a number, got {value!r} of type {type(value).__name__}{why}"
        raise TypeError(msg)
    try:
        number = float(value)
    except OverflowError:  # an integer of more than 308 digits
        number = math.inf
    if not math.isfinite(number):
        msg = f"{name} must be finite, got {_short(value)}"
        raise ValueError(msg)
    return number


def check_positive(name: str, value: Any) -> float:
    # The value as a Python float; errors as `check_number`, and ValueError unless it is above 0
    number = check_number(name, value)
    if number <= 0:
        msg = f"{name} must be positive, got {value}"
        raise ValueError(msg)
    return number


def _short(value: Any) -> str:
    # The value as text, for an integer of many digits their number
    size = value.bit_length() if isinstance(value, int) else 0
    return f"an integer of {size} bits" if size > 64 else str(value)
