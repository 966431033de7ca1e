"""The kernel of sampled rows equals its definition, pair by pair."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from rows.kernels import EXAMPLES, KERNELS, Example
from rows.libraries import Library, tolerance


def definition(example: Example, mask: Any, v: Any) -> list[Any]:
    """The outputs in float64, from all logits."""
    q, k, _, start, stop, numbers = example.arrays
    q = q if numbers is None else q[..., numbers, :]
    place, every = np.arange(k.shape[-2]), example.static["every"]
    seen = (place >= start[..., None]) & (place < stop[..., None]) & (True if mask is None else mask[..., None, :])
    x = np.where(seen, example.static["scale"] * q @ np.swapaxes(k, -1, -2), -np.inf)
    bad = np.any(seen & ~np.isfinite(v).all(axis=-1)[..., None, :], axis=-1, keepdims=True)
    v = np.where(np.isfinite(v).all(axis=-1, keepdims=True), v, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        lse, twice = (np.log(np.exp(times * x).sum(axis=-1)) for times in (1, 2))
        out = np.where(lse[..., None] == -np.inf, 0, np.exp(x - lse[..., None]) @ v)
        effective = np.where(lse == -np.inf, 0, np.exp(2 * lse - twice))
    mean = seen @ v / np.maximum(seen.sum(axis=-1, keepdims=True), 1)
    return [np.where(bad, np.nan, out), lse, effective[..., ::every], np.where(bad, np.nan, mean)]


@pytest.mark.parametrize("example", EXAMPLES["sampled_attention"], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("fine", [False, True])
def test_equals_its_definition(example: Example, masked: bool, fine: bool, eager: Library) -> None:
    """With numbers that are not finite, too: rows that see them are not finite somewhere, and no others are."""
    q, k, v, start, stop, numbers = example.arrays
    mask = example.options["key_mask"] if masked else None
    if not fine:
        v = v.copy()
        v[..., 33, 0], v[..., 1, -1] = np.nan, np.inf
    expected = definition(example, mask, v)
    for dtype in eager.dtypes:
        found = eager.call(
            lambda *x: KERNELS["sampled_attention"](*x[:-1], **example.static, key_mask=x[-1]),
            q, k, v, start, stop, numbers, mask, dtype=dtype,
        )  # fmt: skip
        if eager.has_values:
            for got, value in zip(found, expected, strict=True):
                got, is_bad = eager.numpy(got), np.isnan(value).all(axis=-1)  # a log-sum-exp is never NaN
                if value.ndim == q.ndim:
                    assert np.array_equal(is_bad, ~np.isfinite(got).all(axis=-1))
                np.testing.assert_allclose(
                    got[~is_bad], value[~is_bad], rtol=50 * tolerance(dtype), atol=50 * tolerance(dtype)
                )


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("count", "spoilt"), [(12, None), (48, None), (100, None), (100, 200)])
def test_vectors_of_rows_see_other_keys(turned: bool, count: int, spoilt: int | None, eager: Library) -> None:
    """Rows in order, as those of causal calls: of a panel the first vector has ended, or the second, and one is whole.

    A value that is not finite reaches the rows that see it, and no others.
    """
    n_kv = 900
    last = np.sort(np.random.default_rng(4).integers(1, n_kv, count)).astype(np.int32)
    if turned:
        last = last[::-1].copy()
    start = np.maximum(last - 500, 0).astype(np.int32)
    drawn = np.random.default_rng(5).standard_normal((2 * n_kv + count, 32))
    q, k, v = np.split(drawn, [count, count + n_kv])
    if spoilt is not None:
        v[spoilt, 3] = np.nan
    example = Example("sampled_attention", "", lambda: (q, k, v, start, last, None), {"scale": 0.3, "every": 3})
    expected = definition(example, None, v)
    for dtype in eager.dtypes:
        found = eager.call(
            lambda *x: KERNELS["sampled_attention"](*x, **example.static), *example.arrays, dtype=dtype
        )  # fmt: skip
        if eager.has_values:
            for got, value in zip(found, expected, strict=True):
                got, bound, is_bad = eager.numpy(got), 50 * tolerance(dtype), np.isnan(value).all(axis=-1)
                assert np.array_equal(is_bad, np.isnan(got).any(axis=-1))
                np.testing.assert_allclose(got[~is_bad], value[~is_bad], rtol=bound, atol=bound)
