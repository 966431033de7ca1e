"""Peak memory of calls, measured in a separate process: `python -m asv_benchmarks.papers.memory TABLE THREADS N…`.

Two measures, both beyond the call's inputs and its output:

- resident: the rise of the process's peak resident memory, as the operating system counts it. It includes the scratch
  memory of NumPy and of compiled kernels, which torch's profiler does not see, but is inexact by some 100 kB for each
  core. `MALLOC_MMAP_THRESHOLD_`, which must be set before a process starts, lets malloc take large blocks from the
  system one by one and return them when they are freed, so that no call is served from a reserve.
- allocated: the bytes that torch's profiler counts, which are exact.

A table shows the larger of the two, `extra_bytes`. If that is below `LEAST_BYTES`, it shows the bound alone: the
profiler misses the scratch of compiled kernels, and the resident memory misses small blocks.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LEAST_BYTES = 10**6
THRESHOLD = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
STATUS = Path("/proc/self/status")


def measure(table: str, lengths: Sequence[int], threads: int) -> list[dict[str, Any]]:
    """The memory of each row of a table at each length: {name, n, extra_bytes, resident_bytes, allocated_bytes}."""
    command = [sys.executable, "-m", "asv_benchmarks.papers.memory", table, str(threads), *map(str, lengths)]
    done = subprocess.run(command, env=os.environ | THRESHOLD, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _main(table: str, threads: str, *lengths: str) -> None:
    import torch

    from subquad_torch.bench import peak_extra_memory

    torch.set_num_threads(int(threads))
    paper = importlib.import_module(f"asv_benchmarks.papers.{table}").PAPER
    found = []
    for row, n in ((row, n) for n in map(int, lengths) for row in paper.rows if n <= row.longest):
        sys.stderr.write(f"memory of {row.name} at n = {n}\n")
        call = row.make(n)
        both = {"resident_bytes": resident_bytes(call), "allocated_bytes": peak_extra_memory(call)}
        found.append({"name": row.name, "n": n, "extra_bytes": max(x or 0 for x in both.values()), **both})
    sys.stdout.write(json.dumps(found) + "\n")


def resident_bytes(call: Any) -> int | None:
    """Peak resident bytes of a warmed-up call beyond the memory before it and its output; None outside Linux."""
    if not STATUS.exists():
        return None
    gc.collect()
    STATUS.with_name("clear_refs").write_text("5", encoding="ascii")  # resets the peak VmHWM
    before = _status("VmRSS")
    out = call()
    size = 0 if out is None else out.numel() * out.element_size()
    return max(0, _status("VmHWM") - before - size)


def _status(field: str) -> int:
    (kilobytes,) = re.findall(rf"{field}:\s+(\d+) kB", STATUS.read_text(encoding="ascii"))
    return 1024 * int(kilobytes)


if __name__ == "__main__":
    _main(*sys.argv[1:])
