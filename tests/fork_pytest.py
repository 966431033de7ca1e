"""`python tests/fork_pytest.py`: run pytest in forks of one process that has imported the large libraries already.

Each line of the standard input is a JSON list: a folder, seconds of the processor, arguments of pytest. Each line of the
output is the status of the run, negative if a signal ended it. Nothing of the library is imported before the fork.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import signal
import sys

LIBRARIES = ("numpy", "numba", "scipy.special", "torch", "jax", "array_api_compat", "array_api_strict", "dask.array")

DEADLOCK = 3600  # seconds by the clock, after which a run is ended


def run(folder: str, seconds: int, arguments: list[str]) -> None:
    """Run pytest in this process, which is a fork; does not return."""
    import pytest

    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    signal.alarm(DEADLOCK)
    log = os.open(f"{folder}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    status = 1
    try:
        status = int(pytest.main(["-q", "-p", "no:cacheprovider", *arguments]))
    finally:
        os._exit(status)  # threads of libraries may wait for each other at an ordinary end


def main() -> None:
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    sys.dont_write_bytecode = True
    for line in sys.stdin:
        child = os.fork()
        if not child:
            run(*json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
