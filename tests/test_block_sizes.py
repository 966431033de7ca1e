"""The rows of a block: as many as fit, so that the memory of a call depends on no length, batch or number of landmarks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import subquad
from subquad.backend import Backend
from subquad.core.block_loop import BLOCK_ELEMENTS
from subquad.core.loading import backend_of

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
    sizes = set()
    fold = Backend.fold_blocks

    def noted(self: Backend, step: Any, carry: Any, arrays: Any, size: int, **keywords: Any) -> Any:
        sizes.add(size)
        return fold(self, step, carry, arrays, size, **keywords)

    monkeypatch.setattr(Backend, "fold_blocks", noted)
    monkeypatch.setattr(Backend, "items_behind", lambda *_: MAPPED)
    assert type(backend_of(xp)).fold_blocks is noted
    rng = np.random.default_rng(0)
    q, k, v = (xp.asarray(rng.standard_normal((BATCH, N, d))) for d in (D, D, D_V))
    subquad.attention(q, k, v, method, **options)
    return sizes


@pytest.mark.parametrize("name", CALLS)
def test_a_block_is_halved_until_its_largest_temporary_fits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, widths, most = CALLS[name]
    fits = [BLOCK_ELEMENTS / (BATCH * MAPPED * width) for width in widths]
    sizes = sizes_of(name, monkeypatch)
    assert {size for size in sizes if size >= 64} == {min(most, 2 ** math.floor(math.log2(rows))) for rows in fits}


def test_chunks_of_buckets_are_as_many_as_their_gathered_keys_and_values_fit_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each chunk of 33 rows reads 66 keys: more numbers than its logits."""
    chunks = BLOCK_ELEMENTS // (BATCH * MAPPED * 2 * 33 * (D + D_V))
    assert min(sizes_of("lsh", monkeypatch)) == chunks < 64
