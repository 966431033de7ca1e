"""Benchmarks of subquad for asv; see ../README.md.

Array libraries read the number of threads when they are imported, so it is set here, before any of them is. One
thread unless SUBQUAD_BENCH_THREADS says otherwise: a shared machine gives one core steadily, rarely all of them.
"""

import os

THREADS = os.environ.get("SUBQUAD_BENCH_THREADS", "1")
POOLS = ("OMP", "OPENBLAS", "MKL", "BLIS", "VECLIB_MAXIMUM", "NUMEXPR", "NUMBA")

os.environ |= {f"{pool}_NUM_THREADS": THREADS for pool in POOLS}
os.environ["NPROC"] = THREADS  # the pool of XLA on the CPU
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves device memory to the other libraries
