"""Benchmarks of subquad for asv; see ../README.md.

Array libraries read the number of threads when they are imported, so it is set here, before any of them is. One
thread unless SUBQUAD_BENCH_THREADS says otherwise: a shared machine gives one core steadily, rarely all of them.
"""

import contextlib
import importlib
import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # last: what is measured is the subquad that is installed

from asv_benchmarks import environment

os.environ |= environment(os.environ.get("SUBQUAD_BENCH_THREADS", "1"))

from asv_benchmarks.harness import backends, package_of

for _backend in backends():  # asv forks a process for each measurement: they find the libraries imported, none started
    with contextlib.suppress(ImportError):
        importlib.import_module(f"{package_of(_backend)}.bench")
