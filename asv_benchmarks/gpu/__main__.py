"""One run on a CUDA device: ``python -m asv_benchmarks.gpu [--output docs/gpu.rst]``, in less than 8 minutes.

It measures the ceilings of the device (copy, exp2), times the kernels beside their floors and beside other
implementations, and checks the kernels against float64. A section that cannot run says why, and the others still run.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import math
import os
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX would reserve most of the memory

BUDGET = 440.0  # seconds after which no further section begins


def report() -> Iterator[str]:
    """The lines of the page, each as soon as it is known."""
    import cupy

    from asv_benchmarks.gpu import speed, table
    from asv_benchmarks.gpu.clock import ceilings
    from asv_benchmarks.gpu.correctness import correctness

    begin = time.perf_counter()
    device = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    yield from ("The scan on a GPU", "=================", "")
    yield f"Written by ``python -m asv_benchmarks.gpu --output docs/gpu.rst`` on one {device}, {today};"
    yield from (f"CuPy {cupy.__version__}{''.join(versions())}.", "")
    try:
        copied, exps = ceilings()
        yield f"Copy: {copied / 1e12:.2f} TB/s; exp2: {exps / 1e12:.2f}e12 per second."
    except Exception as problem:  # without ceilings, times are still worth having
        copied = exps = math.nan
        yield f"No ceilings: {table.told(problem)}"
    found: table.Found = {}
    sections = {
        "Kernels and their floors": lambda: speed.kernels(found, copied, exps),
        "Other implementations": lambda: speed.rivals(found),
        "Attention of equal width": speed.crossover,
        "Errors against float64": lambda: correctness(found, begin + BUDGET),
        "What was to be reached": lambda: table.verdict(found),
    }
    for name, section in sections.items():
        yield from ("", name, "-" * len(name), "")
        if time.perf_counter() - begin > BUDGET and "reached" not in name:
            yield "Left out: the time was up."
            continue
        try:
            yield from section()
        except Exception as problem:  # the other sections still run
            yield from ("", f"Stopped by {table.told(problem)}")
        cupy.get_default_memory_pool().free_all_blocks()


def versions() -> Iterator[str]:
    """The versions of the other libraries that are installed."""
    for package in ("torch", "jax"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            yield f", {package} {metadata.version(package)}"


def main() -> int:
    """Print the report, and write it to the file of `--output`."""
    parser = argparse.ArgumentParser(prog="python -m asv_benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="a reStructuredText file: docs/gpu.rst")
    parser.add_argument("--sanitize", action="store_true", help="run small kernels only, for compute-sanitizer")
    arguments = parser.parse_args()
    try:
        import cupy

        cupy.cuda.runtime.getDeviceCount()
    except (ImportError, RuntimeError) as problem:
        sys.stderr.write(f"no CUDA device to measure: {problem}\n")
        return 1
    from asv_benchmarks.gpu.correctness import sanitized

    with contextlib.ExitStack() as stack:
        outputs = [sys.stdout]
        if arguments.output is not None:
            outputs.append(stack.enter_context(arguments.output.open("w", encoding="utf-8")))
        for line in sanitized() if arguments.sanitize else report():  # at once, so that a crash later loses nothing
            for output in outputs:
                output.write(line + "\n")
                output.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
