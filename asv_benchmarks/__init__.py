"""Benchmarks of subquad; see README.md."""

POOLS = ("OMP", "OPENBLAS", "MKL", "BLIS", "VECLIB_MAXIMUM", "NUMEXPR", "NUMBA")


def environment(threads: str) -> dict[str, str]:
    """Variables that give every library's pool so many threads, for a process that has not imported any of them.

    They also leave device memory to the other libraries.
    """
    pools = {f"{pool}_NUM_THREADS": threads for pool in POOLS}
    return {**pools, "NPROC": threads, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # NPROC: XLA's pool on the CPU
