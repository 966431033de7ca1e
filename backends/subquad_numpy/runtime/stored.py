"""How arrays are stored: in the dtype that a kernel computes in, or in half precision, which it widens as it loads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

AS_COMPUTED, FLOAT16, BFLOAT16 = range(3)
HALF_BITS, NAN = 16, 0x7FC0  # of bfloat16: its width, which is what float32 has beyond it; the bits of a NaN
STORED_BITS = 2  # of a number that says how an array is stored
KINDS = {"float16": FLOAT16, "bfloat16": BFLOAT16, "uint16": BFLOAT16}
"""The kind of a dtype; uint16 stands for the bits of bfloat16, which NumPy lacks."""


def stored_word(arrays: Iterable[Any]) -> int:
    """How each array is stored, in one number for an argument record; see `codegen.stored.stored_as`."""
    word = 0
    for place, x in enumerate(arrays):
        if x is not None:
            word |= KINDS.get(np.dtype(x.dtype).name, AS_COMPUTED) << (STORED_BITS * place)
    return word


def computed(dtype: Any) -> np.dtype[Any]:
    """The dtype in which kernels compute with arrays of this dtype."""
    dtype = np.dtype(dtype)
    return np.dtype(np.float32) if dtype.name in KINDS else dtype


def widest(*arrays: Any) -> np.dtype[Any]:
    """The dtype in which kernels compute with these arrays, which have it or half precision."""
    return max((computed(x.dtype) for x in arrays if x is not None), key=lambda dtype: dtype.itemsize)


def common(*arrays: Any) -> Any:
    """The dtype that arrays have in common: half precision if all have the same, else the dtype to compute in."""
    first = arrays[0].dtype
    return first if all(x is None or x.dtype == first for x in arrays) else widest(*arrays)


def widened(x: Any) -> Any:
    """The numbers of an array of half precision in float32; any other array as it is."""
    if x.dtype == np.uint16:
        return (x.astype(np.uint32) << HALF_BITS).view(np.float32)
    return x.astype(np.float32) if x.dtype.name in KINDS else x


def rounded(x: Any, dtype: Any) -> Any:
    """The numbers of an array in a dtype, which may be uint16 for bfloat16: the nearest ones, ties to even."""
    if dtype != np.uint16:
        return x.astype(dtype, copy=False)
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    nearest = (bits + (0x7FFF + ((bits >> HALF_BITS) & 1))) >> HALF_BITS
    return np.where(np.isnan(x), NAN, nearest).astype(np.uint16)


def in_float32(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A `Compiled.backward` whose code reads float32 alone, for arrays of half precision: these are converted first."""

    def run(
        arrays: Sequence[Any], static: Mapping[str, Any], saved: Any, outputs: Sequence[Any], grads: Sequence[Any],
        need: Sequence[bool], *, threads: Any = None,
    ) -> Any:  # fmt: skip
        given, results, by = ([None if x is None else widened(x) for x in some] for some in (arrays, outputs, grads))
        return backward(given, static, saved, results, by, need, threads=threads)

    return run
