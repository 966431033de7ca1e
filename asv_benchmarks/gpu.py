"""One run on a CUDA device: ``python -m asv_benchmarks.gpu [--output docs/gpu.md]``, in less than 8 minutes.

Measures what the device can do (copy, exp2), times the kernels beside their floors and beside what else there
is, and checks them against float64. Every section stands alone: one that cannot run says why.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.util
import itertools
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from subquad.kernels.selective_scan import Inputs

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves the memory to the others

BUDGET = 440.0  # seconds; sections that would begin later are left out
SHAPES = [(8, 2048, 2048), (1, 4096, 2048), (1, 65536, 1024), (1, 524288, 64), (1, 524288, 1024)]
STATES = 16
NO_BFLOAT16 = "bfloat16 needs CuPy 14 and ml_dtypes"
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
    """A kernel of 2^20 threads that take eight exponentials in each of the given number of rounds."""
    import cupy

    kernel, out = cupy.RawKernel(EXP_SOURCE, "ceiling"), cupy.empty(2**20, dtype="float32")
    return lambda rounds: kernel((2**12,), (2**8,), (out, cupy.int32(rounds)))


def milliseconds(run: Callable[[], Any], seconds: float = 0.4) -> float:
    """Median time of `run` on the current stream, between events, after warming up.

    The device is kept busy while the host prepares the launches: what is timed is the device alone.
    """
    import cupy

    run()
    run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or (time.perf_counter() < end and len(times) < 100):
        start, stop = cupy.cuda.Event(), cupy.cuda.Event()
        exponentials()(1024)  # some 2 ms
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, stop))
    return statistics.median(times)


def wall_milliseconds(run: Callable[[], Any], repeat: int = 7) -> float:
    """Median time of `run`, which waits for its result, after warming up: one clock for libraries with own streams."""
    run()
    run()
    times: list[float] = []
    for _ in range(repeat):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def ceilings() -> tuple[float, float]:
    """Bytes and exponentials per second."""
    import cupy

    source = cupy.ones(2**29, dtype="float32")
    target = cupy.empty_like(source)
    copied = 2 * source.nbytes / milliseconds(lambda: cupy.copyto(target, source)) * 1e3
    rounds = 4096
    return copied, 2**20 * 8 * rounds / milliseconds(lambda: exponentials()(rounds)) * 1e3


def has_bfloat16() -> bool:
    """Whether CuPy has arrays of it."""
    import cupy

    return int(cupy.__version__.partition(".")[0]) >= 14 and importlib.util.find_spec("ml_dtypes") is not None


def inputs(batch: int, n: int, d: int, d_state: int, dtype: str, *, full: bool = True) -> Inputs:
    """A Mamba layer's arrays: steps around 0.05, A from -1 to -d_state, with D, z and a bias if `full`."""
    import cupy

    storage = importlib.import_module("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype
    wide = "float64" if dtype == "float64" else "float32"
    rng = cupy.random.default_rng(0)

    def draw(*shape: int) -> Any:
        return rng.standard_normal(shape, dtype="float32").astype(storage)

    A = -cupy.tile(cupy.arange(1, d_state + 1, dtype=wide), (d, 1))
    u, maps = draw(batch, n, d), [draw(batch, n, 1, d_state) for _ in range(2)]
    bias = cupy.full(d, -3, dtype=wide)
    skip, z = (cupy.ones(d, dtype=wide), draw(batch, n, d)) if full else (None, None)
    return Inputs(u, draw(batch, n, d), A, *maps, skip, z, bias, None)


def correctness(deadline: float) -> Iterator[str]:
    """Every kernel against the float64 kernel, itself checked by the tests; the sequence is split in three."""
    import cupy

    from subquad_cupy._scan import scan_backward, scan_forward

    options = {"delta_softplus": True, "reverse": False}
    yield "| B, C | data type | states | worst error of y | worst error of a gradient |"
    yield "|---|---|---|---|---|"
    # what is used most comes first: an instantiation compiles for half a second
    forms = [(), ("B", "C"), ("B",), ("C",)]
    dtypes = [name for name in ("float32", "bfloat16", "float16") if name != "bfloat16" or has_bfloat16()]
    if "bfloat16" not in dtypes:
        yield f"| all | bfloat16 | {NO_BFLOAT16} | | |"
    for constant, d_state, dtype in itertools.product(forms, (16, 1, 2, 4, 8, 32, 64, 128, 256), dtypes):
        if time.perf_counter() > deadline:
            yield from ("", "The others are left out: the time was up.")
            return
        arrays = inputs(2, 777, 70, d_state, dtype)
        fixed = {name: getattr(arrays, name)[0, : arrays.A.shape[0], 0] for name in constant}
        arrays = arrays._replace(**fixed)
        exact = Inputs(*(None if x is None else x.astype("float64") for x in arrays))
        results = []
        for x in (arrays, exact):
            dy = cupy.ones_like(x[0])
            y = scan_forward(x, **options)[0]
            results.append([y, *(g for g in scan_backward(dy, None, x, **options) if g is not None)])
        errors = [
            float(abs(got.astype("float64") - want).max() / abs(want).max()) for got, want in zip(*results, strict=True)
        ]
        form = " and ".join(constant) + " constant" if constant else "of each step"
        yield f"| {form} | {dtype} | {d_state} | {errors[0]:.1e} | {max(errors[1:]):.1e} |"


def kernels(copied: float, exps: float) -> Iterator[str]:
    """Forward and backward beside the larger of two floors: exponentials, and bytes of u, delta, z and y.

    A gradient is taken without checkpoints, as by the library; the last column has those that a forward pass can keep.
    """
    import cupy

    from subquad_cupy._scan import scan_backward, scan_forward

    options = {"delta_softplus": True, "reverse": False}
    columns = ("batch, n, d, states", "data type", "floor, ms", "forward, ms", "/ floor", "backward / forward")
    yield f"| {' | '.join(columns)} | the same from checkpoints |"
    yield "|---|---|---|---|---|---|---|"
    for dtype in ("bfloat16", "float32"):
        if dtype == "bfloat16" and not has_bfloat16():
            yield f"| all | {dtype} | {NO_BFLOAT16} | | | | |"
            continue
        for batch, n, d in SHAPES:
            shape = f"{batch}, {n}, {d}, {STATES}"
            try:
                arrays = inputs(batch, n, d, STATES, dtype)
                values = batch * n * d
                floor = 1e3 * max(values * (STATES + 4) / exps, 4 * values * arrays[0].itemsize / copied)

                def forward(arrays: Inputs = arrays) -> Any:
                    return scan_forward(arrays, **options)

                taken = milliseconds(forward)
                ratio = kept = "not run"
                if values < 2**28:
                    backward = functools.partial(scan_backward, cupy.ones_like(arrays[0]), None, arrays, **options)
                    ratio = f"{milliseconds(backward) / taken:.2f}"
                    *_, saved = scan_forward(arrays, **options, save=True)
                    run = functools.partial(backward, checkpoints=saved)
                    kept = "do not fit" if saved is None else f"{milliseconds(run) / taken:.2f}"
            except Exception as problem:  # the other shapes still run
                yield f"| {shape} | {dtype} | {told(problem)} | | | | |"
                continue
            yield f"| {shape} | {dtype} | {floor:.3f} | {taken:.3f} | {taken / floor:.2f} | {ratio} | {kept} |"


def baselines() -> Iterator[str]:
    """The same scan, without skip and gate, in other hands: (8, 2048, 2048, 16), float32; from call to result."""
    arrays = inputs(8, 2048, 2048, STATES, "float32", full=False)
    ours = wall_milliseconds(_this_kernel(arrays))
    yield "| implementation | forward, ms | times ours |"
    yield "|---|---|---|"
    yield f"| this kernel | {ours:.3f} | 1 |"
    for name, prepare in (
        ("PyTorch loop over time", _torch_loop),
        ("torch associative_scan, compiled", _torch_associative),
        ("jax.lax.associative_scan, jit", _jax_associative),
    ):
        try:
            taken = wall_milliseconds(prepare([arrays[i] for i in (0, 1, 2, 3, 4, 7)]))
            yield f"| {name} | {taken:.2f} | {taken / ours:.1f} |"
        except Exception as problem:  # a baseline that fails is reported, not fatal
            yield f"| {name} | {told(problem)} | |"


def told(problem: Exception) -> str:
    """An exception in one cell of a table."""
    line = next(iter(str(problem).splitlines()), "")
    return f"{type(problem).__name__}: {line[:80]}".replace("|", "/")


def _this_kernel(arrays: Inputs) -> Callable[[], Any]:
    import cupy

    from subquad_cupy._scan import scan_forward

    def run() -> None:
        scan_forward(arrays, delta_softplus=True, reverse=False)
        cupy.cuda.get_current_stream().synchronize()

    return run


def _torch_loop(arrays: list[Any]) -> Callable[[], Any]:
    import torch

    u, delta, A, B, C, bias = (torch.from_dlpack(x) for x in arrays)

    def run() -> None:
        steps = torch.nn.functional.softplus(delta + bias)
        h, out = torch.zeros((*u.shape[::2], A.shape[1]), device=u.device), []
        for t in range(u.shape[1]):
            a = torch.exp(steps[:, t, :, None] * A)
            h = a * h + (steps[:, t] * u[:, t])[..., None] * B[:, t]
            out.append((h * C[:, t]).sum(-1))
        torch.stack(out, 1)
        torch.cuda.synchronize()

    return run


def _torch_associative(arrays: list[Any]) -> Callable[[], Any]:
    import torch
    from torch._higher_order_ops.associative_scan import associative_scan

    u, delta, A, B, C, bias = (torch.from_dlpack(x) for x in arrays)

    def combine(left: Any, right: Any) -> Any:
        return left[0] * right[0], left[1] * right[0] + right[1]

    @torch.compile
    def scan() -> Any:
        steps = torch.nn.functional.softplus(delta + bias)
        a, b = torch.exp(steps[..., None] * A), (steps * u)[..., None] * B
        return (associative_scan(combine, (a, b), dim=1)[1] * C).sum(-1)

    def run() -> None:
        scan()
        torch.cuda.synchronize()

    return run


def _jax_associative(arrays: list[Any]) -> Callable[[], Any]:
    import jax

    jnp = jax.numpy
    u, delta, A, B, C, bias = (jnp.from_dlpack(x) for x in arrays)

    @jax.jit
    def scan(u: Any, delta: Any, A: Any, B: Any, C: Any, bias: Any) -> Any:
        steps = jax.nn.softplus(delta + bias)
        a, b = jnp.exp(steps[..., None] * A), (steps * u)[..., None] * B
        h = jax.lax.associative_scan(lambda x, y: (x[0] * y[0], x[1] * y[0] + y[1]), (a, b), axis=1)[1]
        return (h * C).sum(-1)

    return lambda: scan(u, delta, A, B, C, bias).block_until_ready()


def crossover() -> Iterator[str]:
    """The scan beside causal softmax attention of equal width, bfloat16: where attention falls behind."""
    if not has_bfloat16():
        yield f"Left out: {NO_BFLOAT16}."
        return
    import torch

    from subquad_cupy._scan import scan_forward

    yield "| n | scan (1, n, 1024, 16), ms | attention (1, 16 heads, n, 64), ms |"
    yield "|---|---|---|"
    for n in (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536):
        arrays = inputs(1, n, 1024, STATES, "bfloat16")
        ours = milliseconds(lambda arrays=arrays: scan_forward(arrays, delta_softplus=True, reverse=False), 0.2)
        qkv = torch.randn(3, 1, 16, n, 64, device="cuda", dtype=torch.bfloat16)
        attention = torch.nn.functional.scaled_dot_product_attention  # on the default stream, as CuPy
        theirs = milliseconds(lambda qkv=qkv, run=attention: run(*qkv, is_causal=True), 0.2)
        yield f"| {n} | {ours:.3f} | {theirs:.3f} |"


def report() -> Iterator[str]:
    """The whole table, line by line."""
    import cupy

    begin = time.perf_counter()
    device = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    yield f"# Measured on one {device}"
    yield ""
    try:
        copied, exps = ceilings()
        yield f"CuPy {cupy.__version__}. Copy: {copied / 1e12:.2f} TB/s; exp2: {exps / 1e12:.2f}e12 per second."
    except Exception as problem:  # times without floors are better than none
        copied = exps = math.nan
        yield f"CuPy {cupy.__version__}. No ceilings: {told(problem)}"
    sections = {
        "Kernels and their floors": lambda: kernels(copied, exps),
        "Other implementations": baselines,
        "Attention of equal width": crossover,
        "Errors against float64": lambda: correctness(begin + BUDGET),
    }
    for title, section in sections.items():
        yield from ("", f"## {title}", "")
        if time.perf_counter() - begin > BUDGET:
            yield "Left out: the time was up."
            continue
        try:
            yield from section()
        except Exception as problem:  # the other sections still run
            yield from ("", f"Stopped by {type(problem).__name__}: {problem}")
        cupy.get_default_memory_pool().free_all_blocks()


def main() -> int:
    """Print the report, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="a Markdown file, such as docs/gpu.md")
    path = parser.parse_args().output
    try:
        import cupy

        cupy.cuda.runtime.getDeviceCount()
    except (ImportError, RuntimeError) as problem:
        sys.stderr.write(f"no CUDA device to measure: {problem}\n")
        return 1
    with contextlib.ExitStack() as stack:
        outputs = [sys.stdout]
        if path is not None:
            outputs.append(stack.enter_context(path.open("w", encoding="utf-8")))
        for line in report():  # written at once: what is measured survives whatever comes after
            for output in outputs:
                output.write(line + "\n")
                output.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
