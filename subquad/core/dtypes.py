"""Dtypes: what arrays promote to, what is computed in, and what is only storage."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from subquad.backend import Array


def is_dtype(xp: ModuleType, dtype: Any, kinds: str | tuple[str, ...]) -> bool:
    """`isdtype` of the standard; False for a dtype that the standard does not know, except bfloat16."""
    try:
        return bool(xp.isdtype(dtype, kinds))
    except TypeError:
        return is_bfloat16(dtype) and "real floating" in ((kinds,) if isinstance(kinds, str) else kinds)


def is_half(xp: ModuleType, dtype: Any) -> bool:
    """Whether a dtype is real and floating with less than 32 bits: for storage, not to compute in."""
    return is_bfloat16(dtype) or (xp.isdtype(dtype, "real floating") and xp.finfo(dtype).bits < 32)


def is_bfloat16(dtype: Any) -> bool:
    """Whether a dtype is the bfloat16 of the package ml_dtypes: NumPy and CuPy take it, but know nothing of it."""
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
    """`x` in `dtype`; `x` itself where it has that dtype already."""
    return x if x is None or x.dtype == dtype else xp.astype(x, dtype)
