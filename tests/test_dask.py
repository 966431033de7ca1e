"""Dask: a few tasks for each chunk, the numbers of NumPy whatever the chunks, and nothing computed before it is asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from rows.libraries import relative_error
from rows.other_library import OPTIONS
from rows.times import drawn

import subquad
from subquad.registry import SCANS

dask = pytest.importorskip("dask")
da = pytest.importorskip("dask.array")
TASKS = 8  # for each chunk of the sequence, reading included
METHODS = [("favor", False), ("favor", True), ("linear", False), ("linear", True)]


def chunked(x: Any, chunks: Any) -> Any:
    return None if x is None else da.from_array(x, chunks=chunks)


def selective(u: Any, delta: Any, A: Any, B: Any, C: Any) -> Any:
    return subquad.selective_scan(u, abs(delta), A, B, C)


CALLS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    **{
        f"{name}{' causal' * causal}": (
            lambda q, k, v, name=name, causal=causal: subquad.attention(q, k, v, name, causal=causal),
            3 * [(2, 4096, 8)],
        )
        for name, causal in METHODS
    },
    "selective_scan": (selective, [(2, 4096, 4), (2, 4096, 4), (4, 3), (2, 4096, 3), (2, 4096, 3)]),
    "linear_scan": (lambda a, b: subquad.linear_scan(a, b), 2 * [(2, 4096, 4)]),
}


@pytest.mark.parametrize("name", CALLS)
def test_few_tasks_for_each_chunk_and_none_while_building(name: str) -> None:
    from dask.callbacks import Callback

    function, shapes = CALLS[name]
    rng = np.random.default_rng(0)
    arrays = [-np.abs(x) / 9 if len(x) == 4 else x / 4 for x in (rng.standard_normal(shape) for shape in shapes)]
    lazy = [chunked(x, tuple(512 if size == 4096 else -1 for size in x.shape)) for x in arrays]
    read: list[Any] = []
    with Callback(pretask=lambda *_: read.append(1)):
        out = function(*lazy)
    assert not read
    (graph,) = dask.optimize(out)
    assert len(dict(graph.__dask_graph__())) <= TASKS * 8
    assert relative_error(out.compute(), function(*arrays)) <= 3e-15


@pytest.mark.parametrize(("name", "causal"), METHODS)
def test_chunks_of_any_sizes(name: str, causal: bool) -> None:
    """Groups of heads, a mask, and chunks that differ from array to array and cut batches and channels too."""
    rng = np.random.default_rng(1)
    q, k, v = rng.standard_normal((2, 4, 37, 8)), rng.standard_normal((2, 2, 41, 8)), rng.standard_normal((2, 2, 41, 5))
    mask = rng.random((2, 1, 41)) < 0.7
    lazy = chunked(q, (1, 2, 10, 3)), chunked(k, (2, 1, (7, 20, 14), 8)), chunked(v, (1, 2, 13, 2))
    for n_kv in (41, 30):  # queries with earlier keys, and queries before the first key
        out = subquad.attention(
            lazy[0], lazy[1][:, :, :n_kv], lazy[2][:, :, :n_kv], name, causal=causal,
            key_mask=chunked(mask, (2, 1, 9))[..., :n_kv],
        )  # fmt: skip
        want = subquad.attention(q, k[:, :, :n_kv], v[:, :, :n_kv], name, causal=causal, key_mask=mask[..., :n_kv])
        assert relative_error(out.compute(), want) <= 3e-15


@pytest.mark.parametrize("name", ["bigbird", "clustered", "exact", "linformer", "lsh", "nystrom", "window"])
def test_other_methods_read_nothing_while_building(name: str) -> None:
    from dask.callbacks import Callback

    q = np.random.default_rng(6).standard_normal((2, 37, 8))
    lazy, options, read = chunked(q, (1, 10, 8)), OPTIONS.get(name, {}), []
    with Callback(pretask=lambda *_: read.append(1)):
        out = subquad.attention(lazy, lazy, lazy, name, **options)
    assert not read
    assert relative_error(out.compute(), subquad.attention(q, q, q, name, **options)) <= 3e-15


def test_states_go_on() -> None:
    q, k, v = np.random.default_rng(2).standard_normal((3, 2, 40, 8))
    lazy = [chunked(x, (1, 7, 8)) for x in (q, k, v)]
    method = subquad.Favor(num_features=16)
    whole = method(q, k, v, causal=True)
    state = method.summarize(*(x[:, :25] for x in lazy[1:]))
    out, state = method.step(*(x[:, 25:] for x in lazy), state)
    assert relative_error(out.compute(), whole[:, 25:]) <= 3e-15
    assert relative_error(method.attend(lazy[0], state).compute(), method(q, k, v)) <= 3e-15


@pytest.mark.parametrize(
    "options", [{}, {"reverse": True}, {"segments": True}, {"segments": True, "reverse": True}, {"mask": True}], ids=str
)
@pytest.mark.parametrize("name", ["linear_scan", "selective_scan"])
def test_scans_in_chunks(name: str, options: dict[str, Any]) -> None:
    row, (arrays, own) = SCANS[name], drawn(name, 63)
    rng = np.random.default_rng(3)
    numbers = {"segments": np.sort(rng.integers(0, 5, 63)), "mask": rng.random(63) < 0.7}
    given = {key: numbers.get(key, value) for key, value in options.items()}
    lazy = {key: chunked(x, tuple(10 if size == 63 else -1 for size in x.shape)) for key, x in arrays.items()}
    lazily = {key: chunked(x, 9) if isinstance(x, np.ndarray) else x for key, x in given.items()}

    def call(arrays: Any, options: Any) -> Any:
        return row.function(*(arrays[key] for key in row.positional), **{**own, **options}, return_state=True)

    for got, want in zip(call(lazy, lazily), call(arrays, given), strict=True):
        assert relative_error(got.compute(), want) <= 3e-15


def test_a_reset_lets_no_nan_pass() -> None:
    a, b = np.random.default_rng(4).standard_normal((2, 2, 20, 3)) / 2
    a[0, 5] = np.nan
    a[1, 9] = np.nan  # in the chunk of the reset, before it
    segments = np.repeat([0, 1], 10)
    out = subquad.linear_scan(chunked(a, (1, 3, 2)), chunked(b, (2, 7, 3)), segments=chunked(segments, 5)).compute()
    assert np.isnan(out[0, 5:10]).all()
    assert np.isnan(out[1, 9]).all()
    assert np.allclose(out[:, 10:], subquad.linear_scan(a, b, segments=segments)[:, 10:], atol=1e-15)


def test_complex_matrices_and_maps_of_groups() -> None:
    rng = np.random.default_rng(5)
    u, B, C = rng.standard_normal((2, 33, 4)), rng.standard_normal((4, 3)), rng.standard_normal((2, 33, 2, 3))
    A, start = -np.exp(rng.standard_normal((4, 3))) + 1j, rng.standard_normal((2, 4, 3)) + 0j
    lazy = [chunked(x, -1) for x in (A, B)]
    got = subquad.selective_scan(
        chunked(u, (1, 8, 4)), chunked(abs(u), (2, 9, 2)), *lazy, chunked(C, (1, 5, 1, 2)),
        initial_state=chunked(start, 1), return_state=True,
    )  # fmt: skip
    want = subquad.selective_scan(u, abs(u), A, B, C, initial_state=start, return_state=True)
    for one, other in zip(got, want, strict=True):
        assert relative_error(one.compute(), other) <= 3e-15


def test_unknown_chunk_sizes_are_refused() -> None:
    x = chunked(np.zeros((10, 4)), (5, 4))
    with pytest.raises(TypeError, match=r"q is a dask array whose chunks have unknown sizes.*compute_chunk_sizes"):
        subquad.attention(x[x[:, 0] == 0], x, x, "favor")


@pytest.mark.parametrize("shape", [(0, 40, 8), (2, 0, 40, 8), (2, 0, 8)], ids=str)
@pytest.mark.parametrize("method", sorted(subquad.METHODS))
def test_an_output_without_an_element(method: str, shape: tuple[int, ...]) -> None:
    """Dask's own `max` raises where another axis than the reduced one has no element."""
    out = subquad.attention(*(chunked(np.zeros(shape), shape) for _ in range(3)), method)
    assert isinstance(out, da.Array)
    assert out.compute().shape == shape


def test_grouped_heads_without_an_element() -> None:
    q, k = (chunked(np.zeros(shape, np.float32), shape) for shape in ((0, 4, 40, 8), (0, 2, 40, 8)))
    out = subquad.attention(q, k, k, "exact").compute()
    assert (out.shape, out.dtype) == (q.shape, q.dtype)


@pytest.mark.parametrize("batch", [(0,), (2, 0), (0, 2)], ids=str)
def test_attention_of_an_empty_batch_with_restrictions(batch: tuple[int, ...]) -> None:
    """Each reduction, reshape and constant takes an array without an element, so any path through a method does."""
    q, k, v = (np.zeros((*batch, 8, width)) for width in (4, 4, 3))
    given: dict[str, dict[str, Any]] = {
        "softcap": {"softcap": 3.0}, "lse": {"return_lse": True}, "bias": {"bias": np.zeros((8, 8))},
        "mask": {"mask": np.ones((8, 8), dtype=bool)}, "segments": {"segments": np.arange(8) // 4},
        "visible": {"visible": np.arange(8) + 1}, "sinks": {"sinks": np.zeros(batch[-1:])},
    }  # fmt: skip
    taken = {"exact": list(given), "window": ["lse", "segments", "visible"], "clustered": ["lse"]}
    for method, names in taken.items():
        for options in (given[name] for name in names):
            want = subquad.attention(q, k, v, method, **options)
            lazy = {name: chunked(x, x.shape) if isinstance(x, np.ndarray) else x for name, x in options.items()}
            got = subquad.attention(*(chunked(x, x.shape) for x in (q, k, v)), method, **lazy)
            for one, two in zip(got, want, strict=True) if "return_lse" in options else [(got, want)]:
                assert np.asarray(one).shape == two.shape
    for method in subquad.METHODS:
        got = subquad.attention(*(chunked(x, x.shape) for x in (q, k, v)), method)
        assert np.asarray(got).shape == v.shape
