"""Compilation of the kernels: one specialisation at a time, on first use, kept on disk."""

import ctypes
import re
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba import types

from subquad_numpy.codegen.vector_type import lanes_of

DONE = 1  # what a kernel returns; a C function that runs into an exception, for want of memory, returns 0
compile_seconds: dict[str, float] = {}
"""Time each kernel took to become callable in this process: compiled, or read from the disk."""
CODEGEN = Path(__file__).parent


@cache
def fingerprint(folder: Path) -> str:
    """Hash of the sources that a kernel of this folder inlines: all of `codegen` and of the folder but `calls.py`.

    Numba looks a kernel up on disk by the kernel's own file and would not see a change in what it inlines.
    """
    sources = [path for where in (CODEGEN, folder) for path in sorted(where.glob("*.py")) if path.name != "calls.py"]
    return sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


def _forget_others(folder: Path, name: str, stamp: str) -> None:
    """Remove from the folder's cache what other sources left of the kernel of this name."""
    own = re.compile(rf".*\.{name}_([0-9a-f]{{16}})-.*\.nb[ic]")
    for path in (folder / "__pycache__").glob(f"*.{name}_*"):
        found = own.fullmatch(path.name)
        if found and found[1] != stamp:
            with suppress(OSError):
                path.unlink()


class Kernel:
    """Compiled code behind a C function, so that anyone may call it by its address: threads of other libraries too."""

    def __init__(self, native: Any) -> None:
        self.address: int = native.address
        self._native = native  # keeps the code
        self._call = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)(native.address)

    def __call__(self, first: int, last: int, records: np.ndarray) -> None:
        """Run tasks first to last − 1, without the interpreter lock."""
        if self._call(first, last, records.__array_interface__["data"][0]) != DONE:
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


def element(dtype: Any) -> tuple[int, Any, Any]:
    """(how many are in a vector, Numba's type, zero) of a dtype: with what the text of a kernel begins."""
    dtype = np.dtype(dtype)
    return lanes_of(dtype), numba.from_dtype(dtype), dtype.type(0)


def compiled(name: str, fields: Iterable[str]) -> Callable[[Callable[[int, int, Any], int]], Kernel]:
    """Compile a function (first, last, records) that returns `DONE`; note the time as `name`.

    An argument record is `fields` of int64: numbers and addresses. The kernel decides how many records it reads.
    """
    record = numba.from_dtype(np.dtype([(field, np.int64) for field in fields]))
    signature = types.int64(types.int64, types.int64, types.CPointer(record))

    def decorate(function: Callable[[int, int, Any], int]) -> Kernel:
        start = time.perf_counter()
        # a file of its own on disk for each kernel: in a shared one, two processes that compile different
        # kernels at once can leave the code of one under the name of the other
        folder, base = Path(function.__code__.co_filename).parent, re.sub(r"\W+", "_", name)
        function.__qualname__ = f"{base}_{fingerprint(folder)}"
        code = native(signature)(function)
        compile_seconds[name] = time.perf_counter() - start
        if not code.cache_hits:
            _forget_others(folder, base, fingerprint(folder))
        return Kernel(code)

    return decorate
