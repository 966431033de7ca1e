"""The compiled products through exponentials against their definition in float64: edges, chunks, strides, range."""

from __future__ import annotations

import itertools
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from interpreter import python
from weighted_means import log_weights, means

pytest.importorskip("llvmlite")

from compiled_calls import STEP, SUMMARIZE, Mapped, elu, feature_product, softmax
from compiled_calls import exponential as exponential_map

from subquad_numpy.codegen import machine
from subquad_numpy.features.attend import attend_kernel
from subquad_numpy.table import COMPILED

# of the largest entry: a sum of n terms in blocks of about 100 keeps some ten roundings; exponents of 10 lose a digit
TOLERANCE = {"float32": 4e-6, "float64": 2e-14}
# (heads, n, n_kv, d, d_v, m): below, at and beyond tiles, vectors, panels, blocks, chunks
SIZES = [
    (1, 1, 1, 1, 1, 1),
    (2, 63, 130, 16, 7, 33),
    (3, 257, 65, 64, 64, 64),
    (1, 129, 8200, 20, 33, 48),
    (1, 1030, 515, 8, 16, 300),
    (2, 5, 9, 65, 100, 17),
]


def draw(heads: int, n: int, n_kv: int, d: int, d_v: int, dtype: str) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(n + n_kv)
    return tuple(rng.standard_normal((heads, *shape)).astype(dtype) for shape in ((n, d), (n_kv, d), (n_kv, d_v)))


def masks(heads: int, n_kv: int) -> dict[str, np.ndarray | None]:
    some = np.random.default_rng(1).random((heads, n_kv)) < 0.6
    return {"none": None, "some": some, "a head sees nothing": some & (np.arange(heads) > 0)[:, None]}


def product_by_definition(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, phi: Mapped, mask: np.ndarray | None, causal: bool = False
) -> np.ndarray:
    W_k, W_q, *center = phi.weights
    scale = phi.phi.scale
    q, k, v, keys, queries = (x.astype(np.float64) for x in (q, k, v, W_k, W_q))
    q_mean, k_mean = center or (0, 0)
    k, q = k - k_mean, q - q_mean
    log_k = k @ keys - abs(scale) / 2 * (k * k).sum(-1, keepdims=True)
    log_k += scale * (k * q_mean).sum(-1, keepdims=True)
    return means(log_weights(q @ queries, log_k), v, mask, causal)


def softmax_by_definition(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, mask: Any) -> np.ndarray:
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    return means(scale * (q @ k.swapaxes(-1, -2)), v, mask)


def exponential(d: int, m: int, dtype: str) -> Mapped:
    W = np.random.default_rng(2).standard_normal((d, m)).astype(dtype) * dtype_of(dtype, d**-0.25)
    return exponential_map(W, -W[:, ::-1], d**-0.5)


def dtype_of(dtype: str, value: float) -> Any:
    return np.dtype(dtype).type(value)


def error(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(got - expected).max() / max(np.abs(expected).max(), 1e-30))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", ["none", "some", "a head sees nothing"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", SIZES)
def test_feature_product_is_its_definition(size: tuple[int, ...], dtype: str, mask: str, causal: bool) -> None:
    *shape, m = size
    q, k, v = draw(*shape, dtype)
    phi, seen = exponential(shape[3], m, dtype), masks(shape[0], shape[2])[mask]
    got = feature_product(q, k, v, phi=phi, key_mask=seen, causal=causal)
    assert got.dtype == dtype
    expected = product_by_definition(q, k, v, phi, seen, causal)
    assert np.array_equal(got == 0, expected == 0)  # rows of nothing
    assert error(got, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", ["none", "some", "a head sees nothing"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [(1, 1, 1, 1, 1), (2, 63, 130, 16, 7), (3, 257, 65, 64, 64), (1, 40, 8200, 300, 33)])
def test_linear_attention_is_its_definition(size: tuple[int, ...], dtype: str, mask: str, causal: bool) -> None:
    q, k, v = draw(*size, dtype)
    phi, seen = elu(0.7, -1.3), masks(size[0], size[2])[mask]
    got = feature_product(q, k, v, phi=phi, key_mask=seen, causal=causal)
    y, x = (np.float64(phi.phi.scale_q) * q, np.float64(phi.phi.scale_k) * k)
    log_q, log_k = (np.where(z > 0, np.log1p(np.maximum(z, 0)), z) for z in (y, x))
    with np.errstate(divide="ignore"):
        log = np.log(np.exp(log_q) @ np.exp(log_k).swapaxes(-1, -2))
    expected = means(log, v.astype(np.float64), seen, causal)
    assert np.array_equal(got == 0, expected == 0)
    assert error(got, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("causal", [False, True])
def test_linear_attention_far_below_zero(causal: bool) -> None:
    """elu(x) + 1 is exp(x) there, which float32 does not hold; but only ratios of it matter."""
    q, k, v = draw(1, 70, 70, 4, 3, "float32")
    q, k = q - 300, k - 300
    got = feature_product(q, k, v, phi=elu(1.0, 1.0), causal=causal)
    log = log_weights(q.astype(np.float64), k.astype(np.float64))
    assert error(got, means(log, v, None, causal)) <= 600 * np.finfo(np.float32).eps  # of exponents around -600


def test_a_feature_of_zero() -> None:
    """elu(−∞) + 1: no more than that feature of that key."""
    q, k, v = draw(1, 7, 70, 4, 3, "float32")
    k[0, 5, 0] = -np.inf
    almost = np.where(k == -np.inf, -200, k).astype(np.float32)
    got, expected = (feature_product(q, x, v, phi=elu(1.0, 1.0)) for x in (k, almost))
    assert np.array_equal(got, expected)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("m", [3, 8, 17])
def test_narrow_features_of_centred_keys(dtype: str, m: int) -> None:
    """A block of rows is wider than all features and values together."""
    q, k, v = draw(2, 80, 80, 5, 4, dtype)
    plain, center = exponential(5, m, dtype), tuple(draw(1, 1, 1, 5, 5, dtype)[:2])
    phi = exponential_map(*plain.weights, plain.phi.scale, center)
    got = feature_product(q, k, v, phi=phi, causal=True)
    assert error(got, product_by_definition(q, k, v, phi, None, causal=True)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("mask", ["none", "some", "a head sees nothing"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", SIZES)
def test_softmax_attention_is_its_definition(size: tuple[int, ...], dtype: str, mask: str) -> None:
    q, k, v = draw(*size[:-1], dtype)
    seen = masks(size[0], size[2])[mask]
    got = softmax(q, k, v, scale=0.3, key_mask=seen)
    assert error(got, softmax_by_definition(q, k, v, 0.3, seen)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("negative", [False, True])
def test_softmax_of_few_keys(negative: bool) -> None:
    """More queries than any block, few keys: the reading alone. A scale may be negative."""
    q, k, v = draw(2, 1100, 70, 64, 64, "float32")
    seen = masks(2, 70)["a head sees nothing"]
    scale = -0.2 if negative else 0.2
    got = softmax(q, k, v, scale=scale, key_mask=seen)
    assert error(got, softmax_by_definition(q, k, v, scale, seen)) <= TOLERANCE["float32"]


def test_any_strides_and_shared_heads() -> None:
    """Heads between rows and channels, a batch that repeats, channels apart, columns of the keys in any order."""
    rng = np.random.default_rng(3)
    q = rng.standard_normal((2, 90, 4, 16)).astype(np.float32).swapaxes(1, 2)
    k = np.broadcast_to(rng.standard_normal((1, 1, 700, 16)).astype(np.float32), (2, 1, 700, 16))
    v = rng.standard_normal((2, 1, 700, 24)).astype(np.float32)[..., ::2]
    mask = np.broadcast_to(rng.random((2, 1, 1, 700)) < 0.5, (2, 4, 1, 700))[:, :, 0]
    phi = exponential(16, 40, "float32")
    for x in (q, k, v, mask):
        x.flags.writeable = False
    for causal in (False, True):
        expected = product_by_definition(q, k, v, phi, mask, causal)
        got = feature_product(q, k, v, phi=phi, key_mask=mask, causal=causal)
        assert error(got, expected) <= TOLERANCE["float32"]
    expected = softmax_by_definition(q, k, v, 0.3, mask)
    assert error(softmax(q, k, v, scale=0.3, key_mask=mask), expected) <= TOLERANCE["float32"]


@pytest.mark.parametrize("shape", [(1, 16), (2, 1, 16)])
def test_centers(shape: tuple[int, ...]) -> None:
    """One for all heads, or one for each; also where the heads are theirs alone."""
    q, k, v = draw(1 if len(shape) == 3 else 2, 90, 300, 16, 8, "float32")
    rng = np.random.default_rng(5)
    plain = exponential(16, 40, "float32")
    center = (rng.standard_normal(shape).astype(np.float32), rng.standard_normal(shape).astype(np.float32))
    for scale, causal in itertools.product((plain.phi.scale, -plain.phi.scale), (False, True)):
        phi = exponential_map(*plain.weights, scale, center)
        expected = product_by_definition(q, k, v, phi, None, causal)
        got = feature_product(q, k, v, phi=phi, causal=causal)
        assert error(got, expected) <= TOLERANCE["float32"]


def test_range() -> None:
    """Each feature has its own range: keys far from each other neither overflow nor vanish, in any order."""
    rng = np.random.default_rng(4)
    q, v = (rng.standard_normal((1, 300, 8)).astype(np.float32) for _ in range(2))
    k = (rng.standard_normal((1, 300, 8)) * np.linspace(0, 30, 300)[:, None]).astype(np.float32)
    phi = exponential(8, 64, "float32")
    for order in (np.arange(300), np.arange(300)[::-1]):
        got = feature_product(q, k[:, order], v[:, order], phi=phi)
        # exponents reach some hundreds, and a rounding of those is 1e-5
        assert error(got, product_by_definition(q, k[:, order], v[:, order], phi, None)) <= 2e-4


def test_range_of_logits() -> None:
    """Hundreds apart within a row, whichever key is the largest."""
    q, k, v = draw(1, 1100, 90, 16, 8, "float32")
    got = softmax(q, k, v, scale=40.0)
    assert error(got, softmax_by_definition(q, k, v, 40.0, None)) <= 2e-4  # a rounding of 400 is 3e-5


def test_nan_stays_in_its_row() -> None:
    q, k, v = draw(1, 700, 600, 16, 8, "float32")
    clean = (
        softmax(q, k, v, scale=0.3),
        softmax(q, k[:, :64], v[:, :64], scale=0.3),
    )
    q[0, 5], q[0, 6, 3], mask = np.nan, np.inf, np.arange(600)[None] != 9
    k[0, 9] = v[0, 9] = np.nan
    others = np.delete(np.arange(700), [5, 6])
    masked = softmax(q, k, v, scale=0.3, key_mask=mask)
    few = softmax(q, k[:, :64], v[:, :64], scale=0.3, key_mask=mask[:, :64])
    through = feature_product(q, k, v, phi=exponential(16, 24, "float32"), key_mask=mask)
    for got in (masked, few, through):
        assert np.isnan(got[0, [5, 6]]).all()
        assert np.isfinite(got[0, others]).all()
    assert not np.array_equal(masked[0, others], clean[0][0, others])  # the masked key did count before
    assert np.isnan(softmax(q, k, v, scale=0.3)).all()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [8, 16, 32, 33])
def test_values_that_are_read_where_they_lie(width: int, dtype: str) -> None:
    """Those of one panel with nothing between their rows: not every other row, nor a part of each row, nor one row."""
    q, k, wide = draw(2, 20, 70, 16, 2 * width, dtype)
    v = np.ascontiguousarray(wide[..., :width])
    for values in (v, np.repeat(v, 2, axis=-2)[:, ::2], wide[..., :width], np.broadcast_to(v[:, :1], v.shape)):
        got = softmax(q, k, values, scale=0.3)
        assert error(got, softmax_by_definition(q, k, values, 0.3, None)) <= TOLERANCE[dtype]


def test_rows_between_other_numbers() -> None:
    """A field of a structure: its strides are no multiple of its size."""
    table = np.zeros((2, 600, 16), [("x", np.float32), ("other", np.float16)])
    q = k = v = table["x"]
    q[...] = np.random.default_rng(7).standard_normal(q.shape)
    phi = exponential(16, 16, "float32")
    held = np.zeros((16, 16), table.dtype)
    held["x"] = phi.weights[0]
    for n, n_kv in ((600, 70), (70, 600)):
        a, b, c = q[:, :n], k[:, :n_kv], v[:, :n_kv]
        expected = softmax_by_definition(a, b, c, 0.3, None)
        assert error(softmax(a, b, c, scale=0.3), expected) <= TOLERANCE["float32"]
        strided = exponential_map(held["x"], held["x"][:, ::-1], phi.phi.scale)
        got = feature_product(a, b, c, phi=strided)
        assert error(got, product_by_definition(a, b, c, strided, None)) <= TOLERANCE["float32"]


GUARDED = """
import ctypes, math, numpy, sys
sys.path.insert(0, "tests")
from compiled_calls import exponential, feature_product, softmax
libc, page = ctypes.CDLL(None), 4096
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
def guarded(*shape):
    "An array that ends where memory ends."
    size = 4 * math.prod(shape)
    whole = -(-size // page) * page
    start = libc.mmap(None, whole + page, 3, 0x22, -1, 0)
    assert libc.mprotect(start + whole, page, 0) == 0
    x = numpy.frombuffer((ctypes.c_char * size).from_address(start + whole - size), numpy.float32).reshape(shape)
    x[...] = 1
    return x
for n, n_kv, m in ((257, 31, 300), (600, 40, 17), (5, 700, 513)):
    q, k, v, W = guarded(2, n, 7), guarded(2, n_kv, 7), guarded(2, n_kv, 5), guarded(7, m)
    new = lambda shape, dtype: guarded(*shape)
    softmax(q, k, v, scale=1.0, new=new)
    for causal in (False, True):
        feature_product(q, k, v, phi=exponential(W, W, 0.5), new=new, causal=causal)
print("done")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="numbers of Linux")
def test_nothing_is_read_or_written_behind_an_array() -> None:
    assert python(GUARDED) == "done"


def test_many_queries_that_are_one() -> None:
    """Blocks of queries at one and the same address, the last one smaller."""
    q, k, v = draw(1, 300, 20, 16, 8, "float32")
    q = np.broadcast_to(q[:, :1], q.shape)
    expected = softmax_by_definition(q, k, v, 0.3, None)
    assert error(softmax(q, k, v, scale=0.3), expected) <= TOLERANCE["float32"]


def test_queries_one_number_before_the_other() -> None:
    """The second item lies at element −1, and a thread may begin with it."""
    q, k, v = draw(1, 2, 2**20, 1, 1, "float32")
    q = q.reshape(2, 1, 1)[::-1]
    got = softmax(q, k, v, scale=0.3, threads=2)
    assert error(got, softmax_by_definition(q, k, v, 0.3, None)) <= TOLERANCE["float32"]


def test_large_keys() -> None:
    """|k|² overflows, q·k does not."""
    q, k, v = draw(1, 40, 60, 16, 8, "float32")
    k[0, 3] = 1e20
    got = softmax(q, k, v, scale=1e-19)
    assert error(got, softmax_by_definition(q, k, v, 1e-19, None)) <= TOLERANCE["float32"]


@pytest.mark.parametrize("n_kv", [70, 600])
def test_query_of_nan_that_sees_nothing(n_kv: int) -> None:
    q, k, v = draw(2, 600, n_kv, 16, 8, "float32")
    q[:, 5] = np.nan
    mask = np.arange(2)[:, None] * np.ones(n_kv) > 0
    got = softmax(q, k, v, scale=0.3, key_mask=mask)
    assert (got[0] == 0).all()
    assert np.isnan(got[1, 5]).all()


def test_threads_do_not_change_the_numbers() -> None:
    """One thread, two, and calls from several threads at once: bit-equal."""
    q, k, v = draw(3, 2100, 8200, 16, 16, "float32")
    phi = exponential(16, 64, "float32")

    for causal in (False, True):

        def call(threads: int, causal: bool = causal) -> np.ndarray:
            return feature_product(q, k, v, phi=phi, threads=threads, causal=causal)

        alone = call(1)
        with ThreadPoolExecutor(4) as pool:
            for got in pool.map(call, [1, 2, 2, 3, 2, 1]):
                assert np.array_equal(got, alone)


def test_a_pseudo_inverse_is_the_same_in_any_company() -> None:
    """Bit-equal alone and in a batch, on one thread and on several."""
    a = np.abs(np.random.default_rng(0).standard_normal((9, 40, 40), dtype=np.float32))

    def invert(a: np.ndarray, **options: Any) -> np.ndarray:
        return COMPILED["iterative_pinv"].forward((a,), {"iterations": 6}, **options)[0][0]

    together = invert(a, threads=1)
    assert np.array_equal(invert(a, threads=3), together)
    assert np.array_equal(np.stack([invert(x) for x in a]), together)


@pytest.mark.parametrize("phi", [exponential(16, 40, "float32"), elu(0.5, 0.5)], ids=["exponential", "elu"])
def test_nothing_later_reaches_a_row(phi: Any) -> None:
    """Not even its last bit, nor by a number that is not finite; a hidden one reaches nobody."""
    q, k, v = draw(2, 150, 150, 16, 8, "float32")
    mask = np.arange(150)[None].repeat(2, 0) != 20

    def call(k: np.ndarray, v: np.ndarray) -> np.ndarray:
        return feature_product(q, k, v, phi=phi, key_mask=mask, causal=True)

    before = call(k, v)
    for changed, value in itertools.product((0, 1), (np.nan, np.inf, 30.0)):
        given = [k.copy(), v.copy()]
        given[changed][0, 20] = np.nan
        given[changed][0, 70, 3] = value
        after = call(*given)
        assert np.array_equal(after[0, :70], before[0, :70])
        assert np.array_equal(after[1], before[1])
        if value == 30:
            assert not np.array_equal(after[0, 70:], before[0, 70:])
        else:
            assert np.isnan(after[0, 70:]).all()


def test_no_keys_and_no_queries() -> None:
    q, k, v = draw(2, 3, 5, 4, 6, "float32")
    phi = exponential(4, 8, "float32")
    for causal in (False, True):
        options = {"phi": phi, "causal": causal}
        assert np.array_equal(feature_product(q, k[:, :0], v[:, :0], **options), np.zeros((2, 3, 6)))
        assert feature_product(q[:, :0], k, v, **options).shape == (2, 0, 6)
    assert softmax(q[:, :0], k, v, scale=1.0).shape == (2, 0, 6)
    assert feature_product(q[:0], k[:0], v[:0], phi=phi).shape == (0, 3, 6)


def test_kernels_on_disk_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    make = partial(attend_kernel.__wrapped__, np.dtype("float32"), "elu")
    make()
    monkeypatch.setattr(machine, "object_of", None)  # nothing can be compiled now
    assert make().address


@pytest.mark.parametrize("mask", ["none", "some", "a head sees nothing"])
@pytest.mark.parametrize("kind", ["exponential", "elu", "centred"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_state_goes_on_in_any_pieces(dtype: str, kind: str, mask: str) -> None:
    """Keys at once or in two pieces, by `summarize` or by `step`: one state, and outputs that do not notice."""
    q, k, v = draw(2, 150, 150, 16, 8, dtype)
    phi, seen = elu(0.5, 0.5) if kind == "elu" else exponential(16, 40, dtype), masks(2, 150)[mask]
    if kind == "centred":
        phi = exponential_map(*phi.weights, phi.phi.scale, tuple(draw(1, 1, 1, 16, 16, dtype)[:2]))
    first, second = slice(None, 70), slice(70, None)

    def part(x: np.ndarray | None, rows: slice) -> np.ndarray | None:
        return None if x is None else x[..., rows, :] if x.ndim == 3 else x[..., rows]

    def summarize(state: Any, rows: slice) -> Any:
        arrays = part(k, rows), part(v, rows), *state, *phi.weights, part(seen, rows)
        return SUMMARIZE.forward(arrays, phi.static)[0]

    def step(state: Any, rows: slice) -> Any:
        arrays = part(q, rows), part(k, rows), part(v, rows), *state, *phi.weights, part(seen, rows)
        return STEP.forward(arrays, phi.static)[0]

    none = None, None, None
    whole = summarize(none, slice(None))
    out, *after = step(none, slice(None))
    one, *between = step(none, first)
    other, *last = step(between, second)
    for state in (after, last, summarize(summarize(none, first), second), summarize(between, second)):
        assert np.array_equal(state[0] == -np.inf, whole[0] == -np.inf)
        shown = whole[0] != -np.inf
        assert error(state[0][shown], whole[0][shown]) <= TOLERANCE[dtype]
        for got, expected in zip(state[1:], whole[1:], strict=True):
            assert got.shape == expected.shape
            assert error(got, expected) <= 20 * TOLERANCE[dtype]  # a rounding of an exponent of 10 is 10 roundings
    assert error(np.concatenate([one, other], axis=-2), out) <= 20 * TOLERANCE[dtype]


@pytest.mark.parametrize("where", [0, 70, 149])
def test_a_state_after_keys_that_are_not_finite(where: int) -> None:
    """It is that of the generic form, also of items beside."""
    from subquad.kernels import feature_step

    q, k, v = draw(2, 150, 150, 16, 8, "float32")
    k[1, where, 3] = np.nan
    phi = exponential(16, 40, "float32")
    arrays = q, k, v, None, None, None, *phi.weights
    found = STEP.forward((*arrays, None), phi.static)[0]
    for got, expected in zip(found, feature_step.generic(*arrays, **phi.static), strict=True):
        assert np.array_equal(np.isnan(got), np.isnan(expected))
        assert np.allclose(got, expected, rtol=1e-3, atol=1e-5, equal_nan=True)


def test_heads_of_queries_that_share_keys_leave_one_state() -> None:
    q, k, v = draw(6, 90, 90, 16, 8, "float32")
    q, k, v = q.reshape(2, 3, 90, 16), k[::3, None], v[::3, None]
    phi = exponential(16, 40, "float32")
    out, *state = STEP.forward((q, k, v, None, None, None, *phi.weights, None), phi.static)[0]
    each = [
        STEP.forward((q[:, i : i + 1], k, v, None, None, None, *phi.weights, None), phi.static)[0] for i in range(3)
    ]
    assert np.array_equal(out, np.concatenate([x[0] for x in each], axis=1))
    for got, expected in zip(state, each[0][1:], strict=True):
        assert np.array_equal(got, expected)
