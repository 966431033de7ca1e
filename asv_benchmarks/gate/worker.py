"""One tree's half of the gate: answers "prepare" and "run" on its standard streams, a line of JSON each.

Run by its path, not as a module: the path of modules belongs to the tree that is measured, and an older tree has an
`asv_benchmarks` of its own.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from cases import CASES, Call

WARM_UP = 2  # calls after the first, which compiles


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints must not end up among the answers
    calls: dict[str, Call] = {}
    gc.disable()
    for line in sys.stdin:
        verb, case, *count = json.loads(line)
        try:
            answer = prepare(case, calls) if verb == "prepare" else {"seconds": seconds(calls[case], *count)}
        except Exception as error:  # the other tree goes on without this case
            answer = {"failure": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def prepare(case: str, calls: dict[str, Call]) -> dict[str, Any]:
    """Make the inputs and run: compiled kernels and caches are not what is measured."""
    import subquad

    call = CASES[case]()
    call()
    calls[case] = call
    return {"seconds": min(seconds(call, 1) for _ in range(WARM_UP)), "tree": subquad.__file__}


def seconds(call: Callable[[], object], count: int) -> float:
    """Of one call, from `count` in a row."""
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


if __name__ == "__main__":
    main()
