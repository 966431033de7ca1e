"""Half precision is storage: read as it is, computed in float32, rounded once; no copy in float32 is made."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from pieces import piece
from rows.kernels import EXAMPLES, KERNELS, Example
from rows.libraries import Jax, Library, NumPy, Torch

import subquad
from subquad import kernels
from subquad.cli.cases import find_case
from subquad.core import loading
from subquad.core.beside import namespace_of
from subquad_numpy import array_api
from subquad_numpy.bench import peak_extra_memory

HALF = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
SCANS = sorted(subquad.registry.SCANS)
READ = ("linear_scan", "delta_rule", "gated_linear_attention", "lti_scan", "causal_conv1d", "wkv", "selective_scan")
METHODS: dict[str, dict[str, Any]] = {
    "exact": {}, "auto": {"crossover": 2048}, "favor": {"num_features": 32}, "linear": {}, "linformer": {"rank": 16}, "nystrom": {"num_landmarks": 16},
    "window": {"left": 40}, "bigbird": {}, "lsh": {"bucket_size": 16, "num_rounds": 3},
    "clustered": {"chunk": 32, "cluster_size": 8, "opened": 3, "spans": 2},
}  # fmt: skip
LIMIT = 1 << 20  # bytes


def scan(name: str, n: int) -> tuple[Callable[..., Any], list[Any]]:
    """A scan as a function of its arrays, and example arrays."""
    problem = find_case(name, {}).random(n)
    given = [np.asarray(x, np.float32) if np.asarray(x).dtype.kind == "f" else x for x in problem.arrays.values()]
    return problem.bind(), given


def attend(name: str, *, causal: bool) -> Callable[..., Any]:
    """Attention by a method."""
    method = subquad.METHODS[name](**METHODS[name])
    return lambda q, k, v: subquad.attention(q, k, v, method, causal=causal)


def is_real(x: Any) -> bool:
    return x.dtype.kind == "f"


def rows(n: int, d: int, d_v: int) -> list[Any]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((1, 4, n, width), dtype=np.float32) for width in (d, d, d_v)]


def calls() -> list[Any]:
    found: list[Any] = [pytest.param(*scan(name, 77), id=name) for name in SCANS]
    for name in METHODS:
        for causal in (False, True):
            if not causal or subquad.METHODS[name].causal is True:
                given = rows(150, 20, 9)
                found.append(pytest.param(attend(name, causal=causal), given, id=f"{name}{' causal' * causal}"))
    return found


def few_keys() -> Any:
    """Exact attention of 600 rows to 20 keys, whose gradient goes by features."""
    q, k, v = rows(600, 20, 9)
    return pytest.param(
        lambda q, k, v: subquad.attention(q, k, v, "exact"), [q, k[..., :20, :], v[..., :20, :]], id="few keys"
    )


@pytest.mark.parametrize(("call", "given"), calls())
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("library", [NumPy(), Torch(), Jax()], ids=str)
def test_bits_are_those_of_float32_rounded_once(
    library: Library, dtype: str, call: Callable[..., Any], given: list[Any]
) -> None:
    half = [library.array(x, dtype if is_real(x) else "float32") for x in given]
    wide = [library.array(library.numpy(x).astype(np.float32) if is_real(y) else y, "float32")
            for x, y in zip(half, given, strict=True)]  # fmt: skip
    out, expected = call(*half), library.numpy(call(*wide))
    assert library.dtype_name(out) == dtype
    assert np.array_equal(np.asarray(library.numpy(out), np.float32), expected.astype(HALF[dtype]).astype(np.float32))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("of_q", "of_k", "of_mask"),
    [
        ((1, 8), (90, 8), None),  # chunks before the first query have none
        ((2, 3, 8), (2, 90, 8), (2, 90)),
        ((0, 90, 8), (0, 90, 8), None),
        ((90, 8), (90, 8), (3, 90)),  # a mask alone may make the batch
        ((1, 2, 90, 8), (2, 90, 8), (3, 1, 90)),
        ((2, 4, 90, 8), (2, 2, 90, 8), (2, 1, 90)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", HALF)
def test_clusters_of_any_batch_have_the_bits_of_float32(
    dtype: str, of_q: tuple[int, ...], of_k: tuple[int, ...], of_mask: tuple[int, ...] | None, causal: bool
) -> None:
    rng = np.random.default_rng(0)
    half = [rng.standard_normal(shape).astype(HALF[dtype]) for shape in (of_q, of_k, of_k)]
    mask = None if of_mask is None else rng.random(of_mask) < 0.7
    call = partial(subquad.attention, key_mask=mask, method="clustered", causal=causal, **METHODS["clustered"])
    expected = call(*(x.astype(np.float32) for x in half)).astype(HALF[dtype])
    found = call(*half)
    assert found.shape == expected.shape
    assert np.array_equal(found.astype(np.float32), expected.astype(np.float32))


@pytest.mark.parametrize("items", [1, 2, 3])  # that a thread computes together
@pytest.mark.parametrize(
    ("of_q", "of_k", "of_mask"),
    [((2, 3), (2, 1), (3,)), ((4,), (), ()), ((1, 5), (5,), (2, 1)), ((3, 1, 2), (1, 2), (3, 1, 1))],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float32", *HALF])
def test_rounds_of_a_few_items_have_the_bits_of_all(
    dtype: str, of_q: tuple[int, ...], of_k: tuple[int, ...], of_mask: tuple[int, ...], items: int, monkeypatch: Any
) -> None:
    pytest.importorskip("llvmlite")
    from subquad_numpy.block_attention import hashed

    rng, n = np.random.default_rng(0), 70
    kind = np.dtype(HALF.get(dtype, dtype))
    given = [rng.standard_normal((*batch, n, 21)).astype(kind) for batch in (of_q, of_k, of_k)]
    method, mask = subquad.LSH(**METHODS["lsh"]), rng.random((*of_mask, n)) < 0.7
    expected = subquad.attention(*(x.astype(np.float32) for x in given), method, key_mask=mask)
    monkeypatch.setattr(hashed, "AT_ONCE", items * n * 21)
    monkeypatch.setattr(hashed, "thread_count", lambda threads: 1)
    monkeypatch.setattr(hashed.hashed_attention, "kept", {})
    kernels.hashed_attention.forget()
    found = subquad.attention(*given, method, key_mask=mask)
    kernels.hashed_attention.forget()
    assert np.array_equal(found.astype(np.float32), expected.astype(kind).astype(np.float32))


@pytest.mark.parametrize(
    ("batch", "numbers", "expected"),
    [((2, 3), 3, [(0, 1), (1, 2)]), ((2, 3), 2, [(0, 1, 0, 2), (0, 1, 2, 3), (1, 2, 0, 2), (1, 2, 2, 3)]),
     ((5,), 2, [(0, 2), (2, 4), (4, 5)]), ((2, 3), 6, [()]), ((1,), 0, [()]), ((), 0, [()]), ((0, 3), 1, [()])],
)  # fmt: skip
def test_items_in_parts_lie_side_by_side(
    batch: tuple[int, ...], numbers: int, expected: list[tuple[int, ...]], monkeypatch: Any
) -> None:
    from subquad_numpy.block_attention import hashed

    monkeypatch.setattr(hashed, "AT_ONCE", 5)
    parts = hashed.items_at_once(batch, 10, 2 * numbers)
    assert [tuple(i for some in part for i in (some.start, some.stop)) for part in parts] == expected


@pytest.mark.parametrize("example", EXAMPLES["clustered_attention"], ids=str)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("library", [NumPy(), Torch()], ids=str)
def test_queries_of_clusters_have_half_precision_alone(library: Library, dtype: str, example: Example) -> None:
    """Joined with an output of float32, which was not rounded before."""
    arrays, keywords = example.given(library, "float32", example.options)
    half = library.array(example.arrays[0], dtype)
    arrays[0] = library.array(library.numpy(half).astype(np.float32), "float32")
    out, lse = KERNELS[example.kernel](half, *arrays[1:], **keywords)
    expected, expected_lse = KERNELS[example.kernel](*arrays, **keywords)
    assert (library.dtype_name(out), library.dtype_name(lse)) == (dtype, "float32")
    rounded = library.numpy(expected).astype(HALF[dtype])
    assert np.array_equal(library.numpy(out).astype(np.float32), rounded.astype(np.float32), equal_nan=True)
    assert np.array_equal(library.numpy(lse), library.numpy(expected_lse))


@pytest.mark.parametrize("example", EXAMPLES["block_attention"], ids=str)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("library", [NumPy(), Torch()], ids=str)
def test_an_output_that_will_be_joined_is_not_rounded(library: Library, dtype: str, example: Example) -> None:
    half, keywords = example.given(library, dtype, ["wide"])
    arrays = [x if x is None or library.dtype_name(x) != dtype else library.array(library.numpy(x), "float32")
              for x in half]  # fmt: skip
    out, expected = (KERNELS[example.kernel](*given, **keywords)[0] for given in (half, arrays))
    assert library.dtype_name(out) == "float32"
    assert np.array_equal(library.numpy(out), library.numpy(expected))


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("dtype", HALF)
def test_a_scan_makes_no_copy(dtype: str, name: str) -> None:
    call, given = scan(name, 8192)
    half = [x.astype(HALF[dtype]) if is_real(x) else x for x in given]
    assert max(x.size for x in half) * 4 > LIMIT, "a copy would not be seen"
    assert peak_extra_memory(lambda: call(*half)) < LIMIT


@pytest.mark.parametrize("dtype", HALF)
def test_rounds_hold_two_bytes_for_each_number_of_one_item(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not rounded yet has its upper half in the output."""
    pytest.importorskip("llvmlite")
    monkeypatch.setattr("subquad_numpy.block_attention.hashed.thread_count", lambda threads: 1)
    single, call = rows(4096, 64, 64), attend("lsh", causal=False)
    half = [x.astype(HALF[dtype]) for x in single]
    own, others = (peak_extra_memory(lambda given=given: call(*given)) for given in (half, single))
    assert own < others + 2.1 * 4096 * 64


@pytest.mark.parametrize("dtype", HALF)
def test_a_gated_scan_makes_no_copy(dtype: str) -> None:
    call, given = scan("ssd", 8192)
    half = [x.astype(HALF[dtype]) if is_real(x) else x for x in given]
    assert max(x.size for x in half) * 4 > LIMIT, "a copy would not be seen"
    own, others = (peak_extra_memory(lambda given=some: call(*given)) for some in (half, given))
    assert own < others + LIMIT


@pytest.mark.parametrize("dtype", HALF)
def test_exact_attention_where_ours_is_faster_than_that_of_pytorch(dtype: str, monkeypatch: Any) -> None:
    """On processors of AMD, many rows and keys go by tiles, and so do their gradients."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr("subquad_torch.sdpa.products_are_slow", lambda: True)
    kernels.softmax_attention.forget()
    try:
        half = [Torch().array(x, dtype).requires_grad_() for x in rows(700, 20, 9)]
        wide = [x.detach().float().requires_grad_() for x in half]
        (choice,) = subquad.explain(subquad.attention, *half, "exact").choices
        assert choice.implementation == "compiled"
        out, expected = (subquad.attention(*given, "exact", causal=True) for given in (half, wide))
        assert torch.equal(out, expected.to(out.dtype))
        by = torch.randn(out.shape).to(out.dtype)
        found, exact = torch.autograd.grad(out, half, by), torch.autograd.grad(expected, wide, by.float())
    finally:
        kernels.softmax_attention.forget()
    unit = math.ldexp(1, -8 if dtype == "bfloat16" else -11)
    for grad, other in zip(found, exact, strict=True):
        assert torch.linalg.vector_norm(grad.float() - other) <= 2 * unit * torch.linalg.vector_norm(other)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", HALF)
def test_a_method_makes_no_copy(dtype: str, name: str, causal: bool) -> None:
    if causal and subquad.METHODS[name].causal is not True:
        return
    single, call = rows(4096, 32, 32), attend(name, causal=causal)
    half = [x.astype(HALF[dtype]) for x in single]
    assert half[0].size * 4 > LIMIT, "a copy would not be seen"
    own, others = (peak_extra_memory(lambda given=given: call(*given)) for given in (half, single))
    # rounds of "lsh" are joined before they are rounded, a few items at a time, and hold the order of rows; "clustered"
    # copies keys and values in the order of clusters; "auto" holds most before it has an output, which is 2 bytes a
    # number smaller
    joined = {"lsh": others, "clustered": others, "auto": others + 2 * single[2].size}.get(name, 0)
    assert own < LIMIT + joined or own < others  # "bigbird" puts its output together of parts


@pytest.mark.parametrize("sizes", [(40, 33), (600, 700), (3, 8300)], ids=str)
@pytest.mark.parametrize("dtype", HALF)
def test_attention_has_half_precision_where_its_queries_have_it(dtype: str, sizes: tuple[int, int]) -> None:
    """Keys and values of float32, such as landmarks, do not widen the output; of few rows, many, and chunks of keys."""
    n, n_kv = sizes
    q, k, v = (np.ones((m, 4), np.float32) for m in (n, n_kv, n_kv))
    half = HALF[dtype]
    for given, expected in (((q.astype(half), k, v), half), ((q, k.astype(half), v.astype(half)), np.float32)):
        out = kernels.softmax_attention(*given, scale=0.5)
        assert out.dtype == expected
        assert np.allclose(out.astype(np.float32), 1, rtol=2**-7)


@pytest.mark.parametrize(("call", "given"), [*calls(), few_keys()])
@pytest.mark.parametrize("dtype", HALF)
def test_gradients(dtype: str, call: Callable[..., Any], given: list[Any]) -> None:
    """Within two roundings of those in float32: one of what is saved, one of the gradient itself."""
    torch = pytest.importorskip("torch")
    half = [Torch().array(x, dtype if is_real(x) else "float32").requires_grad_() for x in given]
    wide = [(x.detach() if x.is_complex() else x.detach().float()).requires_grad_() for x in half]
    out, expected = call(*half), call(*wide)
    by = torch.randn(out.shape).to(out.dtype)
    found = torch.autograd.grad(out, half, by, allow_unused=True)
    exact = torch.autograd.grad(expected, wide, by.float(), allow_unused=True)
    unit = math.ldexp(1, -8 if dtype == "bfloat16" else -11)
    for x, grad, other in zip(half, found, exact, strict=True):
        assert grad.dtype == x.dtype
        assert torch.linalg.vector_norm(grad.to(other.dtype) - other) <= 2 * unit * torch.linalg.vector_norm(other)


@pytest.mark.parametrize("dtype", HALF)
def test_every_number_is_rounded_to_nearest(dtype: str) -> None:
    """Ties to even, infinities, NaN, numbers that are subnormal in half precision and those beyond its range."""
    bits = np.random.default_rng(0).integers(0, 2**32, 20000, dtype=np.uint32)
    ties = np.arange(0, 2**32, 2**13, dtype=np.uint64).astype(np.uint32)
    near = (ties[:, None] + np.array([2**32 - 1, 0, 1], np.uint64)).astype(np.uint32).reshape(-1)
    b = np.concatenate([bits, near]).view(np.float32)[:, None]
    with np.errstate(all="ignore"):
        expected = b.astype(HALF[dtype])
    one = np.zeros_like(b, HALF[dtype])
    out = stored_copy(one, b)
    same = (out.view(np.uint16) == expected.view(np.uint16)) | (np.isnan(b) & np.isnan(out))
    assert same.all()


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x,
        lambda x: x.reshape(8, -1),
        lambda x: x.reshape(4, 64, -1)[:, 1:63],
        lambda x: x.reshape(256, -1).T,
        lambda x: x.reshape(8, -1)[::-1],
        lambda x: np.broadcast_to(x, (2, x.size)),
    ],
    ids=["whole", "rows", "parts", "turned", "reversed", "broadcast"],
)
def test_arrays_of_numpy_are_converted_as_numpy_does(view: Callable[..., Any]) -> None:
    """Every number of float16; all ties, their neighbours and more of float32. None of it is the work of others."""
    pytest.importorskip("llvmlite")
    every = np.arange(2**16, dtype=np.uint32).astype(np.uint16).view(np.float16)
    ties = np.arange(0, 2**32, 2**12, dtype=np.uint64)
    near = (ties[:, None] + np.array([2**32 - 1, 1], np.uint64)).astype(np.uint32).reshape(-1)
    with np.errstate(all="ignore"):
        for x, dtype in (
            (every, np.float32),
            (near.view(np.float32), np.float16),
            (near.view(np.float32), ml_dtypes.bfloat16),
        ):
            given = view(x)
            out, expected = array_api.astype(given, dtype), given.astype(dtype)
            assert out.dtype == dtype
            np.testing.assert_array_equal(out.astype(np.float32), expected.astype(np.float32))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_tensors_that_are_negated_late(dtype: str) -> None:
    """Their memory holds other numbers than they have."""
    pytest.importorskip("llvmlite")
    torch = pytest.importorskip("torch")
    q, k, v = torch.randn(3, 2, 64, 8).to(getattr(torch, dtype))
    late = torch._neg_view(-k)
    assert late.is_neg()
    for method in ("exact", "linear", "favor"):
        expected = subquad.attention(q, k, v, method)
        for _ in range(3):
            assert torch.equal(subquad.attention(q, late, v, method), expected)


@pytest.mark.parametrize("dtype", [">f2", "<f2"])
def test_only_native_numbers_are_converted_by_a_kernel(dtype: str) -> None:
    x = np.arange(1 << 15).astype(np.float16).astype(dtype)
    np.testing.assert_array_equal(array_api.astype(x, np.float32), np.arange(1 << 15).astype(np.float16))


@pytest.mark.parametrize("d", [37, 150])  # a few vectors at once, and one after the other
@pytest.mark.parametrize("rows", [1, 31, 33, 100])
@pytest.mark.parametrize("dtype", ["float32", *HALF])
@pytest.mark.parametrize("library", [NumPy(), Torch()], ids=str)
def test_means_of_segments_are_those_of_what_is_stored(library: Library, dtype: str, rows: int, d: int) -> None:
    pytest.importorskip("llvmlite")
    x = np.random.default_rng(0).standard_normal((2, 3, 300, rows, d), dtype=np.float32) + 100
    given = library.array(x, dtype)
    means = [landmarks_mean(library, given[:, 1:]), landmarks_mean(library, given)[:, 1:]]
    wide = library.numpy(given).astype(np.float64)[:, 1:]
    for found in means:  # of items apart, and of adjacent ones
        np.testing.assert_allclose(library.numpy(found), wide.mean(axis=-2), rtol=40 * 2.0**-24)


@pytest.mark.parametrize("d", [37, 150])
@pytest.mark.parametrize("library", [NumPy(), Torch()], ids=str)
def test_means_of_large_bfloat16_do_not_overflow(library: Library, d: int) -> None:
    pytest.importorskip("llvmlite")
    largest = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
    x = largest * (0.5 + 0.5 * np.random.default_rng(0).random((2, 300, 33, d)))
    given = library.array(x, "bfloat16")
    wide = library.numpy(given).astype(np.float64)
    np.testing.assert_allclose(library.numpy(landmarks_mean(library, given)), wide.mean(axis=-2), rtol=40 * 2.0**-24)


def landmarks_mean(library: Library, x: Any) -> Any:
    """The means over axis −2, by the library's kernel."""
    found = loading.backend_of(namespace_of(x)).mean_stored_rows(None, x)
    assert found is not None
    assert library.dtype_name(found) == "float32"
    return found


@pytest.mark.parametrize("name", ["linformer", "nystrom"])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("library", [NumPy(), Torch()], ids=str)
def test_long_sequences_have_the_bits_of_float32_too(library: Library, dtype: str, name: str) -> None:
    """Long enough for the kernel of means."""
    half = [library.array(x, dtype) for x in rows(2000, 20, 9)]
    wide = [library.array(library.numpy(x).astype(np.float32), "float32") for x in half]
    out, expected = (attend(name, causal=False)(*given) for given in (half, wide))
    assert np.array_equal(library.numpy(out), library.numpy(expected).astype(HALF[dtype]))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("library", [NumPy(), Torch()], ids=str)
def test_an_empty_batch(library: Library, dtype: str, name: str) -> None:
    q, k, v = (library.array(x, dtype)[:, :0] for x in rows(150, 20, 9))
    for causal in (False, True):
        if not causal or subquad.METHODS[name].causal is True:
            out = attend(name, causal=causal)(q, k, v)
            assert (tuple(out.shape), out.dtype) == ((1, 0, 150, 9), q.dtype)


def stored_copy(like: Any, b: Any) -> Any:
    """The numbers of b as a kernel stores them in the dtype of `like`."""
    from subquad_numpy.codegen import lanes_of, pointer
    from subquad_numpy.codegen.stored import round_row
    from subquad_numpy.runtime.stored import KINDS

    zero, lanes = np.float32(0), lanes_of(b.dtype)

    def run(target: int, kind: int, source: int, count: int) -> int:
        round_row(pointer(target, zero), kind, 0, count, lanes, pointer(source, zero))
        return 0

    piece(run)(like.ctypes.data, KINDS[like.dtype.name], b.ctypes.data, b.size)
    return like
