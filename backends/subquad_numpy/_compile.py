"""Compilation of the kernels: one specialisation at a time, on first use, kept on disk."""

import re
import time
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import numba

F = TypeVar("F", bound=Callable[..., Any])

INLINED = (
    *("_vector", "_memory", "_lanewise", "_simd", "_math", "_tile", "_block"),
    *("_compile", "_scan", "_scan_backward", "_linear_scan", "_product", "_features", "_feature_gradients"),
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


def compiled(name: str, signature: str) -> Callable[[F], F]:
    """Compile a kernel for one `signature`, without the interpreter lock; note the time as `name`."""

    def decorate(function: F) -> F:
        start = time.perf_counter()
        # a file of its own on disk for each kernel: in a shared one, two processes that compile different
        # kernels at once can leave the code of one under the name of the other
        function.__qualname__ = re.sub(r"\W+", "_", f"{function.__name__} {name}")
        kernel: F = numba.njit(signature, nogil=True, cache=True, error_model="numpy")(function)
        compile_seconds[name] = time.perf_counter() - start
        return kernel

    return decorate
