"""Compilation of the kernels: one specialisation at a time, on first use, kept on disk."""

import ctypes
import re
import time
from collections.abc import Callable, Iterable
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba import types

DONE = 1  # what a kernel returns; a C function that runs into an exception, for want of memory, returns 0
INLINED = (
    *("_vector", "_memory", "_lanewise", "_simd", "_math", "_tile", "_block"),
    *("_compile", "_scan", "_scan_backward", "_linear_scan"),
    *("_product", "_iterative_pinv", "_maps", "_feature_blocks", "_summary", "_reading", "_rows_as_lanes"),
    *("_causal_features", "_causal_gradient", "_query_gradient", "_key_gradient"),
)
compile_seconds: dict[str, float] = {}
"""Time each kernel took to become callable in this process: compiled, or read from the disk."""


@cache
def fingerprint() -> str:
    """Hash of the sources of the kernels.

    Numba keys its cache on disk by the file of the kernel alone and would not see a change in what it
    inlines. Kernels close over this value, which Numba does add to the key.
    """
    sources = (Path(__file__).with_name(f"{name}.py") for name in INLINED)
    return sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


class Kernel:
    """Compiled code behind a C function, so that anyone may call it by its address: threads of other libraries too."""

    def __init__(self, native: Any) -> None:
        self.address: int = native.address
        self._native = native  # keeps the code
        self._call = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)(native.address)

    def __call__(self, first: int, last: int, frame: np.ndarray) -> None:
        """Run tasks first to last − 1, without the interpreter lock."""
        if self._call(first, last, frame.ctypes.data) != DONE:
            msg = "a compiled kernel found no memory for its scratch"
            raise MemoryError(msg)


def native(signature: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile a C function, kept on disk where there is a place for it."""

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return numba.cfunc(signature, cache=True, error_model="numpy")(function)
        except RuntimeError:  # neither the package's folder nor the user's can be written
            return numba.cfunc(signature, error_model="numpy")(function)

    return decorate


def compiled(name: str, order: Iterable[str]) -> Callable[[Callable[[int, int, Any], int]], Kernel]:
    """Compile a function (first, last, frame) that returns `DONE`; note the time as `name`.

    A frame is one record of int64, the fields of `order`: numbers and addresses. The kernel decides how many there are.
    """
    frame = numba.from_dtype(np.dtype([(field, np.int64) for field in order]))
    signature = types.int64(types.int64, types.int64, types.CPointer(frame))

    def decorate(function: Callable[[int, int, Any], int]) -> Kernel:
        start = time.perf_counter()
        # a file of its own on disk for each kernel: in a shared one, two processes that compile different
        # kernels at once can leave the code of one under the name of the other
        function.__qualname__ = re.sub(r"\W+", "_", f"{function.__name__} {name}")
        code = native(signature)(function)
        compile_seconds[name] = time.perf_counter() - start
        return Kernel(code)

    return decorate
