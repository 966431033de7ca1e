"""A word to the user when compilation takes long."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer

PATIENCE = 2.0  # seconds that a process compiles without a word
TEXT = (
    "subquad compiles kernels for this machine, once: they are kept on disk (`subquad warmup` compiles ahead of time, "
    "NUMBA_CACHE_DIR names the folder)"
)
spent = {"seconds": 0.0}  # that this process has compiled for


def tell() -> None:
    """Tell the logger "subquad", at level INFO; and the user of a terminal, who would see nothing of that."""
    import logging

    logger = logging.getLogger("subquad")
    logger.info(TEXT)
    if not logger.isEnabledFor(logging.INFO) and sys.stderr is not None and sys.stderr.isatty():
        print(TEXT, file=sys.stderr, flush=True)


@contextmanager
def patience() -> Iterator[None]:
    """Compile within this context; after `PATIENCE` seconds of all such contexts the user is told, once a process."""
    start, left = time.perf_counter(), PATIENCE - spent["seconds"]
    timer = Timer(left, tell) if left > 0 else None
    if timer is not None:
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        if timer is not None:
            timer.cancel()
        spent["seconds"] += time.perf_counter() - start
