"""Tasks over threads: all of them are done when a call returns, and none outlives the memory that it writes."""

from __future__ import annotations

import _thread
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from weakref import finalize

import numpy as np
import pytest

pytest.importorskip("llvmlite")

from compiled_calls import scan_forward

import subquad
from subquad.backend import Like
from subquad_numpy.codegen.compile import DONE
from subquad_numpy.runtime import arguments
from subquad_numpy.runtime import threads as runtime
from subquad_numpy.runtime.launch import Launch, Rows
from subquad_numpy.runtime.threads import run_tasks, thread_count
from subquad_numpy.selective_scan import calls as scan

RECORDS = np.zeros(1, np.int64)


class Kernel:
    """A Python function (first, last) -> int as a compiled kernel is called: by its address, or from Python."""

    def __init__(self, function: Callable[[int, int], int]) -> None:
        kind = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
        self.function = kind(lambda first, last, records: function(first, last))
        self.address = ctypes.cast(self.function, ctypes.c_void_p).value

    def __call__(self, first: int, last: int, records: Any) -> None:
        self.function(first, last, None)


def test_every_task_runs_once() -> None:
    seen: list[int] = []

    def work(first: int, last: int) -> int:
        seen.extend(range(first, last))
        return DONE

    for threads in (1, 2, 3):
        run_tasks(Kernel(work), 101, RECORDS, threads, None)
        assert sorted(seen) == [*range(101)]
        seen.clear()


def test_several_threads_may_call_at_once() -> None:
    def call(number: int) -> list[int]:
        seen: list[int] = []

        def work(first: int, last: int) -> int:
            time.sleep(0.001)
            seen.extend(range(first, last))
            return DONE

        run_tasks(Kernel(work), 40, RECORDS, 3, None)
        return sorted(seen)

    with ThreadPoolExecutor(4) as pool:
        for seen in pool.map(call, range(8)):
            assert seen == [*range(40)]


def test_no_memory_in_any_thread_is_an_error_of_the_caller() -> None:
    with pytest.raises(MemoryError):
        run_tasks(Kernel(lambda first, last: 0 if first == 4 else DONE), 16, RECORDS, 2, None)


def test_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller does everything, and nothing waits for a thread that will never come."""

    def fail(thread: Any) -> None:
        msg = "can't start new thread"
        raise RuntimeError(msg)

    monkeypatch.setattr(runtime, "pools", [])
    monkeypatch.setattr(threading.Thread, "start", fail)
    done: list[int] = []

    def work(first: int, last: int) -> int:
        done.append(first)
        return DONE

    run_tasks(Kernel(work), 2, RECORDS, 2, None)
    assert sorted(done) == [0, 1]
    assert runtime.pools[0].waiting.empty()


@pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(), reason="interrupts reach the main thread"
)
def test_memory_outlives_an_interrupt_of_the_caller() -> None:
    """What a thread of the pool still writes is not freed under it."""

    class Memory:
        pass

    memory, started, go, left = Memory(), threading.Event(), threading.Event(), []
    freed, caller = threading.Event(), threading.get_ident()
    finalize(memory, freed.set)

    def work(first: int, last: int) -> int:
        if threading.get_ident() == caller:
            started.wait(10)
        elif not started.is_set():
            started.set()
            time.sleep(0.1)  # until the caller waits
            _thread.interrupt_main()
            go.wait(10)
            left.append(freed.is_set())
        return DONE

    kernel = Kernel(work)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores interrupts
    try:
        with pytest.raises(KeyboardInterrupt):
            run_tasks(kernel, 100, RECORDS, 2, memory)
    finally:
        signal.signal(signal.SIGINT, before)
    del memory
    go.set()
    assert freed.wait(10)
    assert left == [False]


def test_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment counts as it is at the call."""
    assert thread_count(7) == 7
    for text, most in (("1", 1), ("2,1", 2), ("many", None), (None, None)):
        if text is None:
            monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        else:
            monkeypatch.setenv("OMP_NUM_THREADS", text)
        count = thread_count()
        assert 1 <= count <= (os.cpu_count() or 1)
        assert most is None or count <= most


def test_threads_may_register_a_kernel_at_once() -> None:
    """XLA refuses a second handler of the same name."""
    pytest.importorskip("jax")
    from subquad_jax import ffi

    made = []

    def make(dtype: str) -> Any:
        made.append(dtype)
        time.sleep(0.1)
        return Kernel(lambda first, last: DONE)

    launch = Launch(make, ("float32",), {}, {})
    with ThreadPoolExecutor(4) as pool:
        names = list(pool.map(lambda _: ffi.register(launch), range(4)))
    assert len(set(names)) == 1
    assert made == ["float32"]


@pytest.mark.parametrize(("returned", "rows"), [(0, 1), (1, 1 << 30)], ids=["scratch", "sums"])
def test_no_memory_is_an_error_of_jax(returned: int, rows: int) -> None:
    """For the scratch of a kernel, which then returns 0, or for what is summed up after it: 4 PB."""
    jax = pytest.importorskip("jax")
    from subquad_jax import ffi

    def make(dtype: str) -> Any:
        return Kernel(lambda first, last: returned)

    make.__name__ = f"returns_{returned}"
    y = {"y": Like((1 << 20,), np.dtype("float32"))}
    launch = Launch(make, ("float32",), {"y": None}, y, tasks=5, threads=2, summed={"y": Rows(rows, wide=False)})
    with pytest.raises(jax.errors.JaxRuntimeError, match="found no memory for its scratch"):
        jax.block_until_ready(jax.jit(lambda: ffi.call(launch, {}))())


@pytest.mark.parametrize(("causal", "kernels"), [(False, 4), (True, 2)], ids=["full", "causal"])
def test_small_calls_stay_on_one_thread(causal: bool, kernels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features of n rows take n · d · m multiply-adds, nine times as many at most in a gradient."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr("subquad_torch.host.threads", lambda: 2)
    calls: list[int] = []

    def noted(kernel: Any, tasks: int, records: np.ndarray, threads: int, memory: Any) -> None:
        calls.append(threads)
        run_tasks(kernel, tasks, records, threads, memory)

    monkeypatch.setattr(arguments, "run_tasks", noted)
    d, m = 8, 64
    for n, expected in ((arguments.SMALL // (9 * d * m) - 1, 0), (arguments.SMALL // (d * m), kernels)):
        calls.clear()
        q, k, v = (torch.ones(n, d, requires_grad=True) for _ in range(3))
        subquad.attention(q, k, v, "favor", num_features=m, causal=causal).sum().backward()
        assert len(calls) == expected


def test_small_scans_stay_on_one_thread_and_long_ones_occupy_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scan of few channels is cut along time, into as many chunks as there are threads for each of its tasks."""
    given: list[tuple[int, int]] = []

    def noted(kernel: Any, tasks: int, records: np.ndarray, threads: int, memory: Any) -> None:
        given.append((tasks, threads))
        run_tasks(kernel, tasks, records, threads, memory)

    monkeypatch.setattr(arguments, "run_tasks", noted)
    d, d_state = 4, 2
    updates = 2 * d * d_state  # of two items
    for n, expected in (
        (scan.SMALL // updates - 1, set()),  # the caller runs both tasks by itself
        (scan.SMALL // updates + 1, {(8, 8)}),  # two items, four chunks of time
    ):
        given.clear()
        u = np.ones((2, n, d), np.float32)
        scan_forward(u=u, delta=u, A=-u[0, :d, :d_state], B=u[..., :d_state], C=u[..., :d_state], threads=8)
        assert set(given) == expected


def test_channels_are_cut_into_whole_vectors_that_occupy_all_threads() -> None:
    """(channels of a block, tasks) of two groups of 512 channels, in vectors of eight."""
    assert [scan.cut_channels(1, 2, 1024, threads, 8) for threads in (1, 2, 3, 4)] == [
        (512, 2), (512, 2), (176, 6), (256, 4),
    ]  # fmt: skip
    assert scan.cut_channels(3, 2, 20, 4, 8) == (
        8,
        12,
    )  # blocks of 16 would give twelve tasks as well, half of them empty


def test_channels_of_a_gradient_are_halved_until_there_are_four_tasks() -> None:
    """(channels of a block, blocks of a group): two vectors at least, whatever the number of threads."""
    assert [scan.cut_gradient(1, 1, width, 8) for width in (8, 16, 40, 64, 1024)] == [
        (8, 1), (16, 1), (16, 3), (16, 4), (128, 8),
    ]  # fmt: skip
    assert [scan.cut_gradient(batch, 2, 64, 8) for batch in (1, 2)] == [(32, 2), (64, 1)]


def test_a_task_of_a_gradient_takes_blocks_side_by_side_where_no_thread_then_has_more() -> None:
    """Of 12 blocks of one group or of four, and of 16, one, four and five."""
    assert [scan.blocks_of_task(1, 12, threads) for threads in (1, 2, 3, 4, 6, 8, 12, 64)] == [3, 3, 2, 3, 2, 2, 1, 1]
    assert [scan.blocks_of_task(4, 12, threads) for threads in (1, 2, 16)] == [3, 3, 3]
    assert [scan.blocks_of_task(1, blocks, 2) for blocks in (16, 1, 4, 5)] == [2, 1, 2, 3]


@pytest.mark.skipif(sys.platform != "linux", reason="a process lists what it has loaded")
def test_a_process_finds_its_own_copy_of_torch() -> None:
    """By its place a process that was forked before the import is known; others have no copy at that place."""
    pytest.importorskip("torch")
    from subquad_torch import openmp

    place = openmp.place_of_library("self")
    assert place is not None
    assert place.endswith("libtorch_cpu.so")
    assert openmp.place_of_library("nobody") is None
    assert openmp.place_of_library(str(os.getppid())) != place
    assert not openmp.is_fork()


@pytest.mark.parametrize("library", [object(), OSError("no such file")], ids=("no OpenMP", "no library"))
def test_torch_without_openmp_has_no_team(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from subquad_torch import openmp

    def opened(_: str) -> Any:
        if isinstance(library, OSError):
            raise library
        return library

    monkeypatch.setattr(ctypes, "CDLL", opened)
    assert openmp.parallel_function.__wrapped__() is None


@pytest.mark.parametrize(("rows", "is_long"), [((1 << 21) - 1, False), (1 << 21, True)])
def test_threads_of_short_calls_of_jax_stay_on_their_core(rows: int, is_long: bool) -> None:
    """A thread that leaves it may wait for a slice of time, 4 ms, on a core where another thread of JAX runs."""
    pytest.importorskip("jax")
    from subquad_jax import ffi, handler

    of_float32 = Like((rows,), np.dtype(np.float32))
    launch = Launch(lambda kind: None, ("float32",), {"x": 1, "y": 1}, {"y": of_float32}, threads=2)
    assert ffi.plan_of(launch, {"x": of_float32})[handler.HEAD - 1] == is_long
