"""Means of m consecutive segments of n rows, of which the first n mod m have one row more than the others.

Means of half precision are of float32.
"""

from __future__ import annotations

import math
from types import ModuleType

from subquad.backend import Array
from subquad.core.beside import place_of
from subquad.core.dtypes import HALF_ELEMENTS, cast, compute_dtype
from subquad.core.loading import backend_of


def means_of_segments(xp: ModuleType, x: Array, m: int) -> Array:
    """The means (..., m, d) of the segments of rows (..., n, d), n ≥ m."""
    length, longer, backend = x.shape[-2] // m, x.shape[-2] % m, backend_of(xp)
    if backend.holds(longer == 0):
        return _mean_of_equal(xp, x, m, length)
    if not backend.loops_any_length and not backend.holds(longer != 0):
        return means_of_any(xp, x, m, length, longer)
    parts = [
        _mean_of_equal(xp, x[..., : longer * (length + 1), :], longer, length + 1),
        _mean_of_equal(xp, x[..., longer * (length + 1) :, :], m - longer, length),
    ]
    return xp.concat(parts, axis=-2)


def _mean_of_equal(xp: ModuleType, x: Array, segments: int, rows: int) -> Array:
    x = xp.reshape(x, (*x.shape[:-2], segments, rows, x.shape[-1]))
    dtype, backend = compute_dtype(xp, x), backend_of(xp)
    found = backend.mean_stored_rows(xp, x)
    if found is not None:
        return found
    if x.dtype == dtype or not backend.fills_in_place or backend.conditions([x]).recorded:
        return backend.mean_rows(xp, cast(xp, x, dtype))
    few = max(1, HALF_ELEMENTS // max(1, math.prod(x.shape) // max(1, segments)))  # segments that are widened at once
    if segments <= few:
        return backend.mean_rows(xp, cast(xp, x, dtype))
    parts = (x[..., i : i + few, :, :] for i in range(0, segments, few))
    return xp.concat([backend.mean_rows(xp, xp.astype(part, dtype)) for part in parts], axis=-2)


def means_of_any(xp: ModuleType, x: Array, m: int, length: int, longer: int) -> Array:
    """The means of m segments, of which `longer` have length + 1 rows, for lengths that a program leaves open."""
    segment = xp.arange(m, device=place_of(x))
    first = segment * length + xp.where(segment < longer, segment, longer)
    count = xp.where(segment < longer, length + 1, length)
    offset = xp.arange(length + 1, device=place_of(x))
    index = xp.where(offset < count[:, None], first[:, None] + offset, 0)
    x = cast(xp, x, compute_dtype(xp, x))
    rows = xp.reshape(xp.take(x, xp.reshape(index, (-1,)), axis=-2), (*x.shape[:-2], m, length + 1, x.shape[-1]))
    rows = xp.where((offset < count[:, None])[..., None], rows, 0.0)
    return xp.sum(rows / xp.astype(count, x.dtype)[:, None, None], axis=-2)  # no sum overflows
