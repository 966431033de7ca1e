"""Peak memory of calls, measured in a process of its own: `python -m asv_benchmarks.papers.memory TABLE THREADS N…`.

Two measures, both beyond the call's inputs and its output:

- resident: the rise of the process's peak resident memory. It counts scratch of NumPy and of compiled kernels too,
  which torch's profiler does not see. Large blocks are taken from the system one by one and given back when freed
  (`MALLOC_MMAP_THRESHOLD_`, which is why the process is another one), so none of them is served from a reserve.
- allocated: what torch's profiler counts. The kernel's own count is loose by some 100 kB for each core; this is not.

A table shows the larger, `extra_bytes`, and where that is below `LEAST_BYTES`, no more than that it is: the profiler
sees no scratch of compiled kernels, and the other loses it where it is small, in its own looseness or because small
blocks do come from a reserve.
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
    """Rows {name, n, extra_bytes, resident_bytes, allocated_bytes} of the table's rows."""
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
        both = {"resident_bytes": _resident(call), "allocated_bytes": peak_extra_memory(call)}
        found.append({"name": row.name, "n": n, "extra_bytes": max(x or 0 for x in both.values()), **both})
    sys.stdout.write(json.dumps(found) + "\n")


def _resident(call: Any) -> int | None:
    """Peak resident bytes of a warmed-up call, beyond what was there and what it returns; None where not Linux."""
    if not STATUS.exists():
        return None
    gc.collect()
    STATUS.with_name("clear_refs").write_text("5", encoding="ascii")  # the peak starts again from here
    before = _status("VmRSS")
    out = call()
    return max(0, _status("VmHWM") - before - out.numel() * out.element_size())


def _status(field: str) -> int:
    (kilobytes,) = re.findall(rf"{field}:\s+(\d+) kB", STATUS.read_text(encoding="ascii"))
    return 1024 * int(kilobytes)


if __name__ == "__main__":
    _main(*sys.argv[1:])
