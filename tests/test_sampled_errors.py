"""The errors at sampled rows equal their definition, row by row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from rows.kernels import EXAMPLES, KERNELS, Example, sampled_errors
from rows.libraries import Library, tolerance

ROWS = sampled_errors("rows", (4, 40), (4, 40))


def definition(
    exact: Any, mean: Any, out: Any, seeing: Any, effective: Any, numbers: Any, *, tolerance: float, out_of: int
) -> list[Any]:
    """The outputs in float64."""
    out = out if numbers is None else out[..., numbers, :]
    size, off, off_of_mean = (np.where(seeing, (x**2).sum(axis=-1), 0) for x in (exact, out - exact, mean - exact))
    count, total, rows = seeing.sum(axis=-1), size.sum(axis=-1), exact.shape[-2]
    with np.errstate(all="ignore"):
        error, of_mean = (
            np.where(count > 0, np.where((x == 0) & (total == 0), 0, x / total), np.nan) ** 0.5
            for x in (off.sum(axis=-1), off_of_mean.sum(axis=-1))
        )
        left = ((off - error[..., None] ** 2 * size) ** 2).sum(axis=-1) * np.where(
            count > 1, count / (count - 1), np.nan
        )
        spread = np.where(error == 0, left, ((1 - count / out_of) * left) ** 0.5 / (2 * error * total))
        above = (seeing & ~(off <= tolerance**2 * size)).sum(axis=-1)
        share, keys = above / np.where(count > 0, count, np.nan), (effective > 0).sum(axis=-1)
        keys = effective.sum(axis=-1) / np.where(keys > 0, keys, np.nan)
    spread = np.zeros_like(error) if rows == out_of else spread
    return [error, spread, of_mean, total**0.5, share, keys, count + 0 * above, above + 0 * count]


def errors(example: Example, arrays: Any, eager: Library, dtype: str) -> Any:
    with np.errstate(all="ignore"):
        return eager.call(lambda *x: KERNELS["sampled_errors"](*x, **example.static), *arrays, dtype=dtype)


def compare(example: Example, arrays: Any, eager: Library, expected: list[Any], dtype: str) -> None:
    found = errors(example, arrays, eager, dtype)
    if eager.has_values:
        for got, value in zip(found, expected, strict=True):
            np.testing.assert_allclose(eager.numpy(got), np.broadcast_to(value, got.shape), rtol=50 * tolerance(dtype))


@pytest.mark.parametrize("example", EXAMPLES["sampled_errors"], ids=str)
def test_equals_its_definition(example: Example, eager: Library) -> None:
    for dtype in eager.dtypes:
        compare(example, example.arrays, eager, definition(*example.arrays, **example.static), dtype)


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e30])
def test_squares_beyond_the_range_of_float32(scale: float, eager: Library) -> None:
    given = [*(x * scale for x in ROWS.arrays[:3]), *ROWS.arrays[3:]]
    compare(ROWS, given, eager, definition(*given, **ROWS.static), "float32")


def test_items_without_rows_and_outputs_of_zero(eager: Library) -> None:
    """Nothing to count is NaN; of one row there is no spread; exact outputs of 0 are met, or missed without measure."""
    exact, mean, out, seeing, effective = (x.copy() for x in ROWS.arrays[:-1])
    seeing[0], effective[0] = False, 0
    seeing[1] = np.arange(40) == 7
    exact[2:], mean[2:], out[2] = 0, 0, 0
    expected = definition(exact, mean, out, seeing, effective, None, **ROWS.static)
    assert np.isnan([expected[place][0] for place in (0, 4, 5)]).all()
    assert np.isnan(expected[1][1])
    assert expected[0][2] == 0
    assert np.isinf(expected[0][3])
    compare(ROWS, [exact, mean, out, seeing, effective, None], eager, expected, "float32")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 2])
def test_numbers_that_are_not_finite(value: float, place: int, eager: Library) -> None:
    """A row that is not finite counts as one above the tolerance, and leaves other items alone."""
    arrays = [*(x.copy() for x in ROWS.arrays[:-1]), None]
    row = int(np.argmax(arrays[3][1]))
    before = definition(*arrays, **ROWS.static)
    assert np.all(before[7][1] < before[6][1])
    arrays[2][1, row] = arrays[0][1, row]  # of which the error was none
    least = definition(*arrays, **ROWS.static)[7]
    arrays[place][1, row, 1] = value
    found = errors(ROWS, arrays, eager, "float32")
    if eager.has_values:
        error, *_, above = map(eager.numpy, found)
        assert not np.isfinite(error[1])
        np.testing.assert_allclose(error[[0, 2, 3]], before[0][[0, 2, 3]], rtol=50 * tolerance("float32"))
        assert above[1] == least[1] + 1
