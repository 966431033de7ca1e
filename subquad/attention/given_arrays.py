"""Options that are arrays, given in the library of the call or of NumPy."""

from __future__ import annotations

from types import ModuleType

import numpy as np

from subquad.backend import Array
from subquad.core.beside import place_of
from subquad.core.checks import check_arrays, check_floating
from subquad.core.dtypes import cast


def from_host(xp: ModuleType, name: str, x: Array, like: Array) -> Array:
    """`x`, of NumPy or of the library of `like`, as an array in the library and dtype and on the device of `like`."""
    is_host = isinstance(x, np.ndarray) and not isinstance(like, np.ndarray)
    own = check_arrays(**({} if is_host else {"q": like}), **{name: x})
    check_floating(own, **{name: x})
    if is_host:
        return xp.asarray(x.astype(f"float{xp.finfo(like.dtype).bits}"), dtype=like.dtype, device=place_of(like))
    return cast(xp, x, like.dtype)
