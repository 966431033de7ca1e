"""What an output is off at sampled rows, in sums over rows: the numbers of an estimate of its error.

error² = Σ_i e[i] / Σ_i s[i],    e[i] = ‖out[i] − exact[i]‖²,    s[i] = ‖exact[i]‖²,    i over rows that see a key
spread = √(1 − r / out_of) √(Σ_i (e[i] − error² s[i])² r / (r − 1)) / (2 error Σ_i s[i]),    norm² = Σ_i s[i]
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

from subquad.backend import Array, Like
from subquad.core.beside import namespace_of, place_of
from subquad.core.kernel import kernel
from subquad.core.shapes import broadcast_batch


def outputs(
    exact: Array, mean: Array, out: Array, seeing: Array, effective: Array, numbers: Array | None, /, *,
    tolerance: float, out_of: int,
) -> tuple[Like, ...]:  # fmt: skip
    """Shape and dtype of the outputs of `sampled_errors`."""
    rows = {"exact": exact, "mean": mean, "out": out}
    own = {"seeing": seeing.shape[:-1], "effective": effective.shape[:-1]}
    batch = broadcast_batch(**{name: x.shape[:-2] for name, x in rows.items()}, **own)
    number, count = Like(batch, exact.dtype), Like(batch, namespace_of(exact).int32)
    return *[number] * 6, count, count


@kernel(outputs=outputs)
def sampled_errors(
    exact: Array, mean: Array, out: Array, seeing: Array, effective: Array, numbers: Array | None, /, *,
    tolerance: float, out_of: int,
) -> tuple[Array, ...]:  # fmt: skip
    """(error, spread, error of the mean, norm, share, effective keys, rows, rows above), all (...).

    For rows exact, mean, out (..., r, d_v) of one dtype, or for `out` (..., n, d_v) of which `numbers`, int32 (r,), are
    the rows. Those that are `seeing`, bool (..., r), count. The rows are a sample of `out_of`, and all of them if they
    are as many; then the spread is 0. `share` is that of the rows that are off by more than `tolerance`, the rows
    above. Effective keys are the mean of `effective` (..., s) where that is above 0. NaN where no row counts, and ∞
    where an exact output of 0 is missed. The counts are int32.
    """
    xp = namespace_of(exact)
    unit = unit_of(xp, exact)  # squares of what is left stay within the range of float32
    out = out if numbers is None else xp.take(out, numbers, axis=-2)
    size = row_squares(xp, exact / unit, seeing)
    off = row_squares(xp, (out - exact) / unit, seeing)
    off_of_mean = row_squares(xp, (mean - exact) / unit, seeing)
    rows = xp.sum(xp.astype(seeing, xp.int32), axis=-1, dtype=xp.int32)
    count, total, none = xp.astype(rows, exact.dtype), xp.sum(size, axis=-1), rows == 0
    error = _share(xp, xp.sum(off, axis=-1), total, none) ** 0.5
    above = seeing & ~((off <= tolerance**2 * size) & xp.isfinite(off))  # ∞ ≤ ∞ says nothing
    above_tolerance = xp.sum(xp.astype(above, xp.int32), axis=-1, dtype=xp.int32)
    looked = xp.sum(xp.astype(effective > 0, exact.dtype), axis=-1)
    found = (
        error,
        _spread(xp, off, size, error, count, out_of),
        _share(xp, xp.sum(off_of_mean, axis=-1), total, none) ** 0.5,
        unit[..., 0, 0] * total**0.5,
        xp.astype(above_tolerance, exact.dtype) / xp.where(none, math.nan, count),
        xp.sum(effective, axis=-1) / xp.where(looked == 0, math.nan, looked),
        rows,
        above_tolerance,
    )
    shape = outputs(exact, mean, out, seeing, effective, None, tolerance=tolerance, out_of=out_of)[0].shape
    return tuple(xp.broadcast_to(x, shape) for x in found)


def unit_of(xp: ModuleType, x: Array) -> Array:
    """The largest magnitude in finite rows of each item (..., r, d_v), to be broadcast; 1 if there is none above 0."""
    if 0 in x.shape[-2:]:
        return xp.ones((1, 1), dtype=x.dtype, device=place_of(x))
    size = xp.max(xp.abs(x), axis=-1, keepdims=True)
    most = xp.max(xp.where(xp.isfinite(size), size, 0.0), axis=-2, keepdims=True)
    return xp.where(most == 0, 1.0, most)


def row_squares(xp: ModuleType, x: Array, seeing: Array) -> Array:
    """Σ x² of each row (..., r); 0 where the row does not count."""
    return xp.where(seeing, xp.sum(x * x, axis=-1), 0.0)


def _share(xp: ModuleType, part: Array, total: Array, none: Array) -> Array:
    # part / total; 0 / 0 is 0, and NaN where nothing was counted
    share = part / xp.where(total == 0, 1.0, total)
    share = xp.where((total == 0) & (part > 0), math.inf, share)
    return xp.where(none, math.nan, share)


def _spread(xp: ModuleType, off: Array, size: Array, error: Array, count: Array, out_of: int) -> Array:
    # The standard deviation of `error`, a root of a ratio of two sums, by the delta method
    if off.shape[-1] == out_of:
        return xp.zeros_like(error)
    total = xp.sum(size, axis=-1)
    residual = off - (error**2)[..., None] * size
    sums = xp.sum(residual * residual, axis=-1) * (count / xp.where(count == 1, math.nan, count - 1))
    below: Any = 2 * xp.where(error == 0, 1.0, error) * xp.where(total == 0, 1.0, total)
    return ((1 - count / out_of) * sums) ** 0.5 / below
