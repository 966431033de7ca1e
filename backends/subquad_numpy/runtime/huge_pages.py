"""Huge pages for large outputs in memory of other libraries.

Linux finds memory when it is first touched, by a fault for each page of 4 KiB that takes longer than many kernels do
for its numbers. Asked before, it gives 2 MiB at a time. NumPy asks for its own arrays; the allocators of XLA and
PyTorch do not. It is a hint: memory that has been touched keeps its pages, and what the system answers is ignored.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache

from subquad_numpy.runtime.arguments import LARGE

PAGE = mmap.PAGESIZE
HUGE = 14  # MADV_HUGEPAGE


@cache
def madvise() -> int:
    """The address of the system's function, or 0 where there is none with this hint."""
    found = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
    return ctypes.cast(found, ctypes.c_void_p).value or 0 if found else 0


@cache
def from_python() -> ctypes._CFunctionType | None:
    """The system's function as one of Python, or None."""
    kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int)
    return kind(madvise()) if madvise() else None


def inside(first: int, size: int) -> tuple[int, int]:
    """Where the whole pages among so many bytes begin, and their size: the others belong to more than this array."""
    start = -(-first // PAGE) * PAGE
    return start, (first + size) // PAGE * PAGE - start


def ask(first: int, size: int) -> None:
    """Ask for huge pages for an output of `size` bytes at this address, if it is large and nobody has written it."""
    if size >= LARGE and (advise := from_python()) is not None:
        advise(*inside(first, size), HUGE)
