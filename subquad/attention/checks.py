"""Checks of the arrays of an attention call: queries, keys, values and masks."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from subquad.backend import Array
from subquad.core.checks import check_arrays, check_floating, check_given, check_number
from subquad.core.dtypes import is_dtype
from subquad.core.shapes import check_mask_axes


def check_rows(others: Mapping[str, Array | None], **rows: Array) -> ModuleType:
    """The array namespace of q, k and v (as far as given) and of `others`.

    Raises TypeError for libraries and dtypes that do not fit, ValueError for devices, ranks and widths.
    """
    check_given(**rows)
    xp = check_arrays(**rows, **others)
    check_floating(xp, **rows)
    for name, x in rows.items():
        if x.ndim < 2:
            msg = f"{name} has shape {tuple(x.shape)}, expected (..., n, d) with at least two axes"
            raise ValueError(msg)
        if x.shape[-1] == 0 and name != "v":
            msg = f"{name} has no channels: shape {tuple(x.shape)}, expected (..., n, d) with d ≥ 1"
            raise ValueError(msg)
    q, k = rows.get("q"), rows.get("k")
    if q is not None and k is not None and q.shape[-1] != k.shape[-1]:
        msg = f"q has {q.shape[-1]} channels (last axis of {tuple(q.shape)}) but k has {k.shape[-1]} ({tuple(k.shape)})"
        raise ValueError(msg)
    return xp


def check_scale(scale: Any) -> float:
    """The scale as a finite float; TypeError for other types, ValueError for NaN and infinities."""
    return check_number(
        "scale", scale, why="; to scale by an array, multiply q and k by its square root, and pass scale=1"
    )


def check_keys(q: Array | None, k: Array, v: Array, key_mask: Array | None, xp: ModuleType) -> Array | None:
    """The mask broadcast to (..., n_kv), or None; ValueError unless k and v have the same number of rows."""
    if v.shape[-2] != k.shape[-2]:
        msg = (
            f"k has {k.shape[-2]} rows (axis −2 of {tuple(k.shape)}) but v has {v.shape[-2]} "
            f"({tuple(v.shape)}); every key needs one value"
        )
        raise ValueError(msg)
    if key_mask is None:
        return None
    mask = check_mask(xp, "key_mask", key_mask, k.shape[-2], "keys")
    check_mask_axes("key_mask", mask, k.shape[:-2], v.shape[:-2], *(() if q is None else (q.shape[:-2],)))
    return mask


def check_mask(xp: ModuleType, name: str, mask: Array, n: int, rows: str) -> Array:
    """The mask broadcast to (..., n); TypeError unless it is bool, ValueError unless it fits.

    `name` and `rows` ("keys" or "queries") are the words of the errors.
    """
    if not is_dtype(xp, mask.dtype, "bool"):
        msg = (
            f"{name} has dtype {mask.dtype}, expected bool with True = keep; "
            f"an additive mask becomes one by `mask == 0`, a 0/1 mask by `mask == 1`"
        )
        raise TypeError(msg)
    if mask.ndim == 0 or mask.shape[-1] not in (1, n):
        msg = (
            f"{name} has shape {tuple(mask.shape)}, expected (..., {n}): "
            f"its last axis runs over the {rows} (a mask over queries × keys is not supported)"
        )
        raise ValueError(msg)
    return mask if mask.shape[-1] == n else xp.broadcast_to(mask, (*mask.shape[:-1], n))
