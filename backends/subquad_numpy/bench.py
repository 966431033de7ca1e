"""What a comparison or a benchmark asks of NumPy: arrays, time and memory."""

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np

from subquad_numpy.needs import why_not_compiled as why_not_compiled


def describe() -> dict[str, Any]:
    """The version and the devices; `reason` says why no arrays can be made here, and is None where they can."""
    return {"version": np.__version__, "devices": ["cpu"], "reason": None}


def kernel_notes() -> list[str]:
    """Notes on how long the kernels take to become callable: compiled at first, later read from the disk."""
    missing = why_not_compiled()
    if missing is not None:
        return [f"{missing}: scans and attention run by plain NumPy"]
    from subquad_numpy.codegen.compile import compile_seconds
    from subquad_numpy.features.attend import attend_kernel
    from subquad_numpy.features.summarize import summarize_kernel
    from subquad_numpy.selective_scan.backward import backward_kernel
    from subquad_numpy.selective_scan.forward import forward_kernel

    for make in (forward_kernel, backward_kernel):
        make("float32", False, False, False)
    for make_features in (summarize_kernel, attend_kernel):
        make_features(np.dtype("float32"), "exponential")
    return [f"{name}: callable after {seconds:.1f} s" for name, seconds in compile_seconds.items()]


def asarray(host: np.ndarray, dtype: str | None = None, device: str | None = None) -> np.ndarray:
    """Copy a host array, so that no two libraries work on the same memory."""
    if device not in (None, "cpu"):
        msg = f"NumPy has one device, 'cpu'; got device={device!r}"
        raise ValueError(msg)
    return np.array(host, dtype=dtype)


def to_numpy(x: np.ndarray) -> np.ndarray:
    """Return the array itself."""
    return x


def compile(function: Callable[..., Any]) -> Callable[..., Any]:  # noqa: A001
    """Return the function itself: NumPy compiles nothing."""
    return function


def synchronize(*arrays: np.ndarray) -> None:
    """Return at once: NumPy has finished when its call returns."""


def peak_extra_memory(function: Callable[..., Any], *args: Any) -> int | None:
    """Peak number of bytes that `function(*args)` allocates, without those of the returned array."""
    function(*args)  # caches and compiled code belong to the first call
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        out = function(*args)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return max(0, peak - before - out.nbytes)
