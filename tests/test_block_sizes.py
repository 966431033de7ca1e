"""The rows of a block: as many as fit, so that the memory of a call depends on no length, batch or number of landmarks."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rows.kernels import clustered_attention

import subquad
from subquad import kernels
from subquad.backend import Backend
from subquad.core.block_loop import BLOCK_ELEMENTS, rows_per_block
from subquad.core.loading import backend_of
from subquad.kernels.project import weight_blocks
from subquad.kernels.visibility import CAUSAL

xp = pytest.importorskip("array_api_strict")
BATCH, N, D, D_V, MAPPED = (
    8,
    1300,
    4,
    39,
    3,
)  # MAPPED: items that a transform computes at once for one item of the arrays
FOUR_OF_FIVE = xp.arange(N) % 5 > 0
CALLS: dict[str, tuple[str, dict[str, Any], set[int], int]] = {
    # method and options, numbers of the largest temporaries for one row of one item, rows of a block that they all fit in
    "lsh": ("lsh", {"bucket_size": 33}, {40}, 1024),  # 1300 / 33 keys, to an even number of buckets
    "kmeans": ("nystrom", {"num_landmarks": 40, "landmarks": "kmeans"}, {40}, 1024),
    "segment-means": ("nystrom", {"num_landmarks": 40, "key_mask": FOUR_OF_FIVE}, {40}, 1024),
    "ridge-fit": ("nystrom", {"num_landmarks": 10, "landmarks": "kmeans", "pinv": "ridge-fit"}, {10, 40, 43}, 1024),
    "linformer": ("linformer", {"projection": (xp.ones((40, N)),) * 2, "key_mask": FOUR_OF_FIVE}, {40}, 1024),
    "favor": ("favor", {"num_features": 40}, {40}, 1024),
    "favor-causal": ("favor", {"num_features": 120, "causal": True}, {120}, 256),
}


def sizes_of(name: str, monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The sizes of blocks in a call."""
    method, options, _, _ = CALLS[name]
    q, k, v = drawn((BATCH, N, D), (BATCH, N, D), (BATCH, N, D_V))
    return folded(lambda: subquad.attention(q, k, v, method, **options), monkeypatch)


def drawn(*shapes: tuple[int, ...]) -> list[Any]:
    rng = np.random.default_rng(0)
    return [xp.asarray(rng.standard_normal(shape)) for shape in shapes]


def folded(call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The sizes of blocks in a call, of which a transform computes `MAPPED` at once."""
    sizes = set()
    fold = Backend.fold_blocks

    def noted(self: Backend, step: Any, carry: Any, arrays: Any, size: int, **keywords: Any) -> Any:
        sizes.add(size)
        return fold(self, step, carry, arrays, size, **keywords)

    monkeypatch.setattr(Backend, "fold_blocks", noted)
    monkeypatch.setattr(Backend, "items_behind", lambda *_: MAPPED)
    assert type(backend_of(xp)).fold_blocks is noted
    call()
    return sizes


@pytest.mark.parametrize("name", CALLS)
def test_a_block_is_halved_until_its_largest_temporary_fits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, widths, most = CALLS[name]
    fits = [BLOCK_ELEMENTS / (BATCH * MAPPED * width) for width in widths]
    sizes = sizes_of(name, monkeypatch)
    assert {size for size in sizes if size >= 64} == {min(most, 2 ** math.floor(math.log2(rows))) for rows in fits}


def test_blocks_of_wide_fits_have_at_least_256_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer rows would pay for the clusters once more: `ridge-fit` reads all of them for each block."""
    q, k, v = drawn((BATCH, N, D), (BATCH, N, D), (BATCH, N, 100))
    options = {"num_landmarks": 10, "landmarks": "kmeans", "pinv": "ridge-fit"}
    assert BLOCK_ELEMENTS / (BATCH * MAPPED * 101) < 256
    sizes = folded(lambda: subquad.attention(q, k, v, "nystrom", **options), monkeypatch)
    assert 256 in sizes


def test_chunks_of_buckets_are_as_many_as_their_gathered_keys_and_values_fit_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each chunk of 33 rows reads 66 keys: more numbers than its logits."""
    chunks = BLOCK_ELEMENTS // (BATCH * MAPPED * 2 * 33 * (D + D_V))
    assert min(sizes_of("lsh", monkeypatch)) == chunks < 64


def attend(n: int = N, n_kv: int = N, d_v: int = D_V, method: str = "exact", **options: Any) -> Any:
    """A call of two items."""
    return subquad.attention(*drawn((2, n, D), (2, n_kv, D), (2, n_kv, d_v)), method, **options)


def listed(size: int) -> Any:
    """Attention of two items, each block of rows to the first three blocks of keys."""
    start, stop = xp.zeros(N, dtype=xp.int32), xp.full(N, N, dtype=xp.int32)
    blocks = xp.broadcast_to(xp.arange(3, dtype=xp.int32), (N // size, 3))
    whole = (start, stop, blocks, *[None] * 6)
    return kernels.block_attention(*drawn((2, N, D), (2, N, D), (2, N, D_V)), *whole, scale=1.0, size=size)


def hashed(first: int, second: int) -> Any:
    x, rotations = drawn((2, N, D), (1, D, (first + second) // 2))
    return kernels.hashed_order(x, rotations, first=first, second=second, size=9)


def outer(d: int, d_v: int, decays: int) -> Any:
    g = -xp.abs(*drawn((2, N, decays))) if decays else None
    return subquad.gated_linear_attention(*drawn((2, N, d), (2, N, d), (2, N, d_v)), g)


def selective(d: int, d_state: int) -> Any:
    u, A, B, C = drawn((2, N, d), (d, d_state), (2, N, d_state), (2, N, d_state))
    return subquad.selective_scan(u, xp.abs(u), -xp.abs(A), B, C)


def lti(d_state: int, **options: Any) -> Any:
    u, A, B, C = drawn((2, N, 50), (50, d_state), (50, d_state), (50, d_state))
    return subquad.lti_scan(u, -xp.abs(A), B, C, delta=xp.ones(50), **options)


def delta_rule(decays: int) -> Any:
    g = -xp.abs(*drawn((2, N, decays)))
    return subquad.delta_rule(*drawn((2, N, 8), (2, N, 8), (2, N, 8)), xp.full((2, N), 0.1), g)


def clusters(name: str, options: dict[str, int]) -> Any:
    """Eight clusters of eight keys, with groups of three where the name says so."""
    example = clustered_attention(name, (2, N), (2, 64))
    arrays = [None if x is None else xp.asarray(x) for x in example.arrays]
    return kernels.clustered_attention(*arrays, **example.static, **options)


# Rows of the blocks, by hand: 2 items, times 3 that a transform adds, times the numbers that a row has; 2¹⁹ fit in
FOLDED: dict[str, tuple[Callable[[], Any], set[int]]] = {
    "few keys": (lambda: attend(n_kv=100), {512}),  # of 600 each; all keys at once
    "many keys": (lambda: attend(), {256, 1024}),  # of 6 · 256 each; a column of 20 rows is shorter than one of 256
    "few rows of many keys": (lambda: attend(n=20), {1024}),  # of the keys, of 6 · 20 each
    "no more rows than a block": (lambda: attend(n=256), {256}),
    "causal": (lambda: attend(causal=True), {256, 1024}),
    "capped, few keys": (lambda: attend(n_kv=100, softcap=9.0), {512}),
    "capped, many keys": (lambda: attend(softcap=9.0), {256, 1024}),
    "capped, few rows of many keys": (lambda: attend(n=20, softcap=9.0), {1024}),
    "lists of short blocks": (lambda: listed(10), {2**19 // (6 * 3 * 10 * (D + D_V))}),
    "lists of long blocks": (lambda: listed(50), {2**19 // (6 * 3 * 50 * 50)}),
    "buckets of one rotation": (lambda: hashed(100, 0), {512}),  # of 600 each
    "buckets of two": (lambda: hashed(100, 120), {256}),  # of 6 · 220 each
    "clusters": (lambda: clusters("prefix", {}), {2**19 // (6 * (2 * 8 + 2 * 8 * (8 + 3 + 2)))}),
    "groups of clusters": (lambda: clusters("groups", {"always": 1, "reach": 2, "group": 3, "expanded": 2}),
                           {2**19 // (6 * (2 * (8 + 2) + 3 * 8 * (8 + 3 + 2)))}),
    "nearest centres": (lambda: kernels.nearest(*drawn((2, N, D), (2, 200, D)), None), {256}),  # of 1200 each
    "projected": (lambda: attend(method="linformer", projection=(xp.ones((10, N)),) * 2, key_mask=FOUR_OF_FIVE, d_v=200),
                  {256, 1024}),  # of 6 · 200 each; then the 10 keys pass blocks of rows
    "outer products of pairs": (lambda: outer(4, 39, 0), {1, 64 * (2**18 // (6 * 64 * 64))}),
    "outer products of large states": (lambda: outer(40, 200, 1), {1, 64 * (2**18 // (6 * 40 * 200))}),
    "outer products with decays": (lambda: outer(4, 39, 4), {1, 16 * (2**18 // (6 * 16 * 16 * 39))}),
    "selective scan": (lambda: selective(50, 7), {1, 32 * (2**15 // (6 * 50 * 7))}),
    "fixed scan": (lambda: lti(200), {64 * (2**20 // (6 * 50 * 200))}),
    "fixed scan with padding": (lambda: lti(200, mask=FOUR_OF_FIVE), {1, 32 * (2**20 // (6 * 50 * 200))}),
    "delta rule": (lambda: delta_rule(1), {64}),
    "delta rule with decays": (lambda: delta_rule(8), {16}),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDED)
def test_rows_of_a_block_are_what_fits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, expected = FOLDED[name]
    assert folded(call, monkeypatch) == expected


def test_rows_are_halved_down_to_the_fewest() -> None:
    assert [rows_per_block(width) for width in (0, 1, 512, 513, 1024, 1025, 8192, 8193, 10**9)] == [
        1024, 1024, 1024, 512, 512, 256, 64, 64, 64
    ]  # fmt: skip
    assert rows_per_block(10**9, min_rows=256) == 256
    assert rows_per_block(1, max_rows=256) == 256


@pytest.mark.parametrize(
    ("rows", "width", "step"),
    [(100, 2**13, 64), (100, 2**16, 8), (100, 2**17, 7), (10, 2**20, 1), (100, 0, 2**19), (1000, 1, 2**19)],
)
def test_weights_are_converted_by_blocks(rows: int, width: int, step: int) -> None:
    """Of 2¹⁹ numbers, or a sixteenth of the rows."""
    starts = range(0, rows, step)
    assert list(weight_blocks(SimpleNamespace(shape=(rows, width)))) == [(x, min(x + step, rows)) for x in starts]
    assert list(weight_blocks(SimpleNamespace(shape=(0, width)))) == [(0, 0)]


@pytest.mark.parametrize(("n", "is_traced", "parts"), [(200, False, 0), (256, False, 0), (257, False, 2), (5120, False, 20),
                                                       (5120, True, 16), (4096, True, 16), (3000, True, 12)])  # fmt: skip
def test_blocks_of_causal_rows_are_joined_once(
    n: int, is_traced: bool, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One block is not copied; a program that is traced has no more than 16."""
    concat, joined = xp.concat, []

    def counted(arrays: Any, **options: Any) -> Any:
        joined.append(len(arrays))
        return concat(arrays, **options)

    monkeypatch.setattr(xp, "concat", counted)
    monkeypatch.setattr(Backend, "is_concrete", lambda *_: not is_traced)
    monkeypatch.setattr(sys.modules["subquad.kernels.softmax_attention"], "rows_per_block", lambda _: 256)
    q, k, v = drawn((n, 1), (n, 1), (n, 1))
    kernels.softmax_attention(q, k, v, scale=1.0, visible=CAUSAL)
    assert joined == ([parts] if parts else [])
