"""Compilation of the CUDA source: each instantiation of a kernel at its first use."""

from __future__ import annotations

import functools
from importlib.resources import files
from typing import Any


def source() -> str:
    """The text of the CUDA source."""
    return files("subquad_cupy.selective_scan").joinpath("scan.cu").read_text(encoding="utf-8")


@functools.cache
def compiled(kernel: str, index: int) -> Any:
    """The compiled instantiation of a kernel for device `index`, compiled at its first use."""
    import cupy

    with cupy.cuda.Device(index):
        module = cupy.RawModule(code=source(), options=("-std=c++17",), name_expressions=[kernel])
        return module.get_function(kernel)
