"""Compilation of the CUDA source: each instantiation of a kernel at its first use."""

from __future__ import annotations

import functools
from importlib.resources import files
from typing import Any

PARTS = ("numbers", "vectors", "scan", "sums", "lanes", "tiles", "forward", "chunks", "backward")


@functools.cache
def source() -> str:
    """The text of the CUDA source: its parts, each of which needs those before it."""
    folder = files("subquad_cupy.selective_scan") / "cuda"
    return "\n".join(folder.joinpath(f"{part}.cu").read_text(encoding="utf-8") for part in PARTS)


@functools.cache
def compiled(kernel: str, index: int) -> Any:
    """The compiled instantiation of a kernel for device `index`, compiled at its first use."""
    import cupy

    with cupy.cuda.Device(index):
        module = cupy.RawModule(code=source(), options=("-std=c++17",), name_expressions=[kernel])
        return module.get_function(kernel)
