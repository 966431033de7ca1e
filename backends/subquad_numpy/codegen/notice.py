"""A word to the user when compilation takes long."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from subquad.core.notice import told_after

PATIENCE = 2.0  # seconds that a process compiles without a word
TEXT = (
    "subquad compiles kernels for this machine, once: they are kept on disk (`subquad warmup` compiles ahead of time, "
    "NUMBA_CACHE_DIR names the folder)"
)
spent = {"seconds": 0.0}  # that this process has compiled for


@contextmanager
def patience() -> Iterator[None]:
    """Compile within this context; after `PATIENCE` seconds of all such contexts the user is told, once a process."""
    start = time.perf_counter()
    try:
        with told_after(PATIENCE - spent["seconds"], TEXT):
            yield
    finally:
        spent["seconds"] += time.perf_counter() - start
