"""One case in processes of its own: `python -m asv_benchmarks.throughput.measure WHAT FOLDER THREADS CASE N BATCH…`.

Times and memory are measured in two processes: for memory, malloc must return what is freed, which costs time.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from asv_benchmarks.harness import spread
from asv_benchmarks.papers.memory import THRESHOLD
from asv_benchmarks.throughput import weights

STATUS = Path("/proc/self/status")
STEPS, SECONDS = 40, 5.0  # most steps of a generation that are timed, and seconds after which it ends earlier
PROMPTS = 3  # prompts that are timed, or the first alone if it takes longer than `SECONDS`


def measure(folder: Path, threads: int, case: str, n: int, batches: Iterable[int]) -> list[dict[str, Any]]:
    """The rows of a case: seconds of a prompt of n tokens, of a step for each batch, bytes beyond the weights."""
    given = [str(folder), str(threads), case, str(n), *map(str, batches)]
    rows = []
    for what, environment in (("times", {}), ("memory", THRESHOLD)):
        command = [sys.executable, "-m", "asv_benchmarks.throughput.measure", what, *given]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | environment)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    return [times | memory for times, memory in zip(*rows, strict=True)]


def main(what: str, folder: str, threads: str, name: str, n: str, *batches: str) -> None:
    from asv_benchmarks.throughput.cases import CASES

    case = CASES[name](Path(folder), int(threads))
    prompt = np.random.default_rng(1).integers(0, weights.VOCABULARY, int(n))
    case.prompt(prompt[:16])  # what is imported and compiled at first use is not measured
    next(case.generate(1))
    found = (_times if what == "times" else _memory)(case, prompt, list(map(int, batches)))
    sys.stdout.write(json.dumps([{"case": name} | row for row in found]) + "\n")


def _times(case: Any, prompt: Any, batches: list[int]) -> list[dict[str, Any]]:
    """Seconds of the prompt, and of a step of each batch."""

    def seconds(call: Callable[[], Any], most: int) -> dict[str, float]:
        found: list[float] = []
        while not found or (len(found) < most and sum(found) < SECONDS):
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
        return spread(found)

    of_prompt, rows = seconds(lambda: case.prompt(prompt), PROMPTS), []
    for batch in batches:
        steps = case.generate(batch)
        for _ in range(2):
            next(steps)
        rows.append({"batch": batch, "prompt": of_prompt, "step": seconds(lambda: next(steps), STEPS)})  # noqa: B023
    return rows


def _memory(case: Any, prompt: Any, batches: list[int]) -> list[dict[str, Any]]:
    """Peak bytes beyond what the model itself has: in a prompt, and in generation with the states or caches."""
    gc.collect()
    before, rows = _resident("VmRSS"), []
    _reset_peak()
    case.prompt(prompt)
    of_prompt = _resident("VmHWM") - before
    for batch in batches:
        _reset_peak()
        steps = case.generate(batch)
        for _ in range(3):
            next(steps)
        rows.append({"prompt_bytes": of_prompt, "step_bytes": _resident("VmHWM") - before})
        del steps
        gc.collect()
    return rows


def _reset_peak() -> None:
    if STATUS.exists():
        STATUS.with_name("clear_refs").write_text("5", encoding="ascii")


def _resident(field: str) -> int:
    """Bytes of this process by the operating system; 0 outside Linux."""
    if not STATUS.exists():
        return 0
    line = next(x for x in STATUS.read_text(encoding="ascii").splitlines() if x.startswith(field))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    main(*sys.argv[1:])
