"""What a comparison or a benchmark asks of CuPy: arrays, time and memory."""

from collections.abc import Callable
from typing import Any

import cupy
import numpy as np


def describe() -> dict[str, Any]:
    """The version and the devices; `reason` says why no arrays can be made here, and is None where they can.

    CuPy can be imported on machines that have no GPU: only the driver knows.
    """
    try:
        count = cupy.cuda.runtime.getDeviceCount()
        reason = None if count else "the CUDA driver reports no device"
    except cupy.cuda.runtime.CUDARuntimeError as error:
        count, reason = 0, f"no CUDA device: {error}"
    devices = [f"cuda:{index}" for index in range(count)]
    return {"version": cupy.__version__, "devices": devices, "reason": reason}


def asarray(host: np.ndarray, dtype: str | None = None, device: str | None = None) -> cupy.ndarray:
    """Copy a host array to `device` (default: the current one)."""
    with cupy.cuda.Device(None if device is None else int(device.removeprefix("cuda:"))):
        return cupy.array(host, dtype=dtype)


def to_numpy(x: cupy.ndarray) -> np.ndarray:
    """Copy to the host."""
    return cupy.asnumpy(x)


def compile(function: Callable[..., Any]) -> Callable[..., Any]:  # noqa: A001
    """Return the function itself: CuPy compiles kernels at their first call."""
    return function


def synchronize(*arrays: cupy.ndarray) -> None:
    """Wait until the current stream of every array's device has finished."""
    for index in {x.device.id for x in arrays}:
        with cupy.cuda.Device(index):
            cupy.cuda.get_current_stream().synchronize()


def peak_extra_memory(function: Callable[..., Any], *args: Any) -> int | None:
    """Peak number of bytes that `function(*args)` uses of CuPy's pool, without those of the returned array."""
    function(*args)  # caches and compiled code belong to the first call
    with _PeakOfPool() as pool:
        out = function(*args)
    return max(0, pool.peak - out.nbytes)


class _PeakOfPool(cupy.cuda.MemoryHook):  # type: ignore[misc]
    """A memory hook that records the maximum sum of live allocations, since the pool records no peak."""

    name = "subquad: peak of the pool"

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def malloc_postprocess(self, **allocation: int) -> None:
        """Count an allocation."""
        self.live[allocation["pmem_id"]] = allocation["mem_size"]
        self.peak = max(self.peak, sum(self.live.values()))

    def free_postprocess(self, **allocation: int) -> None:
        """Forget an allocation; memory that was allocated before the hook was set is not counted."""
        self.live.pop(allocation["pmem_id"], None)
