"""Tasks over threads: all of them are done when a call returns, and none outlives the memory that it writes."""

from __future__ import annotations

import ctypes
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from weakref import finalize

import numpy as np
import pytest

pytest.importorskip("numba")

from subquad_numpy.runtime import threads as _threads
from subquad_numpy.runtime.threads import run_tasks

FRAME = np.zeros(1, np.int64)


def test_every_task_runs_once() -> None:
    seen: list[int] = []
    run_tasks(lambda first, last, frame: seen.extend(range(first, last)), 101, FRAME, 3, None)
    assert sorted(seen) == [*range(101)]


def test_an_error_in_any_thread_reaches_the_caller() -> None:
    def fail(first: int, last: int, frame: Any) -> None:
        if first == 4:
            raise MemoryError

    with pytest.raises(MemoryError):
        run_tasks(fail, 16, FRAME, 2, None)


def test_a_thread_that_could_not_be_started_is_waited_for_if_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """An executor raises where it can start no thread, with the work already in its queue: another may take it."""

    class Full(ThreadPoolExecutor):
        def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
            super().submit(*args, **kwargs)
            msg = "can't start new thread"
            raise RuntimeError(msg)

    done, started, caller = [], threading.Event(), threading.get_ident()

    def work(first: int, last: int, frame: Any) -> None:
        if threading.get_ident() == caller:
            started.wait(10)
        else:
            started.set()
            time.sleep(0.1)
        done.append(first)

    with Full(1) as pool:
        monkeypatch.setattr(_threads, "_pools", [pool])
        run_tasks(work, 2, FRAME, 2, None)
        assert sorted(done) == [0, 1]


def test_memory_outlives_an_interrupt_of_the_caller() -> None:
    """What threads of the pool still write is not freed under them, and they begin nothing more."""

    class Memory:
        pass

    memory, started, go, left = Memory(), threading.Event(), threading.Event(), []
    freed, caller = threading.Event(), threading.get_ident()
    finalize(memory, freed.set)

    def work(first: int, last: int, frame: Any) -> None:
        if threading.get_ident() == caller:
            started.wait(10)
            raise KeyboardInterrupt
        started.set()
        go.wait(10)
        left.append((first, freed.is_set()))

    with pytest.raises(KeyboardInterrupt):
        run_tasks(work, 100, FRAME, 2, memory)
    del memory
    go.set()
    assert freed.wait(10)
    assert len(left) == 1
    assert not left[0][1]


def test_threads_may_register_a_kernel_at_once() -> None:
    """XLA refuses a second handler of the same name."""
    pytest.importorskip("jax")
    from subquad_jax import ffi
    from subquad_numpy.runtime.launch import Launch

    made = []

    def at_once(dtype: str) -> Any:
        made.append(dtype)
        time.sleep(0.1)
        return returning(0)

    with ThreadPoolExecutor(4) as pool:
        names = list(pool.map(lambda _: ffi.register(Launch(at_once, ("float32",), {}, {})), range(4)))
    assert len(set(names)) == 1
    assert made == ["float32"]


def returning(code: int) -> Any:
    """A compiled kernel that does nothing but return this."""

    class Kernel:
        function = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)(lambda *_: code)
        address = ctypes.cast(function, ctypes.c_void_p).value

    return Kernel()


@pytest.mark.parametrize(("returned", "rows"), [(0, 1), (1, 1 << 30)], ids=["scratch", "sums"])
def test_no_memory_is_an_error_of_jax(returned: int, rows: int) -> None:
    """For the scratch of a kernel, which then returns 0, or for what is summed up after it: 4 PB."""
    jax = pytest.importorskip("jax")
    from subquad.backend import Like
    from subquad_jax import ffi
    from subquad_numpy.runtime.launch import Launch, Rows

    def make(dtype: str) -> Any:
        return returning(returned)

    make.__name__ = f"returns_{returned}"
    out = {"y": Like((1 << 20,), np.dtype("float32"))}
    launch = Launch(make, ("float32",), {"y": None}, out, tasks=5, threads=2, summed={"y": Rows(rows, wide=False)})
    with pytest.raises(jax.errors.JaxRuntimeError, match="found no memory for its scratch"):
        jax.block_until_ready(jax.jit(lambda: ffi.call(launch, {}))())
