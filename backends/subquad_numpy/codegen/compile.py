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

DONE = 1  # what a kernel returns; a compiled function that raises, since no memory is left for scratch, returns 0
compile_seconds: dict[str, float] = {}
"""Seconds until each kernel was callable in this process, compiled or read from the disk, by name."""
CODEGEN = Path(__file__).parent


@cache
def fingerprint(folder: Path) -> str:
    """Hash of the sources that a kernel of this folder inlines: `codegen`, and what in the folder is written in it.

    Numba finds a kernel on disk by the kernel's own file, and would not notice a change in the code that is inlined.
    """
    sources = [path.read_bytes() for path in sorted(CODEGEN.glob("*.py"))]
    own = (path.read_bytes() for path in sorted(folder.glob("*.py")))
    sources += [source for source in own if re.search(rb"^from subquad_numpy\.codegen", source, re.MULTILINE)]
    return sha256(b"".join(sources)).hexdigest()[:16]


def _forget_others(folder: Path, name: str, stamp: str) -> None:
    """Remove kernels of this name that were compiled from other sources from the folder's cache."""
    own = re.compile(rf".*\.{name}_([0-9a-f]{{16}})-.*\.nb[ic]")
    for path in (folder / "__pycache__").glob(f"*.{name}_*"):
        found = own.fullmatch(path.name)
        if found and found[1] != stamp:
            with suppress(OSError):
                path.unlink()


class Kernel:
    """A compiled kernel as a C function, which threads of other libraries can call by its address."""

    def __init__(self, native: Any) -> None:
        self.address: int = native.address
        self._native = native  # keeps the code
        self._call = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)(native.address)

    def __call__(self, first: int, last: int, records: int) -> None:
        """Run tasks first to last − 1, without the interpreter lock; `records` is the address of the records."""
        if self._call(first, last, records) != DONE:
            msg = "a compiled kernel found no memory for its scratch"
            raise MemoryError(msg)


def native(signature: Any) -> Callable[[Callable[..., Any]], Any]:
    """A decorator that compiles a C function, and keeps the code on disk where a folder can be written."""

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return numba.cfunc(signature, cache=True, error_model="numpy")(function)
        except (RuntimeError, OSError):  # no folder can be written, or there is no source: .pyc alone, a zip
            return numba.cfunc(signature, error_model="numpy")(function)

    return decorate


def element(dtype: Any) -> tuple[int, Any, Any]:
    """(elements of a vector, Numba's type, the number 0) of a dtype, which every kernel factory starts from."""
    dtype = np.dtype(dtype)
    return lanes_of(dtype), numba.from_dtype(dtype), dtype.type(0)


def compiled(name: str, fields: Iterable[str]) -> Callable[[Callable[[int, int, Any], int]], Kernel]:
    """A decorator that compiles a kernel, and notes the time under `name`.

    The kernel is a function (first, last, records) that runs tasks first to last − 1 and returns `DONE`. An argument
    record consists of `fields` of int64, numbers and addresses; the kernel decides how many records it reads.
    """
    record = numba.from_dtype(np.dtype([(field, np.int64) for field in fields]))
    signature = types.int64(types.int64, types.int64, types.CPointer(record))

    def decorate(function: Callable[[int, int, Any], int]) -> Kernel:
        start = time.perf_counter()
        # Each kernel gets its own file on disk, by its own name. In a shared file, two processes that compile different
        # kernels at once could leave the code of one under the name of the other.
        folder, base = Path(function.__code__.co_filename).parent, re.sub(r"\W+", "_", name)
        function.__qualname__ = f"{base}_{fingerprint(folder)}"
        code = native(signature)(function)
        compile_seconds[name] = time.perf_counter() - start
        if not code.cache_hits:
            _forget_others(folder, base, fingerprint(folder))
        return Kernel(code)

    return decorate
