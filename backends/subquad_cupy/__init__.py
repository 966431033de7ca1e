"""CuPy backend. Importing it needs no device."""

from __future__ import annotations

from typing import Any

IN_PLACE = True


def synchronize(*arrays: Any) -> None:
    """Wait for the current stream."""
    import cupy

    cupy.cuda.get_current_stream().synchronize()
