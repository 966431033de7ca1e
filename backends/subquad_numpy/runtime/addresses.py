"""Where the numbers of an array are in memory, read in a tenth of a microsecond."""

from __future__ import annotations

import sys
from collections.abc import Callable
from ctypes import c_size_t
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
DATA = object.__basicsize__  # NumPy's ABI: an array object is the head of any object, then the address of its numbers


KNOWN: dict[type, Callable[[Any], int]] = {}  # class of arrays of another library → their address


def asked_address(x: Any) -> int:
    """The address of the first element, as its class tells, or the array protocol together with all else."""
    known = None if type(x) is np.ndarray else KNOWN.get(type(x))
    return int(x.__array_interface__["data"][0]) if known is None else known(x)


def read_address(x: Array) -> int:
    """The address of the first element, read from the array object; asked for of anything but an array of NumPy."""
    return _word_at(id(x) + DATA).value if type(x) is np.ndarray else asked_address(x)


def reads_objects() -> bool:
    """Whether this interpreter's objects can be read: `id` is an address, and the head has the size it claims."""
    if sys.implementation.name != "cpython":
        return False
    probe = np.zeros(2)
    return all(read_address(x) == asked_address(x) for x in (probe, probe[1:]))


_word_at = c_size_t.from_address
address_of = read_address if reads_objects() else asked_address
KNOWN[np.ndarray] = address_of
