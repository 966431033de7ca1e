"""What may come in: array library, device, dtype and shape, checked once at the door."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device

from subquad._dispatch import Array, library_of


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


def is_dtype(xp: ModuleType, dtype: Any, kinds: str | tuple[str, ...]) -> bool:
    """`isdtype` of the standard, False for the dtypes that it does not know, but for bfloat16."""
    try:
        return bool(xp.isdtype(dtype, kinds))
    except TypeError:
        return _is_bfloat16(dtype) and "real floating" in ((kinds,) if isinstance(kinds, str) else kinds)


def is_half(xp: ModuleType, dtype: Any) -> bool:
    """A real floating dtype of less than 32 bits: for storage, not to compute in."""
    return _is_bfloat16(dtype) or (xp.isdtype(dtype, "real floating") and xp.finfo(dtype).bits < 32)


def _is_bfloat16(dtype: Any) -> bool:
    """That of the package ml_dtypes, which NumPy and CuPy take, but say nothing of."""
    return getattr(dtype, "name", None) == "bfloat16"


def common_dtype(xp: ModuleType, *arrays: Array | None) -> Any:
    """The dtype that the arrays promote to."""
    given = [x for x in arrays if x is not None]
    try:
        return xp.result_type(*given)
    except TypeError:  # float16 and bfloat16 of ml_dtypes: NumPy has no answer, other libraries say float32
        return xp.result_type(xp.float32, *[x for x in given if not is_half(xp, x.dtype)])


def compute_dtype(xp: ModuleType, *arrays: Array | None) -> Any:
    """The dtype to compute in: the common one, but at least float32."""
    dtype = common_dtype(xp, *arrays)
    return xp.float32 if is_half(xp, dtype) else dtype


def cast(xp: ModuleType, x: Array | None, dtype: Any) -> Array | None:
    """`x` in `dtype`, the same object where it has it already."""
    return x if x is None or x.dtype == dtype else xp.astype(x, dtype)


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


def nearest(name: str, known: Iterable[str]) -> str:
    """What to say of a name that is none of these."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    return f"{hint}Known: {', '.join(known) or 'none'}"


def broadcast_batch(**shapes: tuple[int, ...] | None) -> tuple[int, ...]:
    """The common batch shape by the standard's rules; ValueError names the arguments that do not fit."""
    result: list[int] = []
    for shape in shapes.values():
        if shape is None:
            continue
        for axis in range(1, len(shape) + 1):
            if axis > len(result):
                result.insert(0, shape[-axis])
            elif result[-axis] == 1:
                result[-axis] = shape[-axis]
            elif shape[-axis] not in (1, result[-axis]):
                listed = ", ".join(f"{name} {list(s)}" for name, s in shapes.items() if s is not None)
                msg = f"batch shapes do not broadcast: {listed}; they must be equal or 1 axis by axis"
                raise ValueError(msg)
    return tuple(result)


def flatten_batch(xp: ModuleType, x: Array, batch: tuple[int, ...], rank: int) -> Array:
    """(..., tail) → (product of `batch`, tail), the tail being the last `rank` axes; broadcast where it must be."""
    tail = x.shape[-rank:]
    if tuple(x.shape[:-rank]) != batch:
        x = xp.broadcast_to(x, (*batch, *tail))
    return xp.reshape(x, (math.prod(batch), *tail))
