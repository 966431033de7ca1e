"""Benchmarks of subquad for asv; see ../README.md.

Array libraries read the number of threads when they are imported, so this file sets it before any import. The number is
SUBQUAD_BENCH_THREADS, by default 1, because a shared machine gives one core steadily, but seldom all.
"""

import contextlib
import importlib
import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # at the end, so that the installed subquad is measured

from asv_benchmarks import environment

os.environ |= environment(os.environ.get("SUBQUAD_BENCH_THREADS", "1"))

from asv_benchmarks.harness import backends, package_of

# asv forks a process for each measurement: libraries are imported here once, but no thread is started
for _backend in backends():
    with contextlib.suppress(ImportError):
        importlib.import_module(f"{package_of(_backend)}.bench")
