"""Benchmarks of subquad; see README.md."""

POOLS = ("OMP", "OPENBLAS", "MKL", "BLIS", "VECLIB_MAXIMUM", "NUMEXPR", "NUMBA")


def environment(threads: str) -> dict[str, str]:
    """Environment variables that give the thread pool of every library `threads` threads.

    They take effect in a process that has not imported a library yet. One of them also stops JAX from reserving most of
    the memory of a device.
    """
    pools = {f"{pool}_NUM_THREADS": threads for pool in POOLS}
    return {**pools, "NPROC": threads, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # NPROC sets XLA's pool on the CPU
