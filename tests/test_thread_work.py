"""How much work a call of a compiled kernel is: with little of it one thread runs, with more all that there are."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from rows import kernels
from rows.kernels import Example
from rows.libraries import NumPy

pytest.importorskip("llvmlite")


from subquad_numpy.outer_scan.calls import cut_gradient
from subquad_numpy.runtime import arguments
from subquad_numpy.runtime.arguments import Forms, Run
from subquad_numpy.table import COMPILED

THREADS = 3
ATTENTION = (2, 40), (2, 50)  # rows of q, and of k and v: 8 and 3 numbers in each
CLUSTERS = (2, 40), (2, 64)
ALL = {"always": 1, "reach": 2, "group": 3, "expanded": 2}
# multiply-adds of each run of a call of two items, by hand: rows, times what a row reads, times numbers in that
PRODUCTS: dict[str, tuple[Example, tuple[str, ...], list[int]]] = {
    "softmax": (kernels.softmax_attention("plain", *ATTENTION), (), [40 * 50 * 8]),  # by features: as "readings"
    "intervals": (kernels.block_attention("plain", *ATTENTION), (), [40 * 50 * 11]),
    "samples": (kernels.sampled_attention("rows", *ATTENTION), (), [40 * 50 * 11]),
    "errors": (kernels.sampled_errors("rows", (2, 40), (2, 40)), (), [3 * 40 * 3]),
    "lists": (kernels.block_attention("lists", *ATTENTION), (), [40 * (3 * 16) * 11]),
    "long lists": (kernels.block_attention("lists", *ATTENTION, size=40), (), [40 * 40 * 11]),
    "rounds": (kernels.hashed_attention("causal", *ATTENTION), (), 3 * [40 * (2 * 16) * 11]),
    "buckets": (kernels.hashed_order("one", (2, 40)), (), [3 * 40 * 8 * 4]),
    "buckets of two": (kernels.hashed_order("two", (2, 40), second=4), (), [3 * 40 * 8 * 6]),
    "nearest": (kernels.nearest("values", (2, 40), (2, 7), values=(2, 40)), (), [40 * 7 * 8]),
    "tree": (kernels.balanced_tree(2, 40, size=8), (), [40 * 8 * (32 + 12 * 3)]),
    "members": (kernels.cluster_members(2, 40, size=8), (), [5 * 8 * 8 * 2]),
    "spread": (kernels.cluster_spread(2, 40, size=8), (), [5 * 8 * 8 * 12]),
    "variances": (kernels.cluster_spread(2, 40, size=8, seen=False), (), [5 * 8 * 8 * 3]),
    "clusters": (kernels.clustered_attention("prefix", *CLUSTERS), (), [40 * (2 * 8 * 11 + 8 * (2 * 8 + 4 + 3))]),
    "groups": (kernels.clustered_attention("groups", *CLUSTERS), tuple(ALL), [40 * (3 * 8 * 11 + (2 + 6) * 23)]),
    "closed groups": (kernels.clustered_attention("groups", *CLUSTERS), (), [40 * (2 * 8 * 11 + 2 * 23)]),
    "inverses": (kernels.matrices(2, 12, 12), (), [4 * 6 * 2 * 12**3]),
    "sums": (kernels.features("feature_summarize", "exponential", ((2, 40), (2, 40)), None), (), [40 * 8 * 12]),
    "readings": (kernels.features("feature_attend", "exponential", ((2, 40),), (2,)), (), [40 * 8 * 12]),
    "steps": (kernels.features("feature_step", "exponential", 3 * ((2, 40),), (2,)), (), [4 * 40 * 8 * 12]),
    "whole": (kernels.features("feature_whole", "exponential", ((2, 40), (2, 50), (2, 50)), None), (), [90 * 8 * 12]),
    "landmarks": (
        kernels.landmark_attention("plain", (2, 40), (2, 50), 5),
        (),
        [5 * ((40 + 50 + 5) * 11 + 24 * 5 * 5)],
    ),
}
# tasks of each run of two items, by hand: each has so many rows, or is an item, a round or a block of a list
TASKS: dict[str, tuple[Example, list[int]]] = {
    "sums": (kernels.features("feature_summarize", "exponential", ((2, 2 * 4096 - 1),) * 2, None), [2]),
    "long sums": (kernels.features("feature_summarize", "exponential", ((2, 2 * 4096),) * 2, None), [2 * 2]),
    "longest sums": (kernels.features("feature_summarize", "exponential", ((2, 17 * 4096),) * 2, None), [2 * 16]),
    "readings": (kernels.features("feature_attend", "exponential", ((2, 512),), (2,)), [2]),
    "long readings": (kernels.features("feature_attend", "exponential", ((2, 513),), (2,)), [2 * 2]),
    "steps": (kernels.features("feature_step", "exponential", 3 * ((2, 3000),), (2,)), [2]),
    "whole": (kernels.features("feature_whole", "exponential", 3 * ((2, 1024),), None), [2]),
    "landmarks": (kernels.landmark_attention("plain", (2, 200), (2, 300), 5), [2]),
    # means of queries, landmarks to two chunks of keys, values, queries to landmarks
    "many landmarks": (kernels.landmark_attention("rows", (2, 6000), (2, 9000), 16), [2 * 2, 2 * 2, 2, 2 * 12]),
    "landmarks of many queries": (kernels.landmark_attention("rows", (2, 9000), (2, 4000), 16), [2 * 3, 2, 2, 2 * 18]),
    "rows by few keys": (kernels.softmax_attention("rows", (2, 3000), (2, 50)), [2 * 6]),
    "samples": (kernels.sampled_attention("rows", (2, 129), (2, 50)), [2 * 3]),
    "errors": (kernels.sampled_errors("rows", (2, 400), (2, 400)), [2]),
    "lists": (kernels.block_attention("lists", *ATTENTION), [2 * 3]),
    "rounds": (kernels.hashed_attention("causal", *ATTENTION), 3 * [2 * 3]),
    "buckets": (kernels.hashed_order("one", (2, 40)), [2 * 3]),
    "nearest": (kernels.nearest("rows", (2, 1024), (2, 7)), [2]),
    "nearest of many": (kernels.nearest("rows", (2, 1025), (2, 7)), [2 * 2]),
    "nearest of many centres": (kernels.nearest("rows", (2, 1025), (2, 65)), [2]),  # parts have 16 rows for each centre
    "clusters": (kernels.clustered_attention("prefix", (2, 257), (2, 64)), [2 * 2]),
    "tree": (kernels.balanced_tree(2, 40, size=8), [2]),
    "members": (kernels.cluster_members(2, 32 * 8, size=8), [2]),
    "members of many": (kernels.cluster_members(2, 32 * 8 + 1, size=8), [2 * 2]),
    "spread of many": (kernels.cluster_spread(2, 32 * 8 + 1, size=8), [2 * 2]),
    "inverses": (kernels.matrices(3, 12, 12), [3]),
}


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, int, int]]:
    """(multiply-adds of an item, tasks, threads asked for) of each run, none of which is made."""
    noted: list[tuple[float, int, int]] = []
    make = Run.__init__

    def planned(self: Any, kernel: Any, fields: Any, batch: Any, tasks: int, products: float, *values: Any) -> None:
        make(self, kernel, fields, batch, tasks, products, *values)
        self.products = products

    def asked(self: Any, arrays: Any, threads: Any) -> None:
        noted.append((self.products, self.tasks, threads))

    for record in COMPILED.values():
        if isinstance(record.forward, Forms):
            monkeypatch.setattr(record.forward, "kept", {})  # plans without products, or of these runs
    monkeypatch.setattr(Run, "__init__", planned)
    monkeypatch.setattr(Run, "__call__", asked)
    return noted


def given(example: Example, chosen: tuple[str, ...] = ()) -> tuple[list[Any], dict[str, Any]]:
    """The arrays, the mask of keys last, and the other keywords."""
    arrays, keywords = example.given(NumPy(), "float32", chosen)
    return [*arrays, None] if "key_mask" in example.options else arrays, keywords


@pytest.mark.parametrize("name", PRODUCTS)
def test_work_is_counted_in_multiply_adds(name: str, runs: list[tuple[float, int, int]]) -> None:
    example, chosen, expected = PRODUCTS[name]
    arrays, static = given(example, chosen)
    COMPILED[example.kernel].forward(arrays, static)
    assert [products for products, _, _ in runs] == expected


@pytest.mark.parametrize("name", TASKS)
def test_work_is_cut_into_tasks(name: str, runs: list[tuple[float, int, int]]) -> None:
    example, expected = TASKS[name]
    arrays, static = given(example)
    with np.errstate(all="ignore"):  # of memory that no run has written
        COMPILED[example.kernel].forward(arrays, static)
    assert [tasks for _, tasks, _ in runs] == expected


# (multiply-adds of an item, tasks) of each run of a gradient of two items, by hand
GRADIENTS: dict[str, tuple[Example, list[tuple[int, int]]]] = {
    "inverses": (kernels.matrices(2, 12, 12), [(15 * 6 * 2 * 12**3, 2)]),
    "softmax": (kernels.softmax_attention("plain", *ATTENTION), [(3 * 40 * 50 * 8, 2)]),
    "intervals": (kernels.block_attention("plain", *ATTENTION), [(3 * 40 * 50 * 11, 2)]),
    "lists": (kernels.block_attention("lists", *ATTENTION), [(3 * 40 * (3 * 16) * 11, 2 * THREADS)]),
    "rounds": (kernels.hashed_attention("causal", *ATTENTION), 3 * [(3 * 40 * (2 * 16) * 11, 2 * THREADS)]),
    "sums": (kernels.features("feature_summarize", "exponential", ((2, 4095),) * 2, None), [(3 * 4095 * 8 * 12, 2)]),
    "long sums": (
        kernels.features("feature_summarize", "exponential", ((2, 4096),) * 2, None),
        [(3 * 4096 * 8 * 12, 4)],
    ),
    "readings": (kernels.features("feature_attend", "exponential", ((2, 4095),), (2,)), [(3 * 4095 * 8 * 12, 2)]),
    "long readings": (kernels.features("feature_attend", "exponential", ((2, 4096),), (2,)), [(3 * 4096 * 8 * 12, 4)]),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_work_of_a_gradient_is_counted_and_cut(name: str, runs: list[tuple[float, int, int]]) -> None:
    example, expected = GRADIENTS[name]
    arrays, static = given(example)
    kernel = COMPILED[example.kernel]
    assert kernel.backward is not None
    need = [x is not None and x.dtype == "float32" for x in arrays]
    with np.errstate(all="ignore"):  # of memory that no run has written
        outputs, saved = kernel.forward(arrays, static, save=True)
        runs.clear()
        kernel.backward(arrays, static, saved, outputs, [np.zeros_like(x) for x in outputs], need, threads=THREADS)
    assert [(products, tasks) for products, tasks, _ in runs] == expected


def outer(n: int) -> Example:
    return kernels.outer_scan("outer", n, sizes=(2, 1, 3, 7, 5))


def weights(rows: int) -> Example:
    return kernels.project("weights", 4, 2**9, rows)


def step(d_inner: int) -> Example:
    return kernels.mamba_step("step", 1, 2**8, d_inner, 3, 2, layers=2)


# (example of a length, its work at length 1, and the least work for which threads are woken, forward and backward)
SCANS: dict[str, tuple[Callable[[int], Example], int, int, int]] = {
    "linear_scan": (lambda n: kernels.linear_scan("linear", n), 2 * 5, 2**18, 2**16),
    "selective_scan": (lambda n: kernels.selective_scan("plain", n), 2 * 6 * 3, 2**17, 0),
    "delta_scan": (lambda n: kernels.delta_scan("delta", n), 2 * 2 * 8 * 3, 2**18, 0),
    "outer_scan": (outer, 2 * 3 * 7 * 5, 2**18, 0),
    "lti_scan": (lambda n: kernels.lti_scan("lti", n), 2 * 5 * 3, 2**18, 2**17),
    "causal_conv1d": (lambda n: kernels.causal_conv1d("conv", n), 2 * 5, 2**17, 2**16),
    "project": (weights, 2**9, 2**18, 0),
    "mamba_step": (step, 2 * 2 * 2**8, 2**18, 0),
}


def either_side(name: str, least: int) -> list[tuple[Example, int]]:
    """An example with just less than this work, and the threads of it; and the next longer one."""
    made, work, _, _ = SCANS[name]
    n = -(-least // work)
    return [(made(n - 1), 1), (made(n), THREADS)]


@pytest.mark.parametrize("name", SCANS)
def test_little_work_is_done_by_one_thread(name: str, runs: list[tuple[float, int, int]]) -> None:
    for example, expected in either_side(name, SCANS[name][2]):
        arrays, static = given(example)
        runs.clear()
        COMPILED[name].forward(arrays, static, threads=THREADS)
        assert {threads for _, _, threads in runs} == {expected}


@pytest.mark.parametrize("name", [name for name, (*_, least) in SCANS.items() if least])
def test_little_work_of_a_gradient_is_done_by_one_thread(name: str, runs: list[tuple[float, int, int]]) -> None:
    for example, expected in either_side(name, SCANS[name][3]):
        arrays, static = given(example)
        outputs, saved = COMPILED[name].forward(arrays, static, save=True)
        runs.clear()
        need = [x is not None for x in arrays]
        backward = COMPILED[name].backward
        assert backward is not None
        with np.errstate(all="ignore"):  # of memory that no run has written
            backward(arrays, static, saved, outputs, [np.zeros_like(x) for x in outputs], need, threads=THREADS)
        assert {threads for _, _, threads in runs} == {expected}


class Noted:
    """Runs no launch, and keeps the threads that each asks for, and its tasks."""

    def __init__(self, need: list[bool]) -> None:
        self.asked: list[int] = []
        self.tasks: list[int] = []
        self.need = need

    def __call__(self, launch: Any, operands: Any) -> dict[str, Any]:
        self.asked.append(launch.threads)
        self.tasks.append(math.prod(launch.batch) * launch.tasks)
        return {key: np.zeros(like.shape, like.dtype) for key, like in launch.results.items()}

    def where_any(self, condition: Any, change: Any, given: Any) -> Any:
        return given

    def unless(self, condition: Any, compute: Callable[[], Any]) -> Any:
        return compute()


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many threads as `THREADS`, whatever the machine has."""
    monkeypatch.setenv("NUMBA_NUM_THREADS", str(THREADS))
    monkeypatch.setattr("subquad_numpy.runtime.threads.CORES", THREADS)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(THREADS), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


@pytest.mark.parametrize("name", SCANS)
def test_launches_ask_for_the_same_threads(name: str, threads: None) -> None:
    """Those that another library compiles into its programs."""
    launch = COMPILED[name].launch
    assert launch is not None
    for example, expected in either_side(name, SCANS[name][2]):
        arrays, static = given(example)
        run = Noted([])
        launch(arrays, static, run)
        assert run.asked == [expected]


@pytest.mark.parametrize("name", [name for name, (*_, least) in SCANS.items() if least])
def test_launches_of_gradients_ask_for_the_same_threads(name: str, threads: None) -> None:
    kernel = COMPILED[name]
    assert kernel.launch_backward is not None
    for example, expected in either_side(name, SCANS[name][3]):
        arrays, static = given(example)
        outputs, _ = kernel.forward(arrays, static)
        run = Noted([x is not None and x.dtype == "float32" for x in arrays])
        kernel.launch_backward(arrays, static, outputs, [np.zeros_like(x) for x in outputs], run)
        assert run.asked == [expected]


# launches of landmarks are the runs of long calls
LAUNCHED = [name for name, (x, *_) in PRODUCTS.items() if COMPILED[x.kernel].launch is not None and name != "landmarks"]


@pytest.mark.parametrize("name", LAUNCHED)
def test_launches_count_the_same_work(name: str, threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them run on all threads where their work suffices, and on one thread where it is less by one."""
    example, chosen, products = PRODUCTS[name]
    arrays, static = given(example, chosen)
    launch = COMPILED[example.kernel].launch
    assert launch is not None
    whole = products[0] if example.kernel == "iterative_pinv" else 2 * products[0]  # whose items are tasks
    for small, expected in ((whole, THREADS), (whole + 1, 1)):
        monkeypatch.setattr(arguments, "SMALL", small)
        run = Noted([])
        launch(arrays, static, run)
        assert run.asked == len(products) * [expected]


def test_launches_of_landmarks_count_their_work(threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Means of queries, landmarks to two chunks of keys, chunks that join, inverses, queries to landmarks."""
    example = kernels.landmark_attention("rows", (2, 3000), (2, 9000), 16, d_v=5)
    products = [3000 * 8, 2 * 16 * 9000 * 13, 2 * 16 * 5, 4 * 6 * 16**3, 3000 * 16 * 8]
    arrays, static = given(example)
    launch = COMPILED["landmark_attention"].launch
    assert launch is not None
    for place, own in enumerate(products):
        for small, expected in ((2 * own, THREADS), (2 * own + 1, 1)):
            monkeypatch.setattr(arguments, "SMALL", small)
            run = Noted([])
            with np.errstate(all="ignore"):  # of memory that no run has written
                launch(arrays, static, run)
            assert run.asked[place] == expected
            assert run.tasks == [2 * 1, 2 * 2 * 1, 2, 2, 2 * 6]


@pytest.mark.parametrize("name", GRADIENTS)
def test_launches_of_gradients_count_the_same_work(name: str, threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    example, expected_runs = GRADIENTS[name]
    arrays, static = given(example)
    kernel = COMPILED[example.kernel]
    assert kernel.launch_backward is not None
    outputs, _ = kernel.forward(arrays, static)
    whole = expected_runs[0][0] if example.kernel == "iterative_pinv" else 2 * expected_runs[0][0]
    for small, expected in ((whole, THREADS), (whole + 1, 1)):
        monkeypatch.setattr(arguments, "SMALL", small)
        run = Noted([x is not None and x.dtype == "float32" for x in arrays])
        kernel.launch_backward(arrays, static, outputs, [np.zeros_like(x) for x in outputs], run)
        assert run.asked == len(expected_runs) * [expected]


@pytest.mark.parametrize(
    ("n", "threads", "chunks"), [(3071, 8, 1), (3072, 3, 3), (3072, 8, 3), (9000, 2, 1), (9000, 8, 8)]
)
def test_long_scans_of_few_channels_are_cut_over_time(
    n: int, threads: int, chunks: int, runs: list[tuple[float, int, int]]
) -> None:
    """Into chunks of 1024 steps or more, one for each thread; two chunks would gain nothing, since each is done twice."""
    u = np.ones((1, n, 6), np.float32)
    maps = np.ones((1, n, 1, 9), np.float32)
    arrays = [u, u, -u[0, :6, :1] * np.ones(9, np.float32), maps, maps, None, None, None, None, None]
    with np.errstate(all="ignore"):
        COMPILED["selective_scan"].forward(arrays, {"delta_softplus": False, "reverse": False}, threads=threads)
    assert [(tasks, asked) for _, tasks, asked in runs] == (1 if chunks == 1 else 2) * [(chunks, threads)]


@pytest.mark.parametrize(("sizes", "parts", "span"), [
    ((1, 1000, 1, 16, 64, 64), 8, 1000),  # eight tasks, if there are so many heads
    ((1, 1000, 1, 3, 64, 64), 3, 1000),
    ((3, 1000, 1, 16, 64, 64), 3, 1000),  # nine of them
    ((3, 1000, 3, 16, 64, 64), 1, 1000),
    # a step keeps 1280 bytes in blocks, and 512 more in each part; states before spans, 256 kB each, take as much
    ((1, 2**15, 1, 16, 64, 64), 8, 1280),  # √(2¹⁵ · 2¹⁸ / 5376), to whole blocks of 32 steps
    ((1, 2**20, 1, 16, 64, 64), 2, 10944),  # √(2²⁰ · 2¹⁸ / 2304): more parts would not fit
    ((1, 2**20, 1, 1, 64, 64), 1, 3680),  # √(2²⁰ · 2¹⁴ / 1280)
])  # fmt: skip
def test_gradients_of_outer_products_stay_within_48_megabytes(sizes: tuple[int, ...], parts: int, span: int) -> None:
    """As far as states and parts of gradients go."""
    assert cut_gradient(*sizes, 4) == (parts, span)
