"""A word to the user when what is done once on a machine takes long."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer


@contextmanager
def told_after(seconds: float, text: str) -> Iterator[None]:
    """Within this context, tell the user `text` after so many seconds, if they are not over yet."""
    timer = Timer(seconds, _tell, (text,)) if seconds > 0 else None
    if timer is not None:
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        if timer is not None:
            timer.cancel()


def _tell(text: str) -> None:
    # The logger "subquad", at level INFO; and the user of a terminal, who would see nothing of that
    import logging

    logger = logging.getLogger("subquad")
    logger.info(text)
    if not logger.isEnabledFor(logging.INFO) and sys.stderr is not None and sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)
