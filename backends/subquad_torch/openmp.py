"""Compiled kernels on PyTorch's own threads.

After each operation PyTorch's threads wait for the next one by spinning, and threads of ours would have to share cores
with them. Therefore PyTorch's threads run our kernels. They belong to the OpenMP library that PyTorch is linked with,
and are started by `GOMP_parallel`, a function that all such libraries on Linux have.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from pathlib import Path
from threading import get_ident
from typing import Any

import numpy as np
import torch

from subquad_numpy.runtime.threads import Team, current_core


class OpenMP(Team):
    """A number of PyTorch's threads, as a team that runs tasks."""

    def run(self, kernel: Any, tasks: int, records: np.ndarray[Any, Any]) -> None:
        """Run all tasks of a call on these threads; `records` are the argument records."""
        from subquad_numpy.runtime.native_tasks import CALLER, CORE, FAILED, SYSTEM, TEAM, scheduler, words_for, worker

        parallel = parallel_function()
        assert parallel is not None
        words = words_for(kernel, tasks, records, self)
        words[TEAM], words[CALLER], words[CORE], words[SYSTEM:] = self, get_ident(), current_core(), scheduler()
        parallel(worker().address, words.ctypes.data, self, 0)
        if words[FAILED]:
            msg = "a compiled kernel found no memory for its scratch"
            raise MemoryError(msg)


def threads() -> int:
    """The number of threads that PyTorch uses, as a team of these threads where OpenMP can be reached."""
    count = torch.get_num_threads()
    return count if parallel_function() is None or is_fork() else OpenMP(count)


@cache
def parallel_function() -> Any:
    """GOMP_parallel(function, data, threads, flags) of PyTorch's OpenMP library; None where there is none."""
    if sys.platform != "linux":
        return None
    try:
        function = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).GOMP_parallel
    except (OSError, AttributeError):  # a build of PyTorch without OpenMP, or with other file names
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    function.restype = None
    return function


def is_fork() -> bool:
    """Whether this process is a fork of one whose threads, which OpenMP would wait for, do not exist here."""
    return bool(_forked)


def _shares_code_with_parent() -> bool:
    """Whether PyTorch's library lies at one address here and in the parent process, as after a fork without exec."""
    here, there = (place_of_library(process) for process in ("self", str(os.getppid())))
    return here is not None and here == there


def place_of_library(process: str) -> str | None:
    """The line of a process's map of memory that has PyTorch's library for the CPU; None without one."""
    try:
        for line in Path(f"/proc/{process}/maps").read_text().splitlines():
            if line.endswith("libtorch_cpu.so"):
                return line
    except OSError:
        pass
    return None


_forked: list[bool] = []
if hasattr(os, "register_at_fork"):  # OpenMP's threads do not survive a fork
    os.register_at_fork(after_in_child=lambda: _forked.append(True))
if sys.platform == "linux" and _shares_code_with_parent():  # a fork that happened before this import
    _forked.append(True)
