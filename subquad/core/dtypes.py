"""Dtypes: the common dtype of arrays, the dtype to compute in, and half precision, which serves as storage alone."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

from subquad.backend import Array

HALF_ELEMENTS = 2**17  # numbers of half precision that are widened at once: half a megabyte of float32


class FloatInfo(NamedTuple):
    """What `finfo` of the Array API standard tells of a dtype, for namespaces of libraries that tell less."""

    bits: int
    eps: float
    max: float
    min: float
    smallest_normal: float


def is_dtype(xp: ModuleType, dtype: Any, kinds: str | tuple[str, ...]) -> bool:
    """Whether a dtype is of one of the kinds, as by `isdtype` of the Array API standard.

    bfloat16 counts as real floating; any other dtype that the standard does not know is of no kind.
    """
    try:
        return bool(xp.isdtype(dtype, kinds))
    except TypeError:
        return is_bfloat16(dtype) and "real floating" in ((kinds,) if isinstance(kinds, str) else kinds)


def is_half(xp: ModuleType, dtype: Any) -> bool:
    """Whether a dtype is real and floating with fewer than 32 bits: storage alone, computed in float32."""
    size = getattr(dtype, "itemsize", None)  # most libraries' dtypes tell, sooner than their `finfo`
    if isinstance(size, int) and size > 2:
        return False
    return is_bfloat16(dtype) or (xp.isdtype(dtype, "real floating") and xp.finfo(dtype).bits < 32)


def is_bfloat16(dtype: Any) -> bool:
    """Whether a dtype is the bfloat16 of the package ml_dtypes, which NumPy and CuPy store but do not promote."""
    return getattr(dtype, "name", None) == "bfloat16"


def common_dtype(xp: ModuleType, *arrays: Array | None) -> Any:
    """The dtype that the arrays (those that are not None) promote to."""
    found = [x.dtype for x in arrays if x is not None]
    first = found[0]
    if all(dtype == first for dtype in found):
        return first
    # half precision is promoted here: libraries differ in it, and a compiler may not see through how they do it
    wide = [dtype for dtype in found if not is_half(xp, dtype)]
    return xp.result_type(*wide) if wide else xp.float32


def compute_dtype(xp: ModuleType, *arrays: Array | None) -> Any:
    """The dtype to compute in: the common one, but at least float32."""
    dtype = common_dtype(xp, *arrays)
    return xp.float32 if is_half(xp, dtype) else dtype


def stored_dtype(xp: ModuleType, x: Array | None, compute: Any) -> Any:
    """The dtype in which a kernel that reads half precision gets an array: its own if that is half, else `compute`."""
    return x.dtype if x is not None and compute == xp.float32 and is_half(xp, x.dtype) else compute


def scan_dtypes(xp: ModuleType, A: Array, *arrays: Array | None) -> tuple[Any, Any]:
    """(dtype of the real arrays, dtype of the state) of a scan with the matrix A, which may be complex.

    They are at least float32 and complex64, and as wide as the widest array.
    """
    common, is_complex = common_dtype(xp, A, *arrays), is_dtype(xp, A.dtype, "complex floating")
    if xp.result_type(common, xp.float32) in (xp.float32, xp.complex64):
        return xp.float32, xp.complex64 if is_complex else xp.float32
    if common == xp.float64 or common == getattr(xp, "complex128", None):
        return xp.float64, xp.complex128 if is_complex else xp.float64
    real = xp.finfo(common).dtype  # long double
    return real, xp.result_type(real, xp.complex64) if is_complex else real


def cast(xp: ModuleType, x: Array | None, dtype: Any) -> Array | None:
    """`x` in `dtype`: the array given, not a copy, if it has that dtype; None for None."""
    return x if x is None or x.dtype == dtype else xp.astype(x, dtype)
