"""The processor that kernels are compiled for: this machine's, or the one that the environment names.

`NUMBA_CPU_NAME` and `NUMBA_CPU_FEATURES` are those of Numba: for a container that runs elsewhere.
"""

from __future__ import annotations

import os
from functools import cache

from llvmlite import binding


@cache
def name() -> str:
    """LLVM's name of the processor."""
    return os.environ.get("NUMBA_CPU_NAME") or binding.get_host_cpu_name()


@cache
def features() -> str:
    """What the processor has, "+avx2,-avx512f", …, as LLVM reads it."""
    given = os.environ.get("NUMBA_CPU_FEATURES")
    return binding.get_host_cpu_features().flatten() if given is None else given


@cache
def register_bytes() -> int:
    """The bytes of a vector register, or 0 where we do not know it."""
    if not binding.get_process_triple().startswith("x86_64"):
        return 0
    return 64 if has("avx512f") else 32 if has("avx") else 16


@cache
def has(feature: str) -> bool:
    """Whether the processor has a feature."""
    return f"+{feature}" in features().split(",")
