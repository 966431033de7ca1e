"""One kernel for Nyström attention: the numbers of the kernels that it stands for, and who is chosen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from rows.libraries import relative_error

import subquad
from subquad.kernels import landmark_attention

pytest.importorskip("llvmlite")

from subquad_numpy.block_attention.whole import launch_joined
from subquad_numpy.runtime.arguments import run
from subquad_numpy.runtime.launch import Launch

PARTS = ["softmax_attention", "iterative_pinv"]
SIZES = [(64, 64, 32, 32, 16), (70, 133, 19, 37, 7), (17, 20, 8, 5, 16), (3, 3, 2, 80, 1), (90, 40, 16, 16, 24)]
# (n, n_kv, d, d_v, m) of calls that are several runs: keys in chunks and in one; segments of two lengths, that end within
# tiles of keys; more rows of landmarks than a tile has; fewer queries than a tile; rows of whole vectors and of parts
LONG = [(1000, 9001, 32, 37, 65), (517, 12345, 19, 64, 17), (3000, 133, 64, 16, 100), (16, 20000, 8, 5, 16)]


def _rows(n: int, n_kv: int, d: int, d_v: int, dtype: Any = np.float32) -> list[Any]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(dtype) for shape in ((2, 3, n, d), (3, n_kv, d), (2, 1, n_kv, d_v))]


def _both(q: Any, k: Any, v: Any, m: int) -> tuple[Any, Any]:
    """The output of the one kernel, and that of the kernels it stands for."""
    static = {"m": m, "iterations": 6, "scale": q.shape[-1] ** -0.5}
    with np.errstate(all="ignore"):
        found = landmark_attention(q, k, v, **static, implementation="compiled")
        return found, landmark_attention.parts(q, k, v, **static)  # type: ignore[misc]


@pytest.mark.parametrize("sizes", SIZES + LONG)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numbers_are_those_of_the_kernels_that_it_stands_for(sizes: tuple[int, ...], dtype: Any) -> None:
    q, k, v = _rows(*sizes[:4], dtype)
    found, expected = _both(q, k, v, sizes[4])
    assert found.dtype == expected.dtype == dtype
    assert found.shape == expected.shape
    assert relative_error(found, expected) < (1e-5 if dtype == np.float32 else 1e-13)


@pytest.mark.parametrize("n_kv", [64, 9001])
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", range(3))
def test_numbers_that_are_not_finite_reach_the_same_rows(number: float, place: int, n_kv: int) -> None:
    """A query spoils its own row; a key or a value all rows of its item."""
    arrays = _rows(64, n_kv, 32, 32)
    arrays[place][(0, 0, 10, 3)[-arrays[place].ndim :]] = number
    found, expected = _both(*arrays, 16)
    assert not np.isfinite(found).all()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("n", "m"), [(8, 2), (8192, 16)])
@pytest.mark.parametrize("d", [1, 32])
def test_means_of_large_keys_are_finite(d: int, n: int, m: int) -> None:
    q, k, v = _rows(n, n, d, 5)
    k *= np.float32(1e38 / np.abs(k).max())
    k[..., : n // 2, 0] = 2e38  # whose sum overflows
    found, expected = _both(q * np.float32(1e-38), k, v, m)
    assert np.isfinite(expected).all()
    assert relative_error(found, expected) < 1e-5


def _chosen(q: Any, k: Any, **options: Any) -> list[str]:
    given: dict[str, Any] = {"num_landmarks": 8, **options}
    return [choice.kernel for choice in subquad.explain(subquad.attention, q, k, k, "nystrom", **given).choices]


def test_plain_calls_take_it_and_others_the_kernels_it_is_made_of() -> None:
    q, k = np.zeros((2, 40, 8)), np.zeros((2, 50, 8))
    assert _chosen(q, k) == ["landmark_attention"]
    long = np.zeros((200, 400, 8))
    assert _chosen(long, k[0], num_landmarks=16) == ["landmark_attention"]
    assert _chosen(long, k[0], num_landmarks=15) == PARTS
    assert _chosen(q, k, key_mask=np.arange(50) < 45) == PARTS
    for options in ({"landmarks": "uniform"}, {"landmarks": (q[:, :8], k[:, :8])}, {"query_mask": np.arange(40) < 30}):
        assert _chosen(q, k, **options) == PARTS
    assert "landmark_attention" not in _chosen(q, k, pinv="ridge")
    assert _chosen(q[:, :8], k) == ["softmax_attention"]  # exact attention
    halves = np.zeros((2, 40, 8), np.float16)
    assert _chosen(halves, halves) == ["landmark_attention"]


def test_recorded_calls_of_pytorch_take_the_kernels_it_is_made_of() -> None:
    torch = pytest.importorskip("torch")
    q, k = torch.zeros(2, 40, 8), torch.zeros(2, 50, 8)
    assert _chosen(q, k) == ["landmark_attention"]
    assert _chosen(q.requires_grad_(), k) == PARTS
    learned, plain = (subquad.attention(x, k, k, "nystrom", num_landmarks=8) for x in (q, q.detach()))
    assert learned.requires_grad
    assert not plain.requires_grad
    torch.testing.assert_close(learned.detach(), plain)


@pytest.mark.parametrize("sizes", [(70, 133, 19, 37, 7), *LONG])
def test_half_precision_is_read_as_it_is_and_rounded_once(sizes: tuple[int, ...]) -> None:
    q, k, v = _rows(*sizes[:4], np.float16)
    found, _ = _both(q, k, v, sizes[4])
    expected, _ = _both(*(x.astype(np.float32) for x in (q, k, v)), sizes[4])
    assert found.dtype == np.float16
    assert (found == expected.astype(np.float16)).all()


def test_rows_that_are_read_from_other_layouts_give_the_same_numbers() -> None:
    """Rows apart from each other are read where they lie; numbers apart from each other are copied."""
    q, k, v = _rows(1000, 9001, 32, 37)
    expected, _ = _both(q, k, v, 17)
    apart = [np.repeat(x, 2, axis=-2)[..., ::2, :] for x in (q, k, v)]
    for arrays in (apart, [np.repeat(x, 2, axis=-1)[..., ::2] for x in apart]):
        found, _ = _both(*arrays, 17)
        assert (found == expected).all()


def test_threads_change_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = _rows(1000, 9001, 32, 37)
    expected, _ = _both(q, k, v, 17)
    for threads in ("1", "2"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        for _ in range(3):
            found, _ = _both(q, k, v, 17)
            assert (found == expected).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_outputs_over_chunks_of_keys_join(dtype: Any) -> None:
    """Also where a chunk, or all of them, have no key for a row, and where a row is NaN."""
    rng = np.random.default_rng(0)
    parts, levels = rng.standard_normal((3, 2, 2, 5, 19)).astype(dtype), rng.standard_normal((3, 2, 2, 5)).astype(dtype)
    levels[0] += 100
    levels[:2, 0, 1, 3], levels[:, 1, 0, 2], levels[1, 1, 1, 4] = -np.inf, -np.inf, np.nan
    parts[:, 1, 0, 2] = 0

    def run_by_numpy(launch: Launch, operands: Any) -> dict[str, Any]:
        made = {name: np.full(x.shape, np.nan, x.dtype) for name, x in launch.results.items()}
        given = {**launch.sizes, **operands, **made}
        run(launch.compile(*launch.kind), dict(launch.record), launch.batch, launch.tasks, 1.0, 1, **given)
        return made

    out, lse = launch_joined(parts, levels, run_by_numpy)  # type: ignore[arg-type]
    with np.errstate(all="ignore"):
        expected_lse = np.logaddexp.reduce(levels.astype(np.float64), axis=0)
        shares = np.exp(levels - np.where(expected_lse == -np.inf, 0, expected_lse))
        expected = (parts * shares[..., None]).sum(axis=0)
    assert np.isnan(expected[1, 1, 4]).all()
    rtol, atol = (1e-5, 1e-6) if dtype == np.float32 else (1e-13, 1e-14)
    np.testing.assert_allclose(out, expected, rtol=rtol, atol=atol)
    np.testing.assert_allclose(lse, expected_lse, rtol=rtol, atol=atol)
