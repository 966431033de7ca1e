"""An item of a batch is computed as if it were alone; heads and groups are items."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from rows.libraries import Library, relative_error
from rows.methods import MAIN, METHODS, Case, D, Row, named, rows
from rows.scans import SCANS, Scan, is_shared, scans

import subquad

N = 45
CASE = Case((3, 4, N, D), (3, 4, N, D), (3, 4, N, 5), mask="random")


@rows([row for row in METHODS if row.by != "arrays"])
def test_item_alone_equals_item_in_batch(row: Row) -> None:
    """With an item that would change any maximum, mean or start value taken over the batch.

    Short vectors: the matrix of landmarks is nearly singular, and its iteration has not forgotten where it started.
    """
    inputs, arrays = CASE.draw(), row.arrays(CASE)
    for name in ("q", "k"):
        inputs[name] *= 0.3
    large = {name: inputs[name].copy() for name in ("q", "k", "v")}
    for x in large.values():
        x[1:] *= 3
    for causal in row.forms:
        attend = row.call(causal=causal)
        alone = attend(*(inputs[name][:1] for name in ("q", "k", "v", "key_mask")), arrays)
        beside = attend(large["q"], large["k"], large["v"], inputs["key_mask"], arrays)[:1]
        assert relative_error(beside, alone) < 1e-12


@rows(MAIN)
def test_nan_in_one_item_stays_there(eager: Library, row: Row) -> None:
    inputs, arrays = CASE.draw(), row.arrays(CASE)
    broken = {name: inputs[name].copy() for name in ("q", "k", "v")}
    for x in broken.values():
        x[1] = np.nan
    given = [(*(x[name] for name in ("q", "k", "v")), inputs["key_mask"], arrays) for x in (inputs, broken)]
    clean, dirty = map(eager.numpy, eager.calls(row.call(causal=row.causal), *given, dtype="float64"))
    assert relative_error(dirty[::2], clean[::2]) < 1e-12


@rows([row for row in MAIN if row.method != "bigbird"])  # it draws for each head
def test_permuted_heads_give_permuted_outputs(row: Row) -> None:
    case = Case((2, 4, N, D), (2, 4, N, D), (2, 4, N, 5))
    inputs, order = case.draw(), [2, 0, 3, 1]
    for causal in row.forms:
        out, permuted = (
            row.call(causal=causal)(*(x[:, heads] for x in (inputs["q"], inputs["k"], inputs["v"])), None, {})
            for heads in (slice(None), order)
        )
        assert relative_error(permuted, out[:, order]) < 1e-12


# heads that share keys share a metric in "clustered", which tests/test_clustered.py sees
@rows([row for row in METHODS if row.by != "arrays" and row.method != "clustered"])
def test_grouped_queries_equal_repeated_heads(row: Row) -> None:
    """Six query heads share two key heads; a mask per key head or per query head."""
    case = Case((2, 6, N, D), (2, 2, N, D), (2, 2, N, 5), mask="heads")
    inputs, arrays = case.draw(), row.arrays(case)
    k, v = (np.repeat(inputs[name], 3, axis=1) for name in ("k", "v"))
    mask = np.repeat(inputs["key_mask"], 3, axis=1)
    repeated = dict(arrays)
    if "center" in arrays:  # one for each query head and one for each key head
        repeated["center"] = (arrays["center"][0], np.repeat(arrays["center"][1], 3, axis=0))
    for causal in row.forms:
        attend = row.call(causal=causal)
        expected = attend(inputs["q"], k, v, mask, repeated)
        for key_mask in (inputs["key_mask"], mask):
            assert relative_error(attend(inputs["q"], inputs["k"], inputs["v"], key_mask, arrays), expected) < 1e-12


@rows(MAIN)
def test_batch_axes_broadcast(row: Row) -> None:
    """One query for all keys, one set of keys for all queries, values with an axis of their own."""
    inputs = Case((4, 1, N, D), (3, N, D), (1, 3, N, 5)).draw()
    q, k, v = (inputs[name] for name in ("q", "k", "v"))
    whole = [np.broadcast_to(x, (4, 3, *x.shape[-2:])).copy() for x in (q, k, v)]
    for causal in row.forms:
        attend = row.call(causal=causal)
        assert relative_error(attend(q, k, v, None, {}), attend(*whole, None, {})) < 1e-12


@rows(MAIN)
def test_mask_with_more_batch_axes_than_the_arrays(row: Row) -> None:
    """One sequence under four masks."""
    inputs = Case((N, D), (N, D), (N, 5)).draw()
    masks = np.random.default_rng(1).random((4, N)) < 0.7
    q, k, v = (inputs[name] for name in ("q", "k", "v"))
    for causal in row.forms:
        together = row.call(causal=causal)(q, k, v, masks, {})
        alone = np.stack([row.call(causal=causal)(q, k, v, mask, {}) for mask in masks])
        assert relative_error(together, alone) < 1e-12


# for five items of a batch, with the options beside it; where all rows are landmarks, the output is exact attention
WIDE: dict[str, tuple[str, Callable[[np.random.Generator], Any], dict[str, Any]]] = {
    "center": ("favor", lambda rng: tuple(rng.standard_normal((2, 5, D))), {}),
    "center-causal": ("favor", lambda rng: tuple(rng.standard_normal((2, 5, D))), {"causal": True}),
    "landmarks": ("nystrom", lambda rng: tuple(rng.standard_normal((2, 5, 4, D))), {}),
    "conv_weights": ("nystrom", lambda rng: rng.standard_normal((5, 3)), {"num_landmarks": 4}),
    "query_mask": ("nystrom", lambda rng: rng.random((5, N)) < 0.7, {"num_landmarks": 4}),
    "query_mask-exact": ("nystrom", lambda rng: rng.random((5, N)) < 0.7, {"num_landmarks": N}),
}


@pytest.mark.parametrize("case", WIDE)
def test_option_with_more_batch_axes_than_the_arrays(eager: Library, case: str) -> None:
    """One sequence, an option for each of five items."""
    method, draw, options = WIDE[case]
    inputs, option = Case((N, D), (N, D), (N, 5)).draw(), draw(np.random.default_rng(1))
    given = [inputs[name] for name in ("q", "k", "v")]

    def attend(q: Any, k: Any, v: Any, option: Any) -> Any:
        return subquad.attention(q, k, v, method, **options, **{case.partition("-")[0]: option})

    items = zip(*option, strict=True) if isinstance(option, tuple) else option
    alone = np.stack([attend(*given, item) for item in items])
    together = eager.numpy(eager.call(attend, *given, option, dtype="float64"))
    assert relative_error(together, alone) < 1e-12


@rows(named("favor-seed", "favor-trigonometric", "linear", "nystrom"))
def test_state_with_more_batch_axes_than_the_arrays(row: Row) -> None:
    """New tokens of one sequence after five pasts."""
    rng = np.random.default_rng(1)
    past, (q, k, v) = rng.standard_normal((2, 5, 30, D)), rng.standard_normal((3, 7, D))
    method = row.object() if row.causal else subquad.Nystrom(num_landmarks=4).with_landmarks(q, k)
    state = method.summarize(*past)
    alone = [{name: x[i] for name, x in state.items()} for i in range(5)]
    merged = method.merge(state, method.summarize(k, v))
    outs = [method.attend(q, method.merge(item, method.summarize(k, v))) for item in alone]
    assert relative_error(method.attend(q, merged), np.stack(outs)) < 1e-12
    if row.causal:
        out, after = method.step(q, k, v, state)
        assert relative_error(out, np.stack([method.step(q, k, v, item)[0] for item in alone])) < 1e-12
        assert all(relative_error(after[name], merged[name]) < 1e-12 for name in merged)


@rows(MAIN)
def test_a_mask_alone_may_empty_the_batch(eager: Library, row: Row) -> None:
    q, k, v = (x[None] for x in list(Case((N, D), (N, D), (N, 5)).draw().values())[:3])
    for causal in row.forms:
        out = eager.call(row.call(causal=causal), q, k, v, np.ones((0, N), dtype=bool), {}, dtype="float64")
        assert eager.numpy(out).shape == (0, N, 5)


@scans(*(scan.name for scan in SCANS if scan.batch))
def test_scan_item_alone_equals_item_in_batch(scan: Scan) -> None:
    drawn = scan.draw(70)
    alone = {name: x if is_shared(name, x) else x[:1] for name, x in drawn.items()}
    for whole, part in zip(scan.call()(drawn), scan.call()(alone), strict=True):
        assert relative_error(whole[:1], part) < 1e-12
