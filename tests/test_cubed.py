"""Cubed: the numbers of NumPy by few tasks for each chunk, nothing read while building, in the memory of the Spec."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rows.libraries import relative_error
from rows.other_library import OPTIONS
from test_dask import CALLS, METHODS

import subquad
from subquad.core.beside import namespace_of

cubed = pytest.importorskip("cubed")
TASKS = 8  # for each chunk of the sequence, reading included
GENERIC = ["exact", "linformer", "nystrom", "window"]  # by the generic code


@pytest.fixture
def spec(tmp_path: Path) -> Iterator[Any]:
    """A Spec that is not the default, so that a constant made elsewhere raises."""
    return cubed.Spec(work_dir=str(tmp_path), allowed_mem="200MB", reserved_mem="1MB")


class Counted:
    """A source of an array that counts how often it is read."""

    def __init__(self, x: np.ndarray) -> None:
        self.x, self.shape, self.dtype, self.ndim, self.reads = x, x.shape, x.dtype, x.ndim, 0

    def __getitem__(self, key: Any) -> np.ndarray:
        self.reads += 1
        return self.x[key]


@pytest.mark.parametrize("name", CALLS)
def test_few_tasks_for_each_chunk_and_none_while_building(name: str, spec: Any) -> None:
    function, shapes = CALLS[name]
    rng = np.random.default_rng(0)
    arrays = [-np.abs(x) / 9 if len(x) == 4 else x / 4 for x in (rng.standard_normal(shape) for shape in shapes)]
    sources = [Counted(x) for x in arrays]
    lazy = [
        cubed.from_array(x, chunks=tuple(512 if size == 4096 else size for size in x.shape), asarray=False, spec=spec)
        for x in sources
    ]
    out = function(*lazy)
    assert not any(x.reads for x in sources)
    assert out.plan().num_tasks <= TASKS * 8
    assert relative_error(np.asarray(out.compute()), function(*arrays)) <= 3e-15
    assert all(x.reads for x in sources)


@pytest.mark.parametrize(("name", "causal"), METHODS)
def test_masks_groups_and_chunks_that_differ(name: str, causal: bool, spec: Any) -> None:
    rng = np.random.default_rng(1)
    q, k, v = rng.standard_normal((2, 4, 37, 8)), rng.standard_normal((2, 2, 37, 8)), rng.standard_normal((2, 2, 37, 5))
    keep = rng.random((2, 1, 37)) < 0.7
    chunks = (1, 2, 10, 3), (2, 1, 5, 8), (1, 2, 20, 2), (2, 1, 9)
    lazy = [cubed.from_array(x, chunks=cut, spec=spec) for x, cut in zip((q, k, v, keep), chunks, strict=True)]
    out = subquad.attention(*lazy[:3], name, causal=causal, key_mask=lazy[3])
    want = subquad.attention(q, k, v, name, causal=causal, key_mask=keep)
    assert relative_error(np.asarray(out.compute()), want) <= 3e-15


@pytest.mark.parametrize("reverse", [False, True])
def test_scans(reverse: bool, spec: Any) -> None:
    rng = np.random.default_rng(2)
    a, b, start = rng.standard_normal((2, 37, 4)) / 3, rng.standard_normal((2, 37, 4)), rng.standard_normal((2, 4))
    segments = np.sort(rng.integers(0, 4, 37))
    lazy = [cubed.from_array(x, chunks=cut, spec=spec) for x, cut in ((a, (1, 10, 4)), (b, (2, 7, 2)), (start, (1, 4)))]
    options = {"return_state": True, "reverse": reverse}
    packed = cubed.from_array(segments, chunks=9, spec=spec)
    got = subquad.linear_scan(*lazy[:2], initial_state=lazy[2], segments=packed, **options)
    want = subquad.linear_scan(a, b, initial_state=start, segments=segments, **options)
    for one, other in zip(got, want, strict=True):
        assert relative_error(np.asarray(one.compute()), other) <= 3e-15


@pytest.mark.parametrize("method", GENERIC)
def test_generic_code_beside_any_spec(method: str, spec: Any) -> None:
    q = np.random.default_rng(3).standard_normal((2, 37, 8))
    lazy = cubed.from_array(q, chunks=(2, 20, 8), spec=spec)
    options = OPTIONS.get(method, {})
    out = subquad.attention(lazy, lazy, lazy, method, **options)
    assert relative_error(np.asarray(out.compute()), subquad.attention(q, q, q, method, **options)) <= 3e-15


def test_memory_is_bounded_by_the_chunks(tmp_path: Path) -> None:
    """A task that would need too much is refused before anything runs; with smaller chunks all of it is computed."""
    spec = cubed.Spec(work_dir=str(tmp_path), allowed_mem="1MB", reserved_mem="0MB")
    q = np.random.default_rng(0).standard_normal((1, 4096, 16))
    x = cubed.from_array(q, chunks=(1, 2048, 16), spec=spec)
    with pytest.raises(ValueError, match="exceeds allowed_mem"):
        subquad.attention(x, x, x, "favor", num_features=16).compute()
    x = cubed.from_array(q, chunks=(1, 256, 16), spec=spec)
    out = subquad.attention(x, x, x, "favor", num_features=16)
    assert out.plan().max_projected_mem <= 1_000_000
    assert relative_error(np.asarray(out.compute()), subquad.attention(q, q, q, "favor", num_features=16)) <= 3e-15


@pytest.mark.parametrize("axis", [-1, -2, 0])
def test_functions_that_cubed_lacks_or_gets_wrong(axis: int, spec: Any) -> None:
    rng = np.random.default_rng(4)
    x, order = rng.standard_normal((4, 6, 5)), np.argsort(rng.random((4, 6, 5)), axis=axis)
    functions = {
        "take": lambda xp, x, order: xp.take(x, xp.asarray([3, 0, 0, 2], **where(xp)), axis=axis),
        "repeat": lambda xp, x, order: xp.repeat(x, 2, axis=axis),
        "concat": lambda xp, x, order: xp.concat([x, x], axis=axis),
        "argsort": lambda xp, x, order: xp.argsort(x, axis=axis),
        "take_along_axis": lambda xp, x, order: xp.take_along_axis(x, order, axis=axis),
        "reshape": lambda xp, x, order: xp.reshape(x, (4, 3, -1)),
    }
    lazy = [cubed.from_array(y, chunks=(2, 4, 2), spec=spec) for y in (x, order)]

    def where(xp: Any) -> dict[str, Any]:
        return {} if xp is np else {"device": spec}

    for name, function in functions.items():
        got = np.asarray(function(namespace_of(lazy[0]), *lazy).compute())
        np.testing.assert_array_equal(got, function(np, x, order), err_msg=name)


@pytest.mark.parametrize("pinv", ["exact", "ridge"])
def test_decompositions_of_small_matrices(pinv: str, spec: Any) -> None:
    q, k, v = np.random.default_rng(5).standard_normal((3, 2, 2, 37, 4))
    method = subquad.Nystrom(num_landmarks=8, pinv=pinv)
    out = method(*(cubed.from_array(x, chunks=(1, 2, 10, 4), spec=spec) for x in (q, k, v)))
    assert relative_error(np.asarray(out.compute()), method(q, k, v)) <= 1e-12  # condition numbers multiply rounding
