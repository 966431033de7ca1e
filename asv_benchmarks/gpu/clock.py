"""Time of kernels on the device, and the ceilings of the device.

`cupyx.profiler.benchmark` would include the time in which the host prepares launches; `milliseconds` lets the device do
other work in that time.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

from asv_benchmarks import harness

EXP_SOURCE = r"""
extern "C" __global__ void ceiling(float* out, int rounds) {
    float x[8];
    for (int i = 0; i < 8; ++i) x[i] = -1e-3f * (threadIdx.x + i);
    for (int k = 0; k < rounds; ++k)
#pragma unroll
        for (int i = 0; i < 8; ++i) asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(x[i]));
    float sum = 0;
    for (int i = 0; i < 8; ++i) sum += x[i];
    out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}
"""


@functools.cache
def exponentials() -> Callable[[int], None]:
    """A function that launches 2^20 threads, each of which takes eight exponentials in each of `rounds` rounds."""
    import cupy

    kernel, out = cupy.RawKernel(EXP_SOURCE, "ceiling"), cupy.empty(2**20, dtype="float32")
    return lambda rounds: kernel((2**12,), (2**8,), (out, cupy.int32(rounds)))


def milliseconds(run: harness.Run, seconds: float = 0.4) -> float:
    """The median device time of `run` in ms, between events on the current stream, after warming up."""
    import cupy

    run()
    run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or (time.perf_counter() < end and len(times) < 100):
        start, stop = cupy.cuda.Event(), cupy.cuda.Event()
        exponentials()(1024)  # keeps the device busy for some 2 ms, while the host prepares the launches
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, stop))
    return statistics.median(times)


def ceilings() -> tuple[float, float]:
    """(bytes copied, exponentials) per second."""
    import cupy

    source = cupy.ones(2**29, dtype="float32")
    target = cupy.empty_like(source)
    copied = 2 * source.nbytes / milliseconds(lambda: cupy.copyto(target, source)) * 1e3
    rounds = 4096
    return copied, 2**20 * 8 * rounds / milliseconds(lambda: exponentials()(rounds)) * 1e3
